"""Takes pages for sequences that grow: the one place where the free list shrinks.

All of it is integer work on the rows concerned, and every write is a scatter whose unwanted places are out of
range and so dropped: a donated cache is changed in place, and an operation that is refused writes nothing at all.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from flexjax.paged.cache import PagedCache
from flexjax.paged.errors import (
    ALREADY_ALLOCATED,
    BAD_COUNT,
    NOT_ALLOCATED,
    OUT_OF_PAGES,
    PAST_TABLE,
)
from flexjax.paged.rows import NOWHERE, Rows, flag, row_errors


class Growth(NamedTuple):
    """Room for more tokens in some rows.

    Attributes:
        cache: with the new pages in the table, the lengths not yet changed.
        code: why it was refused; 0 if it was not.
        counts: int32 (n,), the tokens there is room for now; zeros if refused.
        source: int32 (n,), the shared page that a row's end lay in and was copied from.
        target: int32 (n,), the page that it is to be copied to; out of range for no copy.
    """

    cache: PagedCache
    code: Array
    counts: Int32[Array, "n"]
    source: Int32[Array, "n"]
    target: Int32[Array, "n"]


def grow(
    cache: PagedCache, rows: Rows, counts: Int32[Array, "n"], most: int, opening: bool = False
) -> Growth:
    """Gives rows the pages that `counts` more tokens need, at most `most` of them a row.

    With `opening` the rows must be without a sequence, and get an empty one.

    A page that other rows hold too is never written: if a sequence ends in the middle of one, the row gets a page
    of its own to copy it to. Of several rows that reach for it at once, the last keeps it if nobody else does.
    """
    page, limit = cache.page_size, cache.capacity
    length, held = rows.read(cache.lengths), rows.read(cache.held_pages)
    counts = jnp.where(rows.wanted, counts, 0)
    active = rows.read(cache.active)
    wrong = (ALREADY_ALLOCATED, active) if opening else (NOT_ALLOCATED, ~active)
    code = (
        row_errors(cache, rows)
        | flag(wrong[0], rows.wanted & wrong[1])
        | flag(BAD_COUNT, (counts < 0) | ((counts > most) & (most < limit)))
        | flag(PAST_TABLE, counts > limit - length)
    )
    counts = jnp.clip(counts, 0, limit - length)

    end = length // page  # where in the table the next token goes
    shared = (length % page > 0) & (counts > 0)
    source = rows.read(cache.page_table)
    source = jnp.take_along_axis(source, jnp.minimum(end, cache.max_pages - 1)[:, None], 1)[:, 0]
    same = (source[:, None] == source[None, :]) & shared[:, None] & shared[None, :]
    before = jnp.tril(same, -1).sum(1, dtype=jnp.int32)
    copies = shared & (_at(cache.reference_counts, source) - before > 1)
    more = jnp.maximum(-(-(length + counts) // page) - held, 0)
    need = more + copies
    code = code | flag(OUT_OF_PAGES, need.sum(dtype=jnp.int32) > cache.free_count)

    ok = code == 0
    copies, more, need = copies & ok, jnp.where(ok, more, 0), jnp.where(ok, need, 0)
    top = (
        cache.free_count - 1 - (jnp.cumsum(need, dtype=jnp.int32) - need)
    )  # of the part of the stack for each row
    target = jnp.where(copies, _at(cache.free_pages, top), NOWHERE)
    step = jnp.arange(min(-(-most // page), cache.max_pages), dtype=jnp.int32)[None, :]
    new = _at(cache.free_pages, (top - copies)[:, None] - step)
    new = jnp.where(step < more[:, None], new, NOWHERE)

    table = _put(cache.page_table, (rows.where(copies), end), target)
    row = jnp.broadcast_to(rows.where(ok)[:, None], new.shape)
    place = jnp.where(step < more[:, None], held[:, None] + step, NOWHERE)
    table = _put(table, (row, place), new)
    references = cache.reference_counts.at[jnp.where(copies, source, NOWHERE)].add(-1, mode="drop")
    references = _put(references, target, jnp.ones_like(target))
    references = _put(references, new, jnp.ones_like(new))
    grown = dataclasses.replace(
        cache,
        page_table=table,
        held_pages=cache.held_pages.at[rows.where(ok)].add(more, mode="drop"),
        reference_counts=references,
        free_count=cache.free_count - need.sum(dtype=jnp.int32),
    )
    if opening:
        active = cache.active.at[rows.where(ok)].set(True, mode="drop")
        grown = dataclasses.replace(grown, active=active)
    return Growth(grown, code, jnp.where(ok, counts, 0), source, target)


def with_copies(
    cache: PagedCache,
    source: Int32[Array, "n"],
    target: Int32[Array, "n"],
    kept: Bool[Array, "n"] | None = None,
) -> PagedCache:
    """Copies pages in all pools; a target out of range is left out.

    Where `kept` is given and False, the target is filled with zeros instead.
    """

    def copied(pool: Array) -> Array:
        pages = pool.at[:, source].get(mode="clip")
        if kept is not None:
            keep = kept.reshape(1, -1, *(1,) * (pool.ndim - 2))
            pages = jnp.where(keep, pages, jnp.zeros((), pool.dtype))
        return pool.at[:, distinct(target)].set(pages, mode="drop", unique_indices=True)

    return _over_pools(cache, copied, copied)


def zeroed(cache: PagedCache, target: Int32[Array, "n"]) -> PagedCache:
    """Fills pages with zeros in all pools; a target out of range is left out."""

    def filled(pool: Array) -> Array:
        zero = jnp.zeros((), pool.dtype)
        return pool.at[:, distinct(target)].set(zero, mode="drop", unique_indices=True)

    return _over_pools(cache, filled, None)


def distinct(index: Array) -> Array:
    """Makes indices out of range different from each other, so that all may be called unique."""
    dropped = NOWHERE - jnp.arange(index.size, dtype=jnp.int32).reshape(index.shape)
    return jnp.where(index == NOWHERE, dropped, index)


def _over_pools(cache: PagedCache, pages: Any, bounds: Any) -> PagedCache:
    changed = {
        name: jax.tree.map(change, getattr(cache, name))
        for change, names in (
            (pages, ("key_pages", "value_pages")),
            (bounds, ("key_min", "key_max")),
        )
        for name in names
        if change is not None and getattr(cache, name) is not None
    }
    return dataclasses.replace(cache, **changed)


def _at(values: Array, index: Array) -> Array:
    return values.at[index].get(mode="clip")


def _put(values: Array, index: Any, new: Array) -> Array:
    return values.at[index].set(new, mode="drop")
