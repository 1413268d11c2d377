"""Selecting batch rows, heads and rows of blocks from the lists of a block mask."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flexjax import _compat
from flexjax.block_lists import Geometry, lists_from_states, states_from_lists

KV_LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
Q_LISTS = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")


@functools.partial(jax.jit, static_argnums=2)
def taken(lists: dict[str, Array], table: Array, axis: int) -> dict[str, Array]:
    """The lists of the selected batch rows or heads."""
    return {name: jnp.take(x, table, axis=axis) for name, x in lists.items()}


@functools.partial(jax.jit, static_argnums=(2, 3))
def cut(lists: dict[str, Array], start: Any, count: int, cols: int | None) -> dict[str, Array]:
    """The lists of `count` rows of blocks; the transposed ones too, unless `cols` is None."""
    rows = {
        name: jax.lax.dynamic_slice_in_dim(lists[name], start, count, axis=2) for name in KV_LISTS
    }
    return rows if cols is None else rows | transposed(rows, cols)


def selected(part: Any, size: int, name: str) -> Array:
    """The int32 table of selected indices along an axis of length `size`."""
    if isinstance(part, slice):
        return jnp.arange(size, dtype=jnp.int32)[part]
    table = _integers(part)
    if table is None or table.ndim > 1:
        raise IndexError(
            f"A {name} index must be an integer, a slice or a 1-D integer array, but it is {part!r}."
        )
    if (
        isinstance(table, np.ndarray)
        and table.size
        and not -size <= table.min() <= table.max() < size
    ):
        raise IndexError(f"The {name} index {part!r} is out of range for {size} of them.")
    return _from_the_start(jnp.atleast_1d(table), size)


def _integers(index: Any) -> Any:
    """An index as an integer array, of NumPy where its value is known; None if it is something else."""
    array = index if _compat.is_tracer(index) else np.asarray(index)
    return array if jnp.issubdtype(array.dtype, jnp.integer) else None


def _from_the_start(index: Any, size: int) -> Array:
    """An int32 index into an axis with negative values counted from its end, inside the axis."""
    index = jnp.where(index < 0, index + size, index)
    return jnp.clip(index, 0, size - 1).astype(jnp.int32)


def row_range(part: Any, geometry: Geometry) -> tuple[Any, int, int]:
    """(first row, number of rows, number of queries) of a slice along the rows of blocks."""
    rows, q_block = geometry.rows, geometry.q_block
    if isinstance(part, slice):
        start, stop, step = part.indices(rows)
        if step != 1 or stop <= start:
            raise IndexError(
                f"Rows of blocks must be sliced contiguously and not empty, but the slice is {part!r} of "
                f"{rows} rows. Index one row at a time instead."
            )
        return start, stop - start, min(geometry.q_len, stop * q_block) - start * q_block
    row = _integers(part)
    if row is None or row.ndim:
        raise IndexError(
            f"Rows of blocks must be selected by an integer or a contiguous slice, but got {part!r}: one mask "
            "has one query offset."
        )
    if _compat.is_tracer(row):
        if geometry.q_len % q_block:
            raise IndexError(
                f"A traced row index needs rows of equal length, but {geometry.q_len} queries do not divide "
                f"into blocks of {q_block}."
            )
        return _from_the_start(row, rows), 1, q_block
    row = int(row)
    if not -rows <= row < rows:
        raise IndexError(f"Row {row} is out of range for {rows} rows of blocks.")
    row %= rows
    return row, 1, min(geometry.q_len, (row + 1) * q_block) - row * q_block


def transposed(fields: dict[str, Any], cols: int) -> dict[str, Array]:
    """The lists of a mask's columns, from those of its rows."""
    states = states_from_lists(*(fields[name] for name in KV_LISTS), cols)
    lists = lists_from_states(states, of_columns=True)
    return dict(zip(Q_LISTS, lists.arrays, strict=True))
