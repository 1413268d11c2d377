"""Sums of a tile that leave the warpgroup: added to float32 arrays in global memory, in no fixed order.

A thread of a warpgroup, in lane 4 g + t of warp w, holds of a [64, n] tile the rows 16 w + g and 16 w + g + 8, and
in each of them the columns 8 j + 2 t and 8 j + 2 t + 1. Sums over lanes that differ in g halve a list in every
round: a lane keeps one half, hands the other to its partner, and adds what it gets.

All functions here emit MLIR and PTX and run on the GPU only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from flexjax.backends.mosaic_gpu import lanes, placement, registers
from flexjax.backends.mosaic_gpu.emit import TileValue
from flexjax.backends.mosaic_gpu.lanes import F32, I32, Lane
from flexjax.backends.mosaic_gpu.registers import TILE

_SPLAT = plgpu.Layout.WG_SPLAT
_LANES_APART = (16, 8, 4)  # partners that differ in one bit of g, the highest first


def _i32(value: int) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(32), value)


def _lane() -> tuple[Lane, Lane, Lane]:
    """(warp, g, t) of the thread."""
    thread = Lane(mgpu.utils.thread_idx(), I32)
    return (
        lanes.shift_right(thread, 5) & 3,
        lanes.shift_right(thread, 2) & 7,
        thread & 3,
    )


def _partner(value: ir.Value, distance: int) -> ir.Value:
    return mgpu.utils.shfl_bfly(value, distance)


def _pointer(ref: ir.Value, offset: Lane) -> ir.Value:
    """Address of the element at `offset`, counted from the first one of a reference in global memory."""
    pointer = mgpu.utils.memref_ptr(ref)
    if pointer.type.address_space == 0:
        pointer = llvm.addrspacecast(llvm.PointerType.get(address_space=1), pointer)
    wide = arith.extsi(ir.IntegerType.get_signless(64), offset.ir)
    return mgpu.utils.getelementptr(pointer, [wide], ir.MemRefType(ref.type).element_type)


def _add(pointer: ir.Value, values: Sequence[ir.Value]) -> None:
    """Adds one number, or two neighbouring ones of which the first is aligned."""
    pair = len(values) == 2
    operands = "{$1, $2}" if pair else "$1"
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [pointer, *values],
        f"red.relaxed.gpu.global.add{'.v2' if pair else ''}.f32 [$0], {operands};",
        "l" + ",f" * len(values),
        has_side_effects=True,
    )


def _halved(values: list[Any], upper: Lane, distance: int) -> list[Any]:
    """The sums with the partner's values, of the upper or the lower half of a list of even length."""
    half = len(values) // 2
    kept = []
    for low, high in zip(values[:half], values[half:], strict=True):
        mine = arith.select(upper.ir, high, low)
        given = arith.select(upper.ir, low, high)
        kept.append(arith.addf(mine, _partner(given, distance)))
    return kept


def add_column_sums(ref: Any, tile: jax.Array, start: jax.Array) -> None:
    """Adds the sums over a tile's rows, one number a column, to `ref[start:]`; `start` is even."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE, _SPLAT))
    def add(_: Any, target: Any, x: Any, start: Any) -> None:
        values = placement.unpack(x, F32)
        columns = sorted({c for _, c in values})
        rows = sorted({r for r, _ in values})
        sums = []
        for c in columns:
            total = values[rows[0], c]
            for r in rows[1:]:
                total = total + values[r, c]
            sums.append(total.ir)
        _, g, t = _lane()
        first = Lane(start.registers.item(), I32) + t * 2
        for bit, distance in zip((4, 2, 1), _LANES_APART, strict=True):
            upper = lanes.compare("ne", g & bit, 0)
            step = columns[len(sums) // 2]
            sums = _halved(sums, upper, distance)
            first = first + lanes.select(upper, lanes.const(step, I32), 0)
        for i in range(0, len(sums), 2):
            _add(_pointer(target, first + columns[i]), sums[i : i + 2])

    add(ref, tile, start)


def add_diagonal_sums(ref: Any, tile: jax.Array, zero: jax.Array) -> None:
    """Adds the sums along a tile's diagonals to `ref`: those of column - row = d at `ref[zero + d]`.

    `zero` is an odd number. Some zeros are added up to 64 places before and 128 behind those of the tile.

    A thread first sums its own diagonals. In list element (m, e) of lane (g, t) it then has the diagonal
    8 m + e + 2 t - g - 8; shifted by 7 - g places, all lanes of equal t hold equal diagonals at equal
    positions, and can be summed. The shift is made bit by bit, each before the round that sums over that bit of g.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE, _SPLAT))
    def add(_: Any, target: Any, x: Any, zero: Any) -> None:
        values = placement.unpack(x, F32)
        own: dict[int, Lane] = {}
        for (r, c), value in sorted(values.items()):
            own[c - r] = own[c - r] + value if c - r in own else value
        warp, g, t = _lane()
        # Pairs (e = 0, 1) of the diagonals 8 m - 8 + e.
        pairs = [[own[d].ir, own[d + 1].ir] for d in range(min(own), max(own), 8)]
        first = Lane(zero.registers.item(), I32) - 15 - warp * 16 + t * 2
        nothing = registers.f32(0.0)
        for bit, shift in ((1, _shifted_by_1), (2, _shifted_by_2), (4, _shifted_by_4)):
            upper = lanes.compare("ne", g & bit, 0)
            moved = shift(pairs, t)
            stayed = [*pairs, [nothing, nothing]]
            pairs = [
                [arith.select(upper.ir, s, m) for s, m in zip(*both, strict=True)]
                for both in zip(stayed, moved, strict=True)
            ]
            if len(pairs) % 2:
                pairs.append([nothing, nothing])
            half = len(pairs) // 2
            flat = [v for pair in pairs for v in pair]
            flat = _halved(flat, upper, 4 * bit)
            pairs = [flat[i : i + 2] for i in range(0, len(flat), 2)]
            first = first + lanes.select(upper, lanes.const(8 * half, I32), 0)
        for m, pair in enumerate(pairs):
            _add(_pointer(target, first + 8 * m), pair)

    add(ref, tile, zero)


