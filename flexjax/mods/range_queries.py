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

# A sparse table of more elements is built over chunks of the array instead of single elements.
_SMALL_TABLE = 1 << 16


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
    low, high = _extreme(ordered, indices, xp, "min"), _extreme(ordered, indices, xp, "max")
    return (low != 0, high != 0) if boolean else (low, high)


def _extreme(array: Any, indices: Sequence[Index], xp: Any, which: str) -> Any:
    rank = max(np.ndim(i.first) for i in indices)
    where: list[Any] = []
    ranged: int | None = None
    for axis, index in enumerate(indices):
        if index.step is not None:
            tokens, block, grid_axis = index.step
            array = _by_chunks(_leading(array, axis, tokens), axis, block, xp, which)
            shape = [1] * rank
            shape[grid_axis] = -1
            where.append(xp.arange(array.shape[axis], dtype=np.int32).reshape(shape))
        elif index.exact:
            where.append(xp.clip(index.first, 0, array.shape[axis] - 1))
        elif ranged is None:
            ranged = axis
            where.append(None)
        else:
            array = getattr(xp, which)(array, axis=axis, keepdims=True)
            where.append(xp.asarray(0, np.int32))
    if ranged is None:
        return array[tuple(where)]
    limit = array.shape[ranged] - 1
    first, last = (xp.clip(i, 0, limit) for i in (indices[ranged].first, indices[ranged].last))
    chunk = _chunk(array.shape, ranged)
    levels = _sparse_table(_by_chunks(array, ranged, chunk, xp, which), ranged, xp, which)
    first, last = first // chunk, last // chunk
    # Bounds of an index that may wrap around are those of its dtype, so the range is never empty.
    level = _floor_log2(last - first + 1, xp)
    ends = []
    for start in (first, last - (xp.ones_like(level) << level) + 1):
        where[ranged] = start
        ends.append(levels[(level, *where)])
    return _pick(*ends, xp=xp, which=which)


def _pick(x: Any, y: Any, xp: Any, which: str) -> Any:
    return (xp.minimum if which == "min" else xp.maximum)(x, y)


def _leading(array: Any, axis: int, count: int) -> Any:
    """The first `count` elements along an axis, all that an index below `count` can reach."""
    return array[(slice(None),) * axis + (slice(0, count),)]


def _by_chunks(array: Any, axis: int, chunk: int, xp: Any, which: str) -> Any:
    """The extremes of consecutive chunks along an axis; the last chunk may be shorter."""
    if chunk == 1:
        return array
    length = array.shape[axis]
    count = -(-length // chunk)
    if count * chunk != length:
        padding = [(0, 0)] * array.ndim
        padding[axis] = (0, count * chunk - length)
        array = xp.pad(array, padding, mode="edge")
    split = array.reshape(*array.shape[:axis], count, chunk, *array.shape[axis + 1 :])
    return getattr(xp, which)(split, axis=axis + 1)


def _chunk(shape: Sequence[int], axis: int) -> int:
    """Elements in a chunk: one if the table is small, else so many that it is smaller than the array."""
    levels = shape[axis].bit_length()
    if levels * math.prod(shape) <= _SMALL_TABLE:
        return 1
    return 1 << (2 * levels).bit_length()


def _sparse_table(array: Any, axis: int, xp: Any, which: str) -> Any:
    """[level, *array]: the extremes of 2^level elements beginning at each, as far as there are so many."""
    length = array.shape[axis]
    levels, reach = [array], 1
    while 2 * reach <= length:
        ahead = np.minimum(np.arange(length) + reach, length - 1)
        levels.append(_pick(levels[-1], xp.take(levels[-1], ahead, axis=axis), xp, which))
        reach *= 2
    return xp.stack(levels)


def _floor_log2(x: Any, xp: Any) -> Any:
    """floor(log2(x)) of a positive int32."""
    if xp is np:
        return (np.frexp(x.astype(np.float64))[1] - 1).astype(np.int32)
    return 31 - lax.clz(x)
