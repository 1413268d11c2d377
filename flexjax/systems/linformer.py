"""Linformer: keys and values are projected to a fixed number of them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexjax.attention import flex_attention
from flexjax.masks._arguments import integer_array


def linformer_attention(
    query: Float[Array, "B Hq L D"],
    key: Float[Array, "B Hkv S D"],
    value: Float[Array, "B Hkv S Dv"],
    key_projection: Float[Array, "K S"] | Float[Array, "Hkv K S"],
    value_projection: Float[Array, "K S"] | Float[Array, "Hkv K S"] | None = None,
    *,
    kv_lengths: Int[Array, " B"] | None = None,
    **options: Any,
) -> Float[Array, "B Hq L Dv"]:
    """Attention to K projections of S keys: `softmax(Q (E K)^T * scale) (F V)`, linear in the length.

    A projected key is a sum over all positions, so there is no causal Linformer, and a score_mod or a mask
    of positions would mean nothing: its kv_idx counts projections.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        key_projection: E, shape (K, S), or (Hkv, K, S) with one a key head.
        value_projection: F, likewise; E serves both if None.
        kv_lengths: integers (B,), the valid keys of each batch row; those behind enter no projection.
        options: for `flex_attention`: scale, sinks, return_lse, backend and so on.

    Returns:
        What `flex_attention` returns.

    Raises:
        TypeError: `kv_lengths` is not made of integers.
        ValueError: the projections do not fit the keys, `kv_lengths` not the batch, or a mask is given.

    Source: Wang et al., "Linformer: Self-Attention with Linear Complexity", arXiv 2006.04768, section 4.
    """
    for name in ("mask_mod", "block_mask", "score_mod"):
        if options.get(name) is not None:
            raise ValueError(
                f"linformer_attention() takes no {name}: every projected key is a sum over all positions, so "
                "that nothing can be hidden from a query, the future least of all. Pass kv_lengths= for padded "
                "rows, or use flex_attention with a sparse mask."
            )
    value_projection = key_projection if value_projection is None else value_projection
    if kv_lengths is not None:
        where = "linformer_attention()"
        valid_keys = integer_array(where, "kv_lengths", kv_lengths, {1: "(B,)"})
        if valid_keys.shape[0] != query.shape[0]:
            raise ValueError(
                f"{where}: kv_lengths must have shape ({query.shape[0]},), one number a batch row of the query, "
                f"but it has {valid_keys.shape}."
            )
        valid = jnp.arange(key.shape[2])[None] < valid_keys[:, None]
        key, value = (jnp.where(valid[:, None, :, None], x, 0) for x in (key, value))
    projected = _project("key", key_projection, key), _project("value", value_projection, value)
    return flex_attention(query, *projected, **options)


def _project(name: str, projection: Array, x: Array) -> Array:
    heads, length = x.shape[1], x.shape[2]
    shape = projection.shape
    fits = shape[-1:] == (length,) and (len(shape) == 2 or (len(shape) == 3 and shape[0] == heads))
    if not fits:
        raise ValueError(
            f"{name}_projection must have shape (K, {length}) or ({heads}, K, {length}) for a {name} of shape "
            f"{x.shape}, but it has {shape}."
        )
    across = "ks,bhsd->bhkd" if len(shape) == 2 else "hks,bhsd->bhkd"
    return jnp.einsum(across, projection.astype(x.dtype), x)
