"""Which elements of a tile a thread holds, and how values of a program travel in and out of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from flexjax.backends.mosaic_gpu.lanes import I32, Lane

Offsets = tuple[int, ...]


@functools.lru_cache(maxsize=64)
def static_offsets(layout: Any, shape: tuple[int, ...]) -> tuple[tuple[Offsets, ...], ...]:
    """Index of every element of every register of a thread, relative to the thread's first element."""
    strides = [int(np.prod(shape[axis + 1 :], dtype=int)) for axis in range(len(shape))]
    tile_strides = layout.tiling.tile_strides(tuple(strides))
    step = tile_strides[layout.vector_dim]
    registers = []
    for position in np.ndindex(*layout.registers_shape(shape)):
        first = sum(i * s for i, s in zip(position, tile_strides, strict=True))
        elements = (first + step * e for e in range(layout.vector_length))
        registers.append(
            tuple(
                tuple(linear // s % n for s, n in zip(strides, shape, strict=True))
                for linear in elements
            )
        )
    return tuple(registers)


def origin(layout: Any, shape: tuple[int, ...]) -> list[Lane]:
    """Index of the thread's first element."""
    first = next(iter(layout.thread_idxs(shape)))
    return [Lane(arith.index_cast(ir.IntegerType.get_signless(32), i), I32) for i in first]


def unpack(array: mgpu.FragmentedArray, dtype: np.dtype) -> dict[Offsets, Lane]:
    """The elements of an array that the thread holds, by their static offsets."""
    values = {}
    places = static_offsets(array.layout, array.shape)
    for register, offsets in zip(array.registers.reshape(-1), places, strict=True):
        for element, offset in enumerate(offsets):
            value = vector.extract(register, dynamic_position=[], static_position=[element])
            values[offset] = Lane(value, dtype)
    return values


def pack(
    value_at: Callable[[Offsets], Lane], layout: Any, shape: tuple[int, ...], dtype: np.dtype
) -> mgpu.FragmentedArray:
    """The inverse of `unpack`; a scalar's only offset is ()."""
    signed = mgpu.utils.is_signed(dtype)
    if not shape:
        return mgpu.FragmentedArray.splat(value_at(()).ir, (), is_signed=signed)
    registers = np.empty(layout.registers_shape(shape), object)
    places = static_offsets(layout, shape)
    for position, offsets in zip(np.ndindex(*registers.shape), places, strict=True):
        elements = [value_at(offset).ir for offset in offsets]
        kind = ir.VectorType.get((len(elements),), elements[0].type)
        registers[position] = vector.from_elements(kind, elements)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)
