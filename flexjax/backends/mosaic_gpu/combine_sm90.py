"""Adds up the segments of every tile that the decoding kernel has written: the second step of split decoding.

A segment holds an output O_i, unnormalised and relative to a reference m_i in units of log2, and a sum l_i. With
m the largest m_i and w_i = 2^(m_i - m), the tile's output is sum(w_i O_i) / sum(w_i l_i). A CTA takes some columns
of one tile, and reads several segments at a time, because it waits for memory rather than for arithmetic.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from flexjax.backends.mosaic_gpu import emit, packing, placement
from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS
from flexjax.backends.mosaic_gpu.decode_plan import Plan
from flexjax.backends.mosaic_gpu.launch_sm90 import launch
from flexjax.backends.mosaic_gpu.registers import ROW, TILE
from flexjax.backends.mosaic_gpu.softmax import LOG2_E
from flexjax.mods import graph as graphs
from flexjax.problem import Result, heads_first

_MOST_AT_A_TIME = 8


class Inputs(NamedTuple):
    """References to the segments, the plan's starts, and the lengths, if there are any."""

    out: Any
    reference: Any
    total: Any
    starts: Any
    lengths: tuple[Any, ...]


class Outputs(NamedTuple):
    """References to what is written, of rows of tiles: out [n, rows, Dv], statistics [n, rows to 64]."""

    out: Any
    lse: Any
    max_scores: tuple[Any, ...]


class Buffers(NamedTuple):
    """Nothing."""


class Sums(NamedTuple):
    """What a tile has so far: reference [64], sum [64], output [64, columns]."""

    reference: Any
    total: Any
    out: Any


def steps_each(total: Any, ctas: int) -> Any:
    """Steps of every CTA but the last ones."""
    return jnp.maximum(lax.div(total + (ctas - 1), jnp.int32(ctas)), 1)


