"""flex_attention, the one public entry: validates, traces the mods, states the problem, calls a backend."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from flexjax.backends.registry import check_request, select
from flexjax.block_creation import create_block_mask
from flexjax.block_mask import BlockMask
from flexjax.mods.trace import ScoreMod, index_ranges, trace_mask_mod, trace_score_mod
from flexjax.mods.transform import rewrite_graph, rewrite_score_mod, shift_queries
from flexjax.problem import BHLD, BLHD, BlockLists, Blocks, Operands, Problem
from flexjax.sharding import attend_sharded

_DTYPES = ("bfloat16", "float16", "float32")
_NARROW = ("float8_e4m3fn", "float8_e5m2")
MAX_HEAD_DIM = 256


class AuxRequest(NamedTuple):
    """Which auxiliary outputs `flex_attention(..., return_aux=...)` returns.

    Attributes:
        lse: the logsumexp of every row.
        max_scores: the largest score of every row.
    """

    lse: bool = False
    max_scores: bool = False


class AuxOutput(NamedTuple):
    """Auxiliary outputs; None where not requested.

    Attributes:
        lse: float32 (B, Hq, L) in both layouts, natural logarithm; -inf for a row without visible keys.
            Differentiable.
        max_scores: float32 (B, Hq, L), the largest modified and masked score. Carries no gradient.
    """

    lse: Float[Array, "B Hq L"] | None = None
    max_scores: Float[Array, "B Hq L"] | None = None


def flex_attention(
    query: Float[Array, "B Hq L D"],
    key: Float[Array, "Bkv Hkv S D"],
    value: Float[Array, "Bkv Hkv S Dv"],
    score_mod: Callable[..., Any] | None = None,
    block_mask: BlockMask | None = None,
    scale: float | Array | None = None,
    enable_gqa: bool | None = None,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
    mask_mod: Callable[..., Any] | None = None,
    sinks: Float[Array, "Hq"] | None = None,
    layout: str = "BHLD",
    precision: str | lax.Precision | None = None,
    backend: str | None = None,
) -> Any:
    """Attention with a score and a mask of your own.

    Computes softmax(score_mod(Q K^T * scale) where the mask allows, else -inf) V without ever holding the
    score matrix, and skips the blocks that the mask leaves nothing in. Differentiable in query, key, value,
    sinks and every floating-point array that score_mod reads (FlexAttention, arXiv:2412.05496).

    Scores, softmax and logsumexp are float32; probabilities are rounded to the dtype of the query before they
    multiply the values. A query without any visible key gives an output of 0, a logsumexp of -inf and zero
    gradients.

    Args:
        query: (B, Hq, L, D), bfloat16, float16 or float32; D up to 256.
        key: (Bkv, Hkv, S, D). Bkv is B, or 1 to share keys and values between batch rows. Hkv divides Hq:
            query head h attends to key head h // (Hq / Hkv). May have a narrower dtype than the query.
        value: (Bkv, Hkv, S, Dv); Dv may differ from D.
        score_mod: `(score, b, h, q_idx, kv_idx) -> score` on scalars: a float32 score, already scaled, and
            int32 indices; h is the query head. May close over JAX arrays and index them; a read out of range
            is clamped into it.
        block_mask: which blocks are computed, and the mask in them, from `create_block_mask`. Its lengths
            must be (L, S), its B and H be 1 or those of the query.
        scale: factor on Q K^T before score_mod; 1 / sqrt(D) by default. A scalar array is differentiable.
        enable_gqa: None infers grouped heads from the shapes; False insists on equal head counts.
        return_lse: also return the logsumexp.
        kernel_options: tuning options of the backend, validated by it.
        return_aux: also return the auxiliary outputs that it names; excludes return_lse.
        mask_mod: `(b, h, q_idx, kv_idx) -> bool` on scalars, True where the query may attend. Builds its own
            BlockMask; excludes block_mask.
        sinks: float (Hq,), a learnable logit for every query head that takes part in the softmax but has no
            value (attention sinks). The logsumexp that is returned does not include it.
        layout: "BHLD", or "BLHD" for arrays of shape (B, L, H, D).
        precision: of float32 matrix products, as for `jax.numpy.matmul`; full float32 by default.
        backend: "mosaic_gpu" (kernels for NVIDIA Hopper), "xla", "reference" (dense, for checking), or None for
            the best one that can. A backend that is named here is never replaced by another.

    Returns:
        The output (B, Hq, L, Dv) in the query's dtype and layout; with return_lse a pair (output, lse), where
        lse is float32 (B, Hq, L) in both layouts; with return_aux a pair (output, AuxOutput).

    Raises:
        ValueError: shapes, lengths, options or arguments that do not fit together.
        TypeError: a dtype or a mod that cannot be used.
        NotImplementedError: the requested backend cannot compute this; the message says why.

    Inside `jax.shard_map` everything is local: mods see the shard's own indices.
    """
    if layout not in (BHLD, BLHD):
        raise ValueError(f"layout must be {BHLD!r} or {BLHD!r}, but it is {layout!r}.")
    if return_lse and return_aux is not None:
        raise ValueError(
            "return_lse and return_aux were both given. Use return_aux=AuxRequest(lse=True) alone."
        )
    if return_aux is not None and not isinstance(return_aux, AuxRequest):
        raise TypeError(
            f"return_aux must be a flexjax.AuxRequest, such as AuxRequest(lse=True), but it is {return_aux!r}."
        )
    query, key, value = (
        _as_array(x, n) for x, n in ((query, "query"), (key, "key"), (value, "value"))
    )
    problem = _shapes(query, key, value, layout, enable_gqa)
    problem = dataclasses.replace(
        problem,
        precision=_precision(precision),
        options=check_request(backend, kernel_options),
        max_scores=return_aux is not None and return_aux.max_scores,
    )
    score_mod, static_scale = _scaled(score_mod, scale, problem.qk_dim)
    problem = dataclasses.replace(problem, scale=static_scale)
    block_mask = _mask_argument(block_mask, mask_mod, problem)
    problem, operands = _with_mods(problem, Operands(query, key, value), score_mod, block_mask)
    sinks = None if sinks is None else _sinks(sinks, problem.q_heads)
    result = attend_sharded(problem, select(problem, backend), operands)
    out = result.out if sinks is None else _with_sinks(result.out, result.lse, sinks, layout)
    if return_aux is not None:
        lse = result.lse if return_aux.lse else None
        return out, AuxOutput(lse, result.max_scores)
    return (out, result.lse) if return_lse else out


# -- validation -------------------------------------------------------------------------------------


def _as_array(x: Any, name: str) -> Any:
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(
            f"{name} must be a JAX array, but it is a {type(x).__name__}. Convert it with jnp.asarray."
        )
    return jnp.asarray(x)


def _shapes(query: Any, key: Any, value: Any, layout: str, enable_gqa: bool | None) -> Problem:
    """The problem without mods, or an error that names the shapes that do not fit."""
    axes = "(B, H, L, D)" if layout == BHLD else "(B, L, H, D)"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must have four axes {axes}, but it has shape {x.shape}. Add axes of length 1 for a "
                "missing batch or head, or use jax.vmap for additional ones."
            )
        if 0 in x.shape:
            raise ValueError(
                f"{name} has an axis of length 0: shape {x.shape}. Every axis of {axes} must be at least 1; "
                "leave the call out where there is nothing to attend to."
            )
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape} in layout {layout}"
    sizes = [_sizes(x, layout) for x in (query, key, value)]
    (batch, heads, q_len, dim), (kv_batch, kv_heads, kv_len, k_dim), v_sizes = sizes
    if (kv_batch, kv_heads, kv_len) != v_sizes[:3]:
        raise ValueError(
            f"key and value must agree in batch, heads and length, but got {shapes}. Only their last axes may "
            "differ."
        )
    if k_dim != dim:
        raise ValueError(
            f"query and key must have the same head dimension D, but got {shapes}. Only value may have another."
        )
    if kv_batch not in (1, batch):
        raise ValueError(
            f"key and value must have the query's batch size or 1, but got {shapes}. Repeat them with "
            "jnp.repeat, or fold the batch in another way."
        )
    if heads % kv_heads:
        raise ValueError(
            f"The number of query heads ({heads}) must be a multiple of the number of key heads ({kv_heads}), "
            f"but got {shapes}. If length and heads are swapped, pass layout="
            f"{BLHD if layout == BHLD else BHLD!r}."
        )
    if enable_gqa is False and heads != kv_heads:
        raise ValueError(
            f"enable_gqa=False needs as many key heads as query heads, but got {shapes}. Leave enable_gqa out to "
            "have grouped heads inferred."
        )
    if max(dim, v_sizes[3]) > MAX_HEAD_DIM:
        raise ValueError(
            f"Head dimensions up to {MAX_HEAD_DIM} are supported, but got {shapes}. Use more heads of a smaller "
            "dimension."
        )
    _dtypes(query, key, value)
    return Problem(
        batch,
        kv_batch,
        heads,
        kv_heads,
        q_len,
        kv_len,
        dim,
        v_sizes[3],
        np.dtype(query.dtype),
        np.dtype(key.dtype),
        np.dtype(value.dtype),
        scale=1.0,
        layout=layout,
    )


def _sizes(x: Any, layout: str) -> tuple[int, int, int, int]:
    b, h, length, d = (
        x.shape if layout == BHLD else (x.shape[0], x.shape[2], x.shape[1], x.shape[3])
    )
    return b, h, length, d


def _dtypes(query: Any, key: Any, value: Any) -> None:
    if query.dtype.name not in _DTYPES:
        raise TypeError(
            f"query must be bfloat16, float16 or float32, but it is {query.dtype}. Cast it with "
            "query.astype(jnp.float32); attention computes its scores in float32."
        )
    for name, x in (("key", key), ("value", value)):
        narrower = x.dtype.itemsize < query.dtype.itemsize and x.dtype.name in (*_DTYPES, *_NARROW)
        if x.dtype != query.dtype and not narrower:
            raise TypeError(
                f"{name} must have the query's dtype {query.dtype} or a narrower float, but it is {x.dtype}. "
                f"Cast it with {name}.astype(query.dtype)."
            )


def _precision(precision: Any) -> str | None:
    if precision is None:
        return None
    try:
        return lax.Precision(precision).name.lower()
    except (ValueError, TypeError):
        names = sorted(p.name.lower() for p in lax.Precision)
        raise ValueError(
            f"precision must be a jax.lax.Precision or one of {names}, but it is {precision!r}."
        ) from None


def _scaled(score_mod: Any, scale: Any, dim: int) -> tuple[Any, float]:
    """(score_mod, static scale); a scale that is an array becomes part of the score_mod."""
    if scale is None:
        return score_mod, 1.0 / math.sqrt(dim)
    if isinstance(scale, (int, float, np.number)) and not isinstance(scale, bool):
        return score_mod, float(scale)
    if not isinstance(scale, (jax.Array, np.ndarray)) or scale.ndim != 0:
        raise ValueError(
            f"scale must be a number or a scalar array, but it is {scale!r}. For a scale per head, multiply by "
            "a captured array in score_mod: `score * scales[h]`."
        )
    factor = jnp.asarray(scale)

    def scaled(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        score = score * factor.astype(jnp.float32)
        return score if score_mod is None else score_mod(score, b, h, q_idx, kv_idx)

    return scaled, 1.0


def _mask_argument(block_mask: Any, mask_mod: Any, problem: Problem) -> BlockMask | None:
    """The BlockMask to use, whichever way it was given, checked against the problem."""
    if mask_mod is not None:
        if block_mask is not None:
            raise ValueError(
                "mask_mod and block_mask were both given. Combine them first: "
                "create_block_mask(and_masks(block_mask.mask_mod, mask_mod), ...)."
            )
        if isinstance(mask_mod, BlockMask):
            raise TypeError("mask_mod is a BlockMask; pass it as block_mask.")
        return _own_mask(mask_mod, problem.batch, problem.q_heads, problem.q_len, problem.kv_len)
    if block_mask is None:
        return None
    if not isinstance(block_mask, BlockMask):
        hint = ""
        if callable(block_mask):
            hint = " Pass a mask function as mask_mod."
        elif isinstance(block_mask, (jax.Array, np.ndarray)):
            hint = " Make one of a dense mask with BlockMask.from_dense."
        raise TypeError(
            "block_mask must be a BlockMask from create_block_mask, but it is of type "
            f"{type(block_mask).__name__}.{hint}"
        )
    if block_mask.seq_lengths != (problem.q_len, problem.kv_len):
        raise ValueError(
            f"The block_mask is for (queries, keys) = {block_mask.seq_lengths}, but query and key have lengths "
            f"({problem.q_len}, {problem.kv_len}). Build it with create_block_mask(mask_mod, B, H, "
            f"{problem.q_len}, {problem.kv_len}), or slice its rows with block_mask[:, :, rows]."
        )
    batch, heads = block_mask.shape[:2]
    for name, size, wanted, role in (
        ("batch row", batch, problem.batch, "b"),
        ("head", heads, problem.q_heads, "h"),
    ):
        if size not in (1, wanted):
            raise ValueError(
                f"The block_mask distinguishes {size} {name}s, but the query has {wanted}. Build it with "
                f"{role.upper()} = {wanted}, or 1 for one mask for all of them."
            )
        graph = block_mask.mask_graph
        if size == 1 and wanted > 1 and graph is not None and role in graph.depends:
            raise ValueError(
                f"The block_mask was built for a single {name}, but its mask_mod depends on {role} and the query "
                f"has {wanted} {name}s, so its blocks would be those of {role} = 0. Build it with "
                f"{role.upper()} = {wanted}."
            )
    return block_mask


def _own_mask(
    mask_mod: Any, batch: int, heads: int, q_len: int, kv_len: int, **options: Any
) -> BlockMask:
    """The BlockMask of a bare mask_mod, as small as its dependence on b and h allows."""
    graph, _ = trace_mask_mod(mask_mod, index_ranges(batch, heads, q_len, kv_len))
    return create_block_mask(
        mask_mod,
        batch if "b" in graph.depends else 1,
        heads if "h" in graph.depends else 1,
        q_len,
        kv_len,
        **options,
    )


# -- the problem's mods -----------------------------------------------------------------------------


def _with_mods(
    problem: Problem, operands: Operands, score_mod: Any, block_mask: BlockMask | None
) -> tuple[Problem, Operands]:
    offset = None if block_mask is None else block_mask.q_offset
    if score_mod is not None:
        score, captures = _traced_score(score_mod, problem, offset)
        problem = dataclasses.replace(problem, score=score)
        operands = dataclasses.replace(operands, score_captures=tuple(captures))
    if block_mask is None:
        return problem, operands
    mask, captures = block_mask.mask_graph, block_mask.mask_captures
    if mask is not None and offset is not None:
        mask = rewrite_graph(mask, shift_queries(_ranges(problem)))
        captures = (*captures, offset)
    batch, heads = block_mask.shape[:2]
    backward = not block_mask.inference_only
    lists = BlockLists(
        block_mask.kv_num_blocks,
        block_mask.kv_indices,
        block_mask.full_kv_num_blocks,
        block_mask.full_kv_indices,
        block_mask.q_num_blocks,
        block_mask.q_indices,
        block_mask.full_q_num_blocks,
        block_mask.full_q_indices,
    )
    problem = dataclasses.replace(
        problem, mask=mask, blocks=Blocks(block_mask.geometry, batch, heads, backward)
    )
    captures = tuple(lax.stop_gradient(c) for c in captures)
    return problem, dataclasses.replace(operands, lists=lists, mask_captures=captures)


def _ranges(problem: Problem) -> Any:
    ranges = index_ranges(problem.batch, problem.q_heads, problem.q_len, problem.kv_len)
    # Nothing is broadcast here, so that the single row or head of a problem is known to be 0.
    exact = {"b": (0, problem.batch - 1), "h": (0, problem.q_heads - 1)}
    return ranges | exact


def _traced_score(
    score_mod: Any, problem: Problem, offset: Any
) -> tuple[ScoreMod | None, list[Any]]:
    ranges = _ranges(problem)
    if offset is None:
        return trace_score_mod(score_mod, ranges)
    # Traced for any query index, since the slice's place in the whole mask is data.
    whole = ranges | {"q": (0, int(np.iinfo(np.int32).max))}
    score, captures = trace_score_mod(score_mod, whole)
    return rewrite_score_mod(score, shift_queries(ranges)), [*captures, offset]


def _sinks(sinks: Any, heads: int) -> Array:
    sinks = jnp.asarray(sinks)
    if sinks.shape != (heads,) or not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(
            f"sinks must be a float array of one logit a query head, shape ({heads},), but it is "
            f"{sinks.dtype} {sinks.shape}. Repeat a logit that heads share with jnp.full(({heads},), logit)."
        )
    return sinks


def _with_sinks(out: Any, lse: Any, sinks: Array, layout: str) -> Any:
    """Adds exp(sink) to every softmax's denominator: out * sigmoid(lse - sink)."""
    # A row without keys has lse = -inf; its output is 0 whatever the weight, its gradient must be too.
    dead = lse == -jnp.inf
    weight = jax.nn.sigmoid(jnp.where(dead, 0.0, lse) - sinks.astype(jnp.float32)[None, :, None])
    weight = jnp.where(dead, 0.0, weight)
    weight = jnp.swapaxes(weight, 1, 2) if layout == BLHD else weight
    return (out.astype(jnp.float32) * weight[..., None]).astype(out.dtype)
