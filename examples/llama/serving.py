"""One more token for every sequence of a batch, from caches of keys and values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from examples.llama.attention import scores_capped
from examples.llama.config import Config
from examples.llama.model import Llama
from flexjax import KVCache, decode, masks, scores

# Keys and values of one layer, (B, S, Hkv, D) each.
Cache = tuple[Float[Array, "B S Hkv D"], Float[Array, "B S Hkv D"]]


def empty_caches(config: Config, batch: int, capacity: int) -> list[Cache]:
    """Room for `capacity` tokens of each sequence, in every layer."""
    shape = (batch, capacity, config.kv_heads, config.head_dim)
    zeros = jnp.zeros(shape, jnp.dtype(config.dtype))
    return [(zeros, zeros) for _ in range(config.layers)]


def decode_step(
    model: Llama, caches: list[Cache], lengths: Int[Array, "B"], tokens: Int[Array, "B"]
) -> tuple[Float[Array, "B vocabulary"], list[Cache]]:
    """Logits of the next token, and the caches with this one in them.

    Args:
        model: its attention says how cached keys are attended to.
        caches: of each layer; donate them to `jax.jit`, or every step copies them.
        lengths: tokens that each sequence has in the caches, below their capacity.
        tokens: the newest one of each sequence.
    """
    x = model.embed(tokens[:, None])
    rows, grown = jnp.arange(len(tokens)), []
    for layer, (block, (keys, values)) in enumerate(zip(model.blocks, caches, strict=True)):
        attention = block.attention
        query, key, value = attention.project(block.attention_norm(x), lengths[:, None])
        keys = keys.at[rows, lengths].set(key[:, 0])
        values = values.at[rows, lengths].set(value[:, 0])
        grown.append((keys, values))
        sinks = None if attention.sinks is None else attention.sinks[...]
        y = attend_cached(model.config, layer, query, keys, values, lengths + 1, sinks)
        x = block.feed_forward(x + attention.out(y.reshape(*x.shape[:2], -1)))
    return model.logits(x)[:, 0], grown


def attend_cached(
    config: Config,
    layer: int,
    query: Float[Array, "B 1 Hq D"],
    keys: Float[Array, "B S Hkv D"],
    values: Float[Array, "B S Hkv D"],
    lengths: Int[Array, "B"],
    sinks: Float[Array, "Hq"] | None,
) -> Float[Array, "B 1 Hq D"]:
    """Attention of the newest token of each sequence to all that its cache holds, itself included."""
    window = config.window if config.windowed(layer) else None
    if config.attention == "flexjax":
        return _flexjax(config, query, keys, values, lengths, window, sinks)
    index = jnp.arange(keys.shape[1])
    seen = index < lengths[:, None]
    if window is not None:
        seen &= index >= lengths[:, None] - window
    if config.score_cap is None and sinks is None:
        return jax.nn.dot_product_attention(
            query,
            keys,
            values,
            mask=None if window is None else seen[:, None, None],
            key_value_seq_lengths=lengths,
            implementation=config.attention,
        )
    batch, _, heads, dim = query.shape
    grouped = query.reshape(batch, keys.shape[2], -1, dim)
    score = jnp.einsum("bkgd,bskd->bkgs", grouped, keys, preferred_element_type=jnp.float32)
    score = score * dim**-0.5
    if config.score_cap is not None:
        score = scores_capped(score, config.score_cap)
    score = jnp.where(seen[:, None, None], score, -jnp.inf)
    if sinks is not None:
        column = sinks.astype(jnp.float32).reshape(1, *grouped.shape[1:3], 1)
        column = jnp.broadcast_to(column, (*score.shape[:3], 1))
        score = jnp.concatenate([score, column], axis=-1)
    probability = jax.nn.softmax(score, axis=-1)[..., : len(index)].astype(values.dtype)
    return jnp.einsum("bkgs,bskd->bkgd", probability, values).reshape(batch, 1, heads, dim)


def _flexjax(
    config: Config,
    query: Array,
    keys: Array,
    values: Array,
    lengths: Array,
    window: int | None,
    sinks: Array | None,
) -> Array:
    return decode(
        query,
        KVCache(keys, values, lengths, layout="BLHD"),
        None if config.score_cap is None else scores.soft_cap(config.score_cap),
        # A single query has no future, so that a window is all that there is to mask.
        None if window is None else masks.sliding_window(window - 1),
        sinks=sinks,
        layout="BLHD",
        backend=config.backend,
    )
