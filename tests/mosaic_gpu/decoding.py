"""Decoding steps as data, and their check against the dense oracle.

What lies past the lengths is NaN in keys and values, and garbage in page tables: none of it may be seen.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import AuxRequest, BlockMask, KVCache, decode
from flexjax.testing import assert_close, oracle
from tests.mosaic_gpu.paged import Paged


@dataclasses.dataclass(frozen=True, eq=False)
class DecodeCase:
    """One decoding step.

    Attributes:
        id: name of the test.
        lengths: of the sequences; the batch has as many.
        capacity: of the cache.
        score, mask: the mods, of positions in the sequence.
        blocks: makes a block mask over (q_len, capacity); `listed` then tells the oracle what it allows.
        listed: `(b, h, query of the step, kv_idx) -> bool`.
        page: tokens of a page; None for a contiguous cache.
        kv_batch: 1 for a cache that all rows share; all lengths are then the same.
        options: kernel options.
    """

    id: str
    lengths: tuple[int, ...] = (200, 70)
    capacity: int = 256
    score: Callable[..., Any] | None = None
    mask: Callable[..., Any] | None = None
    blocks: Callable[[], BlockMask] | None = None
    listed: Callable[..., Any] | None = None
    page: int | None = None
    heads: int = 2
    kv_heads: int = 1
    q_len: int = 1
    dim: int = 32
    v_dim: int | None = None
    dtype: str = "bfloat16"
    layout: str = "BHLD"
    scale: float | None = None
    kv_batch: int | None = None
    options: dict = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query, key and value, heads first."""
        rng = np.random.default_rng(zlib.crc32(self.id.encode()))
        kv = (self.kv_batch or len(self.lengths), self.kv_heads, self.capacity)
        shapes = (
            (len(self.lengths), self.heads, self.q_len, self.dim),
            (*kv, self.dim),
            (*kv, self.v_dim or self.dim),
        )
        return tuple(
            np.asarray(jnp.asarray(rng.standard_normal(s), self.dtype), np.float32) for s in shapes
        )

    def in_layout(self, x: Any) -> Any:
        return jnp.swapaxes(x, 1, 2) if self.layout == "BLHD" else x

    @property
    def query(self) -> jax.Array:
        return self.in_layout(jnp.asarray(self.arrays[0], self.dtype))

    @property
    def cache(self) -> KVCache | Paged:
        """The cache, with NaN wherever no sequence has a token."""
        _, *arrays = self.arrays
        ends = np.asarray(self.lengths if self.kv_batch != 1 else self.lengths[:1])
        there = np.arange(self.capacity) < ends[:, None]
        arrays = [np.where(there[:, None, :, None], x, np.nan) for x in arrays]
        lengths = jnp.asarray(self.lengths, jnp.int32)
        if self.page is None:
            key, value = (self.in_layout(jnp.asarray(x, self.dtype)) for x in arrays)
            return KVCache(key, value, lengths, self.layout)
        rows = self.capacity // self.page
        batch = len(self.lengths)
        pages = np.random.default_rng(0).permutation(batch * rows + 2)[: batch * rows]
        pages = pages.reshape(batch, rows).astype(np.int32)

        def pool(x: np.ndarray) -> jax.Array:
            dim = x.shape[-1]
            out = np.full((self.kv_heads, batch * rows + 2, self.page, dim), np.nan)
            parts = x.reshape(batch, self.kv_heads, rows, self.page, dim).swapaxes(0, 1)
            out[:, pages] = parts
            return jnp.asarray(out, self.dtype)

        used = np.arange(rows) * self.page < np.asarray(self.lengths)[:, None]
        garbage = np.where(np.arange(rows) % 2 == 0, 2**31 - 1, -(2**31))
        table = jnp.asarray(np.where(used, pages, garbage), jnp.int32)
        return Paged(pool(arrays[0]), pool(arrays[1]), table, lengths)

    def oracle(self, exact: bool = True) -> Any:
        """The truth, from the mods as flex_attention would see them on whole sequences."""
        lengths, q_len = jnp.asarray(self.lengths, jnp.int32), self.q_len

        def mask(b, h, q_idx, kv_idx):
            position = q_idx + lengths[b] - q_len
            allowed = (kv_idx < lengths[b]) & (position >= 0)
            if self.listed is not None:
                allowed &= self.listed(b, h, q_idx, kv_idx)
            return allowed if self.mask is None else allowed & self.mask(b, h, position, kv_idx)

        score = None
        if self.score is not None:

            def score(s, b, h, q_idx, kv_idx):
                return self.score(s, b, h, q_idx + lengths[b] - q_len, kv_idx)

        arrays = (jnp.asarray(x, self.dtype) for x in self.arrays)
        return oracle(*arrays, score_mod=score, mask_mod=mask, scale=self.scale, exact=exact)

    def decode(self, backend: str | None = None, **options: Any) -> tuple[Any, Any]:
        """Output and statistics; lengths and tables are traced, as in a decoding loop."""

        @jax.jit
        def run(query: Any, cache: Any) -> Any:
            return decode(
                query,
                cache,
                self.score,
                self.mask,
                block_mask=None if self.blocks is None else self.blocks(),
                scale=self.scale,
                layout=self.layout,
                backend=backend,
                kernel_options=self.options | options,
                return_aux=AuxRequest(lse=True, max_scores=True),
            )

        return run(self.query, self.cache)


def cases(*items: DecodeCase) -> pytest.MarkDecorator:
    """Parametrises a test over cases."""
    assert len({c.id for c in items}) == len(items), "two cases have the same id"
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in items])


def check(case: DecodeCase, backend: str | None = None, **options: Any) -> None:
    """Holds output, logsumexp and row maxima against the oracle."""
    out, aux = case.decode(backend, **options)
    assert out.dtype == jnp.dtype(case.dtype)
    out = case.in_layout(out)
    exact, dense = case.oracle(), functools.cache(lambda: case.oracle(exact=False))
    assert out.shape == exact.out.shape
    assert_close("out", out, exact.out, lambda: dense().out, floor=1e-3)
    assert_close("lse", aux.lse, exact.lse, lambda: dense().lse, floor=1e-4)
    assert_close(
        "max_scores", aux.max_scores, exact.max_scores, lambda: dense().max_scores, floor=1e-4
    )
    dead = np.asarray(exact.lse) == -np.inf
    assert not np.asarray(out, np.float32)[dead].any(), "rows without keys are not exactly zero"
