"""Sums of a tile that leave the warpgroup: added to float32 arrays in global memory, in no fixed order.

A thread of a warpgroup, in lane 4 g + t of warp w, holds of a [64, n] tile the rows 16 w + g and 16 w + g + 8, and
in each of them the columns 8 j + 2 t and 8 j + 2 t + 1. Sums over lanes that differ in g halve a list in every
round: a lane keeps one half, hands the other to its partner, and adds what it gets.

All functions here emit MLIR and PTX and run on the GPU only.
"""

from __future__ import annotations

import functools
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
from flexjax.mods.graph import COLUMN, ROW, SCALAR
from flexjax.mods.graph import TILE as TILE_RANK

_SPLAT = plgpu.Layout.WG_SPLAT


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


def _add(pointer: ir.Value, values: Sequence[ir.Value], unless_zero: bool = False) -> None:
    """Adds one number, or two neighbouring ones of which the first is aligned."""
    if len(values) == 2:
        code = "red.relaxed.gpu.global.add.v2.f32 [$0], {$1, $2};"
    else:
        code = "red.relaxed.gpu.global.add.f32 [$0], $1;"
    if unless_zero:
        code = "{ .reg .pred p; setp.neu.f32 p, $1, 0f00000000; @p " + code + " }"
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [pointer, *values],
        code,
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
    types = (plgpu.RefType(), TILE, _SPLAT)
    plgpu.inline_mgpu(arg_types=types)(emit_column_sums)(ref, tile, start)


