"""The IR's vocabulary of elementwise operations, each with its meaning in JAX and in NumPy.

Nodes carry names of this table rather than JAX primitives: primitives gain and lose parameters between
releases, public `jax.lax` functions do not. NumPy is for constant folding and for evaluating masks on the
host: running JAX eagerly while a user's function is being traced would pick up whatever mesh, precision or
transformation is active there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import lax

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Op:
    """One elementwise operation.

    Attributes:
        jax: `(params, *operands) -> result` on equally shaped JAX arrays.
        numpy: the same on NumPy arrays, or None where NumPy has no exact counterpart.
    """

    jax: Callable[..., Any]
    numpy: Callable[..., Any] | None = None


def _plain(jax_fn: Callable[..., Any], numpy_fn: Callable[..., Any] | None = None) -> Op:
    return Op(
        lambda params, *xs: jax_fn(*xs),
        None if numpy_fn is None else lambda params, *xs: numpy_fn(*xs),
    )


def is_integer(dtype: Any) -> bool:
    return np.issubdtype(np.dtype(dtype), np.integer)


def is_bool(dtype: Any) -> bool:
    return np.dtype(dtype) == np.bool_


def is_float(dtype: Any) -> bool:
    """Whether `dtype` is a real floating type; NumPy does not know bfloat16 and float8 as such."""
    dtype = np.dtype(dtype)
    return not (is_integer(dtype) or is_bool(dtype) or np.issubdtype(dtype, np.complexfloating))


def _div_numpy(x: Any, y: Any) -> Any:
    # lax.div truncates integers towards zero, and XLA defines x / 0 as all ones.
    dtype = np.asarray(x).dtype
    if not is_integer(dtype):
        return np.divide(x, y)
    safe = np.where(y == 0, 1, y).astype(dtype)
    quotient = ((x - np.fmod(x, safe)) // safe).astype(dtype)
    return np.where(y == 0, np.invert(np.zeros_like(x)), quotient)


def _rem_numpy(x: Any, y: Any) -> Any:
    dtype = np.asarray(x).dtype
    if not is_integer(dtype):
        return np.fmod(x, y)
    return np.where(y == 0, x, np.fmod(x, np.where(y == 0, 1, y).astype(dtype)))


def _sign_numpy(x: Any) -> Any:
    # sign(-0.0) is -0.0.
    return np.sign(x) if is_integer(np.asarray(x).dtype) else np.copysign(np.sign(x), x)


def _logistic_numpy(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _select_numpy(params: Params, which: Any, *cases: Any) -> Any:
    return np.choose(np.asarray(which).astype(np.int32), cases)


def _shift_numpy(op: str) -> Callable[..., Any]:
    """XLA's shifts: an amount that is negative or as large as the word shifts everything out."""

    def shift(x: Any, by: Any) -> Any:
        dtype = np.asarray(x).dtype
        bits = 8 * dtype.itemsize
        inside = (by >= 0) & (by < bits)
        if op == "arithmetic":  # of unsigned words too it repeats the highest bit
            signed = np.asarray(x).view(f"i{dtype.itemsize}")
            by = np.where(inside, by, bits - 1).astype(signed.dtype)
            return np.right_shift(signed, by).view(dtype)
        unsigned = np.asarray(x).view(f"u{dtype.itemsize}")
        by = np.where(inside, by, 0).astype(unsigned.dtype)
        shifted = unsigned << by if op == "left" else unsigned >> by
        return np.where(inside, shifted, 0).astype(unsigned.dtype).view(dtype)

    return shift


def _round_jax(params: Params, x: Any) -> Any:
    return lax.round(x, lax.RoundingMethod(params["rounding_method"]))


def _round_numpy(params: Params, x: Any) -> Any:
    if params["rounding_method"] == int(lax.RoundingMethod.TO_NEAREST_EVEN):
        return np.round(x)
    whole = np.trunc(x)
    return np.copysign(whole + np.sign(x) * (np.abs(x - whole) >= 0.5), x)


def _integer_pow_jax(params: Params, x: Any) -> Any:
    return lax.integer_pow(x, params["y"])


def _reduce_precision_jax(params: Params, x: Any) -> Any:
    return lax.reduce_precision(x, params["exponent_bits"], params["mantissa_bits"])


