"""Freeing: a sequence ends, and pages that nobody else holds go back to the free list."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flexjax.paged.allocate import RowsLike
from flexjax.paged.cache import PagedCache
from flexjax.paged.errors import NOT_ALLOCATED
from flexjax.paged.rows import NOWHERE, Rows, flag, row_errors, rows_argument, settled


def free(cache: PagedCache, rows: RowsLike) -> PagedCache:
    """Ends the sequences in the rows, which can then be allocated anew.

    Args:
        cache: the cache; donate it to the surrounding `jax.jit`.
        rows: as for `allocate`.

    Raises:
        PageError: outside of `jax.jit`: a row holds no sequence (freed twice?), is out of range or named twice.
            The cache is unchanged. Inside, see `PagedCache.ok`.
        TypeError: rows are not integers.
        ValueError: their shape does not fit.
    """
    return settled(cache, *_free(cache, rows_argument("free()", cache, rows)))


@functools.partial(jax.jit, inline=True)
def _free(cache: PagedCache, rows: Rows) -> tuple[PagedCache, Array]:
    code = row_errors(cache, rows)
    code = code | flag(NOT_ALLOCATED, rows.wanted & ~rows.read(cache.active))
    ok = code == 0
    place = jnp.arange(cache.max_pages, dtype=jnp.int32)[None, :]
    held = (place < rows.read(cache.held_pages)[:, None]) & (rows.wanted & ok)[:, None]
    pages = jnp.where(held, rows.read(cache.page_table), NOWHERE).reshape(-1)
    counts = cache.reference_counts.at[pages].add(-1, mode="drop")
    idle = jnp.where((counts.at[pages].get(mode="clip") == 0) & (pages != NOWHERE), pages, NOWHERE)
    # Several rows may let go of the same page: the one whose mark stays in the count of 0 returns it.
    mark = -1 - jnp.arange(idle.size, dtype=jnp.int32)
    counts = counts.at[idle].min(mark, mode="drop")
    returns = (idle != NOWHERE) & (counts.at[idle].get(mode="clip") == mark)
    counts = counts.at[idle].set(0, mode="drop")
    returned = returns.astype(jnp.int32)
    top = cache.free_count + jnp.cumsum(returned, dtype=jnp.int32) - returned
    closed = rows.where(ok)
    freed = dataclasses.replace(
        cache,
        lengths=cache.lengths.at[closed].set(0, mode="drop"),
        held_pages=cache.held_pages.at[closed].set(0, mode="drop"),
        active=cache.active.at[closed].set(False, mode="drop"),
        reference_counts=counts,
        free_pages=cache.free_pages.at[jnp.where(returns, top, NOWHERE)].set(idle, mode="drop"),
        free_count=cache.free_count + returned.sum(dtype=jnp.int32),
    )
    return freed, code
