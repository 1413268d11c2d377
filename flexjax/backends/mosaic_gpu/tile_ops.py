"""The mod IR's elementwise operations on lanes: one table, name -> implementation.

A kernel carries narrow types in wide registers: bfloat16 and float16 as float32 that is rounded after
every operation (a float32 result rounded once more equals the narrow operation's own result for + - * /
and sqrt), 8- and 16-bit integers as 32-bit ones that wrap after every operation. So each entry below
deals with float32, int32, uint32 and bool alone.

Semantics are those of `lax`, including integer division that truncates, x / 0 == -1, x rem 0 == x, and
shifts by more than the width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from flexjax.backends.mosaic_gpu import lanes
from flexjax.backends.mosaic_gpu.lanes import BOOL, F32, I32, U32, Lane, call, select
from flexjax.mods.ops import COMPARISONS, is_bool, is_float, is_integer


def carrier(dtype: Any) -> np.dtype:
    """The dtype in which a kernel computes values of `dtype`."""
    dtype = np.dtype(dtype)
    if is_bool(dtype):
        return BOOL
    if is_float(dtype):
        return F32
    return U32 if dtype.kind == "u" else I32


def supported_dtype(dtype: Any) -> bool:
    """Whether a kernel carries values of `dtype`; it has no 64-bit, 8-bit float or 4-bit types."""
    dtype = np.dtype(dtype)
    if is_bool(dtype) or dtype.name in ("float32", "bfloat16", "float16"):
        return True
    return is_integer(dtype) and dtype.kind in "iu" and dtype.itemsize <= 4


@dataclasses.dataclass(frozen=True)
class Operands:
    """What an implementation is told besides the operands.

    Attributes:
        params: the node's static parameters.
        dtype: dtype of the first operand, before widening.
        constants: values of operands that are constants of the graph, else None.
        shared: for every operand, whether it serves many lanes of the result.
        approx: use the special function unit's approximations, good to 10 bits or better.
        natural: whether the first operand is an int32 that is known not to be negative.
    """

    params: dict[str, Any]
    dtype: np.dtype
    constants: tuple[Any, ...]
    shared: tuple[bool, ...]
    approx: bool
    natural: bool

    @property
    def bits(self) -> int:
        return 8 * self.dtype.itemsize


Implementation = Callable[..., Lane]
TABLE: dict[str, Implementation] = {}


def _op(name: str) -> Callable[[Implementation], Implementation]:
    def register(function: Implementation) -> Implementation:
        TABLE[name] = function
        return function

    return register


def narrow(value: Lane, dtype: Any) -> Lane:
    """Rounds or wraps a carried value so that it is one of `dtype`."""
    dtype = np.dtype(dtype)
    if dtype == carrier(dtype):
        return value
    if is_float(dtype):
        return lanes.rounded_to(value, dtype)
    bits = 8 * dtype.itemsize
    if dtype.kind == "u":
        return value & ((1 << bits) - 1)
    return lanes.shift_right(lanes.shift_left(value, 32 - bits), 32 - bits)


# Results of these are inside their dtype whenever the operands are.
_EXACT = COMPARISONS | {
    *(
        "and",
        "bitcast",
        "ceil",
        "clamp",
        "clz",
        "convert",
        "floor",
        "is_finite",
        "max",
        "min",
        "nextafter",
    ),
    *(
        "or",
        "population_count",
        "reduce_precision",
        "rem",
        "round",
        "select_n",
        "shift_right_arithmetic",
    ),
    *("shift_right_logical", "sign", "stop_gradient", "xor"),
}


def apply(op: str, operands: Operands, result_dtype: Any, *args: Lane) -> Lane:
    """One operation; the result is carried in `carrier(result_dtype)`."""
    value = TABLE[op](operands, *args)
    return value if op in _EXACT else narrow(value, result_dtype)


# -- arithmetic -------------------------------------------------------------------------------------

TABLE |= {
    "add": lambda o, x, y: x + y,
    "sub": lambda o, x, y: x - y,
    "mul": lambda o, x, y: x * y,
    "neg": lambda o, x: -x,
    "square": lambda o, x: x * x,
    "max": lambda o, x, y: lanes.maximum(x, y),
    "min": lambda o, x, y: lanes.minimum(x, y),
    "clamp": lambda o, low, x, high: lanes.minimum(lanes.maximum(x, low), high),
    "stop_gradient": lambda o, x: x,
}


@_op("abs")
def _abs(o: Operands, x: Lane) -> Lane:
    if x.dtype == F32:
        return call("abs", x)
    return x if x.dtype == U32 else lanes.maximum(x, -x)


@_op("sign")
def _sign(o: Operands, x: Lane) -> Lane:
    if x.dtype == F32:  # zeros keep their sign, and NaN stays NaN
        one = call("copysign", lanes.const(1.0, F32), x)
        return select(call("abs", x) > 0.0, one, x)
    positive = lanes.cast(x > 0, x.dtype)
    return positive if x.dtype == U32 else positive - lanes.cast(x < 0, x.dtype)


@_op("div")
def _div(o: Operands, x: Lane, y: Lane) -> Lane:
    if x.dtype != F32:
        return _integer_div(o, x, y)
    divisor = o.constants[1]
    if divisor is not None and _has_reciprocal(float(divisor), o.approx):
        return x * float(np.float32(1) / np.float32(divisor))
    if not o.approx:
        return lanes.div(x, y)
    return x * call("rcp.approx", y) if o.shared[1] else call("div.approx", x, y)


def _has_reciprocal(value: float, approx: bool) -> bool:
    """Whether x / value may become a product: always if the reciprocal is exact."""
    mantissa, exponent = math.frexp(value)
    inside = math.isfinite(value) and value != 0.0 and abs(exponent) < 120
    return inside and (approx or abs(mantissa) == 0.5)


def _safe_divisor(x: Lane, y: Lane) -> tuple[Lane, Lane]:
    """A divisor that the hardware divides by, and where the true one is 0."""
    zero = lanes.compare("eq", y, 0)
    unsafe = zero
    if (
        y.dtype == I32
    ):  # -2**31 / -1 is undefined too; as for 1, the quotient is -2**31 and the rest 0
        unsafe |= lanes.compare("eq", y, -1) & lanes.compare("eq", x, -(2**31))
    return select(unsafe, 1, y), zero


def _static_divisor(o: Operands) -> int | None:
    """A divisor that is a constant of the graph, if the hardware divides by it."""
    divisor = o.constants[1]
    return None if divisor is None or int(divisor) in (0, -1) else int(divisor)


def _integer_div(o: Operands, x: Lane, y: Lane) -> Lane:
    static = _static_divisor(o)
    if static is not None:
        return lanes.quotient(x, static, o.natural)
    divisor, zero = _safe_divisor(x, y)
    quotient = lanes.div(x, divisor)
    return select(zero, -1, quotient)


@_op("rem")
def _rem(o: Operands, x: Lane, y: Lane) -> Lane:
    if x.dtype == F32:
        return _float_rem(x, y)
    static = _static_divisor(o)
    if static is not None:
        return lanes.remainder(x, static, o.natural)
    divisor, zero = _safe_divisor(x, y)
    return select(zero, x, lanes.rem(x, divisor))


def _float_rem(x: Lane, y: Lane) -> Lane:
    # x - n y with n = x / y rounded to an integer is exact in one fma, and leaves |rest| < |y| 2**-24 n.
    # Two rounds are exact for quotients up to 2**47; the rest is then at most |y| / 2.
    size, modulus = call("abs", x), call("abs", y)
    rest = size
    for _ in range(2):
        n = call("roundeven", lanes.div(rest, modulus))
        rest = call("fma", -n, modulus, rest)
    rest = select(rest < 0.0, rest + modulus, rest)
    infinite = lanes.compare("eq", modulus, np.inf) & (size < np.inf)
    return call("copysign", select(infinite, size, rest), x)


@_op("integer_pow")
def _integer_pow(o: Operands, x: Lane) -> Lane:
    exponent = o.params["y"]
    result, factor, left = None, x, abs(exponent)
    while left:
        if left & 1:
            result = factor if result is None else result * factor
        left >>= 1
        factor = factor * factor if left else factor
    one = lanes.const(1, x.dtype)
    if result is None:
        return one
    return lanes.div(one, result) if exponent < 0 else result


# -- comparisons and logic --------------------------------------------------------------------------


def _comparison(op: str) -> Implementation:
    return lambda o, x, y: lanes.compare(op, x, y)


TABLE |= {op: _comparison(op) for op in COMPARISONS}
TABLE |= {
    "and": lambda o, x, y: x & y,
    "or": lambda o, x, y: x | y,
    "xor": lambda o, x, y: x ^ y,
    "not": lambda o, x: ~x,
    "is_finite": lambda o, x: call("abs", x) < np.inf,
}


@_op("select_n")
def _select_n(o: Operands, which: Lane, *cases: Lane) -> Lane:
    if which.dtype == BOOL:
        return select(which, cases[1], cases[0])
    result = cases[0]
    for number, case in enumerate(cases[1:], start=1):
        result = select(which >= number, case, result)
    return result


# -- bits -------------------------------------------------------------------------------------------


def _pattern(o: Operands, x: Lane) -> Lane:
    """A carried integer as uint32 with zeros above its own bits."""
    x = lanes.cast(x, U32)
    return x if o.bits == 32 else x & ((1 << o.bits) - 1)


def _of_pattern(dtype: np.dtype, pattern: Lane) -> Lane:
    """The inverse of `_pattern`, for an integer of `dtype`."""
    return narrow(lanes.cast(pattern, carrier(dtype)), dtype)


def _shifted(o: Operands, x: Lane, y: Lane, shift: Callable[..., Lane], beyond: Lane | int) -> Lane:
    # Amounts are unsigned; in LLVM a shift by more than the width is undefined.
    amount = o.constants[1]
    if amount is not None and 0 <= int(amount) < o.bits:
        return shift(x, y)
    inside = _pattern(o, y) < o.bits
    return select(inside, shift(x, select(inside, y, 0)), beyond)


@_op("shift_left")
def _shift_left(o: Operands, x: Lane, y: Lane) -> Lane:
    return _shifted(o, x, y, lanes.shift_left, 0)


@_op("shift_right_logical")
def _shift_right_logical(o: Operands, x: Lane, y: Lane) -> Lane:
    return _of_pattern(o.dtype, _shifted(o, _pattern(o, x), y, lanes.shift_right, 0))


@_op("shift_right_arithmetic")
def _shift_right_arithmetic(o: Operands, x: Lane, y: Lane) -> Lane:
    # The sign bit is shifted in whatever the signedness of the dtype.
    signed = _of_pattern(np.dtype(f"int{o.bits}"), _pattern(o, x))
    shifted = _shifted(o, signed, y, lanes.shift_right, lanes.shift_right(signed, 31))
    return shifted if x.dtype == I32 else _pattern(o, shifted)


@_op("population_count")
def _population_count(o: Operands, x: Lane) -> Lane:
    return lanes.cast(call("ctpop", _pattern(o, x), dtype=U32), carrier(o.dtype))


@_op("clz")
def _clz(o: Operands, x: Lane) -> Lane:
    zeros = call("ctlz", _pattern(o, x), dtype=U32) - (32 - o.bits)
    return lanes.cast(zeros, carrier(o.dtype))


@_op("bitcast")
def _bitcast(o: Operands, x: Lane) -> Lane:
    target = np.dtype(o.params["dtype"])
    bits = call(f"{o.dtype.name}_bits", x, dtype=U32) if is_float(o.dtype) else _pattern(o, x)
    if is_float(target):
        return call(f"{target.name}_of_bits", bits)
    return _of_pattern(target, bits)


# -- conversions ------------------------------------------------------------------------------------


@_op("convert")
def _convert(o: Operands, x: Lane) -> Lane:
    target = np.dtype(o.params["dtype"])
    if is_bool(target):
        return x if x.dtype == BOOL else lanes.compare("ne", x, 0)
    if is_float(target):
        return narrow(lanes.cast(x, F32), target)
    if x.dtype == F32:
        limits = np.iinfo(target)
        if target.itemsize < 4:  # XLA saturates
            x = lanes.minimum(lanes.maximum(x, limits.min), limits.max)
        signed = carrier(target) == I32
        return call("to_int32" if signed else "to_uint32", x, dtype=carrier(target))
    return narrow(lanes.cast(x, carrier(target)), target)


_FORMATS = {(8, 7): "bfloat16", (5, 10): "float16", (8, 23): "float32"}


@_op("reduce_precision")
def _reduce_precision(o: Operands, x: Lane) -> Lane:
    return narrow(x, _FORMATS[o.params["exponent_bits"], o.params["mantissa_bits"]])


def unsupported_node(op: str, params: dict[str, Any], dtype: Any) -> str | None:
    """Why a kernel cannot compute an operation on `dtype`; None if it can."""
    if op not in TABLE:
        return f"`{op}` has no implementation there"
    if op == "reduce_precision":
        bits = params["exponent_bits"], params["mantissa_bits"]
        if bits not in _FORMATS:
            return f"`reduce_precision` to {bits[0]} exponent and {bits[1]} mantissa bits"
    if op == "pow" and not is_float(dtype):
        return "`pow` of an integer base has no implementation there"
    return None
