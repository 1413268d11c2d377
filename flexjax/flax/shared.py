"""What the two layers and the adapter share. Flax's layout is `[batch..., length, heads, head_dim]`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from flexjax.attention import flex_attention
from flexjax.block_mask import BlockMask
from flexjax.problem import BLHD


def batched_attention(
    query: Float[Array, "*batch L Hq D"],
    key: Float[Array, "*kv_batch S Hkv D"],
    value: Float[Array, "*kv_batch S Hkv Dv"],
    **options: Any,
) -> Float[Array, "*batch L Hq Dv"]:
    """`flex_attention` with all leading axes merged into one batch axis.

    Args:
        query: (batch..., L, Hq, D); no batch axis at all is one batch row.
        key: (batch..., S, Hkv, D), or batch axes of length 1, or none, shared by all queries.
        value: (batch..., S, Hkv, Dv), likewise.
        **options: of `flex_attention`. Mods see the row-major index over all batch axes as b.

    Raises:
        ValueError: an array has fewer than three axes, or the batch axes do not fit together.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3:
            raise ValueError(
                f"{name} must have the axes [batch..., length, heads, head_dim], but it has shape {x.shape}."
            )
        if x.shape[:-3] != query.shape[:-3] and math.prod(x.shape[:-3]) != 1:
            raise ValueError(
                f"The batch axes of {name}, {x.shape[:-3]}, must be those of the query, {query.shape[:-3]}, or "
                f"have length 1: query {query.shape}, key {key.shape}, value {value.shape}. Broadcast {name} "
                "with jnp.broadcast_to."
            )
    out = flex_attention(_merged(query), _merged(key), _merged(value), layout=BLHD, **options)
    return out if query.ndim == 4 else out.reshape(*query.shape[:-1], value.shape[-1])


def _merged(x: Array) -> Array:
    return x if x.ndim == 4 else x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def rotated(
    rope: Callable[[Array], Array] | None, x: Float[Array, "*batch L H D"]
) -> Float[Array, "*batch L H D"]:
    """Applies a rotary embedding, a function of (batch..., L, D), to every head."""
    return x if rope is None else jax.vmap(rope, in_axes=-2, out_axes=-2)(x)


def mask_arguments(
    call: tuple[Any, BlockMask | None], default: tuple[Any, BlockMask | None]
) -> dict[str, Any]:
    """mask_mod and block_mask of a layer's call; the layer's own stand back if either is given."""
    mask_mod, block_mask = call if any(m is not None for m in call) else default
    return {"mask_mod": mask_mod, "block_mask": block_mask}


def head_shapes(
    num_heads: int, num_kv_heads: int | None, qkv_features: int, head_dim: int | None
) -> tuple[int, int]:
    """(number of key heads, head dimension) of a layer.

    Raises:
        ValueError: key heads do not divide the query heads, or query heads the features.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(
            f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({kv_heads}): every key head serves "
            "the same number of query heads."
        )
    if head_dim is None and qkv_features % num_heads:
        raise ValueError(
            f"qkv_features ({qkv_features}) must be a multiple of num_heads ({num_heads}). Pass head_dim "
            "to choose the dimension of a head freely."
        )
    return kv_heads, qkv_features // num_heads if head_dim is None else head_dim
