"""Decoding on Hopper: attention of a few queries to many keys, at the speed of memory.

The steps of all tiles, one after another, are dealt out to as many CTAs as run at a time (decode_plan.py). Every
CTA is one warpgroup that keeps a ring of shared-memory stages filled by TMA and computes what arrives, two of them
on a multiprocessor; its steps may belong to several tiles, and the loads for the next tile run ahead of the end of
this one. A tile that a CTA has all the steps of is done then. Of others it writes down what it has, a *segment*,
unnormalised; of the CTAs that have segments of a tile, the one that is done last adds them up (combine_sm90.py).

    for each step:
        S = Q K^T, give the stage of K to the next load, P = softmax of S
        O = O alpha + P V, give the stage of V to the next load
        at the end of a tile, or of the CTA's steps: write O / l, or O, m and l of the segment

The segment of tile t in CTA c is number c + t: one of the two grows from each segment to the next.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu import combine_sm90, emit, packing, products_sm90, registers
from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS, padded_dim
from flexjax.backends.mosaic_gpu.decode_config import DecodeConfig
from flexjax.backends.mosaic_gpu.decode_kernel_sm90 import (
    Buffers,
    Inputs,
    Kernel,
    Outputs,
    Results,
    Segments,
)
from flexjax.backends.mosaic_gpu.decode_plan import Deal, Plan
from flexjax.backends.mosaic_gpu.decode_steps import Place, Step, Steps
from flexjax.backends.mosaic_gpu.launch_sm90 import (
    addressable,
    capture,
    launch,
    rows,
    unknown_zero,
)
from flexjax.backends.mosaic_gpu.registers import ROW, TILE
from flexjax.backends.mosaic_gpu.row_stores import store_rows
from flexjax.backends.mosaic_gpu.softmax import State
from flexjax.block_lists import cdiv
from flexjax.mods import graph as graphs
from flexjax.problem import BLHD, Operands, Problem, Result, heads_first

# Columns of queries or values that are on their way through registers at a time.
_COLUMNS = 64

# How many steps before its copies an entry of the page table is asked for: it comes behind the keys that are on
# their way. In profiles pages of 64 took 1% less time with three than with one, other pages the same.
_ENTRIES_AHEAD = 3


def forward(problem: Problem, operands: Operands, config: DecodeConfig) -> Result:
    """Runs the kernel.

    Copies keys and values only if TMA cannot address them: see `launch_sm90.addressable`.
    """
    plan = Plan(problem, config)
    work = plan.work(operands)
    query, key, value = _arrays(plan, operands)
    lengths = () if operands.lengths is None else (operands.lengths,)
    kernel = Kernel(plan)
    score_captures = operands.score_captures if problem.score is not None else ()
    mask_captures = operands.mask_captures if kernel.mask is not None else ()
    counts = jnp.zeros(plan.rows.all_tiles, jnp.int32)
    inputs = Inputs(
        query,
        key,
        value,
        work,
        lengths,
        page_table=() if operands.page_table is None else (operands.page_table,),
        score_captures=tuple(map(capture, score_captures)),
        mask_captures=tuple(map(capture, mask_captures)),
        counts=() if config.interpret else (jax.new_ref(counts),),
    )
    outputs = launch(
        "flexjax_decode",
        functools.partial(_run, kernel),
        inputs,
        _outputs(plan, value.shape[-1]),
        kernel.buffers(query.shape[-1], value.shape[-1]),
        ctas=config.ctas,
        warpgroups=1,
        approx_math=config.approx_math,
        interpret=config.interpret,
    )
    results = outputs.results
    if config.interpret:
        hidden = jnp.zeros(problem.batch, jnp.int32)
        if operands.lengths is not None:
            hidden = jnp.maximum(problem.q_len - operands.lengths, 0)
        starts = plan.starts(operands, work)
        results = combine_sm90.add_up_outside(plan, outputs.segments, starts, hidden, results)

    def by_head(x: Any) -> Any:
        shape = (problem.batch, problem.q_heads, problem.q_len)
        return x[:, : plan.rows.count].reshape(*shape, *x.shape[2:])

    out = heads_first(by_head(results.out)[..., : problem.v_dim], problem.layout)
    lse, *maxima = map(by_head, (results.lse, *results.max_scores))
    return Result(out, lse, maxima[0] if maxima else None)


def _outputs(plan: Plan, v_dim: int) -> Outputs:
    """The types of what the kernel writes."""
    rows, interpret = plan.rows, plan.config.interpret
    lead, padded = plan.problem.batch * rows.heads, rows.tiles * WARPGROUP_ROWS
    stats = jax.ShapeDtypeStruct((lead, padded), jnp.float32)
    out = (lead, padded if interpret else rows.count, v_dim)
    results = Results(
        jax.ShapeDtypeStruct(out, plan.problem.q_dtype),
        stats,
        (stats,) if plan.problem.max_scores else (),
    )
    count = plan.config.ctas + rows.all_tiles
    written = WARPGROUP_ROWS if interpret else min(rows.count, WARPGROUP_ROWS)
    stats = jax.ShapeDtypeStruct((count, WARPGROUP_ROWS), jnp.float32)
    out = jax.ShapeDtypeStruct((count, written, v_dim), jnp.float32)
    return Outputs(results, Segments(out, stats, stats))


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


class Load(NamedTuple):
    """A step, and of a paged cache the rows of the pool at which its copies begin."""

    step: Step
    pool_rows: tuple[Any, ...]


class Ahead(NamedTuple):
    """What is known of steps that are not loaded yet.

    Attributes:
        place: of the next one.
        far: of the last one whose entries of the page table are there; empty without pages.
        entries: of the next steps, one behind another.
    """

    place: Place
    far: tuple[Place, ...]
    entries: tuple[tuple[Any, ...], ...]


def _run(kernel: Kernel, inputs: Inputs, outputs: Outputs, buffers: Buffers) -> None:
    Decoder(kernel, inputs, outputs, buffers).run(lax.axis_index("cta"))


@dataclasses.dataclass(frozen=True)
class Decoder:
    """One CTA."""

    kernel: Kernel
    inputs: Inputs
    outputs: Outputs
    buffers: Buffers

    @property
    def steps(self) -> Steps:
        return Steps(self.kernel, self.inputs)

    def run(self, cta: Any) -> None:
        plan, stages = self.kernel.plan, self.kernel.plan.config.stages
        total, of_first = self.steps.total, self.steps.steps_of(0)
        deal = plan.deal(total, of_first)
        begin, end = plan.share(cta, total, of_first, deal)
        nowhere = Place(jnp.int32(0), jnp.int32(0), jnp.int32(0))
        start = self.steps.located(begin, nowhere)
        # Asked for before any key: what is asked for later waits until a whole ring of keys has come.
        queries = self._queries(self.steps.step_at(begin, start))

        def fill(i: Any, ahead: Ahead) -> Ahead:
            load, later = self._coming(begin + i, ahead)

            @pl.when(begin + i < end)
            def _() -> None:
                self._load(self.inputs.key, self.buffers.key, self.buffers.key_full, i, load)
                self._load(self.inputs.value, self.buffers.value, self.buffers.value_full, i, load)

            return later

        ahead = lax.fori_loop(0, stages, fill, self._ahead(begin, start))
        self._put_queries(queries)
        v_dim = self.buffers.value.shape[-1]
        zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, v_dim), jnp.float32), TILE)
        carry = start, ahead, zeros, self.kernel.softmax.start(WARPGROUP_ROWS)
        last, *_ = lax.fori_loop(
            begin, end, lambda x, c: self._step(cta, deal, x, begin, end, *c), carry
        )
        if not plan.config.interpret:
            self._add_up_segments(begin, end, start, last, deal)
            self._empty_tiles(cta)

    # -- loads ----------------------------------------------------------------------------------

    def _ahead(self, begin: Any, start: Place) -> Ahead:
        """What is known ahead of the first step."""
        if not self.inputs.page_table:
            return Ahead(start, (), ())
        far, entries = start, [self.steps.entries(self.steps.step_at(begin, start))]
        for x in (begin + i for i in range(1, _ENTRIES_AHEAD)):
            far = self.steps.located(x, far)
            entries.append(self.steps.entries(self.steps.step_at(x, far)))
        return Ahead(start, (far,), tuple(entries))

    def _coming(self, x: Any, ahead: Ahead) -> tuple[Load, Ahead]:
        """What step x loads, from what is known ahead of it, and the same for the next step."""
        step = self.steps.step_at(x, ahead.place)
        place = self.steps.located(x + 1, ahead.place)
        if not ahead.entries:
            return Load(step, ()), Ahead(place, (), ())
        entries, *later = ahead.entries
        last = x + _ENTRIES_AHEAD
        far = self.steps.located(last, *ahead.far)
        later.append(self.steps.entries(self.steps.step_at(last, far)))
        return Load(step, self.steps.pool_rows(step, entries)), Ahead(place, (far,), tuple(later))

    def _load(self, source: Any, target: Any, full: Any, stage: Any, load: Load) -> None:
        step, pool_rows = load
        plan, problem = self.kernel.plan, self.kernel.plan.problem
        kv_tile, pieces = plan.config.kv_tile, self.kernel.pieces
        head = step.head if plan.config.packed else lax.div(step.head, jnp.int32(problem.group))
        if not pool_rows:
            b = lax.div(step.b, jnp.int32(problem.batch // problem.kv_batch))
            first = pl.multiple_of(self.steps.inside(step.first_key), kv_tile)
            where = rows(problem, source, b, head, first, kv_tile)
            plgpu.copy_gmem_to_smem(where, target.at[stage], full.at[stage])
            return
        length = kv_tile // pieces
        for i, row in enumerate(pool_rows):
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

    def _next_queries(self, step: Step) -> None:
        """Queries of the next tile to shared memory, when all warps have read those of the last one."""
        plgpu.barrier_arrive(self.buffers.query_free.at[0])
        plgpu.barrier_wait(self.buffers.query_free.at[0])
        self._put_queries(self._queries(step))

    def _put_queries(self, queries: list[Any]) -> None:
        for part, values in zip(_columns(self.buffers.query), queries, strict=True):
            part[...] = values
        plgpu.commit_smem()

    def _queries(self, step: Step) -> list[Any]:
        """Queries of a tile, by columns; rows past the last one repeat it."""
        plan, query, parts = self.kernel.plan, self.inputs.query, []
        graph = packing.reader(query.shape, plan.problem.q_dtype)
        for i, part in enumerate(_columns(self.buffers.query)):
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
            parts.append(emit.on_tile(graph, (query,), inputs)[0].astype(plan.problem.q_dtype))
        return parts

    # -- one step -------------------------------------------------------------------------------

    def _step(
        self,
        cta: Any,
        deal: Deal,
        x: Any,
        begin: Any,
        end: Any,
        place: Place,
        ahead: Ahead,
        out: Any,
        state: State,
    ) -> tuple[Place, Ahead, Any, State]:
        config, buffers, softmax = self.kernel.plan.config, self.buffers, self.kernel.softmax
        stages, number = config.stages, x - begin
        # One stage is hidden from the compiler, whose registers do not suffice for what it would keep.
        stage = unknown_zero(number) if stages == 1 else lax.rem(number, jnp.int32(stages))
        place = self.steps.located(x, place)
        step = self.steps.step_at(x, place)
        next_load, ahead = self._coming(x + config.stages, ahead)
        more = x + config.stages < end
        starts = (x != begin) & (step.number == 0)
        pl.when(starts)(lambda: self._next_queries(step))
        out = jnp.where(jnp.broadcast_to(starts, out.shape), 0.0, out)
        state = State(
            jnp.where(jnp.broadcast_to(starts, (WARPGROUP_ROWS,)), -jnp.inf, state.reference),
            jnp.where(jnp.broadcast_to(starts, (WARPGROUP_ROWS,)), 0.0, state.total),
        )
        plgpu.barrier_wait(buffers.key_full.at[stage])
        scores = products_sm90.scores(buffers.query, buffers.key.at[stage])
        load = self.inputs.key, buffers.key, buffers.key_full, stage, next_load
        self._pass_on(buffers.key_free, *load, wanted=more)
        scores = self._hidden(self._scores(scores, step), step)
        p, state, alpha = softmax.searching(scores, state)
        out = softmax.rescaled(out, alpha)
        plgpu.barrier_wait(buffers.value_full.at[stage])
        self._clear_values(stage, step)
        p = p.astype(self.kernel.plan.problem.q_dtype)
        staged = buffers.probabilities[0] if buffers.probabilities else None
        out = products_sm90.add_weighted(out, p, buffers.value.at[stage], staged)
        load = self.inputs.value, buffers.value, buffers.value_full, stage, next_load
        self._pass_on(buffers.value_free, *load, wanted=more)

        @pl.when(step.last | (x == end - 1))
        def _() -> None:
            _, segments = self._segments(x, step, place, deal)
            pl.when(segments == 1)(lambda: self._store_results(step, out, state))
            pl.when(segments > 1)(lambda: self._store_segment(cta + step.tile, out, state))

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

    def _segments(self, x: Any, step: Step, place: Place, deal: Deal) -> tuple[Any, Any]:
        """See `Plan.segments`; of the tile of step x."""
        return self.kernel.plan.segments(step.tile, x - step.number, place.count, deal)

    def _add_up_segments(self, begin: Any, end: Any, start: Place, last: Place, deal: Deal) -> None:
        """Counts the segments of the CTA's first and last tile in, and adds up those of a tile that is complete.

        Only at the end, also for the first: a counter is behind all the keys that are on their way.
        """

        def visit(i: Any, carry: None) -> None:
            x = jnp.where(i == 0, begin, end - 1)
            place = Place(*(jnp.where(i == 0, a, b) for a, b in zip(start, last, strict=True)))
            step = self.steps.step_at(x, place)
            first, count = self._segments(x, step, place, deal)
            other = (i == 0) | (x - step.number > begin)

            @pl.when((begin < end) & other & (count > 1))
            def _() -> None:
                share = self._share(step.tile, step.b, step.head, step.part, first, count)
                self._add_up(share, written=True)

            return carry

        lax.fori_loop(0, 2, visit, None)

    def _store_segment(self, segment: Any, out: Any, state: State) -> None:
        plan, total, segments = self.kernel.plan, state.total, self.outputs.segments
        if not plan.config.interpret:
            total = registers.finish_row_sums(total)
        limit = min(plan.rows.count, WARPGROUP_ROWS)
        store_rows(segments.out, segment, 0, 0, out, limit, plan.config.interpret)
        where = (segment, pl.ds(0, WARPGROUP_ROWS))
        segments.reference[where] = plgpu.layout_cast(state.reference, ROW)
        segments.total[where] = plgpu.layout_cast(total, ROW)

    def _store_results(self, step: Step, out: Any, state: State) -> None:
        plan, results = self.kernel.plan, self.outputs.results
        problem, interpret = plan.problem, plan.config.interpret
        inverse, lse, maxima = self.kernel.softmax.finish(state)
        out = out * lax.broadcast_in_dim(inverse, out.shape, [0])
        first_row = step.part * WARPGROUP_ROWS
        if self.inputs.lengths and problem.q_len > 1:
            # Queries before the first token of a sequence that is shorter than they are many.
            inputs = dataclasses.replace(
                self._tile_inputs(None, step), kv_size=out.shape[1], kv_limit=out.shape[1]
            )
            graph = packing.row_exists(problem.batch, problem.q_len)
            (exists,) = emit.evaluate_on_tile(graph, self.inputs.lengths, inputs)
            out = jnp.where(emit.broadcast(exists, graphs.TILE, inputs), out, 0.0)
            lse, maxima = (jnp.where(exists.value, x, -jnp.inf) for x in (lse, maxima))
        lead = step.b * plan.rows.heads + step.head
        out = out.astype(problem.q_dtype)
        store_rows(results.out, lead, first_row, 0, out, plan.rows.count, interpret)
        where = (lead, pl.ds(first_row, WARPGROUP_ROWS))
        results.lse[where] = plgpu.layout_cast(lse, ROW)
        for ref in results.max_scores:
            ref[where] = plgpu.layout_cast(maxima, ROW)

    def _share(self, tile: Any, b: Any, head: Any, part: Any, first: Any, count: Any) -> Any:
        plan, hidden = self.kernel.plan, jnp.int32(0)
        if self.inputs.lengths and plan.problem.q_len > 1:
            hidden = jnp.maximum(plan.problem.q_len - self.steps.length(b), 0)
        lead = b * plan.rows.heads + head
        return combine_sm90.Share(tile, lead, part * WARPGROUP_ROWS, hidden, first, count)

    def _add_up(self, share: Any, written: bool) -> None:
        (counts,) = self.inputs.counts
        combine_sm90.add_up(
            self.kernel.plan,
            self.outputs.segments,
            counts,
            self.outputs.results,
            share,
            written=written,
        )

    def _empty_tiles(self, cta: Any) -> None:
        """Writes the results of tiles without any step, which are dealt out to the CTAs in turns."""
        plan, rows = self.kernel.plan, self.kernel.plan.rows

        def visit(i: Any, carry: None) -> None:
            number = cta + i * plan.config.ctas
            tile = jnp.minimum(number, rows.all_tiles - 1)
            row = lax.div(tile, jnp.int32(plan.inner))

            @pl.when((number < rows.all_tiles) & (self.steps.steps_of(row) == 0))
            def _() -> None:
                lead, part = (
                    lax.div(tile, jnp.int32(rows.tiles)),
                    lax.rem(tile, jnp.int32(rows.tiles)),
                )
                nothing = jnp.int32(0)
                share = combine_sm90.Share(
                    tile, lead, part * WARPGROUP_ROWS, nothing, nothing, nothing
                )
                self._add_up(share, written=False)

            return carry

        lax.fori_loop(0, cdiv(rows.all_tiles, plan.config.ctas), visit, None)


def _columns(buffer: Any) -> list[Any]:
    """A tile in shared memory in parts narrow enough to pass through registers beside an accumulator."""
    dim = buffer.shape[-1]
    if dim <= _COLUMNS:
        return [buffer]
    return [buffer.at[:, pl.ds(c, min(_COLUMNS, dim - c))] for c in range(0, dim, _COLUMNS)]
