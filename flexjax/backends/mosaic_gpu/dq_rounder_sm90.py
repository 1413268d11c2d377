"""How the sums of dQ are rounded inside the persistent backward kernel on Hopper.

The float32 sums of a head (dq_tiles.py) are complete when all its columns are. Rounding them is a matter of memory
alone, which the kernel leaves idle, so that a warpgroup beside the others takes it on:

    consumer warps   add their shares of dQ, step by step
                     count for a column at the end of the next one, when its additions have long arrived
    rounding warps   for each of their tiles of 64 queries, in the order in which heads are finished:
                         wait until all columns of the head have been counted
                         read the sums, scale and round them, and put them in order

It has few registers and reads slowly. What is finished last is left to the consumers, who have nothing else to do
then.

Nobody waits for ever: columns do not wait for rounding, and whoever runs takes them all, so that nobody has to
start for others to go on.

Counters lie behind the sums, in the same array of zeros: how many columns have been taken (counter.py), and
for every head of keys, or share of one, how many warps have counted.
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
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from flexjax.backends.mosaic_gpu.backward_kernel_sm90 import Inputs, Kernel, Outputs
from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS
from flexjax.backends.mosaic_gpu.dq_tiles import COLUMNS, WARP_ROWS
from flexjax.backends.mosaic_gpu.registers import WARPGROUP
from flexjax.block_lists import cdiv
from flexjax.problem import BLHD

_COUNTING_WARPS = 4  # of a consumer warpgroup
_QUAD = 4  # lanes that hold a row


@dataclasses.dataclass(frozen=True)
class DqRounder:
    """A warpgroup that rounds tiles of 64 queries, each of its warps by itself."""

    kernel: Kernel
    inputs: Inputs
    outputs: Outputs

    def run(self, cta: Any) -> None:
        """Takes part in rounding all heads but the last ones."""
        self._share(range(self._last_heads), cta, self.kernel.schedule.ctas)

    def finish(self, cta: Any, warpgroup: int) -> None:
        """Takes part, as one of the consumers, in rounding the last heads."""
        schedule, n = self.kernel.schedule, self.kernel.config.warpgroups
        heads = range(self._last_heads, schedule.heads)
        self._share(heads, cta * n + warpgroup, schedule.ctas * n)

    @property
    def _last_heads(self) -> int:
        """The first of the heads that are finished last: a column counts when the CTA has had one more."""
        schedule = self.kernel.schedule
        group = schedule.heads_together
        column = max(0, schedule.columns - schedule.ctas - 1)
        return column // (group * schedule.kv_tiles) * group

    def _share(self, heads: range, worker: Any, workers: int) -> None:
        """Rounds every `workers`-th tile of some heads, from that with the number `worker` on."""
        schedule = self.kernel.schedule
        tiles = cdiv(self.kernel.problem.q_len, WARPGROUP_ROWS)
        of_head = schedule.rows * tiles
        count = lax.div(len(heads) * of_head - worker + workers - 1, jnp.int32(workers))

        def tile(i: Any, finished: Any) -> Any:
            number = heads.start * of_head + worker + i * workers
            head = lax.div(number, jnp.int32(of_head))
            pl.when(head != finished)(lambda: self._await(head))
            inside = number - head * of_head
            row = lax.div(inside, jnp.int32(tiles))
            b, h = schedule.row_of_head(head, row)
            self._round(b, h, (inside - row * tiles) * WARPGROUP_ROWS)
            return head

        lax.fori_loop(0, count, tile, jnp.int32(-1))

    def _await(self, head: Any) -> None:
        """Waits until all columns of a head have been counted."""
        kernel = self.kernel
        counting = sum(part.columns > 0 for part in kernel.parts) * _COUNTING_WARPS
        wanted = kernel.schedule.kv_tiles * counting

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
        def emit(_: Any, sums: Any, head: Any) -> None:
            counter = address(sums, kernel.finished, head.registers.item())
            code = f"""{{
                .reg .pred other, early;
                .reg .s32 counted;
                setp.ne.s32 other, $1, 0;
                @other bra done;
            again:
                ld.relaxed.gpu.global.s32 counted, [$0];
                setp.lt.s32 early, counted, {wanted};
                @!early bra enough;
                nanosleep.u32 1000;
                bra again;
            enough:
                ld.acquire.gpu.global.s32 counted, [$0];
            done:
            }}"""
            # One thread asks, and not often, for all CTAs ask in the same place.
            thread = arith.andi(mgpu.utils.thread_idx(), _constant(WARPGROUP - 1))
            mgpu.utils.inline_ptx(code, counter, thread, has_side_effects=True)
            mgpu.utils.warpgroup_barrier()

        emit(self.inputs.dq[0], head)

    def _round(self, b: Any, h: Any, first: Any) -> None:
        """Rounds 64 queries of a query head, 16 of them a warp.

        Four lanes hold 8 columns of a row together. They exchange what they have of 32 columns, so that each comes
        to 8 neighbours, 16 bytes.
        """
        problem = self.kernel.problem
        (out,) = self.outputs.dq
        dim, length, heads = out.shape[-1], problem.q_len, problem.q_heads
        # Rows of the output: where the first one is, and how far apart they are.
        place, apart = (b * heads + h) * length + first, 1
        if problem.layout == BLHD:
            place, apart = (b * length + first) * heads + h, heads

        @plgpu.inline_mgpu(arg_types=((plgpu.RefType(),) * 2, (plgpu.Layout.WG_SPLAT,) * 3))
        def emit(_: Any, refs: Any, numbers: Any) -> None:
            f32, kind = ir.F32Type.get(), mgpu.utils.dtype_to_ir_type(problem.q_dtype)
            sums, out = map(mgpu.utils.memref_ptr, refs)
            row, first, place = (x.registers.item() for x in numbers)
            warp, lane = (arith.andi(x, _constant(n)) for x, n in _warp_and_lane())
            in_warp, chunk = arith.shrui(lane, _constant(2)), arith.andi(lane, _constant(3))
            own = arith.addi(arith.muli(warp, _constant(WARP_ROWS)), in_warp)
            inside = arith.addi(
                arith.muli(warp, _constant(WARP_ROWS * dim)), arith.shli(lane, _constant(2))
            )
            source = _at(_at(sums, _times(row, dim), f32), inside, f32)
            for group in range(0, dim // COLUMNS, _QUAD):
                chunks = min(dim // COLUMNS - group, _QUAD)
                start = mgpu.utils.getelementptr(source, [WARP_ROWS * COLUMNS * group], f32)
                held = _read(start, chunks, problem.scale, kind)
                for i in range(2):
                    own_row = arith.addi(own, _constant(8 * i))
                    query = arith.addi(first, own_row)
                    exists = arith.cmpi(arith.CmpIPredicate.slt, query, _constant(length))
                    if chunks < _QUAD:
                        has = arith.cmpi(arith.CmpIPredicate.slt, chunk, _constant(chunks))
                        exists = arith.andi(exists, has)
                    values = _exchanged([pair[i] for pair in held], chunk)
                    with mgpu.utils.when(exists):
                        line = arith.addi(place, arith.muli(own_row, _constant(apart)))
                        target = _at(out, _times(line, dim), kind)
                        column = arith.addi(chunk, _constant(group))
                        target = _at(target, arith.muli(column, _constant(COLUMNS)), kind)
                        quad = ir.VectorType.get((_QUAD,), ir.IntegerType.get_signless(32))
                        llvm.store(vector.from_elements(quad, values), target, alignment=16)

        emit((self.inputs.dq[0], out), (self.kernel.row_of(b, h, first), first, place))


def count_column(sums: Any, kernel: Kernel, head: Any, some: Any) -> None:
    """Counts, for every warp of a consumer warpgroup, a column whose additions to dQ have arrived.

    Args:
        sums: the reference to the sums, and to the counters behind them.
        kernel: the kernel.
        head: of the column; negative for no column.
        some: bool, whether the last additions are of the next column, so that they need not have arrived.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT))
    def emit(_: Any, sums: Any, head: Any, some: Any) -> None:
        head, some = head.registers.item(), some.registers.item()
        code = """{
            .reg .pred counts, some;
            setp.ne.s32 some, $2, 0;
            @some bra all_but_one;
            cp.async.bulk.wait_group 0;
        all_but_one:
            cp.async.bulk.wait_group 1;
            setp.ge.s32 counts, $1, 0;
            @counts red.release.gpu.global.add.s32 [$0], 1;
        }"""
        counter = address(sums, kernel.finished, head)
        with mgpu.utils.when(nvvm.elect_sync()):
            mgpu.utils.inline_ptx(code, counter, head, some, has_side_effects=True)

    emit(sums, head, jnp.asarray(some, jnp.int32))


