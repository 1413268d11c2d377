"""What an operation yields on bounds: the rules of interval arithmetic behind `regions`, by type.

Each rule is sound: its bounds contain every value that operands within theirs can yield. `xp` is `numpy` or
`jax.numpy`. Which operations have a rule says one table a type: `LOGIC`, `MONOTONE`, `FLOAT` and `INTEGER`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from flexjax.mods.ops import is_bool, is_float

_INT32 = np.iinfo(np.int32)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The smallest and the largest value that a node may have in the region."""

    low: Any
    high: Any


# -- booleans ---------------------------------------------------------------------------------------


def _xor(x: Bounds, y: Bounds) -> Bounds:
    different = (x.low & ~y.high) | (~x.high & y.low)
    equal = (x.low & y.low) | ~(x.high | y.high)
    return Bounds(different, ~equal)


LOGIC: dict[str, Callable[..., Bounds]] = {
    "and": lambda x, y: Bounds(x.low & y.low, x.high & y.high),
    "or": lambda x, y: Bounds(x.low | y.low, x.high | y.high),
    "not": lambda x: Bounds(~x.high, ~x.low),
    "xor": _xor,
}


def compare(op: str, x: Bounds, y: Bounds, same: bool) -> Bounds:
    if same:  # a value against itself
        true = (x.low == x.low) if op in ("eq", "le", "ge") else (x.low != x.low)
        return Bounds(true, true)
    if is_bool(x.low.dtype):
        if op not in ("eq", "ne"):  # False < True
            x, y = (Bounds(v.low.astype(np.int32), v.high.astype(np.int32)) for v in (x, y))
            return compare(op, x, y, same)
        different = _xor(x, y)
        return different if op == "ne" else LOGIC["not"](different)
    match op:
        # Bounds of NaN decide nothing: comparisons with them are false, so they are asked for proofs only.
        case "lt":
            return Bounds(x.high < y.low, ~(x.low >= y.high))
        case "le":
            return Bounds(x.high <= y.low, ~(x.low > y.high))
        case "gt" | "ge":
            return compare({"gt": "lt", "ge": "le"}[op], y, x, same)
        case "eq":
            settled = (x.low == x.high) & (y.low == y.high) & (x.low == y.low)
            return Bounds(settled, ~((x.high < y.low) | (y.high < x.low)))
    return LOGIC["not"](compare("eq", x, y, same))


# -- any type ---------------------------------------------------------------------------------------


def select(which: Bounds, *cases: Bounds, xp: Any) -> Bounds:
    if is_bool(which.low.dtype) and len(cases) == 2:
        no, yes = cases
        # Where the choice is open the result lies in either case.
        low = xp.where(which.low, yes.low, xp.where(which.high, _lower(no, yes, xp), no.low))
        high = xp.where(which.low, yes.high, xp.where(which.high, _upper(no, yes, xp), no.high))
        return Bounds(low, high)
    low, high = cases[0].low, cases[0].high
    for case in cases[1:]:
        low, high = _lower(Bounds(low, high), case, xp), _upper(Bounds(low, high), case, xp)
    return Bounds(low, high)


def _lower(x: Bounds, y: Bounds, xp: Any) -> Any:
    return x.low & y.low if is_bool(x.low.dtype) else xp.minimum(x.low, y.low)


def _upper(x: Bounds, y: Bounds, xp: Any) -> Any:
    return x.high | y.high if is_bool(x.low.dtype) else xp.maximum(x.high, y.high)


def convert(x: Bounds, dtype: Any, unknown: Bounds, xp: Any) -> Bounds:
    source, target = np.dtype(x.low.dtype), np.dtype(dtype)
    if is_bool(target):
        if is_float(source):
            return unknown
        if is_bool(source):
            return x
        return Bounds((x.low > 0) | (x.high < 0), (x.low != 0) | (x.high != 0))
    if is_float(target):
        # Conversion to float32 rounds, which keeps the order; narrower types would lose the bounds' tie
        # to the value's own dtype.
        if target != np.float32:
            return unknown
        return Bounds(x.low.astype(target), x.high.astype(target))
    if not is_float(source):
        low, high = x.low.astype(np.int32), x.high.astype(np.int32)
        bad = (low < unknown.low) | (high > unknown.high)
    else:
        # Truncation keeps the order; values outside the integers' range are left to the platform.
        bad = ~((x.low > _FLOAT_MIN) & (x.high < _FLOAT_MAX))
        low = xp.where(bad, 0, x.low).astype(np.int32)
        high = xp.where(bad, 0, x.high).astype(np.int32)
        bad = bad | (low < unknown.low) | (high > unknown.high)
    return Bounds(xp.where(bad, unknown.low, low), xp.where(bad, unknown.high, high))


