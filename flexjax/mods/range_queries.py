"""The smallest and the largest element that a read of an array can find while its indices vary.

An index that is q or kv itself steps through the blocks of the mask: the array is reduced block by block once.
Any other index that varies (q - kv, q + offset, kv // 7) asks for the extremes of a range, and a sparse table
answers: level k holds the extremes of 2^k chunks beginning at each chunk, so that two overlapping entries cover
any range (Bender and Farach-Colton, "The LCA Problem Revisited", 2000). Only the first such index is treated
so; along others the extremes of the whole axis are taken, which is sound, and rarely met.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from flexjax.mods.ops import is_float

# A sparse table of more elements is built over chunks of the array instead of single elements.
_SMALL_TABLE = 1 << 16

# Levels of a table that are made in one kernel, each from up to 2^5 entries of the last level before them.
_LEVELS_AT_ONCE = 5


Ends = tuple[Any, Any]  # (smallest, largest)


@dataclasses.dataclass(frozen=True)
class Index:
    """One index of a read.

    Attributes:
        first, last: the smallest and the largest value that it takes in each region.
        exact: whether it takes one value only.
        step: where it is q or kv itself, (tokens, tokens in a block, axis of the grid of regions).
    """

    first: Any
    last: Any
    exact: bool
    step: tuple[int, int, int] | None = None


def bounded_load(array: Any, indices: Sequence[Index], xp: Any) -> tuple[Any, Any]:
    """(smallest, largest) of `array[indices]` in every region; both NaN where a float read may be NaN.

    Args:
        array: bool, integer or float.
        indices: one an axis; values outside the array are clamped into it.
        xp: `numpy` or `jax.numpy`.
    """
    boolean = array.dtype == np.bool_
    ordered = array.astype(np.int8) if boolean else array
    low, high = _extremes((ordered, ordered), indices, xp)
    return (low != 0, high != 0) if boolean else (low, high)


def _extremes(ends: Ends, indices: Sequence[Index], xp: Any) -> Ends:
    rank = max(np.ndim(i.first) for i in indices)
    where: list[Any] = []
    ranged: int | None = None
    for axis, index in enumerate(indices):
        if index.step is not None:
            tokens, block, grid_axis = index.step
            low, high = ends
            ends = _leading(low, axis, tokens), _leading(high, axis, tokens)
            ends = _by_chunks(ends, axis, block, xp)
            shape = [1] * rank
            shape[grid_axis] = -1
            where.append(xp.arange(ends[0].shape[axis], dtype=np.int32).reshape(shape))
        elif index.exact:
            where.append(xp.clip(index.first, 0, ends[0].shape[axis] - 1))
        elif ranged is None:
            ranged = axis
            where.append(None)
        else:
            low, high = _reduced(ends, axis, xp)
            ends = xp.expand_dims(low, axis), xp.expand_dims(high, axis)
            where.append(xp.asarray(0, np.int32))
    if ranged is None:
        low, high = ends
        return low[tuple(where)], high[tuple(where)]
    shape = ends[0].shape
    limit = shape[ranged] - 1
    first, last = (xp.clip(i, 0, limit) for i in (indices[ranged].first, indices[ranged].last))
    chunk = _chunk(shape, ranged)
    tables = _sparse_tables(_by_chunks(ends, ranged, chunk, xp), ranged, xp)
    first, last = first // chunk, last // chunk
    # Bounds of an index that may wrap around are those of its dtype, so the range is never empty.
    level = _floor_log2(last - first + 1, xp)

    def read(start: Any) -> Ends:
        where[ranged] = start
        low, high = (table[(level, *where)] for table in tables)
        return low, high

    return _wider(read(first), read(last - (xp.ones_like(level) << level) + 1), xp)


def _wider(x: Ends, y: Ends, xp: Any) -> Ends:
    return xp.minimum(x[0], y[0]), xp.maximum(x[1], y[1])


def _reduced(ends: Ends, axis: int, xp: Any) -> Ends:
    """The extremes along an axis; NaN where anything is, which XLA's reductions on a CPU may pass over."""
    low, high = ends
    found = low.min(axis=axis), high.max(axis=axis)
    if not is_float(low.dtype):
        return found
    nan = (low != low).any(axis=axis) | (high != high).any(axis=axis)
    return xp.where(nan, np.float32(np.nan), found[0]), xp.where(nan, np.float32(np.nan), found[1])


def _leading(array: Any, axis: int, count: int) -> Any:
    """The first `count` elements along an axis, all that an index below `count` can reach."""
    return array[(slice(None),) * axis + (slice(0, count),)]


def _by_chunks(ends: Ends, axis: int, chunk: int, xp: Any) -> Ends:
    """The extremes of consecutive chunks along an axis; the last chunk may be shorter."""

    def split(array: Any) -> Any:
        length = array.shape[axis]
        count = -(-length // chunk)
        if count * chunk != length:
            padding = [(0, 0)] * array.ndim
            padding[axis] = (0, count * chunk - length)
            array = xp.pad(array, padding, mode="edge")
        return array.reshape(*array.shape[:axis], count, chunk, *array.shape[axis + 1 :])

    if chunk == 1:
        return ends
    return _reduced((split(ends[0]), split(ends[1])), axis + 1, xp)


def _chunk(shape: Sequence[int], axis: int) -> int:
    """Elements in a chunk: one if the table is small, else so many that it is smaller than the array."""
    levels = shape[axis].bit_length()
    if levels * math.prod(shape) <= _SMALL_TABLE:
        return 1
    return 1 << (2 * levels).bit_length()


def _sparse_tables(ends: Ends, axis: int, xp: Any) -> Ends:
    """[level, *array]: the extremes of 2^level elements beginning at each, as far as there are so many.

    A few levels at a time follow from the last one before them, of which level + k takes 2^k entries. XLA would
    fuse a chain of single levels, and compute each entry of level k from 2^k elements.
    """
    length = ends[0].shape[axis]
    levels = length.bit_length() - 1
    lows, highs = [ends[0][None]], [ends[1][None]]
    for level in range(0, levels, _LEVELS_AT_ONCE):
        count = min(_LEVELS_AT_ONCE, levels - level)
        entry = xp.arange(length, dtype=np.int32)[None, :, None]
        number = xp.arange(1 << count, dtype=np.int32)[None, None]
        taken = number >> xp.arange(1, count + 1, dtype=np.int32)[:, None, None] == 0
        # [level, entry, number]: those that it does not take are replaced by its first one.
        where = xp.minimum(entry + xp.where(taken, number << level, 0), length - 1)

        def read(last: Any, where: Any = where) -> Any:
            found = xp.take(last, where, axis=axis)  # the axis has become three
            return xp.moveaxis(found, axis, 0)

        low, high = _reduced((read(lows[-1][-1]), read(highs[-1][-1])), axis + 2, xp)
        lows.append(low)
        highs.append(high)
    return xp.concatenate(lows), xp.concatenate(highs)


def _floor_log2(x: Any, xp: Any) -> Any:
    """floor(log2(x)) of a positive int32."""
    if xp is np:
        return (np.frexp(x.astype(np.float64))[1] - 1).astype(np.int32)
    return 31 - lax.clz(x)
