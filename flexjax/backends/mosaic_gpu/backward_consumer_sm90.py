"""The consumers of the backward kernel: 64 keys of a column each. See backward_sm90.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu import backward_config as configs
from flexjax.backends.mosaic_gpu import capture_gradients, dq_tiles, reductions, registers
from flexjax.backends.mosaic_gpu.backward_copies_sm90 import Copies
from flexjax.backends.mosaic_gpu.backward_kernel_sm90 import Buffers, Inputs, Kernel, Outputs
from flexjax.backends.mosaic_gpu.backward_schedule import Column, Steps
from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS
from flexjax.backends.mosaic_gpu.counter import uniform
from flexjax.backends.mosaic_gpu.dq_rounder_sm90 import DqRounder, count_column
from flexjax.backends.mosaic_gpu.launch_sm90 import rows, unknown_zero
from flexjax.backends.mosaic_gpu.registers import ROW
from flexjax.backends.mosaic_gpu.tile_gradients import Cotangents, Place


class Accumulators(NamedTuple):
    """Accumulators of the column's matrix products, [64, D] and [64, Dv]."""

    dk: Any
    dv: Any


class InRow(NamedTuple):
    """A step of a column.

    Attributes:
        b, h: batch row and query head.
        number: of the step among theirs.
        steps: all of theirs.
    """

    b: Any
    h: Any
    number: Any
    steps: Steps


# The first query of the step that takes over a stage, and whether there is one; None with a producer.
Following = tuple[Any, Any] | None
Sums = tuple[Any, ...]  # by key, one for every load of kind KEYS


