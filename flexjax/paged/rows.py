"""Which rows an operation is about, and how it ends: carried out, or refused with a reason."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from flexjax import _compat
from flexjax.paged.cache import PagedCache
from flexjax.paged.errors import BAD_ROW, PageError

NOWHERE = int(jnp.iinfo(jnp.int32).max)
"""An index out of every range: writes there are dropped."""


class Rows(NamedTuple):
    """The rows of one operation.

    Attributes:
        index: int32 (n,), out of range where `wanted` is False.
        wanted: bool (n,).
    """

    index: Int32[Array, "n"]
    wanted: Bool[Array, "n"]

    def read(self, values: Array) -> Array:
        """The entries of an array with a leading axis B."""
        return values.at[self.index].get(mode="clip")

    def where(self, ok: Array) -> Array:
        """Indices for a write that drops what is not wanted or not ok."""
        return jnp.where(self.wanted & ok, self.index, NOWHERE)


def rows_argument(where: str, cache: PagedCache, rows: Any) -> Rows:
    """Rows from an integer, an array of integers, or a boolean array over all rows.

    Raises:
        TypeError: it is none of these.
        ValueError: its shape does not fit.
    """
    rows = rows if hasattr(rows, "dtype") else np.asarray(rows)
    if np.issubdtype(rows.dtype, np.bool_):
        if rows.shape != (cache.batch,):
            raise ValueError(
                f"{where}: a boolean array of rows must have shape ({cache.batch},), but it has {rows.shape}."
            )
        return Rows(jnp.arange(cache.batch, dtype=jnp.int32), jnp.asarray(rows))
    rows = integers(
        f"{where}: rows must be integers, or booleans over all {cache.batch} rows", rows
    )
    if rows.ndim > 1:
        raise ValueError(
            f"{where}: rows must be one row or a list of them, not of shape {rows.shape}."
        )
    index = rows.reshape(-1)
    return Rows(index, jnp.ones(index.shape, bool))


def row_errors(cache: PagedCache, rows: Rows) -> Array:
    """BAD_ROW if a wanted row is out of range or wanted twice, else 0."""
    index = rows.index
    outside = (index < 0) | (index >= cache.batch)
    same = (index[:, None] == index[None, :]) & rows.wanted[:, None] & rows.wanted[None, :]
    twice = jnp.triu(same, 1).any(1)
    return flag(BAD_ROW, rows.wanted & (outside | twice))


def flag(code: int, condition: Array) -> Array:
    """The code if the condition holds anywhere, else 0."""
    return jnp.where(condition.any(), jnp.int32(code), jnp.int32(0))


def settled(before: PagedCache, after: PagedCache, code: Array) -> PagedCache:
    """The end of an operation: the new cache, an exception outside of a trace, or a flag inside.

    Raises:
        PageError: outside of a trace, for a code other than 0.
    """
    if not _compat.is_tracer(code):
        if int(code):
            raise PageError(before.explain(int(code)))
        return after
    return dataclasses.replace(after, errors=before.errors | code)


def counts_argument(where: str, name: str, counts: Any, length: int) -> Array:
    """Token counts as int32 (n,), from one number for all rows or one for each.

    Raises:
        TypeError: they are not integers.
        ValueError: their shape does not fit.
    """
    counts = integers(f"{where}: {name} must be integers", counts)
    if counts.shape not in ((), (length,)):
        raise ValueError(
            f"{where}: {name} must be one number, or one for each of {length} rows, but they have shape "
            f"{counts.shape}."
        )
    return jnp.broadcast_to(counts, (length,))


def integers(rule: str, values: Any) -> Array:
    """The values as int32. What int32 cannot hold becomes its nearest bound, which no row or count can be either.

    Raises:
        TypeError: they are not integers, against the rule.
    """
    values = values if hasattr(values, "dtype") else np.asarray(values)
    if not np.issubdtype(values.dtype, np.integer):
        raise TypeError(f"{rule}, not {values.dtype}.")
    given, held = np.iinfo(values.dtype), np.iinfo(np.int32)
    bounded = values.clip(max(given.min, held.min), min(given.max, held.max))
    return jnp.asarray(bounded, jnp.int32)