_FLOAT_MIN, _FLOAT_MAX = -2147483000.0, 2147483000.0

# Operations that keep or reverse the order in every operand, and that neither round nor wrap.
MONOTONE: dict[str, Callable[..., tuple[Any, Any]]] = {
    "max": lambda xp, x, y: (xp.maximum(x.low, y.low), xp.maximum(x.high, y.high)),
    "min": lambda xp, x, y: (xp.minimum(x.low, y.low), xp.minimum(x.high, y.high)),
    "clamp": lambda xp, low, x, high: (
        xp.minimum(xp.maximum(x.low, low.low), high.low),
        xp.minimum(xp.maximum(x.high, low.high), high.high),
    ),
    "floor": lambda xp, x: (xp.floor(x.low), xp.floor(x.high)),
    "ceil": lambda xp, x: (xp.ceil(x.low), xp.ceil(x.high)),
}


# -- floats -----------------------------------------------------------------------------------------


def without_nan(low: Any, high: Any, xp: Any) -> Bounds:
    """The bounds, both NaN where either is: then the value may be NaN itself."""
    nan = low + high != low + high
    nan = nan | (low != low) | (high != high)
    return Bounds(xp.where(nan, np.float32(np.nan), low), xp.where(nan, np.float32(np.nan), high))


def widened(low: Any, high: Any, xp: Any) -> Bounds:
    down, up = np.float32(-np.inf), np.float32(np.inf)
    for _ in range(2):
        low, high = xp.nextafter(low, down), xp.nextafter(high, up)
    return without_nan(low, high, xp)


def _corners(f: Callable[[Any, Any], Any], x: Bounds, y: Bounds, xp: Any) -> tuple[Any, Any]:
    """The smallest and the largest `f` of an end of `x` and one of `y`; NaN in any corner stays."""
    values = [f(i, j) for i in (x.low, x.high) for j in (y.low, y.high)]
    return functools.reduce(xp.minimum, values), functools.reduce(xp.maximum, values)


def _float_abs(xp: Any, x: Bounds) -> tuple[Any, Any]:
    low = xp.where((x.low <= 0) & (x.high >= 0), 0, xp.minimum(abs(x.low), abs(x.high)))
    return low, xp.maximum(abs(x.low), abs(x.high))


def _float_square(xp: Any, x: Bounds) -> tuple[Any, Any]:
    low, high = _float_abs(xp, x)
    return low * low, high * high


def _float_div(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any]:
    low, high = _corners(lambda i, j: i / j, x, y, xp)
    zero = (y.low <= 0) & (y.high >= 0)
    nan = np.float32(np.nan)
    return xp.where(zero, nan, low), xp.where(zero, nan, high)


FLOAT: dict[str, Callable[..., tuple[Any, Any]]] = {
    "add": lambda xp, x, y: (x.low + y.low, x.high + y.high),
    "sub": lambda xp, x, y: (x.low - y.high, x.high - y.low),
    "mul": lambda xp, x, y: _corners(lambda i, j: i * j, x, y, xp),
    "div": _float_div,
    "neg": lambda xp, x: (-x.high, -x.low),
    "abs": _float_abs,
    "square": _float_square,
}


# Operations on floats whose results are exact.
UNROUNDED = frozenset(
    {
        "neg",
        "abs",
        "max",
        "min",
        "clamp",
        "floor",
        "ceil",
        "round",
        "sign",
        "select_n",
        "stop_gradient",
    }
)


# -- integers: (low, high, whether they may be wrong because of wrap-around) ------------------------


