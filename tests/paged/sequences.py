"""Caches of ragged sequences whose pages lie in no order, what they hold, and the truth about them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flexjax import paged
from flexjax.paged import PagedCache
from flexjax.testing import oracle

LENGTHS = (37, 64, 1, 0, 90)


@functools.cache
def filled():
    """(cache, keys, values): one row a length, appended to in turns, so that pages are interleaved."""
    rng, batch, longest, chunk = np.random.default_rng(0), len(LENGTHS), max(LENGTHS), 30
    cache = PagedCache.create(
        batch, 40, 16, 2, 8, max_length=112, value_dim=12, dtype="float32", bounds=True
    )
    key = rng.normal(size=(batch, 2, longest, 8)).astype(np.float32)
    value = rng.normal(size=(batch, 2, longest, 12)).astype(np.float32)
    step = jax.jit(paged.append)
    cache = paged.allocate(cache, np.arange(batch))
    for start in range(0, longest, chunk):
        counts = np.clip(np.array(LENGTHS) - start, 0, chunk).astype(np.int32)
        cache = step(cache, *(x[:, :, start : start + chunk] for x in (key, value)), counts)
    return cache.check(), key, value


def queries(batch, length, *, heads=4, dim=8, seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(batch, heads, length, dim)), jnp.float32)


def expected(query, key, value, lengths, counts, score_mod=None, mask_mod=None):
    """(out, lse) of the last `counts` positions of each sequence; 0 and -inf where there is no query."""
    batch, heads, length, dim = query.shape
    limits, first = jnp.asarray(lengths), np.asarray(lengths) - np.asarray(counts)
    position = first[:, None] + np.arange(length)
    whole = np.zeros((batch, heads, max(lengths) + length, dim), np.float32)
    row = np.arange(batch)[:, None]
    whole[row, :, position] = np.swapaxes(query, 1, 2)

    def mask(b, h, q, kv):
        return (kv < limits[b]) & (True if mask_mod is None else mask_mod(b, h, q, kv))

    result = oracle(whole, key, value, score_mod=score_mod, mask_mod=mask)
    none = (np.arange(length) >= np.asarray(counts)[:, None])[:, None]
    out, lse = (np.array(x) for x in (result.out, result.lse))
    out = np.swapaxes(out[row, :, position], 1, 2)
    lse = np.swapaxes(lse[row, :, position], 1, 2)
    return np.where(none[..., None], 0.0, out), np.where(none, -np.inf, lse)
