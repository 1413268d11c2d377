"""Every operation of the mod IR that a kernel computes, with the dtypes it is to be tried on."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax
from ml_dtypes import bfloat16

from flexjax.mods.builder import Builder, Ref
from flexjax.mods.graph import COLUMN, ROW, SCALAR, TILE, Graph

RANKS = (SCALAR, ROW, COLUMN, TILE)
FLOATS = ("float32", "bfloat16", "float16")
WORDS = ("int32", "uint32")
INTEGERS = (*WORDS, "int8", "uint8", "int16", "uint16")
DTYPES = (*FLOATS, *INTEGERS, "bool")


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation on operands of given dtypes.

    Attributes:
        op: name in `flexjax.mods.ops.OPS`.
        dtypes: the operands' dtypes.
        params: static parameters.
        result: dtype of the result where the operands do not say.
        constants: operands that are constants of the graph, by position.
    """

    op: str
    dtypes: tuple[str, ...]
    params: tuple[tuple[str, Any], ...] = ()
    result: str | None = None
    constants: tuple[tuple[int, Any], ...] = ()

    def __str__(self) -> str:
        shown = [*self.dtypes, *(f"{k}={v}" for k, v in self.params)]
        shown += [f"arg{i}={v}" for i, v in self.constants]
        return f"{self.op}({', '.join(shown)})"

    def apply(self, builder: Builder, operands: Sequence[Ref]) -> Ref:
        operands = list(operands)
        for position, value in self.constants:
            operands[position] = builder.const(value, np_dtype(self.dtypes[position]))
        result = None if self.result is None else np_dtype(self.result)
        return builder.apply(self.op, operands, dict(self.params), result)


def np_dtype(name: str) -> np.dtype:
    return np.dtype(bfloat16) if name == "bfloat16" else np.dtype(name)


def _same(op: str, count: int, dtypes: Sequence[str], **params: Any) -> list[Case]:
    return [Case(op, (d,) * count, tuple(sorted(params.items()))) for d in dtypes]


def _cases() -> list[Case]:
    cases: list[Case] = []
    for op in ("add", "sub", "mul", "max", "min", "div", "rem"):
        cases += _same(op, 2, (*FLOATS, *INTEGERS))
    for op in ("max", "min"):
        cases += _same(op, 2, ("bool",))
    for op, divisor in itertools.product(("div", "rem"), (7, -1, -8)):
        cases.append(Case(op, ("int32", "int32"), constants=((1, divisor),)))
    for divisor in (20.0, 4.0, 0.0, 1e-40, np.inf):
        cases.append(Case("div", ("float32", "float32"), constants=((1, divisor),)))
    for op in ("neg", "abs", "sign"):
        cases += _same(op, 1, (*FLOATS, *(d for d in INTEGERS if op != "abs" or d[0] != "u")))
    for op in ("square", "stop_gradient"):
        cases += _same(op, 1, (*FLOATS, *WORDS))
    unary = (
        *(
            "floor",
            "ceil",
            "exp",
            "exp2",
            "expm1",
            "log",
            "log1p",
            "logistic",
            "sqrt",
            "rsqrt",
            "cbrt",
        ),
        *(
            "sin",
            "cos",
            "tan",
            "asin",
            "acos",
            "atan",
            "sinh",
            "cosh",
            "tanh",
            "asinh",
            "acosh",
            "atanh",
        ),
        *("erf", "erfc", "erf_inv", "is_finite"),
    )
    for op in unary:
        cases += _same(op, 1, FLOATS)
    for method in (lax.RoundingMethod.AWAY_FROM_ZERO, lax.RoundingMethod.TO_NEAREST_EVEN):
        cases += _same("round", 1, FLOATS, rounding_method=int(method))
    for op in ("pow", "atan2"):
        cases += _same(op, 2, FLOATS)
    cases += _same("nextafter", 2, ("float32", "bfloat16"))
    cases.append(Case("pow", ("float32", "int32")))
    for y in (-3, -1, 0, 1, 2, 3, 7):
        cases += _same(
            "integer_pow", 1, ("float32", "bfloat16") if y < 0 else ("float32", *WORDS), y=y
        )
    for op in ("and", "or", "xor"):
        cases += _same(op, 2, (*INTEGERS, "bool"))
    cases += _same("not", 1, (*INTEGERS, "bool"))
    for op in ("shift_left", "shift_right_logical", "shift_right_arithmetic"):
        cases += _same(op, 2, INTEGERS)
        cases.append(Case(op, ("int32", "int32"), constants=((1, 5),)))
    for op in ("population_count", "clz"):
        cases += _same(op, 1, INTEGERS)
    for op in ("eq", "ne", "lt", "le", "gt", "ge"):
        cases += _same(op, 2, DTYPES)
    for dtype in DTYPES:
        cases.append(Case("select_n", ("bool", dtype, dtype)))
    cases.append(Case("select_n", ("int32", "float32", "float32", "float32")))
    cases += _same("clamp", 3, (*FLOATS, *INTEGERS))
    for source, target in itertools.permutations(DTYPES, 2):
        cases.append(Case("convert", (source,), (("dtype", target),), target))
    for width in (
        ("float32", *WORDS),
        ("float16", "bfloat16", "int16", "uint16"),
        ("int8", "uint8"),
    ):
        for source, target in itertools.permutations(width, 2):
            if {source, target} != {"float16", "bfloat16"}:
                cases.append(Case("bitcast", (source,), (("dtype", target),), target))
    for exponent, mantissa in ((8, 7), (5, 10), (8, 23)):
        params = {"exponent_bits": exponent, "mantissa_bits": mantissa}
        cases += _same("reduce_precision", 1, ("float32",), **params)
    return cases