def combine(plan: Plan, segments: Any, starts: Any, lengths: tuple[Any, ...]) -> Result:
    """The result of an attention from its segments."""
    problem, rows, interpret = plan.problem, plan.rows, plan.config.interpret
    v_dim = segments.out.shape[-1]
    lead, padded = problem.batch * rows.heads, rows.tiles * WARPGROUP_ROWS
    stats = jax.ShapeDtypeStruct((lead, padded), jnp.float32)
    out = jax.ShapeDtypeStruct((lead, padded if interpret else rows.count, v_dim), problem.q_dtype)
    kernel = Kernel(plan, 32 if v_dim % 32 == 0 else 16, v_dim)
    result = launch(
        "flexjax_combine",
        functools.partial(_run, kernel),
        Inputs(segments.out, segments.reference, segments.total, starts, lengths),
        Outputs(out, stats, (stats,) if problem.max_scores else ()),
        Buffers(),
        ctas=rows.all_tiles * kernel.parts,
        warpgroups=1,
        approx_math=False,
        interpret=interpret,
    )

    def by_head(x: Any) -> Any:
        shape = (problem.batch, problem.q_heads, problem.q_len)
        return x[:, : rows.count].reshape(*shape, *x.shape[2:])

    out = heads_first(by_head(result.out)[..., : problem.v_dim], problem.layout)
    lse, *maxima = map(by_head, (result.lse, *result.max_scores))
    return Result(out, lse, maxima[0] if maxima else None)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is static: the plan, columns of a CTA, and of all."""

    plan: Plan
    columns: int
    v_dim: int

    @property
    def parts(self) -> int:
        return self.v_dim // self.columns

    @property
    def at_a_time(self) -> int:
        """Segments that are read side by side: as many as even sequences have, if registers hold them."""
        cuts = self.plan.config.ctas // self.plan.rows.all_tiles
        return min(cuts + 2, 2 if self.plan.config.interpret else _MOST_AT_A_TIME)


def _run(kernel: Kernel, inputs: Inputs, outputs: Outputs, buffers: Buffers) -> None:
    del buffers
    plan, cta = kernel.plan, lax.axis_index("cta")
    tile, part = lax.div(cta, jnp.int32(kernel.parts)), lax.rem(cta, jnp.int32(kernel.parts))
    row = lax.div(tile, jnp.int32(plan.inner))
    begin, end = inputs.starts[row], inputs.starts[row + 1]
    count = lax.div(end - begin, jnp.int32(plan.inner))
    each = steps_each(inputs.starts[plan.list_rows], plan.config.ctas)
    first_step = begin + (tile - row * plan.inner) * count
    first_cta = lax.div(first_step, each)
    last_cta = lax.div(first_step + count - 1, each)
    segments = jnp.where(count > 0, last_cta - first_cta + 1, 0)
    zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), ROW)
    nothing = Sums(
        plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), -jnp.inf, jnp.float32), ROW),
        zeros,
        plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, kernel.columns), jnp.float32), TILE),
    )
    at_a_time = kernel.at_a_time
    rounds = lax.div(segments + (at_a_time - 1), jnp.int32(at_a_time))

    def add(i: Any, sums: Sums) -> Sums:
        numbers = [i * at_a_time + k for k in range(at_a_time)]
        there = [n < segments for n in numbers]
        # What is not there is read from the last segment, and weighted with 0.
        where = [first_cta + tile + jnp.minimum(n, segments - 1) for n in numbers]
        references = [
            jnp.where(jnp.broadcast_to(t, (WARPGROUP_ROWS,)), _row(inputs.reference, s), -jnp.inf)
            for t, s in zip(there, where, strict=True)
        ]
        totals = [_row(inputs.total, s) for s in where]
        outs = [_columns(kernel, inputs.out, s, part) for s in where]
        reference = functools.reduce(jnp.maximum, references, sums.reference)
        safe = jnp.where(reference == -jnp.inf, 0.0, reference)
        weight = jnp.exp2(sums.reference - safe)
        total, out = sums.total * weight, sums.out * _over_columns(weight, sums.out)
        for r, t, o in zip(references, totals, outs, strict=True):
            weight = jnp.exp2(r - safe)
            total, out = total + weight * t, out + _over_columns(weight, out) * o
        return Sums(reference, total, out)

    sums = lax.fori_loop(0, rounds, add, nothing)
    _store(kernel, inputs, outputs, tile, part, sums)


def _row(ref: Any, segment: Any) -> Any:
    return plgpu.load(ref.at[segment, pl.ds(0, WARPGROUP_ROWS)], layout=ROW, optimized=False)


def _over_columns(row: Any, like: Any) -> Any:
    return lax.broadcast_in_dim(row, like.shape, [0])


def _columns(kernel: Kernel, ref: Any, segment: Any, part: Any) -> Any:
    """Columns of a segment's output; rows past the last one repeat it."""
    graph = packing.reader(ref.shape, np.dtype("float32"))
    inputs = _inputs(kernel, segment, 0, part * kernel.columns, ref.shape[1])
    (value,) = emit.evaluate_on_tile(graph, (ref,), inputs)
    return value.value


def _inputs(kernel: Kernel, h: Any, q_start: Any, kv_start: Any, q_limit: int) -> emit.TileInputs:
    return emit.TileInputs(
        score=None,
        b=0,
        h=h,
        q_start=q_start,
        kv_start=kv_start,
        q_size=WARPGROUP_ROWS,
        kv_size=kernel.columns,
        q_limit=q_limit,
        kv_limit=kernel.columns,
        interpret=kernel.plan.config.interpret,
    )


