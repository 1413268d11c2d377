"""The decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU (Llama 3, arXiv:2407.21783)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from examples.llama.attention import Masks, attend, make_masks, scores_capped
from examples.llama.config import Config


def rotate(
    x: Float[Array, "B L H D"], positions: Int[Array, "#B L"], theta: float
) -> Float[Array, "B L H D"]:
    """Rotary positions (arXiv:2104.09864); angles in float32, for positions reach far beyond 256."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def matrix(config: Config, inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A matrix without bias; its parameters are float32, its products are of the model's dtype."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.variance_scaling(0.5, "fan_in", "normal"),
        rngs=rngs,
    )


def norm(config: Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.width, epsilon=1e-5, dtype=jnp.dtype(config.dtype), rngs=rngs)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: Config, layer: int, rngs: nnx.Rngs):
        self.config, self.layer = config, layer
        queries, keys = (n * config.head_dim for n in (config.heads, config.kv_heads))
        self.query = matrix(config, config.width, queries, rngs)
        self.key = matrix(config, config.width, keys, rngs)
        self.value = matrix(config, config.width, keys, rngs)
        self.out = matrix(config, queries, config.width, rngs)
        self.sinks = nnx.data(nnx.Param(jnp.zeros(config.heads)) if config.sinks else None)

    def project(
        self, x: Float[Array, "B L W"], positions: Int[Array, "#B L"]
    ) -> tuple[Float[Array, "B L Hq D"], Float[Array, "B L Hkv D"], Float[Array, "B L Hkv D"]]:
        """Query, key and value, the first two rotated to their positions."""
        q, k, v = (
            linear(x).reshape(*x.shape[:2], -1, self.config.head_dim)
            for linear in (self.query, self.key, self.value)
        )
        theta = self.config.rope_theta
        return rotate(q, positions, theta), rotate(k, positions, theta), v

    def __call__(self, x: Float[Array, "B L W"], layer_masks: Masks) -> Float[Array, "B L W"]:
        # Rotations enter as differences only, so positions may count through all documents of a row.
        q, k, v = self.project(x, jnp.arange(x.shape[1])[None])
        sinks = None if self.sinks is None else self.sinks[...]
        y = attend(self.config, self.layer, q, k, v, layer_masks, sinks)
        return self.out(y.reshape(*x.shape[:2], -1))


class Block(nnx.Module):
    """Attention and a SwiGLU (arXiv:2002.05202), each behind a norm and beside a skip connection."""

    def __init__(self, config: Config, layer: int, rngs: nnx.Rngs):
        self.attention_norm, self.hidden_norm = norm(config, rngs), norm(config, rngs)
        self.attention = Attention(config, layer, rngs)
        self.gate = matrix(config, config.width, config.hidden, rngs)
        self.up = matrix(config, config.width, config.hidden, rngs)
        self.down = matrix(config, config.hidden, config.width, rngs)

    def feed_forward(self, x: Float[Array, "B L W"]) -> Float[Array, "B L W"]:
        y = self.hidden_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))

    def __call__(self, x: Float[Array, "B L W"], layer_masks: Masks) -> Float[Array, "B L W"]:
        return self.feed_forward(x + self.attention(self.attention_norm(x), layer_masks))


class Llama(nnx.Module):
    """The whole model."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(
            config.vocabulary,
            config.width,
            dtype=jnp.dtype(config.dtype),
            embedding_init=nnx.initializers.normal(config.width**-0.5 if config.tied else 1.0),
            rngs=rngs,
        )
        self.blocks = nnx.List([Block(config, layer, rngs) for layer in range(config.layers)])
        self.norm = norm(config, rngs)
        output = None if config.tied else matrix(config, config.width, config.vocabulary, rngs)
        self.output = nnx.data(output)

    def logits(self, x: Float[Array, "B L W"]) -> Float[Array, "B L vocabulary"]:
        """Float32 logits of the next token, from the last block's output."""
        x = self.norm(x)
        y = self.embed.attend(x) if self.output is None else self.output(x)
        y, cap = y.astype(jnp.float32), self.config.logit_cap
        return y if cap is None else scores_capped(y, cap)

    def hidden(
        self, tokens: Int[Array, "B L"], ids: Int[Array, "B L"] | None = None
    ) -> Float[Array, "B L W"]:
        """The last block's output."""
        layer_masks = make_masks(self.config, tokens.shape[1], ids)
        x = self.embed(tokens)
        for block in self.blocks:
            # Masks come in as arguments, so that the backward pass does not build them again.
            run = nnx.remat(Block.__call__) if self.config.remat else Block.__call__
            x = run(block, x, layer_masks)
        return x

    def __call__(
        self, tokens: Int[Array, "B L"], ids: Int[Array, "B L"] | None = None
    ) -> Float[Array, "B L vocabulary"]:
        """Logits of the next token.

        Args:
            tokens: a batch of rows.
            ids: the document of each token, in packed rows; None if each row is one document.
        """
        return self.logits(self.hidden(tokens, ids))
