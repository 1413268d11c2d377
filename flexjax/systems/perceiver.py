"""Perceiver: a few latent vectors read a long input by cross-attention."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from flexjax.attention import flex_attention
from flexjax.masks import padding
from flexjax.masks._arguments import check_integer

type Parameters = dict[str, Any]


def init_perceiver(
    rng: PRNGKeyArray,
    *,
    latents: int,
    latent_dim: int,
    input_dim: int,
    heads: int = 8,
    self_layers: int = 2,
) -> Parameters:
    """The parameters of `perceiver`, float32.

    Args:
        rng: a random key.
        latents: number of latent vectors N.
        latent_dim: their features, a multiple of `heads`.
        input_dim: features of the inputs.
        heads: attention heads.
        self_layers: layers of self-attention among the latents after each reading.

    Returns:
        A dictionary: the latents, one cross-attention layer, and a list of self-attention layers.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is less than 1 (layers: 0), or `heads` does not divide `latent_dim`.
    """
    where = "init_perceiver()"
    sizes = {"latents": latents, "latent_dim": latent_dim, "input_dim": input_dim, "heads": heads}
    for name, size in sizes.items():
        check_integer(where, name, size, at_least=1)
    check_integer(where, "self_layers", self_layers, at_least=0)
    if latent_dim % heads:
        raise ValueError(f"{where}: {heads} heads do not divide latent_dim={latent_dim}.")
    first, *rest = jax.random.split(rng, 2 + self_layers)
    return {
        "latents": 0.02 * jax.random.normal(first, (latents, latent_dim)),
        "cross": _init_layer(rest[0], latent_dim, input_dim, heads),
        "self": [_init_layer(key, latent_dim, latent_dim, heads) for key in rest[1:]],
    }


def perceiver(
    parameters: Parameters,
    inputs: Float[Array, "B M C"],
    lengths: Int[Array, " B"] | None = None,
    *,
    readings: int = 1,
    backend: str | None = None,
) -> Float[Array, "B N latent_dim"]:
    """Latents that read inputs of any length: the work grows with N M, not M squared.

    Each reading is one cross-attention of the N latents to the M inputs, then self-attention among the
    latents; readings share their weights. Inputs carry their own position features.

    Args:
        parameters: from `init_perceiver`.
        inputs: (B, M, C), the long sequence.
        lengths: valid inputs of each batch row, integers (B,); all if None.
        readings: how often the latents read, >= 1.
        backend: see `flex_attention`.

    Returns:
        The latents, (B, N, latent_dim), in the inputs' dtype.

    Raises:
        ValueError: the inputs' features are not those of the parameters, or `readings` is less than 1.

    Source: Jaegle et al., "Perceiver: General Perception with Iterative Attention", arXiv 2103.03206.
    """
    readings = check_integer("perceiver()", "readings", readings, at_least=1)
    wanted = parameters["cross"]["key"].shape[0]
    if inputs.ndim != 3 or inputs.shape[2] != wanted:
        raise ValueError(
            f"perceiver(): inputs must have shape (B, M, {wanted}), as init_perceiver was told, but they have "
            f"{inputs.shape}."
        )
    parameters = jax.tree.map(lambda x: x.astype(inputs.dtype), parameters)
    start = parameters["latents"]
    latents = jnp.broadcast_to(start, (inputs.shape[0], *start.shape))
    mask = None if lengths is None else padding(lengths)
    for _ in range(readings):
        latents = _layer(parameters["cross"], latents, inputs, mask, backend)
        for layer in parameters["self"]:
            latents = _layer(layer, latents, latents, None, backend)
    return latents


def _init_layer(rng: PRNGKeyArray, dim: int, input_dim: int, heads: int) -> Parameters:
    keys = jax.random.split(rng, 6)
    shapes = {
        "query": (dim, heads, dim // heads),
        "key": (input_dim, heads, dim // heads),
        "value": (input_dim, heads, dim // heads),
        "out": (heads, dim // heads, dim),
        "widen": (dim, 4 * dim),
        "narrow": (4 * dim, dim),
    }
    inputs = {"key": input_dim, "value": input_dim, "narrow": 4 * dim}
    weights = {
        name: jax.random.normal(key, shape) / math.sqrt(inputs.get(name, dim))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    ones = {"norm": dim, "norm_inputs": input_dim, "norm_mlp": dim}
    return weights | {name: jnp.ones((1, 1, n)) for name, n in ones.items()}


def _layer(p: Parameters, x: Array, inputs: Array, mask: Any, backend: str | None) -> Array:
    """Attention of `x` to `inputs` and a perceptron, each behind a normalization and beside a shortcut."""
    y, z = _normalized(x) * p["norm"], _normalized(inputs) * p["norm_inputs"]
    query = jnp.einsum("bld,dhk->bhlk", y, p["query"])
    key, value = (jnp.einsum("bld,dhk->bhlk", z, p[name]) for name in ("key", "value"))
    attended = flex_attention(query, key, value, mask_mod=mask, backend=backend)
    x = x + jnp.einsum("bhlk,hkd->bld", attended, p["out"])
    hidden = jax.nn.gelu((_normalized(x) * p["norm_mlp"]) @ p["widen"])
    return x + hidden @ p["narrow"]


def _normalized(x: Array) -> Array:
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(wide).mean(axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)