def _store(
    kernel: Kernel, inputs: Inputs, outputs: Outputs, tile: Any, part: Any, sums: Sums
) -> None:
    plan, rows, problem = kernel.plan, kernel.plan.rows, kernel.plan.problem
    lead, first_row = lax.div(tile, jnp.int32(rows.tiles)), lax.rem(tile, jnp.int32(rows.tiles))
    first_row = first_row * WARPGROUP_ROWS
    inverse = jnp.where(sums.total == 0.0, 0.0, 1.0 / sums.total)
    out = sums.out * _over_columns(inverse, sums.out)
    maxima = sums.reference * (1.0 / LOG2_E)
    lse = maxima + jnp.log(sums.total)
    if inputs.lengths and problem.q_len > 1:
        # Queries before the first token of a sequence that is shorter than they are many.
        graph = packing.row_exists(problem.batch, problem.q_len)
        tile_inputs = dataclasses.replace(
            _inputs(kernel, 0, first_row, 0, WARPGROUP_ROWS),
            b=lax.div(lead, jnp.int32(rows.heads)),
        )
        (exists,) = emit.evaluate_on_tile(graph, inputs.lengths, tile_inputs)
        out = jnp.where(emit.broadcast(exists, graphs.TILE, tile_inputs), out, 0.0)
        lse, maxima = (jnp.where(exists.value, x, -jnp.inf) for x in (lse, maxima))
    store_rows(
        outputs.out,
        lead,
        first_row,
        part * kernel.columns,
        out.astype(problem.q_dtype),
        rows.count,
        plan.config.interpret,
    )

    @pl.when(part == 0)
    def _() -> None:
        where = (lead, pl.ds(first_row, WARPGROUP_ROWS))
        outputs.lse[where] = plgpu.layout_cast(lse, ROW)
        for ref in outputs.max_scores:
            ref[where] = plgpu.layout_cast(maxima, ROW)


def store_rows(
    ref: Any, lead: Any, first_row: Any, first_column: Any, tile: Any, limit: int, interpret: bool
) -> None:
    """ref[lead, first_row + i, first_column + j] = tile[i, j], for rows below the limit.

    Few of a tile's rows are queries; the others would cost as much memory traffic as all keys of a short step.
    """
    size, columns = tile.shape
    if interpret:  # where the array has whole tiles
        ref[lead, pl.ds(first_row, size), pl.ds(first_column, columns)] = tile
        return

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), TILE, *(plgpu.Layout.WG_SPLAT,) * 3),
    )
    def store(_: Any, ref: Any, x: Any, lead: Any, first_row: Any, first_column: Any) -> None:
        i64 = ir.IntegerType.get_signless(64)
        memref = ir.MemRefType(ref.type)
        strides, _ = memref.get_strides_and_offset()
        pointer = mgpu.utils.memref_ptr(ref)
        lead, first_row, first_column = (
            v.registers.item() for v in (lead, first_row, first_column)
        )
        origin = [lane.ir for lane in placement.origin(x.layout, x.shape)]
        places = placement.static_offsets(x.layout, x.shape)
        by_row: dict[int, list[tuple[int, Any]]] = {}
        for register, offsets in zip(x.registers.reshape(-1), places, strict=True):
            by_row.setdefault(offsets[0][0], []).append((offsets[0][1], register))

        def wide(value: Any) -> Any:
            return arith.extsi(i64, value)

        def times(value: Any, stride: int) -> Any:
            return arith.muli(wide(value), arith.constant(i64, stride))

        i32 = ir.IntegerType.get_signless(32)
        for offset, registers in by_row.items():
            row = arith.addi(arith.addi(first_row, origin[0]), arith.constant(i32, offset))
            column = arith.addi(first_column, origin[1])
            with mgpu.when(arith.cmpi(arith.CmpIPredicate.slt, row, arith.constant(i32, limit))):
                place = arith.addi(times(lead, strides[0]), times(row, strides[1]))
                place = arith.addi(place, wide(column))
                base = mgpu.utils.getelementptr(pointer, [place], memref.element_type)
                for at, register in registers:
                    target = mgpu.utils.getelementptr(base, [at], memref.element_type)
                    llvm.store(register, target)

    store(ref, tile, *(jnp.asarray(v, jnp.int32) for v in (lead, first_row, first_column)))
