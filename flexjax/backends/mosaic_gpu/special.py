"""Transcendental functions and rounding on lanes; importing this fills `tile_ops.TABLE`.

Exact means libdevice: an error of a few units in the last place of float32 over the whole range. Approximate
means the special function unit: a relative error of 2**-11 for tanh, 2**-20 or better for the rest, where
not noted otherwise. What has no approximation below is exact always.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jax import lax

from flexjax.backends.mosaic_gpu import lanes
from flexjax.backends.mosaic_gpu.lanes import F32, U32, Lane, call, select
from flexjax.backends.mosaic_gpu.tile_ops import TABLE, Implementation, Operands

_LOG2_E = math.log2(math.e)


def _libdevice(name: str) -> Implementation:
    return lambda o, *args: call(name, *args)


_SAME_NAME = (
    *(
        "acos",
        "acosh",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "cbrt",
        "ceil",
        "cos",
        "cosh",
        "erf",
    ),
    *(
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "log",
        "log1p",
        "rsqrt",
        "sin",
        "sinh",
        "sqrt",
        "tan",
        "tanh",
    ),
)
TABLE |= {name: _libdevice(name) for name in _SAME_NAME}


# -- approximations ---------------------------------------------------------------------------------


def _exp2(x: Lane) -> Lane:
    return call("exp2.approx", x)


def _exp(x: Lane) -> Lane:
    return _exp2(x * _LOG2_E)


def _log(x: Lane) -> Lane:
    # Near 1 the error is absolute: 2**-22.
    return call("log2.approx", x) * math.log(2)


def _log1p(x: Lane) -> Lane:
    # Near 0, where the logarithm's error is absolute, a series: the relative error is below 2**-17 everywhere.
    near = lanes.const(1 / 5, F32)
    for coefficient in (-1 / 4, 1 / 3, -1 / 2, 1.0):
        near = call("fma", near, x, lanes.const(coefficient, F32))
    return select(call("abs", x) < 0.0625, near * x, _log(x + 1.0))


def _expm1(x: Lane) -> Lane:
    # The same for the difference from 1.
    near = lanes.const(1 / 120, F32)
    for coefficient in (1 / 24, 1 / 6, 1 / 2, 1.0):
        near = call("fma", near, x, lanes.const(coefficient, F32))
    return select(call("abs", x) < 0.125, near * x, _exp(x) - 1.0)


def _reduced_angle(x: Lane) -> Lane:
    # Without this the instruction's own reduction loses |x| 2**-24 radians. 2 pi in three parts (Cody and
    # Waite) keeps the error below 2**-20 for |x| up to 2**17.
    turns = call("roundeven", x * (1 / (2 * math.pi)))
    rest, angle = 2 * math.pi, x
    for bits in (9, 11, 24):
        mantissa, exponent = math.frexp(rest)
        part = math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)
        angle = call("fma", turns, lanes.const(-part, F32), angle)
        rest -= part
    return angle


_APPROXIMATE: dict[str, Callable[[Lane], Lane]] = {
    "exp": _exp,
    "exp2": _exp2,
    "log": _log,
    "log1p": _log1p,
    "expm1": _expm1,
    "tanh": lambda x: call("tanh.approx", x),
    "sqrt": lambda x: call("sqrt.approx", x),
    "rsqrt": lambda x: call("rsqrt.approx", x),
    "sin": lambda x: call("sin.approx", _reduced_angle(x)),
    "cos": lambda x: call("cos.approx", _reduced_angle(x)),
    "logistic": lambda x: call("rcp.approx.ftz", _exp(-x) + 1.0),
}


def _either(exact: Implementation, approximate: Callable[[Lane], Lane]) -> Implementation:
    return lambda o, x: approximate(x) if o.approx else exact(o, x)


def _logistic(o: Operands, x: Lane) -> Lane:
    return lanes.div(lanes.const(1.0, F32), call("exp", -x) + 1.0)


TABLE["logistic"] = _logistic
TABLE |= {name: _either(TABLE[name], function) for name, function in _APPROXIMATE.items()}


# -- the others -------------------------------------------------------------------------------------


def _round(o: Operands, x: Lane) -> Lane:
    nearest_even = o.params["rounding_method"] == int(lax.RoundingMethod.TO_NEAREST_EVEN)
    return call("roundeven" if nearest_even else "round", x)


def _pow(o: Operands, x: Lane, y: Lane) -> Lane:
    # Integer exponents are exact in float32 up to 2**24, and larger ones overflow any base but 1.
    return call("powf", x, lanes.cast(y, F32))


_GILES_CENTRAL = (
    *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087),
    *(-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
)
_GILES_TAIL = (
    *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773),
    *(-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
)


def _erf_inv(o: Operands, x: Lane) -> Lane:
    # M. Giles, "Approximating the erfinv function" (2010), single precision: two polynomials in
    # w = -log(1 - x^2).
    w = -call("log1p", -(x * x))
    central = w < 5.0
    shifted = select(central, w - 2.5, call("sqrt", w) - 3.0)
    p, *rest = (
        select(central, lanes.const(near, F32), far)
        for near, far in zip(_GILES_CENTRAL, _GILES_TAIL, strict=True)
    )
    for coefficient in rest:
        p = call("fma", p, shifted, coefficient)
    return select(lanes.compare("eq", call("abs", x), 1.0), x * np.inf, p * x)


def _nextafter(o: Operands, x: Lane, y: Lane) -> Lane:
    # Floats of one sign are ordered as their bit patterns: one step is +-1 on the pattern.
    name = o.dtype.name
    bits = call(f"{name}_bits", x, dtype=U32)
    towards_zero = (x < y) ^ (x > 0.0)
    moved = call(f"{name}_of_bits", select(towards_zero, bits - 1, bits + 1))
    smallest = call("copysign", call(f"{name}_of_bits", lanes.const(1, U32)), y)
    result = select(lanes.compare("eq", x, 0.0), smallest, moved)
    result = select(lanes.compare("eq", x, y), y, result)
    is_nan = lanes.compare("ne", x, x) | lanes.compare("ne", y, y)
    return select(is_nan, np.nan, result)


TABLE |= {"round": _round, "pow": _pow, "erf_inv": _erf_inv, "nextafter": _nextafter}
