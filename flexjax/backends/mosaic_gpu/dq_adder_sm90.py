"""A warp that adds a consumer warpgroup's shares of dQ, beside the producer of the backward kernel on Hopper.

The consumer leaves a share in shared memory (`dq_tiles.hand_over`) and goes on; it needs the memory again a step
later. The warp

    tells the consumer that the memory is free
    where there is an order, waits until it is this column's turn
    waits for the consumer's share
    issues the additions, by bulk copies
    where there is an order, counts for the step before, whose additions must be complete
    waits until the shared memory has been read

Heads wider than 128 have their consumers save registers so. For the others it is a way to bring additions into an
order, in which float32 gives the same bits in every run: for every share of a tile of dQ there is a counter of the
columns that have added theirs, and a column adds when the counter has come to its own number among the columns of
its head. All of them walk over the queries in the same order, each one or two steps behind the one before it.
Where a head's columns do not all run at once, those that start later do so with this distance.

Nobody waits for ever: a column waits for columns of smaller numbers, which the grid has started earlier (see
backward_schedule.py), and the first of those that run waits for nobody.

One thread issues, waits and counts. Between additions of two columns, which are asynchronous, stand: completion of
the first ones, which includes a fence between proxies; a release; an acquire; a fence between proxies. The release
takes as long as half a step, which is why it is the step before that is counted, behind the next one's additions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from flexjax.backends.mosaic_gpu import backward_config as configs
from flexjax.backends.mosaic_gpu import dq_tiles
from flexjax.backends.mosaic_gpu.backward_kernel_sm90 import Buffers, Inputs, Kernel


@dataclasses.dataclass(frozen=True)
class DqAdder:
    """A warp that adds one consumer warpgroup's shares of dQ."""

    kernel: Kernel
    inputs: Inputs
    buffers: Buffers
    warpgroup: int

    @property
    def _part(self) -> configs.Part:
        return self.kernel.parts[self.warpgroup]

    def run(self, cta: Any) -> None:
        kernel = self.kernel
        if not self._part.columns:
            return
        schedule = kernel.schedule
        column = schedule.column(cta)

        def row(number: Any, before: Any) -> Any:
            b, h = schedule.row(column, number)
            steps = schedule.steps(self.inputs.lists, column, b, h)

            def step(i: Any, before: Any) -> Any:
                first = kernel.row_of(b, h, steps.first_query(i))
                if kernel.config.deferred:  # the first share is that of no step
                    pl.when(before < 0)(self._skip)
                return self._step(first, column.tile, before)

            return lax.fori_loop(0, steps.count, step, before)

        self._finish(lax.fori_loop(0, schedule.rows, row, jnp.int32(-1)))

    def _step(self, first_row: Any, rank: Any, before: Any) -> Any:
        """Adds a share, in its turn.

        Args:
            first_row: the step's first row of dQ.
            rank: how many columns have to add theirs before.
            before: the counter of the step before, or a negative number.

        Returns:
            The counter of this step, to be raised when the additions are complete.
        """
        kernel, part = self.kernel, self._part
        tile = lax.div(first_row, jnp.int32(kernel.config.q_tile))
        counter = tile * len(kernel.parts) + self.warpgroup
        free, full = dq_tiles.handover_barriers(self.warpgroup)
        dim = configs.padded_dim(kernel.problem.qk_dim)
        types = (plgpu.RefType(),) * 2, (plgpu.RefType(),) * len(self.inputs.turns)

        @plgpu.inline_mgpu(arg_types=(*types, (plgpu.Layout.WG_SPLAT,) * 4))
        def emit(_: Any, refs: Any, turns: Any, numbers: Any) -> None:
            sums, staged = refs
            row, rank, now, before = (x.registers.item() for x in numbers)
            first = _first_lane()
            mgpu.utils.warp_barrier()
            _barrier("bar.arrive", free)
            if turns:
                with mgpu.utils.when(first):
                    _await_turn(turns[0], now, rank)
                mgpu.utils.warp_barrier()
            _barrier("bar.sync", full)
            shape = part.rows, part.columns
            warps = [_i32(number) for number in range(4)]
            dq_tiles.emit_reduce(row, warps, sums, staged, shape, part.column, dim, first)
            if turns:
                with mgpu.utils.when(first):
                    _count(turns[0], before, 1)
            mgpu.utils.inline_ptx("cp.async.bulk.wait_group.read 0;", has_side_effects=True)

        refs = self.inputs.dq[0], self.buffers.dq[self.warpgroup]
        emit(refs, self.inputs.turns, (first_row + part.row, rank, counter, before))
        return counter

    def _skip(self) -> None:
        """Takes a share over without adding it."""
        free, full = dq_tiles.handover_barriers(self.warpgroup)

        @plgpu.inline_mgpu()
        def emit(_: Any) -> None:
            _barrier("bar.arrive", free)
            _barrier("bar.sync", full)

        emit()

    def _finish(self, last: Any) -> None:
        """Counts for the last step."""
        if not self.inputs.turns:
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
        def emit(_: Any, turns: Any, last: Any) -> None:
            with mgpu.utils.when(_first_lane()):
                _count(turns, last.registers.item(), 0)

        emit(self.inputs.turns[0], last)


def _count(turns: ir.Value, counter: ir.Value, pending: int) -> None:
    """Raises a counter, unless its number is negative, when all but `pending` groups of additions are complete."""
    code = f"""{{
        .reg .pred none;
        setp.lt.s32 none, $1, 0;
        cp.async.bulk.wait_group {pending};
        @!none red.release.gpu.add.s32 [$0], 1;
    }}"""
    mgpu.utils.inline_ptx(code, _address(turns, counter), counter, has_side_effects=True)


def _await_turn(turns: ir.Value, counter: ir.Value, rank: ir.Value) -> None:
    """Waits until `rank` columns have counted; what this thread adds next comes after theirs."""
    # Reads that acquire empty the first-level cache, so that only the last one does.
    code = """{
        .reg .pred early;
        .reg .s32 turn;
    again:
        ld.relaxed.gpu.s32 turn, [$0];
        setp.lt.s32 early, turn, $1;
        @early bra again;
        ld.acquire.gpu.s32 turn, [$0];
        fence.proxy.async.global;
    }"""
    mgpu.utils.inline_ptx(code, _address(turns, counter), rank, has_side_effects=True)


def _address(turns: ir.Value, counter: ir.Value) -> ir.Value:
    i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(turns), [arith.extsi(i64, counter)], i32)


def _first_lane() -> ir.Value:
    lane = arith.andi(mgpu.utils.thread_idx(), _i32(31))
    return arith.cmpi(arith.CmpIPredicate.eq, lane, _i32(0))


def _barrier(instruction: str, number: int) -> None:
    mgpu.utils.inline_ptx(
        f"{instruction} {number}, {dq_tiles.HANDOVER};", has_side_effects=True, convergent=True
    )


def _i32(value: int) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(32), value)