CASES = _cases()
OPS_COVERED = sorted({case.op for case in CASES})


def graph_of(
    cases: Sequence[Case], ranks: Sequence[str], heads: int, q_len: int, kv_len: int
) -> tuple[Graph, list[np.ndarray]]:
    """One graph with an output for every rank and case, and its captures.

    An operand of rank tile is read from a captured array [q_len, kv_len], of rank row from [q_len], of rank
    column from [kv_len], of rank scalar from [heads]. Equal dtype, rank and operand number share an array.
    """
    builder = Builder(dict.fromkeys(("b", "h", "q", "kv")))
    extents = {"h": heads, "q": q_len, "kv": kv_len}
    axes = {SCALAR: ("h",), ROW: ("q",), COLUMN: ("kv",), TILE: ("q", "kv")}
    arrays: dict[tuple[str, str, int], Any] = {}

    def operand(dtype: str, rank: str, number: int) -> Ref:
        key = (dtype, rank, number)
        if key not in arrays:
            shape = tuple(extents[a] for a in axes[rank])
            arrays[key] = values(np_dtype(dtype), shape, number)
        indices = [builder.input(a) for a in axes[rank]]
        return builder.load(builder.capture(arrays[key]), indices, np_dtype(dtype))

    outputs = []
    for rank in ranks:
        for case in cases:
            operands = [operand(d, rank, i) for i, d in enumerate(case.dtypes)]
            outputs.append(case.apply(builder, operands))
    graph, kept = builder.finish(outputs)
    return graph, [builder.captures[i] for i in kept]


_FLOAT_SPECIAL = (
    *(
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        -0.5,
        1.5,
        -1.5,
        2.5,
        -2.5,
        2.0,
        -3.0,
        0.25,
        1e-3,
        -1e-3,
        7.0,
        -0.999,
    ),
    *(
        np.inf,
        -np.inf,
        np.nan,
        3e38,
        -3e38,
        1e-30,
        -1e-30,
        1e10,
        -1e10,
        65504.0,
        100.0,
        -100.0,
        20.0,
    ),
)
_INTEGER_SPECIAL = (
    *(0, 1, -1, 2, -2, 3, 7, -7, 8, 15, 16, 31, 32, 33, 127, 128, 255, -128, 2**15 - 1, -(2**15)),
    *(2**16 - 1, 2**31 - 1, -(2**31), 2**32 - 1, 2**30, 12345678),
)


def values(dtype: np.dtype, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Operands: every pair of special values first if two arrays have seeds 0 and 1, then random ones."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        special = np.array([v for v in _INTEGER_SPECIAL if limits.min <= v <= limits.max])
        random = rng.integers(limits.min, limits.max, count, endpoint=True)
        random = np.where(rng.random(count) < 0.5, random, rng.integers(0, 41, count))
    else:
        special = np.array(_FLOAT_SPECIAL)
        random = rng.normal(size=count) * 2.0 ** rng.integers(-12, 12, count)
    grid = np.meshgrid(special, special, indexing="ij")[seed % 2].reshape(-1)
    random[: len(grid)] = grid[:count]
    with np.errstate(over="ignore"):
        return random.astype(dtype).reshape(shape)
