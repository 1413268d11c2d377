"""Adds up the segments of a tile whose steps are spread over several CTAs: the last step of split decoding.

A segment holds an output O_i, unnormalised and relative to a reference m_i in units of log2, and a sum l_i. With
m the largest m_i and w_i = 2^(m_i - m), the tile's output is sum(w_i O_i) / sum(w_i l_i).

On the GPU no second kernel is launched for that. A CTA that has written its segment of a tile counts itself in,
and the one that is last adds them all up, always in the order of the segments, so that a result is the same every
time. Nobody waits. A thread takes four columns of a row, whatever the number of rows that are queries, and reads
several segments at a time, because it waits for memory rather than for arithmetic.

The interpreter runs CTAs one after another and knows no counters; there XLA adds the segments up.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from flexjax.backends.mosaic_gpu import lanes
from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS
from flexjax.backends.mosaic_gpu.decode_kernel_sm90 import Results, Segments
from flexjax.backends.mosaic_gpu.decode_plan import Plan
from flexjax.backends.mosaic_gpu.lanes import F32, I32, Lane
from flexjax.backends.mosaic_gpu.registers import FIRST_NAMED_BARRIER, WARPGROUP
from flexjax.backends.mosaic_gpu.softmax import LOG2_E
from flexjax.block_lists import cdiv

_MOST_AT_A_TIME = 24
_VECTOR = 4  # columns of a thread, 16 bytes


class Share(NamedTuple):
    """Where the segments of a tile lie.

    Attributes:
        tile: number of the tile.
        lead: its row of tiles among those of all batch rows.
        first_row: first of its rows in that.
        hidden: queries of the batch row that come before its first token.
        first: the first segment.
        count: how many there are.
    """

    tile: Any
    lead: Any
    first_row: Any
    hidden: Any
    first: Any
    count: Any


def add_up(
    plan: Plan, segments: Segments, counts: Any, results: Results, share: Share, *, written: bool
) -> None:
    """Adds up the segments of a tile, if all are there.

    Args:
        plan: the plan.
        segments: references.
        counts: reference to an int32 a tile, 0 at the start: how many segments are written.
        results: references to what is written.
        share: the tile's segments.
        written: whether this CTA has just written one of them, and has to be counted in; else there are none.
    """
    refs = (*segments, counts, results.out, results.lse, *results.max_scores)
    types = (plgpu.RefType(),) * len(refs), (plgpu.Layout.WG_SPLAT,) * len(share)

    @plgpu.inline_mgpu(arg_types=types)
    def emit(_: Any, refs: Any, numbers: Any) -> None:
        out, reference, total, counts, *targets = refs
        here = Share(*(Lane(n.registers.item(), I32) for n in numbers))
        sums = _Sums(plan, Segments(out, reference, total), targets, here)
        if not written:
            sums.emit()
            return
        with mgpu.utils.when(_is_last(_at(counts, here.tile), here.count).ir):
            sums.emit()

    emit(refs, tuple(jnp.asarray(n, jnp.int32) for n in share))


def _is_last(counter: ir.Value, count: Lane) -> Lane:
    """Counts this CTA in, behind all that it has written; whether it is the last of `count`."""
    thread = mgpu.utils.thread_idx()
    code = f"""{{
        .reg .pred first, last;
        .reg .u32 before;
        setp.eq.u32 first, $1, 0;
        mov.u32 before, 0;
        bar.sync {FIRST_NAMED_BARRIER}, {WARPGROUP};
        @first atom.acq_rel.gpu.add.u32 before, [$2], 1;
        setp.eq.and.u32 last, before, $3, first;
        bar.red.or.pred last, {FIRST_NAMED_BARRIER}, {WARPGROUP}, last;
        selp.u32 $0, 1, 0, last;
    }}"""
    i32 = ir.IntegerType.get_signless(32)
    last = mgpu.utils.inline_ptx(
        code,
        thread,
        counter,
        (count - 1).ir,
        result_types=i32,
        has_side_effects=True,
        convergent=True,
    )
    return lanes.compare("ne", Lane(last, I32), 0)


def _at(ref: ir.Value, *indices: Lane) -> ir.Value:
    """Address of an element of a reference in global memory."""
    i64 = ir.IntegerType.get_signless(64)
    strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
    place = arith.constant(i64, 0)
    for index, stride in zip(indices, strides, strict=True):
        step = arith.muli(arith.extsi(i64, index.ir), arith.constant(i64, stride))
        place = arith.addi(place, step)
    pointer = mgpu.utils.memref_ptr(ref)
    return mgpu.utils.getelementptr(pointer, [place], ir.MemRefType(ref.type).element_type)


@dataclasses.dataclass(frozen=True)
class _Sums:
    """Emits the sums over a tile's segments."""

    plan: Plan
    segments: Segments
    targets: list[Any]
    share: Share

    def _side_by_side(self, vectors: int) -> tuple[int, int]:
        """(segments, vectors of a thread) that are read at a time: as many as registers hold."""
        most = self.plan.config.ctas // self.plan.rows.all_tiles + 2  # that even sequences have
        segments = cdiv(most, cdiv(most, _MOST_AT_A_TIME))
        return segments, max(1, min(cdiv(vectors, WARPGROUP), _MOST_AT_A_TIME // segments))

    def emit(self) -> None:
        """All elements that the thread has."""
        _, rows, columns = ir.MemRefType(self.segments.out.type).shape
        i32 = ir.IntegerType.get_signless(32)
        vectors, in_row = rows * columns // _VECTOR, columns // _VECTOR
        segments, wide = self._side_by_side(vectors)
        end, step = (arith.constant(i32, n) for n in (vectors, WARPGROUP * wide))
        loop = scf.ForOp(mgpu.utils.thread_idx(), end, step)
        with ir.InsertionPoint(loop.body):
            first, spots, there = Lane(loop.induction_variable, I32), [], []
            for i in range(wide):
                place = first + i * WARPGROUP
                inside = lanes.minimum(place, vectors - 1)
                row = lanes.quotient(inside, in_row, natural=True)
                column = lanes.remainder(inside, in_row, natural=True) * _VECTOR
                spots.append((row, column))
                there.append(
                    (place < vectors) & (self.share.first_row + row < self.plan.rows.count)
                )
            all_sums = self._sums(spots, segments)
            for (row, column), exists, sums in zip(spots, there, all_sums, strict=True):
                with mgpu.utils.when(exists.ir):
                    self._store(row, column, *sums)
            scf.yield_([])

    def _sums(
        self, spots: list[tuple[Lane, Lane]], at_a_time: int
    ) -> list[tuple[Lane, Lane, ir.Value]]:
        """(reference, sum, output) of some columns of rows, given as (row, first column)."""
        kind = ir.VectorType.get((_VECTOR,), ir.F32Type.get())
        i32 = ir.IntegerType.get_signless(32)
        nothing = lanes.const(0.0, F32)
        start = [lanes.const(-np.inf, F32).ir, nothing.ir, vector.broadcast(kind, nothing.ir)]
        zero, step = (arith.constant(i32, n) for n in (0, at_a_time))
        loop = scf.ForOp(zero, self.share.count.ir, step, start * len(spots))
        with ir.InsertionPoint(loop.body):
            first, before = Lane(loop.induction_variable, I32), list(loop.inner_iter_args)
            read = [[self._segment(first + k, *spot) for k in range(at_a_time)] for spot in spots]
            after = []
            for i, segments in enumerate(read):
                reference, total, out = before[3 * i : 3 * i + 3]
                after += self._added(Lane(reference, F32), Lane(total, F32), out, segments)
            scf.yield_(after)
        results = list(loop.results)
        return [
            (Lane(results[i], F32), Lane(results[i + 1], F32), results[i + 2])
            for i in range(0, len(results), 3)
        ]

    def _added(self, reference: Lane, total: Lane, out: ir.Value, segments: list[Any]) -> list[Any]:
        """The sums of a spot with those of some segments."""
        top = reference
        for other, _, _ in segments:
            top = lanes.maximum(top, other)
        safe = lanes.select(lanes.compare("eq", top, -np.inf), 0.0, top)
        weight = lanes.call("exp2.approx", reference - safe)
        total, out = total * weight, arith.mulf(out, vector.broadcast(out.type, weight.ir))
        for other, other_total, other_out in segments:
            weight = lanes.call("exp2.approx", other - safe)
            total = total + weight * other_total
            weighted = arith.mulf(other_out, vector.broadcast(out.type, weight.ir))
            out = arith.addf(out, weighted)
        return [top.ir, total.ir, out]

    def _segment(self, number: Lane, row: Lane, column: Lane) -> tuple[Lane, Lane, ir.Value]:
        """What a segment has; one that is not there reads the last one, with a reference of -inf."""
        share = self.share
        there = number < share.count
        segment = share.first + lanes.minimum(number, share.count - 1)
        f32 = ir.F32Type.get()
        reference, total = (
            Lane(llvm.load(f32, _at(ref, segment, row)), F32)
            for ref in (self.segments.reference, self.segments.total)
        )
        kind = ir.VectorType.get((_VECTOR,), f32)
        out = llvm.load(kind, _at(self.segments.out, segment, row, column), alignment=16)
        return lanes.select(there, reference, -np.inf), total, out

    def _store(self, row: Lane, column: Lane, reference: Lane, total: Lane, out: ir.Value) -> None:
        share, q_len = self.share, self.plan.problem.q_len
        target, *stats = self.targets
        row = share.first_row + row
        exists = lanes.remainder(row, q_len, natural=True) >= share.hidden
        empty = lanes.compare("eq", total, 0.0)
        inverse = lanes.select(empty, 0.0, lanes.div(lanes.const(1.0, F32), total))
        scaled = arith.mulf(out, vector.broadcast(out.type, inverse.ir))
        zeros = vector.broadcast(out.type, lanes.const(0.0, F32).ir)
        scaled = arith.select(exists.ir, scaled, zeros)
        kind = ir.MemRefType(target.type).element_type
        narrow = arith.truncf(ir.VectorType.get((_VECTOR,), kind), scaled)
        llvm.store(narrow, _at(target, share.lead, row, column), alignment=2 * _VECTOR)
        maximum = reference * (1.0 / LOG2_E)
        lse = maximum + lanes.call("log", total)
        with mgpu.utils.when(lanes.compare("eq", column, 0).ir):
            for ref, value in zip(stats, (lse, maximum), strict=False):
                value = lanes.select(exists, value, -np.inf)
                llvm.store(value.ir, _at(ref, share.lead, row))


def add_up_outside(
    plan: Plan, segments: Segments, starts: Any, hidden: Any, results: Results
) -> Results:
    """The results with those of tiles that have not just one segment added up by XLA, for the interpreter.

    Args:
        plan: the plan.
        segments: what the kernel has written.
        starts: see `decode_plan.Work`.
        hidden: int32 [B], queries before the first token.
        results: of tiles with one segment.
    """
    rows, tile = plan.rows, jnp.arange(plan.rows.all_tiles)
    row = tile // plan.inner
    count = (starts[row + 1] - starts[row]) // plan.inner
    first_step = starts[row] + (tile - row * plan.inner) * count
    deal = plan.deal(starts[plan.list_rows], starts[1])
    first, parts = plan.segments(tile, first_step, count, deal)
    number = jnp.arange(plan.config.ctas)[None]
    there = number < parts[:, None]
    where = first[:, None] + jnp.where(there, number, 0)
    reference = jnp.where(there[..., None], segments.reference[where], -jnp.inf)
    maximum = reference.max(1)
    weight = jnp.exp2(reference - jnp.where(maximum == -jnp.inf, 0.0, maximum)[:, None])
    total = jnp.where(there[..., None], weight * segments.total[where], 0.0).sum(1)
    weighted = weight[..., None] * segments.out[where]
    out = jnp.where(there[..., None, None], weighted, 0.0).sum(1)
    query = (jnp.arange(rows.tiles * WARPGROUP_ROWS) % plan.problem.q_len).reshape(rows.tiles, -1)
    exists = query[None] >= jnp.repeat(hidden, rows.heads)[:, None, None]
    exists = exists.reshape(rows.all_tiles, WARPGROUP_ROWS)
    inverse = jnp.where(total == 0.0, 0.0, 1.0 / total)
    maximum = maximum * (1.0 / LOG2_E)
    lse = maximum + jnp.log(total)

    def chosen(old: Any, new: Any, otherwise: float) -> Any:
        tiles = (rows.all_tiles, WARPGROUP_ROWS, *old.shape[2:])
        one = (parts == 1).reshape(-1, *(1,) * (len(tiles) - 1))
        kept = exists.reshape(*exists.shape, *(1,) * (len(tiles) - 2))
        new = jnp.where(kept, new, otherwise).astype(old.dtype)
        return jnp.where(one, old.reshape(tiles), new).reshape(old.shape)

    return Results(
        chosen(results.out, out * inverse[..., None], 0.0),
        chosen(results.lse, lse, -jnp.inf),
        tuple(chosen(old, maximum, -jnp.inf) for old in results.max_scores),
    )