def emit_column_sums(_: Any, target: Any, x: Any, start: Any) -> None:
    values = placement.unpack(x, F32)
    rows, columns = (sorted({offsets[axis] for offsets in values}) for axis in range(2))
    sums = []
    for c in columns:
        total = values[rows[0], c]
        for r in rows[1:]:
            total = total + values[r, c]
        sums.append(total.ir)
    _, g, t = _lane()
    first = Lane(start.registers.item(), I32) + t * 2
    for bit in (4, 2, 1):
        upper = lanes.compare("ne", g & bit, 0)
        step = columns[len(sums) // 2]
        sums = _halved(sums, upper, 4 * bit)
        first = first + lanes.select(upper, lanes.const(step, I32), 0)
    for i in range(0, len(sums), 2):
        _add(_pointer(target, first + columns[i]), sums[i : i + 2])


def add_diagonal_sums(ref: Any, tile: jax.Array, zero: jax.Array) -> None:
    """Adds the sums along a tile's diagonals to `ref`: those of column - row = d at `ref[zero + d]`.

    `zero` is odd. Zeros are added up to 64 places before those of the tile and 128 behind.
    """
    types = (plgpu.RefType(), TILE, _SPLAT)
    plgpu.inline_mgpu(arg_types=types)(emit_diagonal_sums)(ref, tile, zero)


def emit_diagonal_sums(_: Any, target: Any, x: Any, zero: Any) -> None:
    """See `add_diagonal_sums`.

    A thread first sums its own diagonals. Element (m, e) of lane (g, t)'s list is then the diagonal
    8 m + e + 2 t - g - 8 of the warp's 16 rows. Moved by 7 - g places to the right, as one sequence over m, t and
    e, all lanes hold equal diagonals at equal positions, and can be summed. The lists are moved bit by bit, each
    bit before the round that sums over that bit of g.
    """
    own: dict[int, Lane] = {}
    for (r, c), value in sorted(placement.unpack(x, F32).items()):
        own[c - r] = own[c - r] + value if c - r in own else value
    warp, g, t = _lane()
    pairs: list[list[Any]] = [[own[d].ir, own[d + 1].ir] for d in range(min(own), max(own), 8)]
    first = Lane(zero.registers.item(), I32) - 15 - warp * 16 + t * 2
    nothing = registers.f32(0.0)
    for bit, moved in ((1, _moved_by_1), (2, _moved_by_2), (4, _moved_by_4)):
        upper = lanes.compare("ne", g & bit, 0)
        both = zip([*pairs, [nothing, nothing]], moved(pairs, t), strict=True)
        pairs = [
            [arith.select(upper.ir, s, m) for s, m in zip(stays, moves, strict=True)]
            for stays, moves in both
        ]
        if len(pairs) % 2:
            pairs.append([nothing, nothing])
        step = 8 * (len(pairs) // 2)
        sums = _halved([v for pair in pairs for v in pair], upper, 4 * bit)
        pairs = [sums[i : i + 2] for i in range(0, len(sums), 2)]
        first = first + lanes.select(upper, lanes.const(step, I32), 0)
    for m, pair in enumerate(pairs):
        _add(_pointer(target, first + 8 * m), pair)


# A list of pairs, as columns 8 m + 2 t + e over the four lanes of a row, moved to the right and one pair longer.


def _carried(received: list[ir.Value], from_before: Lane) -> list[ir.Value]:
    """What a lane gets from the one to its left, where the leftmost ones get it from the pair before."""
    nothing = registers.f32(0.0)
    previous = [nothing, *received]
    return [
        arith.select(from_before.ir, before, here)
        for before, here in zip(previous, [*received, nothing], strict=True)
    ]


def _from_left(value: Any) -> Any:
    """The value of lane (g, t - 1), of lane (g, 3) where t is 0."""
    i32 = ir.IntegerType.get_signless(32)
    thread = Lane(mgpu.utils.thread_idx(), I32)
    source = (thread & 28) | ((thread - 1) & 3)
    bits = arith.bitcast(i32, value)
    moved: Any = llvm.inline_asm(
        i32,
        [bits, source.ir],
        "shfl.sync.idx.b32 $0, $1, $2, 31, -1;",
        "=r,r,r",
        asm_dialect=0,
        has_side_effects=True,
    )
    return arith.bitcast(ir.F32Type.get(), moved)


def _moved_by_1(pairs: list[list[ir.Value]], t: Lane) -> list[list[ir.Value]]:
    left = _carried([_from_left(p[1]) for p in pairs], lanes.compare("eq", t, 0))
    own = [*(p[0] for p in pairs), registers.f32(0.0)]
    return [list(pair) for pair in zip(left, own, strict=True)]


def _moved_by_2(pairs: list[list[ir.Value]], t: Lane) -> list[list[ir.Value]]:
    first = lanes.compare("eq", t, 0)
    columns = (_carried([_from_left(p[e]) for p in pairs], first) for e in range(2))
    return [list(pair) for pair in zip(*columns, strict=True)]


def _moved_by_4(pairs: list[list[ir.Value]], t: Lane) -> list[list[ir.Value]]:
    columns = (_carried([_partner(p[e], 2) for p in pairs], t < 2) for e in range(2))
    return [list(pair) for pair in zip(*columns, strict=True)]


def add_elements(
    ref: Any,
    strides: Sequence[int],
    indices: Sequence[TileValue],
    tile: jax.Array,
    transposed: bool,
) -> None:
    """Adds every element of a tile that is not 0 at its indices into an array.

    Args:
        ref: the array, flattened.
        strides: of the array, in elements.
        indices: of every element, inside the array.
        tile: what is added.
        transposed: whether the tile is [keys, queries].
    """
    axes = {ROW: int(transposed), COLUMN: int(not transposed)}
    layouts = {SCALAR: _SPLAT, TILE_RANK: TILE}
    layouts |= {rank: TILE.reduce(1 - axis) for rank, axis in axes.items()}
    ranks = tuple(index.rank for index in indices)
    types = (plgpu.RefType(), TILE, *(layouts[rank] for rank in ranks))
    emit = functools.partial(emit_elements, ranks, tuple(strides), axes)
    arrays = (index.value.astype(jnp.int32) for index in indices)
    plgpu.inline_mgpu(arg_types=types)(emit)(ref, tile, *arrays)


def emit_elements(
    ranks: Sequence[str],
    strides: Sequence[int],
    axes: dict[str, int],
    _: Any,
    target: Any,
    x: Any,
    *arrays: Any,
) -> None:
    indices: list[dict[placement.Offsets, Lane]] = [
        {(): Lane(array.registers.item(), I32)} if rank == SCALAR else placement.unpack(array, I32)
        for array, rank in zip(arrays, ranks, strict=True)
    ]
    for offsets, value in placement.unpack(x, F32).items():
        at = {SCALAR: (), TILE_RANK: offsets}
        at |= {rank: (offsets[axis],) for rank, axis in axes.items()}
        place = lanes.const(0, I32)
        for rank, stride, index in zip(ranks, strides, indices, strict=True):
            place = place + index[at[rank]] * stride
        _add(_pointer(target, place), [value.ir], unless_zero=True)