@dataclasses.dataclass(frozen=True)
class Consumer:
    """A warpgroup that computes 64 keys of a column.

    Its number is static: the addresses of its shared memory are then constants of the matrix instructions, which
    otherwise take registers that are not there.
    """

    kernel: Kernel
    inputs: Inputs
    outputs: Outputs
    buffers: Buffers
    warpgroup: int

    @property
    def _part(self) -> configs.Part | None:
        """The share of dQ that this warpgroup computes; None without any."""
        parts = self.kernel.parts
        return parts[self.warpgroup] if parts and parts[self.warpgroup].columns else None

    def run(self, cta: Any) -> None:
        kernel, buffers = self.kernel, self.buffers
        if not kernel.config.persistent:
            column = kernel.schedule.column(cta)
            if kernel.config.self_loading:
                Copies(kernel, self.inputs, buffers).keys_and_values(column)
            # Every warpgroup reads all the keys, for its share of dQ.
            plgpu.barrier_wait(buffers.key_value_full)
            _, dk, dv = self._sums_of(column, jnp.int32(0))
            self._store(column, dk, dv)
            return
        (number,), (free,), (dq,) = buffers.column, buffers.key_value_free, self.inputs.dq

        def take(state: Any) -> Any:
            """A column: its number, how many steps and columns came before, and the head of the last of them."""
            mine, begin, turn, before = map(uniform, state)
            column = kernel.schedule.column(mine, turn, begin)
            end, dk, dv = self._sums_of(column, begin)
            plgpu.barrier_arrive(free)
            if kernel.config.rounding:
                count_column(dq, kernel, before, end > begin)
            self._store_aside(column, dk, dv)
            plgpu.barrier_wait(buffers.key_value_full)
            return number[0], end, turn + 1, kernel.schedule.head_of(column)

        plgpu.barrier_wait(buffers.key_value_full)
        start = number[0], jnp.int32(0), jnp.int32(0), jnp.int32(-1)
        *_, last = lax.while_loop(lambda state: state[0] >= 0, take, start)
        if kernel.config.rounding:
            count_column(dq, kernel, last, False)
            DqRounder(kernel, self.inputs, self.outputs).finish(cta, self.warpgroup)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _sums_of(self, column: Column, begin: Any) -> tuple[Any, Any, Any]:
        """(number behind the last step, dK, dV) of a column whose first step has the number `begin`."""

        def accumulate(dk: Any, dv: Any) -> tuple[Any, Any, Any]:
            end = self._walk(column, Accumulators(dk, dv), begin)
            return end, dk[...], dv[...]

        dims = (x.shape[-1] for x in (self.buffers.key, self.buffers.value))
        shapes = (plgpu.ACC((WARPGROUP_ROWS, d), jnp.float32) for d in dims)
        return pl.run_scoped(accumulate, *shapes)

    @property
    def _slot(self) -> int:
        """Which of the column's slots of 64 keys this warpgroup computes."""
        return self.warpgroup

    @property
    def _first_key(self) -> int:
        return self._slot * WARPGROUP_ROWS

    @property
    def _key_sums(self) -> tuple[Any, ...]:
        """References to the sums by key that this warpgroup computes."""
        return self.outputs.key_sums

    def _walk(self, column: Column, accumulators: Accumulators, begin: Any) -> Any:
        """All steps of the column; returns the number behind the last one."""
        return self._column(column, accumulators, begin)

    def _column(self, column: Column, accumulators: Any, begin: Any) -> Any:
        """Takes the steps, from the number `begin` on; returns the number behind the last one."""
        schedule = self.kernel.schedule

        def row(number: Any, begin: Any) -> Any:
            b, h = schedule.row(column, number)
            steps = schedule.steps(self.inputs.lists, column, b, h)
            if self.kernel.config.self_loading:
                self._start_loading(steps, begin, b, h)

            def step(masked: bool) -> Any:
                def run(i: Any, sums: Sums) -> Sums:
                    where = InRow(b, h, i, steps)
                    return self._step(begin + i, where, column, accumulators, sums, masked)

                return run

            zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), ROW)
            sums = tuple(zeros for _ in self._key_sums)
            if schedule.has_masked_steps:
                sums = lax.fori_loop(0, steps.masked, step(True), sums)
                sums = lax.fori_loop(steps.masked, steps.count, step(False), sums)
            else:
                sums = lax.fori_loop(0, steps.count, step(False), sums)
            if self.kernel.config.rolling:
                plgpu.wgmma_wait(0)
                self._hand_back_queries(begin + steps.count - 1, steps.count > steps.masked)
            self._store_key_sums(sums, column, b, h)
            return begin + steps.count

        if not self.kernel.config.interpret:
            # Where the compiler knows how many steps there are, it does not know where their numbers begin.
            begin = begin + registers.zero_at_run_time()
        if schedule.rows == 1:
            return row(jnp.int32(0), begin)
        return lax.fori_loop(0, schedule.rows, row, begin)

    @property
    def _dk_first(self) -> bool:
        return self.kernel.config.order == "dk_first" or self._part is None

    def _hand_back_queries(self, number: Any, condition: Any) -> None:
        """Hands back the queries of step `number` on a condition."""
        free = self.buffers.query_free.at[self.kernel.stage(jnp.maximum(number, 0))]
        pl.when(condition)(lambda: plgpu.barrier_arrive(free))

    def _start_loading(self, steps: Steps, begin: Any, b: Any, h: Any) -> None:
        """Issues the copies of a row's first steps, where there is no producer."""
        kernel, copies = self.kernel, Copies(self.kernel, self.inputs, self.buffers)
        firsts = [steps.first_query(i) for i in range(kernel.config.stages)]
        for i, first in enumerate(firsts):

            @pl.when(i < steps.count)
            def _(i: int = i, first: Any = first) -> None:
                stage = kernel.stage(begin + i)
                copies.queries(b, h, first, stage)
                copies.cotangents(b, h, first, stage)

    def _following(self, row: InRow) -> Following:
        """What a step's stage is to hold next. Read early, it has arrived when the stage is free."""
        if not self.kernel.config.self_loading:
            return None
        number = row.number + self.kernel.config.stages
        return row.steps.first_query(number), number < row.steps.count

    def _hand_back_step(self, stage: Any, place: Place, following: Following) -> None:
        """Hands back the queries of a step; without a producer, to those that follow."""
        self._hand_back(stage, place, following, self.buffers.query_free, Copies.queries)

    def _hand_back_cotangents(self, stage: Any, place: Place, following: Following) -> None:
        self._hand_back(stage, place, following, self.buffers.d_out_free, Copies.cotangents)

    def _hand_back(
        self, stage: Any, place: Place, following: Following, free: Any, copy: Callable[..., None]
    ) -> None:
        if following is None:
            plgpu.barrier_arrive(free.at[stage])
            return
        first, wanted = following

        @pl.when(wanted)
        def _() -> None:
            # The other warps of the warpgroup have to have read it, too.
            plgpu.barrier_arrive(free.at[0])
            plgpu.barrier_wait(free.at[0])
            copy(Copies(self.kernel, self.inputs, self.buffers), place.b, place.h, first, stage)

    def _place(self, stage: Any, b: Any, h: Any, column: Column) -> tuple[Any, Place]:
        """(first query of a step, where its tile of scores lies)."""
        # The producer looked it up: lists and counts would take registers here.
        q_tile, number = self.kernel.config.q_tile, self.buffers.q_number[stage]
        if self.kernel.problem.mask is not None:  # which gets simpler if the compiler knows bounds
            last = self.kernel.schedule.padded_queries // q_tile - 1
            number = jnp.clip(number, 0, last)
        first_query = pl.multiple_of(number * q_tile, q_tile)
        key = column.tile * self.kernel.config.kv_tile + self._first_key
        return first_query, Place(b, h, self.kernel.schedule.inside(first_query), key)

    # -- one step -------------------------------------------------------------------------------

    def _step(
        self,
        number: Any,
        row: InRow,
        column: Column,
        accumulators: Accumulators,
        sums: Sums,
        masked: bool,
    ) -> Sums:
        kernel, buffers, config = self.kernel, self.buffers, self.kernel.config
        rolling = config.rolling and not masked
        stage = kernel.stage(number)
        following = self._following(row)
        plgpu.barrier_wait(buffers.query_full.at[stage])
        first_query, place = self._place(stage, row.b, row.h, column)
        scored = None
        if rolling:
            before = row.number > row.steps.masked
            scored = functools.partial(self._hand_back_queries, number - 1, before)
        p, cotangents = self._cotangents(number, place, masked, scored)
        ds = cotangents.ds.astype(kernel.problem.q_dtype)
        own_ds = buffers.ds.at[self._ds_stage(number, column), self._slot]
        self._add_product(accumulators.dv, p, buffers.p, buffers.d_out.at[stage])
        if kernel.parts or config.interpret:
            own_ds[...] = ds
            if not rolling:
                plgpu.commit_smem()
        if kernel.parts and not rolling:
            plgpu.barrier_arrive(buffers.ds_full)
        operand = own_ds if config.interpret else ds
        if self._dk_first:
            plgpu.wgmma(accumulators.dk, operand, buffers.query.at[stage])
        sums = self._sum_loads(sums, cotangents, first_query, place)
        if rolling:
            registers.publish_and_meet(config.warpgroups)
        elif kernel.parts:
            plgpu.barrier_wait(buffers.ds_full)
        if self._dk_first:
            self._finish_step(number, column, place, first_query, following)
            return sums
        part = self._part
        assert part is not None, "the other order is that of a warpgroup with a share of dQ"

        def product(dq: Any) -> Any:
            self._issue_dq(dq, part, number, column)
            plgpu.wgmma(accumulators.dk, operand, buffers.query.at[stage])
            result = plgpu.wgmma_accumulator_load(dq, wait_n=1)
            self._hand_back_cotangents(stage, place, following)
            return result

        dq = pl.run_scoped(product, plgpu.ACC((part.rows, part.columns), jnp.float32))
        self._add_to_dq(dq, part, column.tile, kernel.row_of(place.b, place.h, first_query))
        if not rolling:
            plgpu.wgmma_wait(0)
            self._hand_back_step(stage, place, following)
        return sums

    def _finish_step(
        self,
        number: Any,
        column: Column,
        place: Place,
        first_query: Any,
        following: Following,
    ) -> None:
        """Awaits the products with the step's queries, hands them back, and adds the share of dQ."""
        part, stage = self._part, self.kernel.stage(number)

        def hand_back() -> None:
            self._hand_back_cotangents(stage, place, following)
            self._hand_back_step(stage, place, following)

        if part is None:
            plgpu.wgmma_wait(0)
            hand_back()
            return

        def product(dq: Any) -> Any:
            count = self._issue_dq(dq, part, number, column)
            plgpu.wgmma_wait(count)
            hand_back()
            return dq[...]

        dq = pl.run_scoped(product, plgpu.ACC((part.rows, part.columns), jnp.float32))
        self._add_to_dq(dq, part, column.tile, self.kernel.row_of(place.b, place.h, first_query))

    def _ds_stage(self, step: Any, column: Column) -> Any:
        """Where a step's dS is."""
        return lax.rem(step, jnp.int32(configs.DS_STAGES))

    def _issue_dq(self, dq: Any, part: configs.Part, step: Any, column: Column) -> int:
        """Issues a warpgroup's share of a step's dS K; returns the number of products."""
        slots, ds_stage = self.kernel.config.key_slots, self._ds_stage(step, column)
        zero = unknown_zero(step + 1)  # there may be a step -1
        for slot in range(slots):
            queries = self.buffers.ds.at[ds_stage, slot, :, pl.ds(part.row, part.rows)]
            keys = self.buffers.key.at[slot + zero, :, pl.ds(part.column, part.columns)]
            plgpu.wgmma(dq, queries.transpose((1, 0)), keys)
        return slots

    def _cotangents(
        self,
        number: Any,
        place: Place,
        masked: bool,
        scored: Callable[[], None] | None = None,
    ) -> tuple[Any, Cotangents]:
        """(probabilities as operand, cotangents) of a step; awaits its products.

        Args:
            number: of the step.
            place: where the step's tile of scores lies.
            masked: whether positions may be hidden.
            scored: called as soon as the scores, and every product issued before, are there.
        """
        kernel, buffers, tile = self.kernel, self.buffers, self.kernel.tile
        captures, mask_captures = self.inputs.score_captures, self.inputs.mask_captures
        stage, slot = kernel.stage(number), self._slot + unknown_zero(number)

        def compute(scores: Any, dp: Any) -> Any:
            plgpu.wgmma(scores, buffers.key.at[slot], buffers.query.at[stage].transpose((1, 0)))
            plgpu.barrier_wait(buffers.d_out_full.at[stage])
            plgpu.wgmma(dp, buffers.value.at[slot], buffers.d_out.at[stage].transpose((1, 0)))
            early = masked and kernel.problem.mask_loads  # while the products are under way
            allowed = tile.allowed(place, mask_captures) if early else None
            raw = plgpu.wgmma_accumulator_load(scores, wait_n=1)
            if scored is not None:
                scored()
            if masked and not early:
                allowed = tile.allowed(place, mask_captures)
            # Read late, or ptxas keeps them in registers while there are none to spare.
            lse = plgpu.load(buffers.lse.at[stage], layout=tile.query_layout)
            known = tile.probabilities(raw, lse, place, captures, allowed, masked)
            p = known.p.astype(kernel.problem.q_dtype)
            difference = dp[...]
            delta = plgpu.load(buffers.delta.at[stage], layout=tile.query_layout)
            return p, tile.cotangents(known, difference, delta, place, captures)

        shape = plgpu.ACC(tile.shape, jnp.float32)
        return pl.run_scoped(compute, shape, shape)

    def _add_product(
        self, accumulator: Any, operand: Any, buffer: tuple[Any, ...], other: Any
    ) -> None:
        """Issues a product with an operand in registers, which the interpreter does not know."""
        if buffer:
            staged = buffer[0].at[self._slot]
            staged[...] = operand
            plgpu.commit_smem()
            operand = staged
        plgpu.wgmma(accumulator, operand, other)

    def _add_to_dq(
        self, dq: Any, part: configs.Part, kv_tile: Any, row: Any, publish: bool = False
    ) -> None:
        """Adds a share of dQ in global memory.

        Args:
            dq: the share.
            part: which share it is.
            kv_tile: number of the column's tile of keys.
            row: the step's first row of dQ, see `Kernel.row_of`.
            publish: see `dq_tiles.add`.
        """
        kernel, buffer = self.kernel, self.buffers.dq[self.warpgroup]
        (target,) = self.inputs.dq
        if not kernel.config.interpret:
            if kernel.config.handed_over:
                dq_tiles.hand_over(buffer, dq, self.warpgroup, publish)
                return
            dim = configs.padded_dim(kernel.problem.qk_dim)
            dq_tiles.add(target, buffer, dq, row + part.row, part.column, dim, publish)
            return
        # The interpreter has no reductions: every tile of keys has a dQ of its own.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffer[...] = dq
        plgpu.commit_smem()
        where = pl.ds(row + part.row, part.rows), pl.ds(part.column, part.columns)
        plgpu.copy_smem_to_gmem(buffer, target.at[(kv_tile, *where)])

    # -- captured arrays ------------------------------------------------------------------------

    def _sum_loads(
        self, sums: tuple[Any, ...], cotangents: Cotangents, first_query: Any, place: Place
    ) -> tuple[Any, ...]:
        """Adds a step to the gradients of what the score_mod reads; returns the new sums by key."""
        kernel, problem, interpret = self.kernel, self.kernel.problem, self.kernel.config.interpret
        by_key, targets = list(sums), list(self.inputs.sums)
        head = place.b * problem.q_heads + place.h
        for load in kernel.loads:
            values = cotangents.loads[load.number]
            if load.kind == capture_gradients.KEYS:
                added = values.sum(axis=1) if interpret else registers.partial_row_sums(values)
                by_key.append(by_key.pop(0) + added)  # once around
                continue
            target = targets.pop(0)
            if interpret:
                span = pl.ds(place.key, WARPGROUP_ROWS), pl.ds(first_query, kernel.config.q_tile)
                target[(place.b, place.h, *span)] = values
            elif load.kind == capture_gradients.QUERIES:
                start = head * kernel.schedule.padded_queries + first_query
                reductions.add_column_sums(target, values, start)
            elif load.kind == capture_gradients.DIAGONALS:
                count = capture_gradients.diagonal_count(problem.q_len, problem.kv_len)
                zero = capture_gradients.diagonal_origin(problem.kv_len)
                start = head * count + zero + place.query - place.key
                reductions.add_diagonal_sums(target, values, start)
            else:
                indices = kernel.tile.load_indices(load.number, place, self.inputs.score_captures)
                reductions.add_elements(target, load.strides, indices, values, transposed=True)
        return tuple(by_key)

    def _store_key_sums(self, sums: tuple[Any, ...], column: Column, b: Any, h: Any) -> None:
        first = column.tile * self.kernel.config.kv_tile + self._first_key
        for ref, total in zip(self._key_sums, sums, strict=True):
            if not self.kernel.config.interpret:
                total = registers.finish_row_sums(total)
            ref[b, h, pl.ds(first, WARPGROUP_ROWS)] = total

    # -- results --------------------------------------------------------------------------------

    def _store(self, column: Column, dk: Any, dv: Any) -> None:
        """Writes dK and dV of a column, in place of its keys and values; what lies past the end TMA drops."""
        self._store_tile(column, dv, self.buffers.value, self.outputs.dv)
        if self.kernel.parts:
            # The other warpgroup may still read these keys, for its last share of dQ.
            plgpu.barrier_arrive(self.buffers.ds_full)
            plgpu.barrier_wait(self.buffers.ds_full)
        scaled = dk * self.kernel.problem.scale
        self._store_tile(column, scaled, self.buffers.key, self.outputs.dk)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _store_aside(self, column: Column, dk: Any, dv: Any) -> None:
        """Writes dK and dV of a column by way of memory of their own, while the next keys and values arrive."""
        (buffer,) = self.buffers.results
        for x, target in ((dv, self.outputs.dv), (dk * self.kernel.problem.scale, self.outputs.dk)):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self._store_tile(column, x, buffer, target)

    def _store_tile(self, column: Column, x: Any, buffer: Any, target: Any) -> None:
        problem, staged = self.kernel.problem, buffer.at[self._slot]
        staged[...] = x.astype(problem.q_dtype)
        plgpu.commit_smem()
        first = column.tile * self.kernel.config.kv_tile + self._first_key
        head = column.h * self.kernel.schedule.shares + column.share
        where = rows(problem, target, column.b, head, first, WARPGROUP_ROWS)
        plgpu.copy_smem_to_gmem(staged, where)
