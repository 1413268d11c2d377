"""The online softmax of a tile of scores, in base 2, on the registers of one warpgroup.

With x = c y the scores y in units of log2 (c = log2 e, times the scale where it was not yet applied), a row keeps
a reference m and the sum l of 2^(x - m); the output's accumulator is relative to the same m. A new tile may
raise m to m', and multiplies l and the accumulator by alpha = 2^(m - m') (Milakov and Gimelshein 2018,
arXiv:1805.02867; FlashAttention-2, arXiv:2307.08691).

m need not be the row's maximum: any m serves for which nothing overflows and the sum does not vanish. So

- a step may leave m alone while the maximum has outgrown it by less than 2^`slack`, which spares most steps the
  rescaling of the accumulator (FlashAttention-4 does so too);
- a step may skip the search for the maximum (`trusting`), take the old m, and look at the sums: only a warp in
  which one of them passes 2^`LIMIT`, or is NaN, or whose m is still -inf, finds the maximum and starts over.

Where the true maxima are asked for, neither is done.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector
from jaxlib.mlir.dialects import math as mlir_math

from flexjax.backends.mosaic_gpu import registers
from flexjax.backends.mosaic_gpu.registers import ROW, TILE

LOG2_E = math.log2(math.e)
SLACK = 8.0  # probabilities up to 2^8 and sums up to 2^14 stay far below float16's 65504
LIMIT = 14

_PACK = {"bfloat16": "cvt.rn.bf16x2.f32", "float16": "cvt.rn.f16x2.f32"}


class State(NamedTuple):
    """A row's running values, [64] each in the row layout.

    Attributes:
        reference: m, in units of log2; -inf until a row has met a score above -inf.
        total: l; lane-partial on the GPU.
    """

    reference: Any
    total: Any


@dataclasses.dataclass(frozen=True)
class Softmax:
    """The online softmax of one kernel.

    Attributes:
        factor: c, from a score to units of log2; positive.
        dtype: of the probabilities, as the matrix product with the values takes them.
        maxima: whether m must be the true maximum in the end.
        trust: whether `trusting` may skip the search for the maximum.
        interpret: whether to do without what the interpreter lacks.
    """

    factor: float
    dtype: Any
    maxima: bool
    trust: bool
    interpret: bool

    def start(self, rows: int) -> State:
        def row(value: float) -> Any:
            return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), ROW)

        return State(row(-jnp.inf), row(0.0))

    def searching(self, scores: Any, state: State) -> tuple[Any, State, Any]:
        """(probabilities, new state, alpha) after finding the rows' maxima. Float32 probabilities."""
        old = state.reference
        new = jnp.maximum(old, scores.max(axis=1) * self.factor)
        if not self.maxima:
            new = jnp.where(new - old > SLACK, new, old)
        # A row of -inf only: anything finite gives exponentials of zero rather than of -inf + inf.
        safe = jnp.where(new == -jnp.inf, 0.0, new)
        alpha = jnp.exp2(old - safe)
        p = jnp.exp2(scores * self.factor - lax.broadcast_in_dim(safe, scores.shape, [0]))
        sums = p.sum(axis=1) if self.interpret else registers.partial_row_sums(p)
        return p, State(new, state.total * alpha + sums), alpha

    def trusting(self, scores: Any, state: State) -> tuple[Any, State, Any]:
        """The same from the old reference wherever that will do. Probabilities in `dtype`."""
        if not self.trust or self.maxima or self.interpret:
            return self.searching(scores, state)
        p, sums, reference, alpha = _trusting(scores, state.reference, self.factor, self.dtype)
        return p, State(reference, state.total * alpha + sums), alpha

    def as_operand(self, p: Any) -> Any:
        """Probabilities as operand of the product with the values, after the previous product has ended."""
        if p.dtype == self.dtype:
            return registers.in_fresh_registers(lax.optimization_barrier(p))
        return p.astype(self.dtype)

    def rescaled(self, accumulator: Any, alpha: Any) -> Any:
        if self.interpret:
            return accumulator * lax.broadcast_in_dim(alpha, accumulator.shape, [0])
        return registers.scale_rows(accumulator, alpha)

    def finish(self, state: State) -> tuple[Any, Any, Any]:
        """(1 / l or 0 in rows without keys, lse, maxima) of the rows, in natural units."""
        total = state.total if self.interpret else registers.finish_row_sums(state.total)
        inverse = jnp.where(total == 0.0, 0.0, 1.0 / total)
        maxima = state.reference * (1.0 / LOG2_E)
        return inverse, maxima + jnp.log(total), maxima


