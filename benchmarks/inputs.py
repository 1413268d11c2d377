"""The inputs of a shape: drawn once, given to every peer in the layout and framework that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.variants import Shape

# Rotating over this much keeps a call from finding its inputs in the cache (50 MB on an H100).
_ROTATED_BYTES = 256e6
_MOST_SETS = 8


class Inputs:
    """Random queries, keys and values.

    Attributes:
        shape: their sizes.
        dtype: their dtype.
        seed: of which they are drawn.
        sets: (query, key, value) triples of JAX arrays in layout BHLD.
    """

    def __init__(self, shape: Shape, dtype: str, seed: int = 0) -> None:
        self.shape, self.dtype, self.seed = shape, jnp.dtype(dtype), seed
        queries = shape.batch * shape.q_heads * shape.q_len * shape.dim
        keys = shape.batch * shape.kv_heads * shape.kv_len * shape.dim
        size = (queries + 2 * keys) * self.dtype.itemsize
        count = min(_MOST_SETS, max(2, -int(-_ROTATED_BYTES // size)))
        self.sets = [self._draw(key) for key in jax.random.split(jax.random.key(seed), count)]
        self._converted: dict[str, Any] = {}

    def _draw(self, key: Any) -> tuple[Any, Any, Any]:
        shape = self.shape
        q_sizes = (shape.batch, shape.q_heads, shape.q_len, shape.dim)
        kv_sizes = (shape.batch, shape.kv_heads, shape.kv_len, shape.dim)
        q, k, v = jax.random.split(key, 3)
        return (
            jax.random.normal(q, q_sizes, self.dtype),
            jax.random.normal(k, kv_sizes, self.dtype),
            jax.random.normal(v, kv_sizes, self.dtype),
        )

    def in_layout(self, layout: str) -> list[tuple[Any, Any, Any]]:
        """The same values in layout BHLD or BLHD."""
        if layout == "BHLD":
            return self.sets
        return self.converted("blhd", lambda x: jnp.swapaxes(x, 1, 2))

    def cotangents(self, layout: str) -> list[Any]:
        """A cotangent of the output for every set; the output has the query's shape."""
        keys = jax.random.split(jax.random.key(self.seed + 1), len(self.sets))
        drawn = [
            jax.random.normal(k, s[0].shape, self.dtype)
            for k, s in zip(keys, self.sets, strict=True)
        ]
        return drawn if layout == "BHLD" else [jnp.swapaxes(x, 1, 2) for x in drawn]

    def converted(self, name: str, convert: Callable[[Any], Any]) -> list[tuple[Any, Any, Any]]:
        """The sets with `convert` applied to each array, made at the first request under `name`."""
        if name not in self._converted:
            self._converted[name] = [tuple(map(convert, triple)) for triple in self.sets]
        return self._converted[name]
