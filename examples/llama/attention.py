"""The attention of the model, and the one switch between flexjax and what JAX itself offers.

All three compute the same: causal attention inside each document, in some layers inside a window, with an optional
soft cap and optional sinks. A batch's masks are made once, before the first layer, and shared by all layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from examples.llama.config import Config
from flexjax import BlockMask, and_masks, create_block_mask, flex_attention, masks, scores


class Masks(NamedTuple):
    """What layers may see.

    For flexjax these are BlockMasks, for `jax.nn` arrays (B or 1, 1, L, L). None where nothing needs to be
    written down: `jax.nn` knows causal masks and windows by itself.

    Attributes:
        full: of layers that see everything before them in their document.
        windowed: of layers that see the window alone; None if no layer does.
    """

    full: BlockMask | Bool[Array, "B 1 L L"] | None
    windowed: BlockMask | Bool[Array, "B 1 L L"] | None


def make_masks(config: Config, length: int, ids: Int[Array, "B L"] | None) -> Masks:
    """The masks of a batch.

    Args:
        config: of the model.
        length: L.
        ids: the document of each token; None if each row is one document.
    """
    if config.attention == "flexjax":
        batch = None if ids is None else ids.shape[0]
        inside = masks.causal() if ids is None else masks.document(ids, causal=True)
        full = create_block_mask(inside, batch, None, length, length)
        if config.window is None:
            return Masks(full, None)
        near = and_masks(inside, masks.sliding_window(config.window - 1))
        return Masks(full, create_block_mask(near, batch, None, length, length))
    # Sinks and soft caps are computed with masks alone, and so is what documents add to a causal mask.
    if ids is None and not config.sinks and config.score_cap is None:
        return Masks(None, None)
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    full = (distance >= 0)[None, None]
    if ids is not None:
        full = full & (ids[:, None, :, None] == ids[:, None, None, :])
    near = None if config.window is None else full & (distance < config.window)
    return Masks(full, near)


def attend(
    config: Config,
    layer: int,
    query: Float[Array, "B L Hq D"],
    key: Float[Array, "B L Hkv D"],
    value: Float[Array, "B L Hkv D"],
    layer_masks: Masks,
    sinks: Float[Array, "Hq"] | None = None,
) -> Float[Array, "B L Hq D"]:
    """The attention of one layer."""
    windowed = config.windowed(layer)
    mask = layer_masks.windowed if windowed else layer_masks.full
    if config.attention == "flexjax":
        return flex_attention(
            query,
            key,
            value,
            None if config.score_cap is None else scores.soft_cap(config.score_cap),
            mask,
            sinks=sinks,
            layout="BLHD",
            backend=config.backend,
        )
    if config.score_cap is not None:
        return _capped(query, key, value, mask, config.score_cap, sinks)
    if sinks is not None:
        return _with_sinks(query, key, value, mask, sinks)
    # That the mask is causal, and the window's width, help cuDNN beside a mask of documents too.
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=True,
        local_window_size=(config.window - 1, 0) if windowed else None,
        implementation=config.attention,
    )


def _with_sinks(query: Array, key: Array, value: Array, mask: Array, sinks: Array) -> Array:
    """`jax.nn` has no sinks: a key of zeros more, with the sink as its bias and a value of zeros, is one."""
    one_more = ((0, 0), (0, 1), (0, 0), (0, 0))
    bias = jnp.zeros((1, len(sinks), 1, key.shape[1] + 1), jnp.float32)
    return jax.nn.dot_product_attention(
        query,
        jnp.pad(key, one_more),
        jnp.pad(value, one_more),
        bias=bias.at[0, :, 0, -1].set(sinks),
        mask=jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=True),
        implementation="xla",
    )


def _capped(
    query: Array, key: Array, value: Array, mask: Array, cap: float, sinks: Array | None
) -> Array:
    """Dense attention in plain JAX, for `jax.nn` has no soft cap."""
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    score = jnp.einsum("blhd,bshd->bhls", query, key, preferred_element_type=jnp.float32)
    score = scores_capped(score * query.shape[-1] ** -0.5, cap)
    score = jnp.where(mask, score, -jnp.inf)
    if sinks is not None:
        column = jnp.broadcast_to(sinks[:, None, None], (*score.shape[:-1], 1))
        score = jnp.concatenate([score, column], axis=-1)
    probability = jax.nn.softmax(score, axis=-1)[..., : key.shape[1]].astype(value.dtype)
    return jnp.einsum("bhls,bshd->blhd", probability, value)


def scores_capped(x: Array, cap: float) -> Array:
    """cap * tanh(x / cap)."""
    return cap * jnp.tanh(x / cap)