OPS: dict[str, Op] = {
    "add": _plain(lax.add, np.add),
    "sub": _plain(lax.sub, np.subtract),
    "mul": _plain(lax.mul, np.multiply),
    "div": _plain(lax.div, _div_numpy),
    "rem": _plain(lax.rem, _rem_numpy),
    "max": _plain(lax.max, np.maximum),
    "min": _plain(lax.min, np.minimum),
    "pow": _plain(lax.pow),
    "atan2": _plain(lax.atan2),
    "nextafter": _plain(lax.nextafter),
    "neg": _plain(lax.neg, np.negative),
    "sign": _plain(lax.sign, _sign_numpy),
    "abs": _plain(lax.abs, np.abs),
    "floor": _plain(lax.floor, np.floor),
    "ceil": _plain(lax.ceil, np.ceil),
    "round": Op(_round_jax, _round_numpy),
    "exp": _plain(lax.exp, np.exp),
    "exp2": _plain(lax.exp2, np.exp2),
    "expm1": _plain(lax.expm1, np.expm1),
    "log": _plain(lax.log, np.log),
    "log1p": _plain(lax.log1p, np.log1p),
    "logistic": _plain(lax.logistic, _logistic_numpy),
    "sqrt": _plain(lax.sqrt, np.sqrt),
    "rsqrt": _plain(lax.rsqrt, lambda x: 1 / np.sqrt(x)),
    "cbrt": _plain(lax.cbrt, np.cbrt),
    "square": _plain(lax.square, np.square),
    "integer_pow": Op(_integer_pow_jax, lambda params, x: x ** params["y"]),
    "sin": _plain(lax.sin, np.sin),
    "cos": _plain(lax.cos, np.cos),
    "tan": _plain(lax.tan, np.tan),
    "asin": _plain(lax.asin),
    "acos": _plain(lax.acos),
    "atan": _plain(lax.atan),
    "sinh": _plain(lax.sinh),
    "cosh": _plain(lax.cosh),
    "tanh": _plain(lax.tanh, np.tanh),
    "asinh": _plain(lax.asinh),
    "acosh": _plain(lax.acosh),
    "atanh": _plain(lax.atanh),
    "erf": _plain(lax.erf),
    "erfc": _plain(lax.erfc),
    "erf_inv": _plain(lax.erf_inv),
    "lgamma": _plain(lax.lgamma),
    "digamma": _plain(lax.digamma),
    "is_finite": _plain(lax.is_finite, np.isfinite),
    "and": _plain(lax.bitwise_and, np.bitwise_and),
    "or": _plain(lax.bitwise_or, np.bitwise_or),
    "xor": _plain(lax.bitwise_xor, np.bitwise_xor),
    "not": _plain(lax.bitwise_not, np.invert),
    "shift_left": _plain(lax.shift_left, _shift_numpy("left")),
    "shift_right_logical": _plain(lax.shift_right_logical, _shift_numpy("logical")),
    "shift_right_arithmetic": _plain(lax.shift_right_arithmetic, _shift_numpy("arithmetic")),
    "population_count": _plain(lax.population_count),
    "clz": _plain(lax.clz),
    "eq": _plain(lax.eq, np.equal),
    "ne": _plain(lax.ne, np.not_equal),
    "lt": _plain(lax.lt, np.less),
    "le": _plain(lax.le, np.less_equal),
    "gt": _plain(lax.gt, np.greater),
    "ge": _plain(lax.ge, np.greater_equal),
    "select_n": Op(lambda params, which, *cases: lax.select_n(which, *cases), _select_numpy),
    "clamp": _plain(lax.clamp, lambda lo, x, hi: np.minimum(np.maximum(x, lo), hi)),
    "convert": Op(
        lambda params, x: lax.convert_element_type(x, np.dtype(params["dtype"])),
        lambda params, x: np.asarray(x).astype(np.dtype(params["dtype"])),
    ),
    "bitcast": Op(lambda params, x: lax.bitcast_convert_type(x, np.dtype(params["dtype"]))),
    "reduce_precision": Op(_reduce_precision_jax),
    "stop_gradient": _plain(lax.stop_gradient, lambda x: x),
}

COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})

# JAX primitives whose name differs from the table's, and that mean the same thing.
ALIASES = {"add_any": "add", "lt_to": "lt", "le_to": "le", "eq_to": "eq"}

# Static parameters that are part of an operation's meaning; all others (sharding, accuracy hints, ...)
# are dropped. `convert_element_type` is renamed on the way in.
MEANINGFUL_PARAMS = {
    "integer_pow": ("y",),
    "round": ("rounding_method",),
    "reduce_precision": ("exponent_bits", "mantissa_bits"),
}