def address(sums: ir.Value, first: int, number: ir.Value) -> ir.Value:
    """The address of one of the counters that begin `first` numbers behind the start of the sums."""
    i32 = ir.IntegerType.get_signless(32)
    return _at(_at(mgpu.utils.memref_ptr(sums), _constant(first, 64), i32), number, i32)


def _read(source: ir.Value, chunks: int, scale: float, kind: ir.Type) -> list[list[ir.Value]]:
    """What a lane has of four times 8 columns: two rounded numbers of either of its rows, as 32 bits."""
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    factor = arith.constant(f32, scale)
    result = []
    for n in range(chunks):
        read = llvm.inline_asm(
            ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>"),
            [mgpu.utils.getelementptr(source, [WARP_ROWS * COLUMNS * n], f32)],
            "ld.global.L1::no_allocate.v4.f32 {$0, $1, $2, $3}, [$4];",
            "=f,=f,=f,=f,l",
            has_side_effects=True,  # not before the head is finished
        )
        scaled = [arith.mulf(llvm.extractvalue(f32, read, [e]), factor) for e in range(4)]
        rounded = [arith.truncf(kind, x) for x in scaled]
        pair = ir.VectorType.get((2,), kind)
        words = (vector.from_elements(pair, rounded[2 * i : 2 * i + 2]) for i in range(2))
        result.append([llvm.bitcast(i32, word) for word in words])
    return result + [[_constant(0)] * 2] * (_QUAD - chunks)


