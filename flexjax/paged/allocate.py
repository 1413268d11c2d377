"""Allocation: a row of the table becomes a sequence, and pages are set aside for it."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jaxtyping import Array, Int

from flexjax.paged.cache import PagedCache
from flexjax.paged.growth import grow, with_copies
from flexjax.paged.rows import Rows, counts_argument, rows_argument, settled

type RowsLike = int | Int[Array, "n"] | Any
"""A row, an array of rows, or a boolean array over all rows."""


def allocate(cache: PagedCache, rows: RowsLike, tokens: Any = 0) -> PagedCache:
    """Begins an empty sequence in each of the rows.

    Args:
        cache: the cache; donate it to the surrounding `jax.jit`.
        rows: a row, an int array (n,) of different rows, or a bool array (B,). Traced or not.
        tokens: pages for so many tokens are set aside, a number or int (n,) (for booleans (B,)). By default none:
            `append` takes pages as they are needed.

    Raises:
        PageError: outside of `jax.jit`: a row holds a sequence already, is out of range or named twice; there
            are not enough free pages; the tokens exceed the table. The cache is unchanged. Inside, see
            `PagedCache.ok`.
        TypeError: rows or tokens are not integers.
        ValueError: their shapes do not fit.
    """
    chosen = rows_argument("allocate()", cache, rows)
    counts = counts_argument("allocate()", "tokens", tokens, chosen.index.shape[0])
    return settled(cache, *_allocate(cache, chosen, counts))


def reserve(cache: PagedCache, rows: RowsLike, tokens: Any) -> PagedCache:
    """Sets pages aside for so many more tokens of sequences, so that appending these cannot fail.

    Args:
        cache: the cache; donate it to the surrounding `jax.jit`.
        rows: as for `allocate`.
        tokens: beyond the present length, a number or int (n,).

    Raises:
        PageError: as for `allocate`, or a row holds no sequence.
        TypeError: rows or tokens are not integers.
        ValueError: their shapes do not fit.
    """
    chosen = rows_argument("reserve()", cache, rows)
    counts = counts_argument("reserve()", "tokens", tokens, chosen.index.shape[0])
    return settled(cache, *_reserve(cache, chosen, counts))


@functools.partial(jax.jit, inline=True)
def _allocate(cache: PagedCache, rows: Rows, counts: Array) -> tuple[PagedCache, Array]:
    growth = grow(cache, rows, counts, cache.capacity, opening=True)
    return growth.cache, growth.code


@functools.partial(jax.jit, inline=True)
def _reserve(cache: PagedCache, rows: Rows, counts: Array) -> tuple[PagedCache, Array]:
    growth = grow(cache, rows, counts, cache.capacity)
    return with_copies(growth.cache, growth.source, growth.target), growth.code
