"""The float32 sums of dQ in global memory, in the order in which a warpgroup holds them.

Many CTAs add to a tile of dQ (see backward_sm90.py). In the order of rows and columns, lanes would exchange half
of their registers, store 64 bits at a time, and the warpgroup would meet twice. Instead every thread stores its
registers as they are, 128 bits at a time, and each warp adds what it has by a copy of its own.

Lane 4 g + t of warp w holds of 64 rows the rows 16 w + 8 i + g, i < 2, and of each 8 columns from 8 j on the
columns 8 j + 2 t + e, e < 2. The sums are thus laid out as

    [64 rows, w, j, g, t, i, e]

where the rows are those of all batch rows and heads one after another. XLA puts them in order when it rounds them
to the queries' dtype, which takes no time of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from flexjax.backends.mosaic_gpu import placement
from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS
from flexjax.backends.mosaic_gpu.lanes import F32
from flexjax.backends.mosaic_gpu.registers import FIRST_NAMED_BARRIER, TILE, WARPGROUP

# Threads that meet at a hand-over: a warpgroup and a warp.
HANDOVER = WARPGROUP + 32

WARP_ROWS = 16
COLUMNS = 8  # that a warp stores at a time, of all its rows


def in_order(sums: Any, dim: int) -> Any:
    """[rows, dim] from the sums, [rows * dim]."""
    tiles = sums.reshape(-1, 4, dim // COLUMNS, 8, 4, 2, 2)
    return tiles.transpose(0, 1, 5, 3, 2, 4, 6).reshape(-1, dim)


def add(
    sums: Any, staged: Any, tile: jax.Array, row: Any, column: int, dim: int, publish: bool = False
) -> None:
    """Adds a tile, of a multiple of 64 rows and 8 columns, to the sums.

    Args:
        sums: the reference, [rows * dim].
        staged: flat shared memory of the tile's size, which the last tile may still be leaving.
        tile: float32.
        row: first of the tile's rows, a multiple of 64.
        column: first of its columns.
        dim: of the head.
        publish: whether to make all that this warpgroup has stored to shared memory visible to matrix products
            as well. It then meets once.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), TILE, plgpu.Layout.WG_SPLAT))
    def emit(_: Any, sums: Any, staged: Any, x: Any, row: Any) -> None:
        emit_add(row.registers.item(), x, sums, staged, column, dim, publish)

    emit(sums, staged, tile, row)