# A list of pairs, as columns 8 m + 2 t + e over the four lanes of a row, moved to the right and one pair longer.


def _carried(received: list[ir.Value], from_before: Lane) -> list[ir.Value]:
    """What a lane gets from the one to its left, where the leftmost ones get it from the pair before."""
    nothing = registers.f32(0.0)
    previous = [nothing, *received]
    return [
        arith.select(from_before.ir, before, here)
        for before, here in zip(previous, [*received, nothing], strict=True)
    ]


def _from_left(value: ir.Value) -> ir.Value:
    """The value of lane (g, t - 1), of lane (g, 3) where t is 0."""
    i32 = ir.IntegerType.get_signless(32)
    thread = Lane(mgpu.utils.thread_idx(), I32)
    source = (thread & 28) | ((thread - 1) & 3)
    bits = arith.bitcast(i32, value)
    moved = llvm.inline_asm(
        i32,
        [bits, source.ir],
        "shfl.sync.idx.b32 $0, $1, $2, 31, -1;",
        "=r,r,r",
        asm_dialect=0,
        has_side_effects=True,
    )
    return arith.bitcast(ir.F32Type.get(), moved)


def _shifted_by_1(pairs: list[list[ir.Value]], t: Lane) -> list[list[ir.Value]]:
    left = _carried([_from_left(p[1]) for p in pairs], lanes.compare("eq", t, 0))
    own = [*(p[0] for p in pairs), registers.f32(0.0)]
    return [list(pair) for pair in zip(left, own, strict=True)]


def _shifted_by_2(pairs: list[list[ir.Value]], t: Lane) -> list[list[ir.Value]]:
    first = lanes.compare("eq", t, 0)
    columns = (_carried([_from_left(p[e]) for p in pairs], first) for e in range(2))
    return [list(pair) for pair in zip(*columns, strict=True)]


def _shifted_by_4(pairs: list[list[ir.Value]], t: Lane) -> list[list[ir.Value]]:
    columns = (_carried([_partner(p[e], 2) for p in pairs], t < 2) for e in range(2))
    return [list(pair) for pair in zip(*columns, strict=True)]


def add_elements(
    ref: Any, strides: Sequence[int], indices: Sequence[TileValue], tile: jax.Array, transposed: bool
) -> None:
    """Adds every element of a tile that is not 0 at its indices into an array.

    Args:
        ref: the array, flattened.
        strides: of the array, in elements.
        indices: of every element, inside the array.
        tile: what is added.
        transposed: whether the tile is [keys, queries].
    """
    axes = {"row": int(transposed), "column": int(not transposed)}
    ranks = [i.rank for i in indices]
    layouts = [
        TILE if r == "tile" else TILE.reduce(1 - axes[r]) if r in axes else _SPLAT for r in ranks
    ]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE, *layouts))
    def add(_: Any, target: Any, x: Any, *arrays: Any) -> None:
        unpacked = [
            {(): Lane(a.registers.item(), I32)} if r == "scalar" else placement.unpack(a, I32)
            for a, r in zip(arrays, ranks, strict=True)
        ]
        for offsets, value in placement.unpack(x, F32).items():
            place = lanes.const(0, I32)
            for rank, stride, values in zip(ranks, strides, unpacked, strict=True):
                key = {"scalar": (), "tile": offsets}.get(rank)
                index = values[(offsets[axes[rank]],) if key is None else key]
                place = place + index * stride
            needed = lanes.compare("ne", value, 0.0)
            with mgpu.when(needed.ir):
                _add(_pointer(target, place), [value.ir])

    add(ref, tile, *(i.value.astype(jnp.int32) if i.value.dtype != jnp.int32 else i.value for i in indices))
