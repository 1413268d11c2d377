"""Forking: sequences that begin alike share the pages of what they have in common."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flexjax.paged.allocate import RowsLike
from flexjax.paged.cache import PagedCache
from flexjax.paged.errors import ALREADY_ALLOCATED, BAD_ROW, NOT_ALLOCATED
from flexjax.paged.rows import NOWHERE, Rows, flag, integers, row_errors, rows_argument, settled


def fork(cache: PagedCache, source: Any, targets: RowsLike) -> PagedCache:
    """Begins sequences in the target rows that go on from where the source is.

    No page is copied: they share the source's pages, counted by reference. Whoever appends to a shared page that
    is partly filled gets a copy of it first. Pages that are only reserved for the source are not shared.

    Args:
        cache: the cache; donate it to the surrounding `jax.jit`.
        source: a row that holds a sequence, or int (n,), one for each target.
        targets: rows without a sequence, as for `allocate`.

    Raises:
        PageError: outside of `jax.jit`: a source holds no sequence, a target holds one, a row is out of range,
            or a target is named twice. The cache is unchanged. Inside, see `PagedCache.ok`.
        TypeError: rows are not integers.
        ValueError: their shapes do not fit.
    """
    chosen = rows_argument("fork()", cache, targets)
    count = chosen.index.shape[0]
    source = integers("fork(): source must be a row or an array of rows", source)
    if source.shape not in ((), (count,)):
        raise ValueError(
            f"fork(): source must be one row, or one for each of {count} targets, but it has shape {source.shape}."
        )
    sources = jnp.broadcast_to(source, (count,))
    return settled(cache, *_fork(cache, Rows(sources, chosen.wanted), chosen))


@functools.partial(jax.jit, inline=True)
def _fork(cache: PagedCache, source: Rows, target: Rows) -> tuple[PagedCache, Array]:
    outside = (source.index < 0) | (source.index >= cache.batch)
    code = (
        row_errors(cache, target)
        | flag(BAD_ROW, source.wanted & outside)
        | flag(NOT_ALLOCATED, source.wanted & ~outside & ~source.read(cache.active))
        | flag(ALREADY_ALLOCATED, target.wanted & target.read(cache.active))
    )
    ok = code == 0
    length, table = source.read(cache.lengths), source.read(cache.page_table)
    used = -(-length // cache.page_size)
    place = jnp.arange(cache.max_pages, dtype=jnp.int32)[None, :]
    shared = (place < used[:, None]) & (target.wanted & ok)[:, None]
    pages = jnp.where(shared, table, NOWHERE)
    row = target.where(ok)
    forked = dataclasses.replace(
        cache,
        page_table=cache.page_table.at[row].set(table, mode="drop"),
        lengths=cache.lengths.at[row].set(length, mode="drop"),
        held_pages=cache.held_pages.at[row].set(used, mode="drop"),
        active=cache.active.at[row].set(True, mode="drop"),
        reference_counts=cache.reference_counts.at[pages].add(1, mode="drop"),
    )
    return forked, code
