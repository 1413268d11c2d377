"""The step of the softmax that trusts the last references of its rows; see softmax.py.

One piece of MLIR for a thread's two rows: exponentials from the old references, their sums, and, in a branch that
warps seldom take, the maxima and all exponentials anew.

A linear bias (linear_bias.py) is a shift of the exponent that differs by key. Both rows of a thread have the
same shifts if their references differ by just what the bias differs by. So they share one, the greater of the two,
where that does not make the sum of the other row vanish; then a step computes the shifts once for both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector
from jaxlib.mlir.dialects import math as mlir_math

from flexjax.backends.mosaic_gpu import lanes, placement, registers
from flexjax.backends.mosaic_gpu.lanes import I32, Lane
from flexjax.backends.mosaic_gpu.registers import ROW, TILE

LIMIT = 14  # of a row's sum in one step, as a power of two: well below float16's 65504
# A row shares a reference that is at most so far above its own; bfloat16 has room for twice that.
_APART = 64.0
# Shared references are equal but for their rounding, which matters as little as that of a score.
_EQUAL = 2.0**-7

_PACK = {"bfloat16": "cvt.rn.bf16x2.f32", "float16": "cvt.rn.f16x2.f32"}

# From the number of a pair of keys to the shifts of its exponents.
Shifts = Callable[[int], list[ir.Value]]


class Bias(NamedTuple):
    """A bias of scores that is linear in the indices.

    Attributes:
        slope: float32 scalar, in units of log2.
        corner: int32 scalar, the index at the tile's first query and key.
        of_q, of_kv: static, how the index grows with queries and keys.
    """

    slope: Any
    corner: Any
    of_q: int
    of_kv: int


def trusting_softmax(
    scores: Any,
    reference: Any,
    total: Any,
    factor: float,
    dtype: Any,
    words: Any = None,
    bias: Bias | None = None,
    first: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """(probabilities, lane-partial row sums, reference, alpha) of a tile.

    Args:
        scores: of the tile.
        reference: of its rows.
        total: lane-partial sums of its rows so far.
        factor: from scores to units of log2.
        dtype: of the probabilities.
        words: of a masked tile, the bits of the keys that a thread may see in a row (see row_words.py).
        bias: what the scores still lack.
        first: whether nobody has a reference yet.
    """
    row = registers.row_type(scores.shape[0])
    tile = plgpu.ShapeDtypeStruct(scores.shape, dtype, TILE)
    rows = [reference, total] if words is None else [reference, total, words]
    scalars = [] if bias is None else [bias.slope, bias.corner]
    types = (TILE, *(ROW for _ in rows), *(plgpu.Layout.WG_SPLAT for _ in scalars))

    @plgpu.inline_mgpu(arg_types=types, return_type=(tile, row, row, row))
    def softmax(_: Any, x: Any, *given: Any) -> Any:
        of_rows = [registers.row_elements(value) for value in given[: len(rows)]]
        linear = None
        if bias is not None:
            linear = _Linear.of(x, bias, *(v.registers.item() for v in given[len(rows) :]))
        step = _Step(
            registers.registers_by_row(x), of_rows[0], of_rows[1], factor, np.dtype(dtype), linear
        )
        values = step.anew() if first else step.trusting(of_rows[2] if len(rows) == 3 else None)
        p = step.tile_of(x, values[:-6])
        tails = (values[i : i + 2 or None] for i in (-6, -4, -2))
        return (p, *(registers.row_fragment(given[0], tail) for tail in tails))

    return softmax(scores, *rows, *scalars)


def shares_references(dtype: Any) -> bool:
    """Whether rows with a linear bias share references: probabilities may then be very small."""
    return np.dtype(dtype).name == "bfloat16"


class _Linear(NamedTuple):
    """What a linear bias adds to the exponents of the elements that a thread holds.

    Attributes:
        slope: in units of log2.
        index: float32, at the thread's first row and the tile's first key.
        lead: float32, how much more it is at the thread's first key.
        of_q, of_kv: how it grows.
    """

    slope: ir.Value
    index: ir.Value
    lead: ir.Value
    of_q: int
    of_kv: int

    @classmethod
    def of(cls, tile: Any, bias: Bias, slope: ir.Value, corner: ir.Value) -> _Linear:
        row, column = placement.origin(tile.layout, tile.shape)
        index, lead = row * bias.of_q + Lane(corner, I32), column * bias.of_kv
        index, lead = (lanes.call("exact_float", x).ir for x in (index, lead))
        return cls(slope, index, lead, bias.of_q, bias.of_kv)

    def at_row(self, number: int, shift: ir.Value) -> ir.Value:
        """A shift of the first or second row, and the bias at the tile's first key."""
        return mlir_math.fma(self.slope, self._index_at(number), shift)

    def at_thread(self, number: int, shift: ir.Value) -> ir.Value:
        """The same at the thread's first key."""
        index = arith.addf(self._index_at(number), self.lead)
        return mlir_math.fma(self.slope, index, shift)

    def at_lead(self) -> ir.Value:
        """The bias at the thread's first key less that at the tile's."""
        return arith.mulf(self.slope, self.lead)

    def _index_at(self, number: int) -> ir.Value:
        if not number or not self.of_q:
            return self.index
        return arith.addf(self.index, registers.f32(8.0 * number * self.of_q))

    def at_keys(self, shift: ir.Value, pair: int) -> list[ir.Value]:
        """That shift at both keys of a pair."""
        steps = [(8 * pair + k) * self.of_kv for k in range(2)]
        return [
            mlir_math.fma(self.slope, registers.f32(float(s)), shift) if s else shift for s in steps
        ]