def _trusting(scores: Any, reference: Any, factor: float, dtype: Any) -> tuple[Any, Any, Any, Any]:
    """(probabilities, lane-partial row sums, reference, alpha); see `Softmax.trusting`."""
    row = registers.row_type(scores.shape[0])
    tile = plgpu.ShapeDtypeStruct(scores.shape, dtype, TILE)

    @plgpu.inline_mgpu(arg_types=(TILE, ROW), return_type=(tile, row, row, row))
    def softmax(_: Any, x: Any, m: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        rows, references = registers.registers_by_row(x), registers.row_elements(m)
        c, minus_infinity = registers.f32(factor), registers.f32(-np.inf)

        def exponentials(references: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
            """Pairs of probabilities, packed, in the order of the rows' registers; and the row sums."""
            words, sums = [], []
            for row, reference in zip(rows, references, strict=True):
                shift, chains = arith.negf(reference), None
                for register in row:
                    pair = [
                        registers.exp2(mlir_math.fma(registers.element(register, k), c, shift))
                        for k in range(2)
                    ]
                    chains = pair if chains is None else list(map(arith.addf, chains, pair))
                    words.append(_pack(pair, dtype))
                sums.append(arith.addf(*chains))
            return words, sums

        def is_minus_infinity(value: ir.Value) -> ir.Value:
            return arith.cmpf(arith.CmpFPredicate.OEQ, value, minus_infinity)

        words, sums = exponentials(references)
        limit = registers.f32(2.0**LIMIT)
        unfit = [arith.cmpf(arith.CmpFPredicate.UGT, total, limit) for total in sums]
        unfit += map(is_minus_infinity, references)
        start_over = unfit[0]
        for condition in unfit[1:]:
            start_over = arith.ori(start_over, condition)
        results = [i32] * len(words) + [ir.F32Type.get()] * 6
        branch = scf.IfOp(registers.any_in_warp(start_over), results, has_else=True)
        with ir.InsertionPoint(branch.then_block):
            maxima, alphas, safe = [], [], []
            for row, old in zip(rows, references, strict=True):
                chains = [registers.element(row[0], k) for k in range(2)]
                for register in row[1:]:
                    chains = [
                        arith.maximumf(a, registers.element(register, k))
                        for k, a in enumerate(chains)
                    ]
                top = registers.across_lanes(arith.maximumf, arith.maximumf(*chains))
                new = arith.maximumf(old, arith.mulf(top, c))
                maxima.append(new)
                safe.append(arith.select(is_minus_infinity(new), registers.f32(0.0), new))
                alphas.append(registers.exp2(arith.subf(old, safe[-1])))
            again, sums_again = exponentials(safe)
            scf.yield_([*again, *sums_again, *maxima, *alphas])
        with ir.InsertionPoint(branch.else_block):
            scf.yield_([*words, *sums, *references, registers.f32(1.0), registers.f32(1.0)])
        values = list(branch.results)
        p = _tile_of_words(x, rows, values[: len(words)], dtype)
        tails = (values[len(words) + i : len(words) + i + 2] for i in (0, 2, 4))
        return (p, *(registers.row_fragment(m, tail) for tail in tails))

    return softmax(scores, reference)


def _pack(pair: list[ir.Value], dtype: Any) -> ir.Value:
    """Two float32 numbers, rounded, in one 32-bit word."""
    return llvm.inline_asm(
        ir.IntegerType.get_signless(32),
        [pair[1], pair[0]],
        f"{_PACK[np.dtype(dtype).name]} $0, $1, $2;",
        "=r,f,f",
        asm_dialect=0,
        has_side_effects=False,
    )


def _tile_of_words(like: Any, rows: list[list[Any]], words: list[ir.Value], dtype: Any) -> Any:
    """The tile whose registers, row by row as in `rows`, are the packed pairs `words`."""
    low = {"bfloat16": ir.BF16Type, "float16": ir.F16Type}[np.dtype(dtype).name].get()
    one, pair = (
        ir.VectorType.get((1,), ir.IntegerType.get_signless(32)),
        ir.VectorType.get((2,), low),
    )
    word_of = dict(zip((id(r) for row in rows for r in row), words, strict=True))
    out = np.empty_like(like.registers)
    for position, register in np.ndenumerate(like.registers):
        word = vector.from_elements(one, [word_of[id(register)]])
        out[position] = vector.bitcast(pair, word)
    return registers.fragment(out, like.layout)
