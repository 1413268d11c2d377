"""Decoding on Hopper: attention of a few queries to many keys, at the speed of memory.

The steps of all tiles, one after another, are dealt out to as many CTAs as run at a time (decode_plan.py). Every
CTA is one warpgroup that keeps a ring of shared-memory stages filled by TMA and computes what arrives, two of them
on a multiprocessor; its steps may belong to several tiles, and the loads for the next tile run ahead of the end of
this one. What a CTA has of a tile, a *segment*, it writes down unnormalised; a second small kernel adds the
segments up (combine_sm90.py).

    for each step:
        S = Q K^T, give the stage of K to the next load, P = softmax of S
        O = O alpha + P V, give the stage of V to the next load
        at the end of a tile, or of the CTA's steps: write O, m and l of the segment

The segment of tile t in CTA c is number c + t: one of the two grows from each segment to the next.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu import combine_sm90, emit, packing, products_sm90, registers
from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS, padded_dim
from flexjax.backends.mosaic_gpu.decode_config import DecodeConfig
from flexjax.backends.mosaic_gpu.decode_kernel_sm90 import Buffers, Inputs, Kernel, Segments
from flexjax.backends.mosaic_gpu.decode_plan import Plan
from flexjax.backends.mosaic_gpu.decode_steps import Place, Step, Steps
from flexjax.backends.mosaic_gpu.launch_sm90 import (
    addressable,
    capture,
    launch,
    rows,
)
from flexjax.backends.mosaic_gpu.registers import ROW, TILE
from flexjax.backends.mosaic_gpu.softmax import State
from flexjax.problem import BLHD, Operands, Problem, Result, heads_first

# Columns of queries or values that are on their way through registers at a time.
_COLUMNS = 64


def forward(problem: Problem, operands: Operands, config: DecodeConfig) -> Result:
    """Runs the two kernels.

    Copies keys and values only if TMA cannot address them: see `launch_sm90.addressable`.
    """
    plan = Plan(problem, config)
    work = plan.work(operands)
    query, key, value = _arrays(plan, operands)
    lengths = () if operands.lengths is None else (operands.lengths,)
    kernel = Kernel(plan)
    score_captures = operands.score_captures if problem.score is not None else ()
    mask_captures = operands.mask_captures if kernel.mask is not None else ()
    inputs = Inputs(
        query,
        key,
        value,
        work,
        lengths,
        () if operands.page_table is None else (operands.page_table,),
        *(tuple(map(capture, c)) for c in (score_captures, mask_captures)),
    )
    count = config.ctas + plan.rows.all_tiles
    written = WARPGROUP_ROWS if config.interpret else min(plan.rows.count, WARPGROUP_ROWS)
    stats = jax.ShapeDtypeStruct((count, WARPGROUP_ROWS), jnp.float32)
    out = jax.ShapeDtypeStruct((count, written, value.shape[-1]), jnp.float32)
    segments = launch(
        "flexjax_decode",
        functools.partial(_run, kernel),
        inputs,
        Segments(out, stats, stats),
        kernel.buffers(query.shape[-1], value.shape[-1]),
        ctas=config.ctas,
        warpgroups=1,
        approx_math=config.approx_math,
        interpret=config.interpret,
    )
    return combine_sm90.combine(plan, segments, work.starts, lengths)


def _arrays(plan: Plan, operands: Operands) -> tuple[Any, Any, Any]:
    """Queries as rows of tiles [B * heads, rows, D], and keys and values as TMA reads them."""
    problem, config, row = plan.problem, plan.config, plan.rows
    dim = padded_dim(problem.qk_dim)
    query = heads_first(operands.query, problem.layout)
    query = query.reshape(problem.batch * row.heads, row.count, problem.qk_dim)
    if dim != problem.qk_dim:
        query = jnp.pad(query, ((0, 0), (0, 0), (0, dim - problem.qk_dim)))
    axis = 1 if problem.layout == BLHD and operands.page_table is None else 2
    multiple = config.kv_tile if config.interpret and operands.page_table is None else 8
    key, value = (
        addressable(x, axis, multiple, padded_dim(x.shape[3]))
        for x in (operands.key, operands.value)
    )
    if operands.page_table is not None:  # one long row of tokens a head
        key, value = (x.reshape(x.shape[0], -1, x.shape[3]) for x in (key, value))
    return query, key, value


def _run(kernel: Kernel, inputs: Inputs, outputs: Segments, buffers: Buffers) -> None:
    Decoder(kernel, inputs, outputs, buffers).run(lax.axis_index("cta"))


@dataclasses.dataclass(frozen=True)
class Decoder:
    """One CTA."""

    kernel: Kernel
    inputs: Inputs
    outputs: Segments
    buffers: Buffers

    @property
    def steps(self) -> Steps:
        return Steps(self.kernel, self.inputs)

    def run(self, cta: Any) -> None:
        plan, stages = self.kernel.plan, self.kernel.plan.config.stages
        total = self.inputs.work.starts[plan.list_rows]
        begin, end = share(total, plan.config.ctas, cta)
        nowhere = Place(jnp.int32(0), jnp.int32(0), jnp.int32(0))

        def fill(i: Any, place: Place) -> Place:
            place = self.steps.located(begin + i, place)
            step = self.steps.step_at(begin + i, place)

            @pl.when(begin + i < end)
            def _() -> None:
                self._load(self.inputs.key, self.buffers.key, self.buffers.key_full, i, step)
                self._load(self.inputs.value, self.buffers.value, self.buffers.value_full, i, step)

            return place

        ahead = lax.fori_loop(0, stages, fill, nowhere)
        v_dim = self.buffers.value.shape[-1]
        zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, v_dim), jnp.float32), TILE)
        carry = nowhere, ahead, zeros, self.kernel.softmax.start(WARPGROUP_ROWS)
        lax.fori_loop(begin, end, lambda x, c: self._step(cta, x, begin, end, *c), carry)

    # -- loads ----------------------------------------------------------------------------------

    def _load(self, source: Any, target: Any, full: Any, stage: Any, step: Step) -> None:
        plan, problem = self.kernel.plan, self.kernel.plan.problem
        kv_tile, pieces = plan.config.kv_tile, self.kernel.pieces
        head = step.head if plan.config.packed else lax.div(step.head, jnp.int32(problem.group))
        if not step.pages:
            b = lax.div(step.b, jnp.int32(problem.batch // problem.kv_batch))
            first = pl.multiple_of(self.steps.inside(step.first_key), kv_tile)
            where = rows(problem, source, b, head, first, kv_tile)
            plgpu.copy_gmem_to_smem(where, target.at[stage], full.at[stage])
            return
        length = kv_tile // pieces
        for i, row in enumerate(step.pages):
            where = source.at[head, pl.ds(pl.multiple_of(row, length), length)]
            part = target.at[stage]
            part = part if pieces == 1 else part.at[pl.ds(i * length, length)]
            plgpu.copy_gmem_to_smem(where, part, full.at[stage])

    def _pass_on(self, free: Any, *load: Any, wanted: Any) -> None:
        """Gives a stage that this warp has read to the next load, when the other warps have read it too."""

        @pl.when(wanted)
        def _() -> None:
            plgpu.barrier_arrive(free.at[0])
            plgpu.barrier_wait(free.at[0])
            self._load(*load)

    def _load_queries(self, step: Step) -> None:
        """Queries of a tile to shared memory; rows past the last one repeat it."""
        plan, buffer = self.kernel.plan, self.buffers.query
        plgpu.barrier_arrive(self.buffers.query_free.at[0])
        plgpu.barrier_wait(self.buffers.query_free.at[0])
        query = self.inputs.query
        graph = packing.reader(query.shape, plan.problem.q_dtype)
        for i, part in enumerate(_columns(buffer)):
            inputs = emit.TileInputs(
                score=None,
                b=0,
                h=step.b * plan.rows.heads + step.head,
                q_start=step.part * WARPGROUP_ROWS,
                kv_start=i * _COLUMNS,
                q_size=WARPGROUP_ROWS,
                kv_size=part.shape[-1],
                q_limit=plan.rows.count,
                kv_limit=part.shape[-1],
                interpret=plan.config.interpret,
            )
            part[...] = emit.on_tile(graph, (query,), inputs)[0].astype(plan.problem.q_dtype)
        plgpu.commit_smem()

    # -- one step -------------------------------------------------------------------------------

    def _step(
        self,
        cta: Any,
        x: Any,
        begin: Any,
        end: Any,
        place: Place,
        ahead: Place,
        out: Any,
        state: State,
    ) -> tuple[Place, Place, Any, State]:
        config, buffers, softmax = self.kernel.plan.config, self.buffers, self.kernel.softmax
        stage = lax.rem(x - begin, jnp.int32(config.stages))
        place, ahead = self.steps.located(x, place), self.steps.located(x + config.stages, ahead)
        step, next_step = self.steps.step_at(x, place), self.steps.step_at(x + config.stages, ahead)
        more = x + config.stages < end
        starts = (x == begin) | (step.number == 0)
        pl.when(starts)(lambda: self._load_queries(step))
        out = jnp.where(jnp.broadcast_to(starts, out.shape), 0.0, out)
        state = State(
            jnp.where(jnp.broadcast_to(starts, (WARPGROUP_ROWS,)), -jnp.inf, state.reference),
            jnp.where(jnp.broadcast_to(starts, (WARPGROUP_ROWS,)), 0.0, state.total),
        )
        plgpu.barrier_wait(buffers.key_full.at[stage])
        scores = products_sm90.scores(buffers.query, buffers.key.at[stage])
        load = self.inputs.key, buffers.key, buffers.key_full, stage, next_step
        self._pass_on(buffers.key_free, *load, wanted=more)
        scores = self._hidden(self._scores(scores, step), step)
        p, state, alpha = softmax.searching(scores, state)
        out = softmax.rescaled(out, alpha)
        plgpu.barrier_wait(buffers.value_full.at[stage])
        self._clear_values(stage, step)
        p = p.astype(self.kernel.plan.problem.q_dtype)
        staged = buffers.probabilities[0] if buffers.probabilities else None
        out = products_sm90.add_weighted(out, p, buffers.value.at[stage], staged)
        load = self.inputs.value, buffers.value, buffers.value_full, stage, next_step
        self._pass_on(buffers.value_free, *load, wanted=more)
        pl.when(step.last | (x == end - 1))(lambda: self._store(cta + step.tile, out, state))
        return place, ahead, out, state

    def _clear_values(self, stage: Any, step: Step) -> None:
        """Zeros in place of values past the length, which may be NaN: a probability of 0 would not hide that."""
        if not self.inputs.lengths:
            return  # past the last key of an array TMA reads zeros
        buffer = self.buffers.value.at[stage]
        left = self.steps.length(step.b) - step.first_key

        @pl.when(left < self.kernel.plan.config.kv_tile)
        def _() -> None:
            for part in _columns(buffer):
                values = plgpu.load(part, layout=TILE)
                row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=TILE)
                part[...] = jnp.where(row < left, values, jnp.zeros((), values.dtype))
            plgpu.commit_smem()

    # -- scores ---------------------------------------------------------------------------------

    def _tile_inputs(self, scores: Any, step: Step) -> emit.TileInputs:
        plan = self.kernel.plan
        return emit.TileInputs(
            score=scores,
            b=step.b,
            h=step.head,
            q_start=step.part * WARPGROUP_ROWS,
            kv_start=self.steps.inside(step.first_key),
            q_size=WARPGROUP_ROWS,
            kv_size=plan.config.kv_tile,
            q_limit=plan.rows.count,
            kv_limit=plan.problem.kv_len,
            approx_math=plan.config.approx_math,
            interpret=plan.config.interpret,
        )

    def _scores(self, raw: Any, step: Step) -> Any:
        """Modified scores, up to a factor, from the products Q K^T."""
        graph, before = self.kernel.scores.graph, self.kernel.scores.before
        scores = raw if before == 1.0 else raw * before
        if graph is None:
            return scores
        tile = self._tile_inputs(scores, step)
        return emit.on_tile(graph, self.inputs.score_captures, tile)[0]

    def _hidden(self, scores: Any, step: Step) -> Any:
        """Scores with -inf where the mask, or the end of the keys, hides them."""
        kernel = self.kernel
        if kernel.mask is not None:
            inputs = self._tile_inputs(None, step)
            (allowed,) = emit.on_tile(kernel.mask, self.inputs.mask_captures, inputs)
            if kernel.plan.problem.blocks is not None:
                allowed = allowed | jnp.broadcast_to(~step.masked, allowed.shape)
            scores = jnp.where(allowed, scores, -jnp.inf)
        if kernel.limits:
            offset = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=TILE)
            left = self.steps.length(step.b) - step.first_key
            scores = jnp.where(offset < left, scores, -jnp.inf)
        return scores

    # -- results --------------------------------------------------------------------------------

    def _store(self, segment: Any, out: Any, state: State) -> None:
        """Writes down a segment."""
        plan, total = self.kernel.plan, state.total
        if not plan.config.interpret:
            total = registers.finish_row_sums(total)
        combine_sm90.store_rows(
            self.outputs.out,
            segment,
            0,
            0,
            out,
            min(plan.rows.count, WARPGROUP_ROWS),
            plan.config.interpret,
        )
        where = (segment, pl.ds(0, WARPGROUP_ROWS))
        self.outputs.reference[where] = plgpu.layout_cast(state.reference, ROW)
        self.outputs.total[where] = plgpu.layout_cast(total, ROW)


def share(total: Any, ctas: int, cta: Any) -> tuple[Any, Any]:
    """The steps of a CTA: (first, end)."""
    count = combine_sm90.steps_each(total, ctas)
    begin = jnp.minimum(cta * count, total)
    return begin, jnp.minimum(begin + count, total)


def _columns(buffer: Any) -> list[Any]:
    """A tile in shared memory in parts narrow enough to pass through registers beside an accumulator."""
    dim = buffer.shape[-1]
    if dim <= _COLUMNS:
        return [buffer]
    return [buffer.at[:, pl.ds(c, min(_COLUMNS, dim - c))] for c in range(0, dim, _COLUMNS)]
