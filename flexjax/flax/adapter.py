"""`attention_fn`: FlexAttention inside Flax's own attention layers."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from flexjax.block_mask import BlockMask
from flexjax.flax.shared import batched_attention
from flexjax.masks import and_masks, causal
from flexjax.scores import additive_bias, compose


def attention_fn(
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_mask: BlockMask | None = None,
    *,
    scale: float | Array | None = None,
    sinks: Float[Array, "Hq"] | None = None,
    precision: str | lax.Precision | None = None,
    kernel_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
) -> Callable[..., Array]:
    """An `attention_fn=` for `nnx.MultiHeadAttention` and `linen.MultiHeadDotProductAttention`.

    The function that is returned takes (batch..., length, heads, head_dim) arrays and every keyword that the
    two layers pass. What the layer asks for is added to the mods given here:

    - `mask`, broadcastable to (batch..., Hq, L, S), and `is_causal` hide keys besides mask_mod. A mask that
      depends on queries and keys holds L * S elements: the first one gives a warning, since a mask_mod needs
      no such memory and skips blocks just the same.
    - `bias`, broadcastable to (batch..., Hq, L, S), is added after score_mod. It is differentiable.
    - `dtype` is what query, key and value are cast to; `precision` goes before the one given here. The softmax
      is in float32 whatever `force_fp32_for_softmax` says.
    - Dropout while training, sown weights, replaced einsums and `input_positions` are errors: the weights never
      exist as an array.

    Mods see the row-major index over all batch axes as b. In a step of a decode cache, one query with a mask
    over the cache, they see the query's place in the cache as q_idx: the last position that the mask shows.
    So a causal mask_mod, or ALiBi as score_mod, is the same for training and for decoding.

    Args:
        score_mod: `(score, b, h, q_idx, kv_idx) -> score`, as for `flex_attention`.
        mask_mod: `(b, h, q_idx, kv_idx) -> bool`, True where the query may attend.
        block_mask: a ready BlockMask instead of mask_mod; excludes `mask` and `is_causal` in the layer.
        scale: factor on Q K^T; 1 / sqrt(D) by default.
        sinks: float (Hq,), attention sinks.
        precision: of float32 matrix products.
        kernel_options: tuning options of the backend.
        backend: see `flex_attention`.

    Raises:
        ValueError: mask_mod and block_mask are both given. The function that is returned raises ValueError
            for what it cannot do and for shapes that do not fit.
    """
    if mask_mod is not None and block_mask is not None:
        raise ValueError(
            "attention_fn got both mask_mod and block_mask. Combine them first: "
            "create_block_mask(and_masks(block_mask.mask_mod, mask_mod), ...)."
        )
    options = {
        "scale": scale,
        "sinks": sinks,
        "kernel_options": kernel_options,
        "backend": backend,
    }
    own_precision = precision

    # linen passes only what it finds in the signature, nnx passes everything: no **kwargs here.
    def flex_attention_fn(
        query: Float[Array, "*batch L Hq D"],
        key: Float[Array, "*batch S Hkv D"],
        value: Float[Array, "*batch S Hkv Dv"],
        bias: Float[Array, "..."] | None = None,
        mask: Shaped[Array, "..."] | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        *,
        is_causal: bool = False,
        input_positions: Array | None = None,
        force_fp32_for_softmax: bool = True,
        qk_attn_weights_einsum: Callable[..., Array] | None = None,
        attn_weights_value_einsum: Callable[..., Array] | None = None,
    ) -> Float[Array, "*batch L Hq Dv"]:
        del broadcast_dropout, dropout_rng, force_fp32_for_softmax
        if dropout_rate > 0.0 and not deterministic:
            raise ValueError(
                f"Attention dropout (dropout_rate={dropout_rate}) is not available: flexjax never holds the "
                "attention weights that it would act on. Pass deterministic=True or dropout_rate=0.0, and drop "
                "out the layer's output instead."
            )
        if module is not None:
            raise ValueError(
                "The attention weights cannot be sown: flexjax never holds them. Pass sow_weights=False, or use "
                "Flax's dot_product_attention where you look at them."
            )
        if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
            raise ValueError(
                "flexjax computes Q K^T and P V itself, block by block, so that the layer's "
                "qk_attn_weights_einsum_cls and attn_weights_value_einsum_cls have no effect. Leave them out."
            )
        if input_positions is not None:
            raise ValueError(
                "input_positions have no meaning for flexjax's attention_fn. Rotate query and key in a "
                "function around it, `lambda q, k, v, **kw: fn(rope(q), rope(k), v, **kw)`, or read positions "
                "from an array that score_mod captures."
            )
        if block_mask is not None and (mask is not None or is_causal):
            raise ValueError(
                "The layer passed a mask or is_causal=True, but attention_fn already has a block_mask, which "
                "says everything. Give attention_fn a mask_mod instead, which is combined with the layer's mask."
            )
        query, key, value = (
            x.astype(dtype or jnp.result_type(query, key, value)) for x in (query, key, value)
        )
        lead, (q_len, heads), kv_len = query.shape[:-3], query.shape[-3:-1], key.shape[-3]
        full = (*lead, heads, q_len, kv_len)
        score, masks = score_mod, [] if mask_mod is None else [mask_mod]
        if is_causal:
            masks.append(causal())
        if mask is not None:
            mask = _over_batch(mask, full, "mask").astype(bool)
            if q_len == 1 and kv_len > 1:
                # Of these masks only mask_mod is there: a decode step has no is_causal.
                score, masks = _at_cache_position(score, masks, mask)
            if min(mask.shape[2:]) > 1:
                _warn_of_dense_mask()
            masks.append(_dense_mask_mod(mask))
        if bias is not None:
            added = additive_bias(_over_batch(bias, full, "bias"))
            score = added if score is None else compose(score, added)
        return batched_attention(
            query,
            key,
            value,
            score_mod=score,
            mask_mod=and_masks(*masks) if masks else None,
            block_mask=block_mask,
            precision=own_precision if precision is None else precision,
            **options,
        )

    return flex_attention_fn


def _over_batch(x: Array, full: tuple[int, ...], name: str) -> Array:
    """A mask or bias as (B or 1, Hq or 1, L or 1, S or 1), for arrays of shape `full` with batch axes merged."""
    shape = (1,) * (len(full) - x.ndim) + x.shape
    if len(shape) != len(full) or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise ValueError(
            f"{name} has shape {x.shape}, which does not broadcast to (batch..., heads, queries, keys) = {full}."
        )
    lead = shape[:-3]
    if math.prod(lead) > 1:
        lead = full[:-3]
        x = jnp.broadcast_to(x.reshape(shape), (*lead, *shape[-3:]))
    return x.reshape(math.prod(lead), *shape[-3:])


def _dense_mask_mod(mask: Array) -> Callable[..., Any]:
    """Reads a dense mask. Axes of length 1 are dropped, so that what is left shows what it depends on."""
    kept = tuple(axis for axis, n in enumerate(mask.shape) if n > 1)
    values = mask.reshape(tuple(mask.shape[axis] for axis in kept))

    def dense_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        indices = (b, h, q_idx, kv_idx)
        return values[tuple(indices[axis] for axis in kept)]

    return dense_mask


def _at_cache_position(score_mod: Any, mask_mods: list[Any], mask: Array) -> tuple[Any, list[Any]]:
    """The mods for a single query that stands at the last key its mask shows, in any head."""
    visible = mask.any(axis=(1, 2))
    last = visible.shape[1] - 1 - jnp.argmax(visible[:, ::-1], axis=1).astype(jnp.int32)

    def position(b: Any) -> Any:
        return last[b] if last.shape[0] > 1 else last[0]

    def moved(mod: Any) -> Any:
        return lambda b, h, q_idx, kv_idx: mod(b, h, position(b), kv_idx)

    def moved_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score_mod(score, b, h, position(b), kv_idx)

    return None if score_mod is None else moved_score, [moved(mod) for mod in mask_mods]


@functools.cache
def _warn_of_dense_mask() -> None:
    """Once a process."""
    warnings.warn(
        "A Flax layer passed a dense mask to flexjax's attention_fn. It is kept and read block by block, but it "
        "takes memory in proportion to queries * keys. Pass the mask as a function instead: "
        "attention_fn(mask_mod=flexjax.masks.causal()).",
        UserWarning,
        stacklevel=4,
    )