def hand_over(staged: Any, tile: jax.Array, warpgroup: int, publish: bool = False) -> None:
    """Leaves a tile to the warp that adds it to the sums in its turn: see dq_adder_sm90.py.

    Args:
        staged: flat shared memory of the tile's size, which the last tile may still be leaving.
        tile: float32, as in `add`.
        warpgroup: the number of the one that calls.
        publish: see `add`.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))
    def emit(_: Any, staged: Any, x: Any) -> None:
        emit_hand_over(x, staged, warpgroup, publish)

    emit(staged, tile)


def emit_add(
    row: ir.Value, x: Any, sums: ir.Value, staged: ir.Value, column: int, dim: int, publish: bool
) -> None:
    mgpu.utils.inline_ptx("cp.async.bulk.wait_group.read 0;", has_side_effects=True)
    mgpu.utils.warp_barrier()
    _stage(x, staged)
    if publish:
        mgpu.utils.warpgroup_barrier()
    else:
        mgpu.utils.warp_barrier()
    elected = nvvm.elect_sync()
    emit_reduce(row, [_warp()], sums, staged, x.shape, column, dim, elected)


def emit_hand_over(x: Any, staged: ir.Value, warpgroup: int, publish: bool) -> None:
    staged_free, staged_full = handover_barriers(warpgroup)
    mgpu.utils.inline_ptx(
        f"bar.sync {staged_free}, {HANDOVER};", has_side_effects=True, convergent=True
    )
    _stage(x, staged)
    if publish:
        mgpu.utils.warpgroup_barrier()
    mgpu.utils.inline_ptx(
        f"bar.arrive {staged_full}, {HANDOVER}; // $0",
        _constant(0, ir.IntegerType.get_signless(32)),  # see emit_reduce
        has_side_effects=True,
        convergent=True,
    )


def emit_reduce(
    row: ir.Value,
    warps: Sequence[ir.Value],
    sums: ir.Value,
    staged: ir.Value,
    shape: tuple[int, int],
    column: int,
    dim: int,
    predicate: ir.Value,
) -> None:
    """Issues the additions of what warps have staged of a tile, by the threads where `predicate` holds."""
    i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
    rows, columns = shape
    tiles = range(rows // WARPGROUP_ROWS)
    part = WARP_ROWS * columns
    for warp in warps:
        stage = _of_warp(staged, warp, shape)
        # 64 bits: sums may be many.
        first = arith.muli(arith.extsi(i64, row), _constant(dim, i64))
        inside = arith.addi(
            arith.muli(warp, _constant(WARP_ROWS * dim, i32)), _constant(WARP_ROWS * column, i32)
        )
        target = mgpu.utils.memref_ptr(sums)
        if target.type.address_space == 0:
            target = llvm.addrspacecast(llvm.PointerType.get(address_space=1), target)
        target = _at(target, arith.addi(first, arith.extsi(i64, inside)))
        for m in tiles:
            # The zero is there for LLVM: a zero that is needed after the products is not put where accumulators
            # start, and ptxas then knows that they start from zero.
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [
                    predicate,
                    _at(target, _constant(m * WARPGROUP_ROWS * dim, i32)),
                    _at(stage, _constant(m * part, i32)),
                    _constant(4 * part, i32),
                    _constant(0, i32),
                ],
                "@$0 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [$1], [$2], $3; // $4",
                "b,l,r,r,r",
                has_side_effects=True,
            )
    mgpu.utils.inline_ptx("cp.async.bulk.commit_group;", has_side_effects=True)


def _stage(x: Any, staged: ir.Value) -> None:
    """Stores what the thread holds, and makes it visible to copies once its threads have met."""
    i32 = ir.IntegerType.get_signless(32)
    quad = ir.VectorType.get((4,), ir.F32Type.get())
    held = placement.unpack(x, F32)
    rows, columns = x.shape
    lane = arith.andi(mgpu.utils.thread_idx(), _constant(31, i32))
    mine = _at(_of_warp(staged, _warp(), x.shape), arith.shli(lane, _constant(2, i32)))
    for m in range(rows // WARPGROUP_ROWS):
        for j in range(columns // COLUMNS):
            places = ((64 * m + 8 * i, 8 * j + e) for i in range(2) for e in range(2))
            values = vector.from_elements(quad, [held[p].ir for p in places])
            where = _constant(m * WARP_ROWS * columns + 4 * 32 * j, i32)
            llvm.store(values, _at(mine, where), alignment=16)
    nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)


def _warp() -> ir.Value:
    """The thread's warp, counted in its warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.andi(mgpu.utils.warp_idx(), _constant(3, i32))


def _of_warp(staged: ir.Value, warp: ir.Value, shape: tuple[int, int]) -> ir.Value:
    """Where a warp's part of a staged tile begins: all that it holds lies together."""
    own = _constant(shape[0] * shape[1] // 4, ir.IntegerType.get_signless(32))
    return _at(mgpu.utils.memref_ptr(staged), arith.muli(warp, own))


def handover_barriers(warpgroup: int) -> tuple[int, int]:
    """Named barriers of a warpgroup: "what was staged has left", "the next tile is staged"."""
    first = FIRST_NAMED_BARRIER + 1 + 2 * warpgroup  # after that of `registers.publish_and_meet`
    return first, first + 1


def _constant(value: int, kind: ir.Type) -> ir.Value:
    return arith.constant(kind, value)


def _at(pointer: ir.Value, offset: ir.Value) -> ir.Value:
    return mgpu.utils.getelementptr(pointer, [offset], ir.F32Type.get())
