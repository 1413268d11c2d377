"""Integers of one thread as sums of a few base values and a static offset.

A thread holds elements of a tile at static distances from each other, so the indices of its elements differ by
constants: query `q_start + row + 8`, key `kv_start + column + 17`. Kept apart, the constants end up as
immediate operands of comparisons, additions and loads, and expressions of q - kv turn out equal along the
tile's diagonals: a thread computes 34 of them for 64 elements (64 x 128 tile).

All sums are modulo 2**32, as int32 arithmetic is; bounds are kept where more must be known.
"""

from __future__ import annotations

import dataclasses
import math

from flexjax.backends.mosaic_gpu import lanes
from flexjax.backends.mosaic_gpu.lanes import F32, I32, Lane


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """sum(coefficient * base) + offset. Made by `Forms` only, which makes equal forms identical.

    Attributes:
        terms: (base, coefficient) pairs, sorted; bases by their position in `Forms`.
        offset: the static part, as a signed 32-bit number.
        real: whether the value is a float32 that holds this integer exactly.
    """

    terms: tuple[tuple[int, int], ...]
    offset: int
    real: bool = False


@dataclasses.dataclass(frozen=True)
class _Base:
    lane: Lane
    bound: int | None
    divisor: int
    natural: bool


def _signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


class Forms:
    """The forms of one program, and the instructions that compute them."""

    def __init__(self) -> None:
        self._bases: list[_Base] = []
        self._of_lane: dict[int, Form] = {}
        self._interned: dict[tuple, Form] = {}
        self._sums: dict[tuple, Lane] = {}
        self._lanes: dict[int, Lane] = {}
        self._quotients: dict[tuple, Form] = {}

    def _form(self, terms: dict[int, int], offset: int, real: bool = False) -> Form:
        items = ((base, _signed(c)) for base, c in terms.items())
        key = (tuple(sorted((b, c) for b, c in items if c)), _signed(offset), real)
        if key not in self._interned:
            self._interned[key] = Form(*key)
        return self._interned[key]

    def constant(self, value: int) -> Form:
        return self._form({}, value)

    def base(
        self, lane: Lane, bound: int | None = None, divisor: int = 1, natural: bool = False
    ) -> Form:
        """A value as a form of its own: |value| <= bound, divisor divides it, natural ones are not negative."""
        if id(lane) not in self._of_lane:
            self._bases.append(_Base(lane, bound, divisor, natural))
            self._of_lane[id(lane)] = self._form({len(self._bases) - 1: 1}, 0)
        return self._of_lane[id(lane)]

    def add(self, x: Form, y: Form, sign: int = 1) -> Form:
        terms = dict(x.terms)
        for base, coefficient in y.terms:
            terms[base] = terms.get(base, 0) + sign * coefficient
        return self._form(terms, x.offset + sign * y.offset, x.real)

    def scale(self, x: Form, factor: int) -> Form:
        return self._form({b: factor * c for b, c in x.terms}, factor * x.offset)

    def as_real(self, x: Form) -> Form:
        return self._form(dict(x.terms), x.offset, real=True)

    def of_terms(self, terms: tuple[tuple[int, int], ...]) -> Form:
        """The form of these terms without an offset."""
        return self._form(dict(terms), 0)

    def bound(self, x: Form) -> int | None:
        """A bound of |x| and of the sum of the terms; None where there is none."""
        total = abs(x.offset)
        for base, coefficient in x.terms:
            bound = self._bases[base].bound
            if bound is None:
                return None
            total += abs(coefficient) * bound
        return total

    def divisor(self, x: Form) -> int:
        """What divides the sum of the terms."""
        return math.gcd(*(self._bases[base].divisor * c for base, c in x.terms))

    def divided(self, x: Form, by: int) -> tuple[Form, Form] | None:
        """Quotient and remainder by a positive constant, where both are forms; None elsewhere.

        That is where what the constant does not divide never carries over: of `16 i + j + 9`, with j at most 6,
        the quotient by 16 is i and the remainder j + 9. So the elements of a tile share their quotients.
        """
        bound = self.bound(x)
        bases = [self._bases[base] for base, _ in x.terms]
        if x.real or bound is None or bound >= 2**31 or x.offset < 0:
            return None
        if not all(base.natural for base in bases) or not all(c > 0 for _, c in x.terms):
            return None
        multiples, rest = {}, {}
        for (number, c), base in zip(x.terms, bases, strict=True):
            (rest if base.divisor * c % by else multiples)[number] = c
        remainder = self._form(rest, x.offset % by)
        most = self.bound(remainder)
        if most is None or most >= by:
            return None
        exact = {number: c // by for number, c in multiples.items() if c % by == 0}
        quotient = self._form(exact, x.offset // by)
        others = tuple((number, c) for number, c in multiples.items() if number not in exact)
        if others:
            quotient = self.add(quotient, self._quotient(self.of_terms(others), by))
        return quotient, remainder

    def _quotient(self, x: Form, by: int) -> Form:
        """The quotient of a form that is not negative and that `by` divides."""
        key = (x.terms, by)
        if key not in self._quotients:
            lane = lanes.quotient(self.lane(x), by, natural=True)
            bound = self.bound(x)
            assert bound is not None, "divided() knows a bound"
            self._quotients[key] = self.base(
                lane, bound // by, max(self.divisor(x) // by, 1), natural=True
            )
        return self._quotients[key]

    def sum_of_terms(self, x: Form) -> Lane:
        """The form without its offset, as int32."""
        if x.terms not in self._sums:
            total = None
            for base, coefficient in x.terms:
                lane = self._bases[base].lane
                if coefficient != 1:
                    lane = -lane if coefficient == -1 else lane * coefficient
                total = lane if total is None else total + lane
            self._sums[x.terms] = lanes.const(0, I32) if total is None else total
        return self._sums[x.terms]

    def lane(self, x: Form) -> Lane:
        """The value, int32 or float32; the same lane for the same form."""
        if id(x) not in self._lanes:
            self._lanes[id(x)] = self._compute(x)
        return self._lanes[id(x)]

    def _compute(self, x: Form) -> Lane:
        if not x.terms:
            return lanes.const(x.offset, F32 if x.real else I32)
        if not x.real:
            return self.sum_of_terms(x) + x.offset if x.offset else self.sum_of_terms(x)
        if x.offset:
            return self.lane(self._form(dict(x.terms), 0, real=True)) + x.offset
        return lanes.call("exact_float", self.sum_of_terms(x))