def _add(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    low, high = x.low + y.low, x.high + y.high
    # A sum wraps if its sign differs from that of both operands.
    wraps = (((x.low ^ low) & (y.low ^ low)) | ((x.high ^ high) & (y.high ^ high))) < 0
    return low, high, wraps


def _sub(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    low, high = x.low - y.high, x.high - y.low
    wraps = (((x.low ^ y.high) & (x.low ^ low)) | ((x.high ^ y.low) & (x.high ^ high))) < 0
    return low, high, wraps


def _magnitude(x: Bounds, xp: Any) -> Any:
    return xp.maximum(abs(x.low.astype(np.float32)), abs(x.high.astype(np.float32)))


def _mul(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    low, high = _corners(lambda i, j: i * j, x, y, xp)
    # float32 may be off by two parts in 2^23, so stay clear of the limit.
    return low, high, _magnitude(x, xp) * _magnitude(y, xp) > 2147480000.0


def _abs(xp: Any, x: Bounds) -> tuple[Any, Any, Any]:
    return *_float_abs(xp, x), x.low == _INT32.min


def square(xp: Any, x: Bounds) -> tuple[Any, Any, Any]:
    low, high, wraps = _abs(xp, x)
    return low * low, high * high, wraps | (high > 46340)  # 46340^2 < 2^31


def _quotient(x: Any, y: Any, xp: Any) -> Any:
    """The quotient x / y rounded towards zero; y is not 0."""
    down = x // y
    return xp.where((down < 0) & (down * y != x), down + 1, down)


def _divisor(y: Bounds, xp: Any) -> tuple[Bounds, Any]:
    """A divisor that is safe to compute with, and where it is not the one that was asked for."""
    bad = ((y.low <= 0) & (y.high >= 0)) | (y.low == _INT32.min)
    return Bounds(xp.where(bad, 1, y.low), xp.where(bad, 1, y.high)), bad


def _div(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    y, bad = _divisor(y, xp)
    bad = bad | (x.low == _INT32.min)  # -2^31 / -1 wraps
    x = Bounds(xp.where(bad, 0, x.low), x.high)
    return *_corners(lambda i, j: _quotient(i, j, xp), x, y, xp), bad


def _rem(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    y, bad = _divisor(y, xp)
    bad = bad | (x.low == _INT32.min)
    low = xp.where(bad, 0, x.low)
    # With one quotient for all of them, x rem y = x - y * quotient grows with x.
    first, last = _quotient(low, y.low, xp), _quotient(x.high, y.low, xp)
    together = (y.low == y.high) & (first == last)
    # Otherwise it has the dividend's sign and is no larger than dividend and divisor - 1 in magnitude.
    bound = xp.maximum(abs(y.low), abs(y.high)) - 1
    below = xp.where(low >= 0, 0, xp.maximum(-bound, low))
    above = xp.where(x.high <= 0, 0, xp.minimum(bound, x.high))
    return (
        xp.where(together, low - y.low * first, below),
        xp.where(together, x.high - y.low * first, above),
        bad,
    )


def _filled(x: Any) -> Any:
    """All bits below the highest set bit are set too."""
    for shift in (1, 2, 4, 8, 16):
        x = x | (x >> shift)
    return x


def _bit_and(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    return xp.zeros_like(x.low & y.low), xp.minimum(x.high, y.high), (x.low < 0) | (y.low < 0)


def _bit_or(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    return xp.maximum(x.low, y.low), _filled(x.high | y.high), (x.low < 0) | (y.low < 0)


def _bit_xor(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    return xp.zeros_like(x.low | y.low), _filled(x.high | y.high), (x.low < 0) | (y.low < 0)


def _shift_right(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    bad = (y.low != y.high) | (y.low < 0) | (y.low > 31)
    by = xp.where(bad, 0, y.low)
    return x.low >> by, x.high >> by, bad


INTEGER: dict[str, Callable[..., tuple[Any, Any, Any]]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "rem": _rem,
    "neg": lambda xp, x: (-x.high, -x.low, x.low == _INT32.min),
    "abs": _abs,
    "square": square,
    "sign": lambda xp, x: (xp.sign(x.low), xp.sign(x.high), False),
    "and": _bit_and,
    "or": _bit_or,
    "xor": _bit_xor,
    "not": lambda xp, x: (~x.high, ~x.low, False),
    "shift_right_arithmetic": _shift_right,
}
