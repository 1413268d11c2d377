"""Decoding on Hopper: attention of a few queries to many keys, at the speed of memory.

The steps of all tiles, one after another, are dealt out to as many CTAs as run at a time (decode_plan.py). Every CTA
is one warpgroup that keeps a ring of shared-memory stages filled by TMA and computes what arrives, two of them on a
multiprocessor; its steps may belong to several tiles, and the loads for the next tile run ahead of the end of this
one. What a CTA has of a tile, a *segment*, it writes down unnormalised; a second small kernel adds the segments up
(combine_sm90.py).

    for each step:
        S = Q K^T, give the stage of K to the next load, P = softmax of S
        O = O alpha + P V, give the stage of V to the next load
        at the end of a tile, or of the CTA's steps: write O, m and l of the segment

The segment of tile t in CTA c is number c + t: one of the two grows from each segment to the next.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu import combine_sm90, emit, packing, registers
from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS, padded_dim
from flexjax.backends.mosaic_gpu.decode_config import DecodeConfig
from flexjax.backends.mosaic_gpu.decode_plan import ALL, LISTS, RANGE, Plan, Work
from flexjax.backends.mosaic_gpu.launch_sm90 import (
    addressable,
    barriers,
    capture,
    launch,
    rows,
    tiles,
)
from flexjax.backends.mosaic_gpu.registers import ROW, TILE
from flexjax.backends.mosaic_gpu.simplify import Scores, simplify
from flexjax.backends.mosaic_gpu.softmax import LOG2_E, Softmax, State
from flexjax.mods import graph as graphs
from flexjax.mods.graph import Graph
from flexjax.problem import BLHD, Operands, Problem, Result, heads_first

# Columns of the queries that are on their way through registers at a time.
_COLUMNS = 64


class Inputs(NamedTuple):
    """References to what the kernel reads; `lengths` and `page_table` are empty or one reference."""

    query: Any
    key: Any
    value: Any
    work: Work
    lengths: tuple[Any, ...]
    page_table: tuple[Any, ...]
    score_captures: tuple[Any, ...]
    mask_captures: tuple[Any, ...]


class Segments(NamedTuple):
    """What CTAs write: for each segment float32 out [rows, Dv], reference and total [64] of its softmax."""

    out: Any
    reference: Any
    total: Any


class Buffers(NamedTuple):
    """Shared memory and barriers.

    Attributes:
        query: [64, D].
        key, value: [stages, kv_tile, D or Dv].
        probabilities: [64, kv_tile] in the interpreter, or empty.
        key_full, value_full: one barrier a stage.
        key_free, value_free, query_free: all warps have read.
    """

    query: Any
    key: Any
    value: Any
    probabilities: tuple[Any, ...]
    key_full: Any
    value_full: Any
    key_free: Any
    value_free: Any
    query_free: Any


class Place(NamedTuple):
    """Where a step lies: its list row, the first step of that, and the steps of each of its tiles."""

    row: Any
    begin: Any
    count: Any


class Step(NamedTuple):
    """One step.

    Attributes:
        tile: number of the tile.
        b: batch row.
        head: row of tiles of the batch row.
        part: tile in the row of tiles.
        number: of the step in its tile.
        last: whether it is the last one of its tile.
        first_key: first of its keys.
        masked: whether the mask counts.
    """

    tile: Any
    b: Any
    head: Any
    part: Any
    number: Any
    last: Any
    first_key: Any
    masked: Any


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
        addressable(x, axis, multiple, padded_dim(x.shape[3])) for x in (operands.key, operands.value)
    )
    if operands.page_table is not None:  # one long row of tokens a head
        key, value = (x.reshape(x.shape[0], -1, x.shape[3]) for x in (key, value))
    return query, key, value


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is static about the kernel of a plan."""

    plan: Plan

    @property
    def softmax(self) -> Softmax:
        return Softmax(
            factor=LOG2_E * self.scores.after,
            dtype=self.plan.problem.q_dtype,
            maxima=self.plan.problem.max_scores,
            trust=False,
            interpret=self.plan.config.interpret,
        )

    @property
    def scores(self) -> Scores:
        """How scores come from the products of queries and keys, on packed rows."""
        score = self.plan.problem.score
        scores = simplify(None if score is None else score.forward, self.plan.problem.scale)
        if scores.graph is None:
            return scores
        return dataclasses.replace(scores, graph=packing.packed(scores.graph, self.plan.rows))

    @property
    def mask(self) -> Graph | None:
        """The mask on packed rows; None where it holds nothing but the lengths, which the kernel knows."""
        problem = self.plan.problem
        if problem.mask is None or (problem.decoding is not None and problem.decoding.bare):
            return None
        return packing.packed(problem.mask, self.plan.rows)

    @property
    def limits(self) -> bool:
        """Whether the kernel itself hides keys past the end."""
        problem = self.plan.problem
        if self.mask is None:
            return problem.decoding is not None or problem.kv_len % self.plan.config.kv_tile != 0
        # A mask of a decoding step knows the lengths, but not that a block may stick out of the cache.
        return problem.kv_len % self.plan.kv_block != 0

    def buffers(self, dim: int, v_dim: int) -> Buffers:
        config, dtype = self.plan.config, self.plan.problem.q_dtype
        pieces = self.pieces
        return Buffers(
            query=tiles(dtype, WARPGROUP_ROWS, dim),
            key=tiles(dtype, config.stages, config.kv_tile, dim),
            value=tiles(dtype, config.stages, config.kv_tile, v_dim),
            probabilities=(tiles(dtype, WARPGROUP_ROWS, config.kv_tile),) if config.interpret else (),
            key_full=barriers(config.stages, pieces),
            value_full=barriers(config.stages, pieces),
            key_free=barriers(1),
            value_free=barriers(1),
            query_free=barriers(1),
        )

    @property
    def pieces(self) -> int:
        """Copies that a tile of keys takes: one, or one a page."""
        decoding, kv_tile = self.plan.problem.decoding, self.plan.config.kv_tile
        page = None if decoding is None else decoding.page_size
        return 1 if page is None or page >= kv_tile else kv_tile // page