def _exchanged(held: list[ir.Value], lane: ir.Value) -> list[ir.Value]:
    """The lane-th number of each of four lanes, where this is one of them and `held` are its own."""
    for distance in (2, 1):
        upper = arith.cmpi(
            arith.CmpIPredicate.ne, arith.andi(lane, _constant(distance)), _constant(0)
        )
        result = list(held)
        for low in (n for n in range(_QUAD) if not n & distance):
            high = low + distance
            got = mgpu.utils.shfl_bfly(arith.select(upper, held[low], held[high]), distance)
            result[low] = arith.select(upper, got, held[low])
            result[high] = arith.select(upper, held[high], got)
        held = result
    return held


def _warp_and_lane() -> tuple[tuple[ir.Value, int], ...]:
    return (mgpu.utils.warp_idx(), 3), (mgpu.utils.thread_idx(), 31)


def _times(x: ir.Value, factor: int) -> ir.Value:
    """The product in 64 bits: there may be more numbers than 32 bits can count."""
    wide = arith.extsi(ir.IntegerType.get_signless(64), x)
    return arith.muli(wide, _constant(factor, 64))


def _constant(value: int, bits: int = 32) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(bits), value)


def _at(pointer: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
    return mgpu.utils.getelementptr(pointer, [offset], kind)
