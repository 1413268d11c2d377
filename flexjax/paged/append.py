"""Appending: sequences grow by tokens, whose keys and values are stored."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from flexjax.block_arguments import positive
from flexjax.paged.allocate import RowsLike
from flexjax.paged.cache import PagedCache
from flexjax.paged.growth import distinct, grow, with_copies, zeroed
from flexjax.paged.rows import NOWHERE, Rows, counts_argument, rows_argument, settled
from flexjax.problem import BHLD, BLHD


def append(
    cache: PagedCache,
    key: Float[Array, "n Hkv T D"],
    value: Float[Array, "n Hkv T Dv"],
    counts: Any = None,
    rows: RowsLike | None = None,
    *,
    layout: str = BHLD,
) -> PagedCache:
    """Appends tokens to sequences: one to each, a step of decoding, or chunks of prompts.

    `extend` and `write` in one, for a cache of one layer.

    Args:
        cache: the cache; donate it to the surrounding `jax.jit`.
        key: (n, Hkv, T, D), cast to the cache's dtype.
        value: (n, Hkv, T, Dv).
        counts: how many of the T tokens each row gets, the first ones: a number or int (n,); by default all. If
            `rows` is None, a number is for those rows that hold a sequence.
        rows: as for `allocate`; by default n = B, all rows that hold a sequence.
        layout: "BHLD", or "BLHD" for (n, T, H, D).

    Raises:
        PageError: outside of `jax.jit`: there are not enough free pages; a sequence would outgrow the table; a row
            that gets tokens holds no sequence, is out of range or named twice; a count is negative or more than
            T. The cache is unchanged. Inside, see `PagedCache.ok`.
        TypeError: something is not of the right type.
        ValueError: shapes do not fit.
    """
    tokens = _chunk("append()", cache, key, value, rows, layout)
    granted, counts = extend(cache, tokens if counts is None else counts, rows, most=tokens)
    return write(granted, key, value, counts, rows, layout=layout)


def extend(
    cache: PagedCache, counts: Any, rows: RowsLike | None = None, *, most: int | None = None
) -> tuple[PagedCache, Int32[Array, "n"]]:
    """Makes room for more tokens and adds them to the lengths; their keys and values are zero until written.

    For models of several layers: once a step for all of them, followed by a `write` for each.

    Args:
        cache: the cache; donate it to the surrounding `jax.jit`.
        counts: tokens for each row, a number or int (n,). Without `rows`, one number is for the rows that hold a
            sequence.
        rows: as for `append`.
        most: an upper bound of the counts, which bounds the work: 1 for a step of decoding. By default the
            capacity of a row.

    Returns:
        The cache, and the counts that were granted: zeros if the whole is refused. Hand these to `write`.

    Raises:
        PageError: as for `append`.
        TypeError: counts or rows are not integers.
        ValueError: shapes do not fit, or most is not positive.
    """
    chosen = _rows("extend()", cache, rows)
    given = counts_argument("extend()", "counts", counts, chosen.index.shape[0])
    if rows is None and np.ndim(counts) == 0:
        given = jnp.where(cache.active, given, 0)
    most = cache.capacity if most is None else positive(most, "most")
    # Rows that get nothing need not hold a sequence.
    chosen = Rows(chosen.index, chosen.wanted & (given != 0))
    extended, granted, code = _extend(cache, chosen, given, most)
    return settled(cache, extended, code), granted


def write(
    cache: PagedCache,
    key: Float[Array, "n Hkv T D"],
    value: Float[Array, "n Hkv T Dv"],
    counts: Int32[Array, "n"],
    rows: RowsLike | None = None,
    *,
    layer: int | None = None,
    layout: str = BHLD,
) -> PagedCache:
    """Stores keys and values of the last `counts` tokens of sequences, which `extend` made room for.

    Args:
        cache: the cache; donate it to the surrounding `jax.jit`.
        key: (n, Hkv, T, D), of which the first `counts` are stored; cast to the cache's dtype.
        value: (n, Hkv, T, Dv).
        counts: what `extend` returned. More than a sequence's length or than T is cut down to it.
        rows: what `extend` was given.
        layer: which layer, in a cache with layers.
        layout: "BHLD", or "BLHD" for (n, T, H, D).

    Raises:
        TypeError: something is not of the right type.
        ValueError: shapes do not fit, or the layer is missing or not there.
    """
    one = cache if layer is None else cache.layer(layer)
    tokens = _chunk("write()", one, key, value, rows, layout)
    chosen = _rows("write()", cache, rows)
    counts = counts_argument("write()", "counts", counts, chosen.index.shape[0])
    if layout == BLHD:
        key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    written = _write(one, key, value, chosen, jnp.minimum(counts, tokens))
    names = ("key_pages", "value_pages", "key_min", "key_max")
    if layer is None:
        return written
    changed: dict[str, Any] = {}
    for name in names:
        parts = getattr(cache, name)
        if parts is not None:
            changed[name] = (*parts[:layer], getattr(written, name), *parts[layer + 1 :])
    return dataclasses.replace(cache, **changed)


def _rows(where: str, cache: PagedCache, rows: Any) -> Rows:
    return rows_argument(where, cache, np.arange(cache.batch) if rows is None else rows)


def _chunk(where: str, cache: PagedCache, key: Any, value: Any, rows: Any, layout: str) -> int:
    """T, once the shapes are known to fit."""
    if layout not in (BHLD, BLHD):
        raise ValueError(f"{where}: layout must be {BHLD!r} or {BLHD!r}, but it is {layout!r}.")
    count = _rows(where, cache, rows).index.shape[0]
    keys, values = cache.pools()
    for name, x, pool in (("key", key, keys), ("value", value, values)):
        if not hasattr(x, "shape") or not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{where}: {name} must be an array of floats, but it is {x!r}.")
        heads, length = (1, 2) if layout == BHLD else (2, 1)
        fits = x.ndim == 4 and (x.shape[0], x.shape[heads], x.shape[3]) == (
            count,
            pool.shape[0],
            pool.shape[3],
        )
        if not fits or x.shape[length] == 0 or x.shape[length] != key.shape[length]:
            axes = "(n, Hkv, T, D)" if layout == BHLD else "(n, T, Hkv, D)"
            raise ValueError(
                f"{where}: {name} must have shape {axes} with n = {count} rows, Hkv = {pool.shape[0]}, D = "
                f"{pool.shape[3]} and the same T >= 1 as the key, but key has {key.shape} and value "
                f"{value.shape}."
            )
    return key.shape[2] if layout == BHLD else key.shape[1]


@functools.partial(jax.jit, static_argnums=3, inline=True)
def _extend(
    cache: PagedCache, rows: Rows, counts: Array, most: int
) -> tuple[PagedCache, Array, Array]:
    page = cache.page_size
    before = rows.read(cache.lengths)
    growth = grow(cache, rows, counts, most)
    cache, code, granted = growth.cache, growth.code, growth.counts
    after = before + granted
    cache = dataclasses.replace(
        cache, lengths=cache.lengths.at[rows.where(code == 0)].add(granted, mode="drop")
    )
    # Pages that the sequences reach for the first time.
    step = jnp.arange(min(-(-most // page), cache.max_pages), dtype=jnp.int32)[None, :]
    place = -(-before // page)[:, None] + step
    table = rows.read(cache.page_table)
    reached = jnp.take_along_axis(table, jnp.minimum(place, cache.max_pages - 1), 1)
    reached = jnp.where(place < -(-after // page)[:, None], reached, NOWHERE)
    # The tokens to come do not fill the last of them: kernels multiply what lies behind with weights of 0.
    last = (place == after[:, None] // page) & (after % page > 0)[:, None]
    blank = jnp.where(last, reached, NOWHERE).min(1)
    if most == 1:  # a page is either reached or copied, and one pass does both
        copying = growth.target != NOWHERE
        both = jnp.where(copying, growth.target, blank)
        cache = with_copies(cache, growth.source, both, copying)
    else:
        cache = zeroed(with_copies(cache, growth.source, growth.target), blank)
    return _without_bounds(cache, reached.reshape(-1)), granted, code


def _without_bounds(cache: PagedCache, pages: Array) -> PagedCache:
    """Forgets the bounds of keys of pages that are used anew."""
    if cache.key_min is None:
        return cache
    index = distinct(pages)

    def reset(bound: Array, value: float) -> Array:
        fill = jnp.asarray(value, bound.dtype)
        return bound.at[:, index].set(fill, mode="drop", unique_indices=True)

    return dataclasses.replace(
        cache,
        key_min=jax.tree.map(lambda x: reset(x, jnp.inf), cache.key_min),
        key_max=jax.tree.map(lambda x: reset(x, -jnp.inf), cache.key_max),
    )


@functools.partial(jax.jit, inline=True)
def _write(cache: PagedCache, key: Array, value: Array, rows: Rows, counts: Array) -> PagedCache:
    page = cache.page_size
    length = rows.read(cache.lengths)
    counts = jnp.clip(counts, 0, length)
    token = jnp.arange(key.shape[2], dtype=jnp.int32)[None, :]
    position = (length - counts)[:, None] + token
    table = rows.read(cache.page_table)
    pages = jnp.take_along_axis(table, jnp.minimum(position // page, cache.max_pages - 1), 1)
    pages = jnp.where((token < counts[:, None]) & rows.wanted[:, None], pages, NOWHERE)
    index = distinct(pages)

    def stored(pool: Array, new: Array) -> Array:
        new = jnp.swapaxes(new, 0, 1).astype(pool.dtype)
        return pool.at[:, index, position % page].set(new, mode="drop", unique_indices=True)

    keys, values = cache.pools()
    changed: dict[str, Any] = {
        "key_pages": stored(keys, key),
        "value_pages": stored(values, value),
    }
    if cache.key_min is not None:
        new = jnp.swapaxes(key, 0, 1).astype(keys.dtype)
        changed["key_min"] = cache.key_min.at[:, pages].min(new, mode="drop")
        changed["key_max"] = cache.key_max.at[:, pages].max(new, mode="drop")
    return dataclasses.replace(cache, **changed)
