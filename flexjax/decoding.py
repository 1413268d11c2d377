"""decode: attention of the newest tokens of sequences to all that a cache holds of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from flexjax import _compat
from flexjax.attention import (
    AuxOutput,
    AuxRequest,
    _as_array,
    _mask_argument,
    _scaled,
    _shapes,
    _sinks,
    _traced_score,
    _with_sinks,
)
from flexjax.backends.registry import check_request, select
from flexjax.block_lists import EMPTY, PARTIAL, blocks_from_lists, lists_from_states
from flexjax.block_mask import BlockMask
from flexjax.kv_cache import KVCache
from flexjax.mods.trace import index_ranges, trace_mask_mod
from flexjax.problem import BHLD, BLHD, BlockLists, Blocks, Decoding, Operands, Problem
from flexjax.sharding import attend_sharded


@runtime_checkable
class Pages(Protocol):
    """What `decode` reads of a paged cache, such as `flexjax.paged.PagedCache`.

    Attributes:
        key_pages: (Hkv, pages, page, D).
        value_pages: (Hkv, pages, page, Dv).
        page_table: int32 (B, pages a sequence); entries past the length may be anything.
        lengths: int32 (B,).
    """

    @property
    def key_pages(self) -> Float[Array, "Hkv P page D"]:
        """See above."""

    @property
    def value_pages(self) -> Float[Array, "Hkv P page Dv"]:
        """See above."""

    @property
    def page_table(self) -> Int32[Array, "B N"]:
        """See above."""

    @property
    def lengths(self) -> Int32[Array, "B"]:
        """See above."""


def decode(
    query: Float[Array, "B Hq L D"],
    cache: KVCache | Pages,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    *,
    block_mask: BlockMask | None = None,
    scale: float | Array | None = None,
    return_aux: AuxRequest | None = None,
    sinks: Float[Array, "Hq"] | None = None,
    layout: str = BHLD,
    backend: str | None = None,
    kernel_options: Mapping[str, Any] | None = None,
) -> Any:
    """Attention of the last L tokens of B sequences to the keys and values in a cache.

    The cache already holds the keys and values of these tokens. Query i of sequence b is its token
    lengths[b] - L + i, and that is the q_idx which the mods see: the very mods of training serve here, a causal
    mask among them. Keys from lengths[b] on are hidden, whatever is there. A sequence of length 0, and a query
    before a sequence's first token, gets an output of 0 and a logsumexp of -inf.

    On an H100 keys and values are read once, at the speed of memory: queries and the heads that share a key head
    go together through the matrix units, and the work is dealt out in equal parts however the lengths differ
    (Flash-Decoding, and stream-K: arXiv:2301.03598). Lengths, page tables and captured arrays are data.

    Args:
        query: (B, Hq, L, D), bfloat16, float16 or float32. L may exceed 1, for speculative decoding or for a
            chunk of a prompt; the kernel is made for few queries, and computes any number.
        cache: a `KVCache`, or a paged cache. A KVCache of batch size 1 may serve all B queries.
        score_mod: as for `flex_attention`, with q_idx counted from the start of the sequence.
        mask_mod: alike. A causal mask may be left out if L is 1.
        block_mask: which keys to visit, for (L, capacity), where block rows are those of this very query: for
            example `BlockMask.from_block_scores`. Its own mask_mod sees q_idx counted from the first query, as in
            `flex_attention`. Excludes mask_mod.
        scale: factor on Q K^T before score_mod; 1 / sqrt(D) by default.
        return_aux: also return the auxiliary outputs that it names.
        sinks: float (Hq,), a logit for every query head, as for `flex_attention`.
        layout: of query and output, "BHLD" or "BLHD"; a KVCache has the same one.
        backend: as for `flex_attention`.
        kernel_options: as for `flex_attention`.

    Returns:
        The output (B, Hq, L, Dv) in the query's dtype and layout; with return_aux a pair (output, AuxOutput).

    Raises:
        ValueError: shapes or arguments that do not fit together, or concrete lengths beyond the capacity or, but
            for 0, below L. In a traced program lengths beyond the capacity count as the capacity.
        TypeError: a dtype, a cache or a mod that cannot be used.
        NotImplementedError: the requested backend cannot compute this; the message says why.
    """
    if layout not in (BHLD, BLHD):
        raise ValueError(f"layout must be {BHLD!r} or {BLHD!r}, but it is {layout!r}.")
    if return_aux is not None and not isinstance(return_aux, AuxRequest):
        raise TypeError(
            f"return_aux must be a flexjax.AuxRequest, such as AuxRequest(lse=True), but it is {return_aux!r}."
        )
    query = _as_array(query, "query")
    token = 1 if layout == BLHD else 2
    if query.ndim == 4 and query.shape[token] == 0:
        return _nothing(query, cache, token, return_aux)
    problem, operands = _cached(query, cache, layout)
    problem = dataclasses.replace(
        problem,
        options=check_request(backend, kernel_options),
        max_scores=return_aux is not None and return_aux.max_scores,
    )
    score_mod, static_scale = _scaled(score_mod, scale, problem.qk_dim)
    problem = dataclasses.replace(problem, scale=static_scale)
    problem, operands = _with_mods(problem, operands, score_mod, mask_mod, block_mask)
    result = attend_sharded(problem, select(problem, backend), operands)
    out = result.out
    if sinks is not None:
        out = _with_sinks(out, result.lse, _sinks(sinks, problem.q_heads), layout)
    if return_aux is None:
        return out
    return out, AuxOutput(result.lse if return_aux.lse else None, result.max_scores)


def _nothing(query: Any, cache: Any, token: int, return_aux: AuxRequest | None) -> Any:
    """The result for no queries."""
    value = cache.value if isinstance(cache, KVCache) else cache.value_pages
    out = jnp.zeros((*query.shape[:3], value.shape[-1]), query.dtype)
    if return_aux is None:
        return out
    stats = jnp.zeros((query.shape[0], query.shape[3 - token], 0), jnp.float32)
    return out, AuxOutput(*(stats if wanted else None for wanted in return_aux))


# -- the cache --------------------------------------------------------------------------------------


def _cached(query: Any, cache: Any, layout: str) -> tuple[Problem, Operands]:
    """The problem without mods, or an error that names what does not fit."""
    if isinstance(cache, KVCache):
        if cache.layout != layout:
            raise ValueError(
                f"The query is in layout {layout!r}, but the cache in {cache.layout!r}. Pass layout="
                f"{cache.layout!r} with such a query, or make the cache with layout={layout!r}."
            )
        key, value = _as_array(cache.key, "cache.key"), _as_array(cache.value, "cache.value")
        problem = _shapes(query, key, value, layout, None)
        lengths = _lengths(cache.lengths, problem)
        decoding = Decoding(bare=True)
        return dataclasses.replace(problem, decoding=decoding), Operands(
            query, key, value, lengths=lengths
        )
    if not isinstance(cache, Pages):
        raise TypeError(
            "cache must be a flexjax.KVCache or a paged cache with key_pages, value_pages, page_table and "
            f"lengths, but it is of type {type(cache).__name__}. Wrap arrays: KVCache(key, value, lengths)."
        )
    names = ("key_pages", "value_pages", "page_table")
    key, value, table = (_as_array(getattr(cache, name), name) for name in names)
    for name, x in (("key_pages", key), ("value_pages", value)):
        if x.ndim != 4 or x.shape[:3] != key.shape[:3]:
            raise ValueError(
                f"{name} must have shape (Hkv, pages, page, D), alike for keys and values but for D, but "
                f"key_pages have {key.shape} and value_pages {value.shape}."
            )
    if table.ndim != 2 or table.shape[0] != query.shape[0] or table.dtype != jnp.int32:
        raise ValueError(
            "page_table must be int32 with a row of pages for every batch row of the query, but it is "
            f"{table.dtype} {table.shape} for a query of shape {query.shape}."
        )
    kv_heads, _, page, _ = key.shape
    capacity = table.shape[1] * page

    def whole(x: Any) -> Any:
        shape = (query.shape[0], kv_heads, capacity, x.shape[3])
        shape = shape if layout == BHLD else (shape[0], shape[2], shape[1], shape[3])
        return jax.ShapeDtypeStruct(shape, x.dtype)

    problem = _shapes(query, whole(key), whole(value), layout, None)
    problem = dataclasses.replace(problem, decoding=Decoding(bare=True, page_size=page))
    lengths = _lengths(cache.lengths, problem)
    return problem, Operands(query, key, value, lengths=lengths, page_table=table)


def _lengths(lengths: Any, problem: Problem) -> Any:
    """int32 (B,); traced ones may lie outside of the cache: who reads them clamps them, which is free there."""
    capacity, batch = problem.kv_len, problem.batch
    lengths = jnp.asarray(capacity if lengths is None else lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer) or lengths.shape not in ((), (batch,)):
        raise ValueError(
            f"The cache's lengths must be integers, one for each of the {batch} batch rows of the query or one "
            f"for all, but they are {lengths.dtype} {lengths.shape}."
        )
    if not _compat.is_tracer(lengths):
        known = np.atleast_1d(np.asarray(lengths))
        if known.min() < 0 or known.max() > capacity:
            raise ValueError(
                f"The cache has room for {capacity} tokens a sequence, but its lengths are {known.tolist()}."
            )
        if ((known > 0) & (known < problem.q_len)).any():
            raise ValueError(
                f"The query holds the last {problem.q_len} tokens of every sequence, but the cache's lengths are "
                f"{known.tolist()}: append the keys and values of these tokens to the cache before the call. A "
                "sequence of length 0 takes no part."
            )
    return jnp.broadcast_to(lengths.astype(jnp.int32), (batch,))


# -- mods -------------------------------------------------------------------------------------------


def _with_mods(
    problem: Problem, operands: Operands, score_mod: Any, mask_mod: Any, block_mask: Any
) -> tuple[Problem, Operands]:
    lengths, q_len, last = operands.lengths, problem.q_len, problem.kv_len - 1

    def length(b: Any) -> Any:
        return lax.clamp(jnp.int32(0), lengths[b], jnp.int32(last + 1))

    def position(b: Any, q_idx: Any) -> Any:
        """Of a query in its sequence; its range is told to the proofs about masks."""
        return lax.clamp(jnp.int32(0), q_idx + (length(b) - q_len), jnp.int32(last))

    def exists(b: Any, q_idx: Any, kv_idx: Any) -> Any:
        seen = kv_idx < length(b)
        return seen if q_len == 1 else seen & (q_idx + length(b) >= q_len)

    if score_mod is not None:

        @functools.wraps(score_mod)
        def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return score_mod(s, b, h, position(b, q_idx), kv_idx)

        graph, captures = _traced_score(score, problem, None)
        problem = dataclasses.replace(problem, score=graph)
        operands = dataclasses.replace(operands, score_captures=tuple(captures))

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return exists(b, q_idx, kv_idx)

    if block_mask is not None:
        blocks, lists, listed = _listed(problem, block_mask, mask_mod)
        problem = dataclasses.replace(problem, blocks=blocks)
        operands = dataclasses.replace(operands, lists=lists)

        def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return exists(b, q_idx, kv_idx) & listed(b, h, q_idx, kv_idx)

    elif mask_mod is not None:
        if isinstance(mask_mod, BlockMask):
            raise TypeError("mask_mod is a BlockMask; pass it as block_mask.")

        @functools.wraps(mask_mod)
        def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return mask_mod(b, h, position(b, q_idx), kv_idx) & exists(b, q_idx, kv_idx)

    ranges = index_ranges(problem.batch, problem.q_heads, q_len, problem.kv_len)
    graph, captures = trace_mask_mod(mask, ranges)
    assert problem.decoding is not None, "made by _cached"
    bare = mask_mod is None and block_mask is None
    problem = dataclasses.replace(
        problem, mask=graph, decoding=dataclasses.replace(problem.decoding, bare=bare)
    )
    captures = tuple(lax.stop_gradient(c) for c in captures)
    return problem, dataclasses.replace(operands, mask_captures=captures)


def _listed(problem: Problem, block_mask: Any, mask_mod: Any) -> tuple[Blocks, BlockLists, Any]:
    """Lists of all of a mask's blocks as partial ones, and the mask inside of them."""
    block_mask = _mask_argument(block_mask, mask_mod, problem)
    assert block_mask is not None, "checked by the caller"
    geometry, (batch, heads) = block_mask.geometry, block_mask.shape[:2]
    full = blocks_from_lists(
        block_mask.full_kv_num_blocks, block_mask.full_kv_indices, geometry.cols
    )
    partial = blocks_from_lists(block_mask.kv_num_blocks, block_mask.kv_indices, geometry.cols)
    lists = lists_from_states(jnp.where(full | partial, PARTIAL, EMPTY), (geometry.cols, 1))

    def listed(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        row = lax.div(q_idx, jnp.int32(geometry.q_block))
        col = lax.div(kv_idx, jnp.int32(geometry.kv_block))
        whole = full[b if batch > 1 else 0, h if heads > 1 else 0, row, col]
        return whole | block_mask.mask_mod(b, h, q_idx, kv_idx)

    # The lists of columns, which are not there, only serve a kernel that does not compute decoding steps.
    return Blocks(geometry, batch, heads, backward=True), BlockLists(*lists.arrays), listed
