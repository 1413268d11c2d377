"""Captured arrays under slicing: a view of an array until a single element of it is read.

`bias[h][q][kv]`, `lax.dynamic_slice(bias, (q, kv), (1, 1))[0, 0]` and `bias.at[h, q, kv].get()` all become one
`load` node. Nothing large is touched on the way, because only the base index moves.

Every index is clamped into the array, which is what scalar indexing means in JAX, so that a kernel never
reads out of bounds; the clamp disappears where intervals prove that it does nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import lax

from flexjax.mods.builder import INT32, Builder, Ref
from flexjax.mods.errors import UnsupportedMod
from flexjax.mods.ops import is_bool, is_float

# Vectors up to this many elements are unrolled into scalars, which makes small reductions, inner vmaps
# and dot products inside a mod work without special cases.
MAX_UNROLL = 256


@dataclasses.dataclass(frozen=True)
class View:
    """Part of a captured array.

    Attributes:
        capture: the array's position in the builder.
        offsets: base index along every dimension of the array.
        dims: for each dimension of the view, the array's dimension it runs along.
        shape: shape of the view.
        dtype: dtype of the array.
        fills: (in bounds, fill value) pairs of gathers that fill out-of-bounds reads.
    """

    capture: int
    offsets: tuple[Ref, ...]
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    fills: tuple[tuple[Ref, Ref], ...] = ()

    def shifted(self, builder: Builder, starts: Sequence[Ref | int], sizes: Sequence[int]) -> View:
        """The sub-view of `sizes` that begins at `starts`, which are inside the view."""
        offsets = list(self.offsets)
        for dim, start in zip(self.dims, starts, strict=True):
            start = builder.const(start, INT32) if isinstance(start, int) else start
            offsets[dim] = builder.apply("add", (offsets[dim], start))
        return dataclasses.replace(self, offsets=tuple(offsets), shape=tuple(sizes))

    def keeping(self, axes: Sequence[int]) -> View:
        """The view with only `axes` (all others have length 1), in that order."""
        return dataclasses.replace(
            self,
            dims=tuple(self.dims[a] for a in axes),
            shape=tuple(self.shape[a] for a in axes),
        )

    def element(self, builder: Builder, index: Sequence[int]) -> Ref:
        """The load of one element at a static index."""
        target = self.shifted(builder, index, (1,) * len(index)) if any(index) else self
        value = builder.load(self.capture, target.offsets, self.dtype)
        for in_bounds, fill in self.fills:
            value = builder.apply("select_n", (in_bounds, fill, value))
        return value

    def elements(self, builder: Builder) -> np.ndarray:
        """Every element, as an object array of loads."""
        if math.prod(self.shape) > MAX_UNROLL:
            raise UnsupportedMod(
                f"it uses {math.prod(self.shape)} elements of a captured array (shape {self.shape}) "
                f"at once instead of one element by index; at most {MAX_UNROLL} are unrolled"
            )
        out = np.empty(self.shape, object)
        for index in np.ndindex(*self.shape):
            out[index] = self.element(builder, index)
        return out


def view_of(builder: Builder, array: Any) -> View:
    """A captured array as a whole."""
    shape = tuple(np.shape(array))
    zero = builder.const(0, INT32)
    return View(
        builder.capture(array),
        (zero,) * len(shape),
        tuple(range(len(shape))),
        shape,
        np.dtype(array.dtype),
    )


def _index(builder: Builder, index: Ref, limit: int) -> Ref:
    """`index` clamped into [0, limit] as int32."""
    clamped = builder.clamp(index, 0, min(limit, int(np.iinfo(index.dtype).max)))
    return builder.convert(clamped, INT32)


def dynamic_slice(
    builder: Builder, view: View, starts: Sequence[Ref], sizes: Sequence[int]
) -> View:
    clamped = [
        _index(builder, start, extent - size)
        for start, extent, size in zip(starts, view.shape, sizes, strict=True)
    ]
    return view.shifted(builder, clamped, sizes)


def squeeze(view: View, dimensions: Sequence[int]) -> View:
    drop = {d % len(view.shape) for d in dimensions}
    return view.keeping([a for a in range(len(view.shape)) if a not in drop])


def _default_fill(dtype: np.dtype) -> Any:
    if is_bool(dtype):
        return True
    if is_float(dtype):
        return np.nan
    return np.iinfo(dtype).max if dtype.kind == "u" else np.iinfo(dtype).min


def gather(
    builder: Builder,
    view: View,
    indices: np.ndarray,
    params: dict[str, Any],
    out_shape: Sequence[int],
) -> View | np.ndarray:
    """`lax.gather` from a view; `indices` is an object array of nodes with the index vector last."""
    numbers, mode = params["dimension_numbers"], params["mode"]
    sizes = params["slice_sizes"]
    if mode == lax.GatherScatterMode.ONE_HOT:
        raise UnsupportedMod("it gathers from a captured array with mode='one_hot'")
    window = [
        a
        for a in range(len(view.shape))
        if a not in numbers.collapsed_slice_dims and a not in numbers.operand_batching_dims
    ]

    def read(batch: tuple[int, ...]) -> View:
        starts: list[Ref] = [builder.const(0, INT32)] * len(view.shape)
        for dim, batching in zip(
            numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
        ):
            starts[dim] = builder.const(batch[batching], INT32)
        in_bounds = builder.const(True, np.bool_)
        for position, dim in enumerate(numbers.start_index_map):
            index = indices[(*batch, position)]
            limit = min(view.shape[dim] - sizes[dim], int(np.iinfo(index.dtype).max))
            if mode == lax.GatherScatterMode.FILL_OR_DROP:
                for op, bound in (("ge", 0), ("le", limit)):
                    inside = builder.apply(op, (index, builder.const(bound, index.dtype)))
                    in_bounds = builder.apply("and", (in_bounds, inside))
            # Also under PROMISE_IN_BOUNDS: a broken promise must not read foreign memory.
            starts[dim] = _index(builder, index, limit)
        read_view = view.shifted(builder, starts, sizes).keeping(window)
        if mode == lax.GatherScatterMode.FILL_OR_DROP and not in_bounds.equals(True):
            fill = params["fill_value"]
            fill = _default_fill(view.dtype) if fill is None else fill
            fills = (*read_view.fills, (in_bounds, builder.const(fill, view.dtype)))
            read_view = dataclasses.replace(read_view, fills=fills)
        return read_view

    batch_shape = indices.shape[:-1]
    if batch_shape == ():
        return read(())
    return _gathered(builder, read, batch_shape, numbers.offset_dims, out_shape)


def _gathered(
    builder: Builder,
    read: Callable[[tuple[int, ...]], View],
    batch_shape: tuple[int, ...],
    offset_dims: Sequence[int],
    out_shape: Sequence[int],
) -> np.ndarray:
    if math.prod(out_shape) > MAX_UNROLL:
        raise UnsupportedMod(
            f"it gathers {math.prod(out_shape)} elements of a captured array at once; at most "
            f"{MAX_UNROLL} are unrolled"
        )
    out = np.empty(out_shape, object)
    batch_dims = [d for d in range(len(out_shape)) if d not in offset_dims]
    for batch in np.ndindex(*batch_shape):
        window = read(batch)
        for inner in np.ndindex(*window.shape):
            position = [0] * len(out_shape)
            for dim, i in (
                *zip(batch_dims, batch, strict=True),
                *zip(offset_dims, inner, strict=True),
            ):
                position[dim] = i
            out[tuple(position)] = window.element(builder, inner)
    return out