def _run(kernel: Kernel, inputs: Inputs, outputs: Segments, buffers: Buffers) -> None:
    Decoder(kernel, inputs, outputs, buffers).run(lax.axis_index("cta"))


@dataclasses.dataclass(frozen=True)
class Decoder:
    """One CTA."""

    kernel: Kernel
    inputs: Inputs
    outputs: Segments
    buffers: Buffers

    def run(self, cta: Any) -> None:
        plan, stages = self.kernel.plan, self.kernel.plan.config.stages
        total = self.inputs.work.starts[plan.list_rows]
        begin, end = share(total, plan.config.ctas, cta)
        nowhere = Place(jnp.int32(0), jnp.int32(0), jnp.int32(0))

        def fill(i: Any, place: Place) -> Place:
            place = self._located(begin + i, place)
            step = self._step_at(begin + i, place)

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

    # -- where a step lies ----------------------------------------------------------------------

    def _located(self, x: Any, place: Place) -> Place:
        """The place of step x, which is `place` or behind it."""
        starts, plan = self.inputs.work.starts, self.kernel.plan
        count = plan.list_rows
        beyond = x >= place.begin + place.count * plan.inner
        rounds = jnp.where(beyond, math.ceil(math.log2(count + 1)), 0)

        def halve(_: Any, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
            low, high = bounds
            middle = lax.div(low + high, jnp.int32(2))
            before = starts[middle] <= x
            return jnp.where(before, middle, low), jnp.where(before, high, middle)

        row, _ = lax.fori_loop(0, rounds, halve, (place.row, jnp.int32(count)))
        begin = starts[row]
        return Place(row, begin, lax.div(starts[row + 1] - begin, jnp.int32(plan.inner)))

    def _step_at(self, x: Any, place: Place) -> Step:
        plan, row = self.kernel.plan, self.kernel.plan.rows
        count = jnp.maximum(place.count, 1)
        inside = x - place.begin
        number = lax.rem(inside, count)
        tile = place.row * plan.inner + lax.div(inside, count)
        head, part = lax.div(tile, jnp.int32(row.tiles)), lax.rem(tile, jnp.int32(row.tiles))
        b, head = lax.div(head, jnp.int32(row.heads)), lax.rem(head, jnp.int32(row.heads))
        first_key, masked = self._first_key(place.row, b, head, number)
        return Step(tile, b, head, part, number, number == count - 1, first_key, masked)

    def _first_key(self, list_row: Any, b: Any, head: Any, number: Any) -> tuple[Any, Any]:
        """(first key of a step, whether the mask counts there)."""
        plan, work = self.kernel.plan, self.inputs.work
        kv_tile, always = plan.config.kv_tile, jnp.int32(0) == 0
        if plan.kind == ALL:
            return number * kv_tile, always
        if plan.kind == RANGE:
            return (work.first[0][list_row] + number) * kv_tile, always
        assert plan.kind == LISTS
        partial_counts, partial_indices, _, full_indices = work.lists
        lists_batch, lists_heads = partial_counts.shape
        bm = lax.div(b, jnp.int32(plan.problem.batch // lists_batch))
        where = (bm, head if lists_heads > 1 else 0)
        per_block = jnp.int32(plan.steps_per_block)
        i, part = lax.div(number, per_block), lax.rem(number, per_block)
        partial = partial_counts[where]

        def entry(indices: Any, i: Any) -> Any:
            return indices[(*where, jnp.clip(i, 0, indices.shape[-1] - 1))]

        masked = i < partial
        block = lax.select(masked, entry(partial_indices, i), entry(full_indices, i - partial))
        block = jnp.clip(block, 0, plan.kv_blocks - 1)  # no entry is trusted beyond the mask
        return block * plan.kv_block + part * kv_tile, masked

    def _inside(self, first_key: Any) -> Any:
        """Moves a step that lies wholly beyond the last key, where nothing counts, back onto keys."""
        plan = self.kernel.plan
        if plan.kv_blocks * plan.kv_block == plan.kv_tiles * plan.config.kv_tile:
            return first_key
        return jnp.minimum(first_key, (plan.kv_tiles - 1) * plan.config.kv_tile)

    def _length(self, b: Any) -> Any:
        """Where the keys of a batch row end."""
        return self.inputs.lengths[0][b] if self.inputs.lengths else self.kernel.plan.problem.kv_len

    # -- loads ----------------------------------------------------------------------------------

    def _load(self, source: Any, target: Any, full: Any, stage: Any, step: Step) -> None:
        plan, problem = self.kernel.plan, self.kernel.plan.problem
        kv_tile, pieces = plan.config.kv_tile, self.kernel.pieces
        head = step.head if plan.config.packed else lax.div(step.head, jnp.int32(problem.group))
        first = self._inside(step.first_key)
        if not self.inputs.page_table:
            b = lax.div(step.b, jnp.int32(problem.batch // problem.kv_batch))
            where = rows(problem, source, b, head, pl.multiple_of(first, kv_tile), kv_tile)
            plgpu.copy_gmem_to_smem(where, target.at[stage], full.at[stage])
            return
        assert problem.decoding is not None and problem.decoding.page_size is not None
        page, length = problem.decoding.page_size, kv_tile // pieces
        (table,) = self.inputs.page_table
        last_page = source.shape[1] // page - 1
        for i in range(pieces):
            position = first + i * length
            entry = jnp.minimum(lax.div(position, jnp.int32(page)), table.shape[1] - 1)
            # Past the length the table holds anything: some page is read, and masked.
            number = jnp.clip(table[step.b, entry], 0, last_page)
            row = number * page + (lax.rem(position, jnp.int32(page)) if pieces == 1 else 0)
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
        query, dim = self.inputs.query, buffer.shape[-1]
        graph = packing.reader(query.shape, plan.problem.q_dtype)
        for column in range(0, dim, _COLUMNS):
            size = min(_COLUMNS, dim - column)
            inputs = emit.TileInputs(
                score=None,
                b=0,
                h=step.b * plan.rows.heads + step.head,
                q_start=step.part * WARPGROUP_ROWS,
                kv_start=column,
                q_size=WARPGROUP_ROWS,
                kv_size=size,
                q_limit=plan.rows.count,
                kv_limit=size,
                interpret=plan.config.interpret,
            )
            part = _on_tile(graph, (query,), inputs).astype(plan.problem.q_dtype)
            if size == dim:
                buffer[...] = part
            else:
                buffer[:, pl.ds(column, size)] = part
        plgpu.commit_smem()

    # -- one step -------------------------------------------------------------------------------

    def _step(
        self, cta: Any, x: Any, begin: Any, end: Any, place: Place, ahead: Place, out: Any, state: State
    ) -> tuple[Place, Place, Any, State]:
        config, buffers, softmax = self.kernel.plan.config, self.buffers, self.kernel.softmax
        stage = lax.rem(x - begin, jnp.int32(config.stages))
        place, ahead = self._located(x, place), self._located(x + config.stages, ahead)
        step, next_step = self._step_at(x, place), self._step_at(x + config.stages, ahead)
        more = x + config.stages < end
        starts = (x == begin) | (step.number == 0)
        pl.when(starts)(lambda: self._load_queries(step))
        out = jnp.where(jnp.broadcast_to(starts, out.shape), 0.0, out)
        state = State(
            jnp.where(jnp.broadcast_to(starts, (WARPGROUP_ROWS,)), -jnp.inf, state.reference),
            jnp.where(jnp.broadcast_to(starts, (WARPGROUP_ROWS,)), 0.0, state.total),
        )
        plgpu.barrier_wait(buffers.key_full.at[stage])
        scores = self._raw_scores(stage)
        load = self.inputs.key, buffers.key, buffers.key_full, stage, next_step
        self._pass_on(buffers.key_free, *load, wanted=more)
        scores = self._hidden(self._scores(scores, step), step)
        p, state, alpha = softmax.searching(scores, state)
        out = softmax.rescaled(out, alpha)
        plgpu.barrier_wait(buffers.value_full.at[stage])
        self._clear_values(stage, step)
        out = self._add_product(out, p.astype(self.kernel.plan.problem.q_dtype), stage)
        load = self.inputs.value, buffers.value, buffers.value_full, stage, next_step
        self._pass_on(buffers.value_free, *load, wanted=more)
        pl.when(step.last | (x == end - 1))(lambda: self._store(cta + step.tile, out, state))
        return place, ahead, out, state

    def _raw_scores(self, stage: Any) -> Any:
        def product(scores: Any) -> Any:
            plgpu.wgmma(scores, self.buffers.query, self.buffers.key.at[stage].transpose((1, 0)))
            return scores[...]

        shape = (WARPGROUP_ROWS, self.kernel.plan.config.kv_tile)
        return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))

    def _add_product(self, out: Any, p: Any, stage: Any) -> Any:
        value = self.buffers.value.at[stage]
        if not self.kernel.plan.config.interpret:
            return pl.run_state(lambda acc: plgpu.wgmma(acc, p, value))(plgpu.ACC.init(out))
        # The interpreter has neither run_state nor operands in registers.
        (buffer,) = self.buffers.probabilities
        buffer[...] = p
        plgpu.commit_smem()

        def product(acc: Any) -> Any:
            plgpu.wgmma(acc, buffer, value)
            return acc[...]

        return out + pl.run_scoped(product, plgpu.ACC(out.shape, jnp.float32))

    def _clear_values(self, stage: Any, step: Step) -> None:
        """Zeros in place of values past the length, which may be NaN: a probability of 0 would not hide that."""
        if not self.inputs.lengths:
            return  # past the last key of an array TMA reads zeros
        buffer = self.buffers.value.at[stage]
        left = self._length(step.b) - step.first_key

        @pl.when(left < self.kernel.plan.config.kv_tile)
        def _() -> None:
            values = plgpu.load(buffer, layout=TILE)
            row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=TILE)
            buffer[...] = jnp.where(row < left, values, jnp.zeros((), values.dtype))
            plgpu.commit_smem()

    # -- scores ---------------------------------------------------------------------------------

    def _tile_inputs(self, scores: Any, step: Step) -> emit.TileInputs:
        plan = self.kernel.plan
        return emit.TileInputs(
            score=scores,
            b=step.b,
            h=step.head,
            q_start=step.part * WARPGROUP_ROWS,
            kv_start=self._inside(step.first_key),
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
        return _on_tile(graph, self.inputs.score_captures, self._tile_inputs(scores, step))

    def _hidden(self, scores: Any, step: Step) -> Any:
        """Scores with -inf where the mask, or the end of the keys, hides them."""
        kernel = self.kernel
        if kernel.mask is not None:
            inputs = self._tile_inputs(None, step)
            allowed = _on_tile(kernel.mask, self.inputs.mask_captures, inputs)
            if kernel.plan.problem.blocks is not None:
                allowed = allowed | jnp.broadcast_to(~step.masked, allowed.shape)
            scores = jnp.where(allowed, scores, -jnp.inf)
        if kernel.limits:
            offset = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=TILE)
            left = self._length(step.b) - step.first_key
            scores = jnp.where(offset < left, scores, -jnp.inf)
        return scores

    # -- results --------------------------------------------------------------------------------

    def _store(self, segment: Any, out: Any, state: State) -> None:
        """Writes down a segment."""
        plan, total = self.kernel.plan, state.total
        if not plan.config.interpret:
            total = registers.finish_row_sums(total)
        combine_sm90.store_rows(
            self.outputs.out, segment, 0, 0, out, min(plan.rows.count, WARPGROUP_ROWS), plan.config.interpret
        )
        where = (segment, pl.ds(0, WARPGROUP_ROWS))
        self.outputs.reference[where] = plgpu.layout_cast(state.reference, ROW)
        self.outputs.total[where] = plgpu.layout_cast(total, ROW)


def share(total: Any, ctas: int, cta: Any) -> tuple[Any, Any]:
    """The steps of a CTA: (first, end)."""
    count = combine_sm90.steps_each(total, ctas)
    begin = jnp.minimum(cta * count, total)
    return begin, jnp.minimum(begin + count, total)


def _on_tile(mod: Graph, captures: tuple[Any, ...], tile: emit.TileInputs) -> Any:
    """A mod's value at every position of a tile."""
    (value,) = emit.evaluate_on_tile(mod, captures, tile)
    return emit.broadcast(value, graphs.TILE, tile)