@dataclasses.dataclass(frozen=True)
class _Step:
    """What one thread does.

    Attributes:
        rows: registers of the scores of two rows, pairs of keys each.
        references, totals: of the rows.
        factor: from scores to units of log2.
        dtype: of the probabilities.
        linear: the bias.
    """

    rows: list[list[ir.Value]]
    references: list[ir.Value]
    totals: list[ir.Value]
    factor: float
    dtype: np.dtype
    linear: _Linear | None

    def trusting(self, words: list[ir.Value] | None) -> list[ir.Value]:
        """Packed probabilities, then two each of row sums, references and alphas."""
        references = self.references
        unfit = [_is_minus_infinity(m) for m in references]
        shifts = functools.partial(self._shifts, references)
        if (
            words is not None
        ):  # a row without a reference may go on without one while it sees no key
            shifts = functools.partial(self._shifts, self._finite(references))
            zero = arith.constant(ir.IntegerType.get_signless(32), 0)
            sees = (arith.cmpi(arith.CmpIPredicate.ne, word, zero) for word in words)
            unfit = list(map(arith.andi, unfit, sees))
        elif self.linear is not None and shares_references(self.dtype):
            each = [self.linear.at_thread(i, arith.negf(m)) for i, m in enumerate(references)]
            apart = lanes.FUNCTIONS["abs"](arith.subf(*each))
            unfit.append(arith.cmpf(arith.CmpFPredicate.UGT, apart, registers.f32(_EQUAL)))
            pairs = [self.linear.at_keys(each[0], i) for i in range(len(self.rows[0]))]
            shifts = lambda number: pairs.__getitem__  # noqa: E731
        packed, sums = self._exponentials(shifts)
        limit = registers.f32(2.0**LIMIT)
        large = [arith.cmpf(arith.CmpFPredicate.UGT, total, limit) for total in sums]
        start_over = functools.reduce(arith.ori, [*large, *unfit])
        results = [packed[0].type] * len(packed) + [ir.F32Type.get()] * 6
        branch = scf.IfOp(registers.any_in_warp(start_over), results, has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.yield_(self.anew(_APART if shares_references(self.dtype) else 0.0))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_([*packed, *sums, *references, registers.f32(1.0), registers.f32(1.0)])
        return list(branch.results)

    def anew(self, above: float = 0.0) -> list[ir.Value]:
        """The same after finding the maxima; references that are not the first come to lie so far above."""
        if self.linear is not None:
            return self._anew_with_bias(self.linear)
        new = self._raised(above)
        finite = self._finite(new)
        alphas = [
            registers.exp2(arith.subf(old, m))
            for old, m in zip(self.references, finite, strict=True)
        ]
        packed, sums = self._exponentials(functools.partial(self._shifts, finite))
        return [*packed, *sums, *new, *alphas]

    def _anew_with_bias(self, linear: _Linear) -> list[ir.Value]:
        """The same with a linear bias, whose references are rounded as coarsely as the bias is large.

        Exponents are those from the rounded reference, as in the steps to come, unless it is so far from the
        maximum that they overflow or vanish: then scores a bit apart are worlds apart, and the maximum serves.
        """
        elements = self._biased(linear)
        relative, new = self._raised_by_bias(linear, elements)
        finite = self._finite(new)
        alphas = [
            registers.exp2(arith.subf(old, m))
            for old, m in zip(self.references, finite, strict=True)
        ]
        starts = [self._start(linear, i, finite[i], m) for i, m in enumerate(relative)]
        packed, sums = [], []
        for start, row in zip(starts, elements, strict=True):
            chains = None
            for pair in row:
                pair = [registers.exp2(arith.subf(x, start)) for x in pair]
                chains = pair if chains is None else list(map(arith.addf, chains, pair))
                packed.append(_pack(pair, self.dtype))
            sums.append(arith.addf(*chains))
        return [*packed, *sums, *new, *alphas]

    def _start(self, linear: _Linear, row: int, kept: ir.Value, relative: ir.Value) -> ir.Value:
        """What exponents count from, less the bias at the tile's first key."""
        rounded = arith.negf(linear.at_row(row, arith.negf(kept)))
        off = lanes.FUNCTIONS["abs"](arith.subf(rounded, relative))
        close = arith.cmpf(arith.CmpFPredicate.OLE, off, registers.f32(LIMIT / 2))
        close = arith.ori(close, _is_minus_infinity(relative))
        return arith.select(close, rounded, relative)

    def _raised(self, above: float) -> list[ir.Value]:
        """References that are not below what the rows' scores need.

        A reference that has to be raised once will have to be again: scores may grow with every key, as under a
        bias by distance. If it comes to lie above, it need not in each of the next steps.
        """
        c = registers.f32(self.factor)
        tops = [arith.mulf(_top(self._elements(row)), c) for row in self.rows]
        if above:
            raised = []
            for old, top in zip(self.references, tops, strict=True):
                known = arith.cmpf(arith.CmpFPredicate.OGT, old, registers.f32(-np.inf))
                higher = arith.cmpf(arith.CmpFPredicate.OGT, top, old)
                more = arith.addf(top, registers.f32(above))
                raised.append(arith.select(arith.andi(known, higher), more, top))
            tops = raised
        return list(map(arith.maximumf, self.references, tops))

    def _raised_by_bias(
        self, linear: _Linear, elements: list[list[list[ir.Value]]]
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        """The same, first less the bias at the tile's first key, as the elements are, then as they are kept.

        One that is not raised stays what it is to the bit: its rounding may be more than an exponent holds.
        """
        tops = list(map(_top, elements))
        old = [arith.negf(linear.at_row(i, arith.negf(m))) for i, m in enumerate(self.references)]
        relative = list(map(arith.maximumf, old, tops))
        if shares_references(self.dtype):
            own = [
                arith.maximumf(top, arith.addf(m, lanes.FUNCTIONS["log2.approx"](_whole(total))))
                for top, m, total in zip(tops, old, self.totals, strict=True)
            ]
            shared = arith.maximumf(*relative)
            lowest = arith.subf(shared, registers.f32(_APART))
            near = [arith.cmpf(arith.CmpFPredicate.OGE, x, lowest) for x in own]
            relative = [arith.select(arith.andi(*near), shared, m) for m in relative]
        kept = []
        for i, (m, before) in enumerate(zip(relative, old, strict=True)):
            same = arith.cmpf(arith.CmpFPredicate.OEQ, m, before)
            kept.append(arith.select(same, self.references[i], linear.at_row(i, m)))
        return relative, kept

    def _biased(self, linear: _Linear) -> list[list[list[ir.Value]]]:
        """Exponents of the rows' pairs, less the bias at the tile's first key."""
        c, start = registers.f32(self.factor), _here(linear.at_lead())
        return [
            [
                [
                    mlir_math.fma(x, c, s)
                    for x, s in zip(pair, linear.at_keys(start, i), strict=True)
                ]
                for i, pair in enumerate(self._elements(row))
            ]
            for row in self.rows
        ]

    def _elements(self, row: list[ir.Value]) -> list[list[ir.Value]]:
        """The pairs of scores in a row's registers."""
        return [[registers.element(r, k) for k in range(2)] for r in row]

    def _finite(self, references: list[ir.Value]) -> list[ir.Value]:
        """Of a row of -inf only, anything finite gives exponentials of zero rather than of -inf + inf."""
        zero = registers.f32(0.0)
        return [arith.select(_is_minus_infinity(m), zero, m) for m in references]

    def _shifts(self, references: list[ir.Value], number: int) -> Shifts:
        """The shifts of a row's exponents from its reference."""
        shift = arith.negf(references[number])
        if self.linear is None:
            return lambda pair: [shift] * 2
        return functools.partial(self.linear.at_keys, self.linear.at_thread(number, shift))

    def _exponentials(
        self, shifts: Callable[[int], Shifts]
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        """Pairs of probabilities, packed, in the order of the rows' registers; and the row sums."""
        c = registers.f32(self.factor)
        words, sums = [], []
        for number, row in enumerate(self.rows):
            of_row, chains = shifts(number), None
            for i, register in enumerate(row):
                pair = [
                    registers.exp2(mlir_math.fma(registers.element(register, k), c, shift))
                    for k, shift in enumerate(of_row(i))
                ]
                chains = pair if chains is None else list(map(arith.addf, chains, pair))
                words.append(_pack(pair, self.dtype))
            sums.append(arith.addf(*chains))
        return words, sums

    def tile_of(self, like: Any, words: list[ir.Value]) -> Any:
        """The tile whose registers, row by row, are the packed pairs `words`."""
        low = {"bfloat16": ir.BF16Type, "float16": ir.F16Type}[self.dtype.name].get()
        one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
        pair = ir.VectorType.get((2,), low)
        held = (id(register) for row in self.rows for register in row)
        word_of = dict(zip(held, words, strict=True))
        out = np.empty_like(like.registers)
        for position, register in np.ndenumerate(like.registers):
            word = vector.from_elements(one, [word_of[id(register)]])
            out[position] = vector.bitcast(pair, word)
        return registers.fragment(out, like.layout)


def _is_minus_infinity(value: ir.Value) -> ir.Value:
    return arith.cmpf(arith.CmpFPredicate.OEQ, value, registers.f32(-np.inf))


def _top(pairs: list[list[ir.Value]]) -> ir.Value:
    """The maximum of a row."""
    chains = functools.reduce(lambda a, b: list(map(arith.maximumf, a, b)), pairs)
    return registers.across_lanes(arith.maximumf, arith.maximumf(*chains))


def _whole(partial: ir.Value) -> ir.Value:
    return registers.across_lanes(arith.addf, partial)


def _here(value: ir.Value) -> ir.Value:
    """The value, so that what is computed of it is computed here.

    LLVM would compute it before the loop, as the value is the same in all steps, and a branch that is seldom taken
    would hold a register for every key in all of them.
    """
    return llvm.inline_asm(
        value.type, [value], "mov.f32 $0, $1;", "=f,f", asm_dialect=0, has_side_effects=True
    )


def _pack(pair: list[ir.Value], dtype: np.dtype) -> ir.Value:
    """Two float32 numbers, rounded, in one 32-bit word."""
    return llvm.inline_asm(
        ir.IntegerType.get_signless(32),
        [pair[1], pair[0]],
        f"{_PACK[dtype.name]} $0, $1, $2;",
        "=r,f,f",
        asm_dialect=0,
        has_side_effects=False,
    )
