"""Scalar arithmetic of one thread, as MLIR: what a mod is compiled to inside a kernel.

The file that speaks MLIR's dialects for mods. Transcendental functions are those of MLIR's math dialect,
which libdevice computes, or single PTX instructions; neither depends on the kernel's `approx_math`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxlib.mlir.dialects import math as mlir_math

F32, I32, U32, BOOL = (np.dtype(d) for d in ("float32", "int32", "uint32", "bool"))
Emit = Callable[..., ir.Value]


def _integer(bits: int) -> ir.Type:
    return ir.IntegerType.get_signless(bits)


def _f32() -> ir.Type:
    return ir.F32Type.get()


def ir_type(dtype: np.dtype) -> ir.Type:
    if dtype == F32:
        return _f32()
    return _integer(1 if dtype == BOOL else 32)


@dataclasses.dataclass(frozen=True, eq=False)
class Lane:
    """A scalar in a register of every thread; Python numbers are constants of the other operand's dtype.

    Attributes:
        ir: the value.
        dtype: float32, int32, uint32 or bool.
    """

    ir: ir.Value
    dtype: np.dtype

    def __add__(self, other: Any) -> Lane:
        return _binary(self, other, arith.addf, arith.addi)

    def __sub__(self, other: Any) -> Lane:
        return _binary(self, other, arith.subf, arith.subi)

    def __mul__(self, other: Any) -> Lane:
        return _binary(self, other, arith.mulf, arith.muli)

    def __neg__(self) -> Lane:
        if self.dtype == F32:
            return Lane(arith.negf(self.ir), F32)
        return const(0, self.dtype) - self

    def __and__(self, other: Any) -> Lane:
        return _binary(self, other, None, arith.andi)

    def __or__(self, other: Any) -> Lane:
        return _binary(self, other, None, arith.ori)

    def __xor__(self, other: Any) -> Lane:
        return _binary(self, other, None, arith.xori)

    def __invert__(self) -> Lane:
        return self ^ (True if self.dtype == BOOL else -1)

    def __lt__(self, other: Any) -> Lane:
        return compare("lt", self, other)

    def __le__(self, other: Any) -> Lane:
        return compare("le", self, other)

    def __gt__(self, other: Any) -> Lane:
        return compare("gt", self, other)

    def __ge__(self, other: Any) -> Lane:
        return compare("ge", self, other)


def const(value: Any, dtype: np.dtype) -> Lane:
    kind = ir_type(dtype)
    if dtype == F32:
        return Lane(arith.constant(kind, ir.FloatAttr.get(kind, float(value))), F32)
    if dtype == BOOL:
        return Lane(arith.constant(kind, ir.IntegerAttr.get(kind, -int(bool(value)))), BOOL)
    signed = (int(value) + 2**31) % 2**32 - 2**31
    return Lane(arith.constant(kind, ir.IntegerAttr.get(kind, signed)), dtype)


def _lift(value: Any, dtype: np.dtype) -> Lane:
    return value if isinstance(value, Lane) else const(value, dtype)


def _binary(x: Lane, y: Any, of_floats: Emit | None, of_integers: Emit) -> Lane:
    emit = of_floats if x.dtype == F32 else of_integers
    assert emit is not None, "bits are combined as integers"
    return Lane(emit(x.ir, _lift(y, x.dtype).ir), x.dtype)


def div(x: Lane, y: Any) -> Lane:
    """The hardware's division: integers truncate, and a zero divisor is undefined."""
    return _binary(x, y, arith.divf, arith.divui if x.dtype == U32 else arith.divsi)


def rem(x: Lane, y: Any) -> Lane:
    """The hardware's remainder of integers: a zero divisor is undefined."""
    return _binary(x, y, None, arith.remui if x.dtype == U32 else arith.remsi)


def quotient(x: Lane, divisor: int, natural: bool) -> Lane:
    """An integer divided by a constant that is neither 0 nor -1, truncated; `natural`: x is in [0, 2**31).

    The upper half of a product without a shift must not come out, which LLVM makes of a dividend that it knows to
    be small. ptxas adds to such a half in the same instruction, and 13.0 and 13.1 take two of these that differ in
    what is added for one: of `q // 100 + k // 95` a thread had the same for both of its queries.
    """
    size = abs(divisor)
    if natural and size < 2**31:
        whole = cast(x, U32)
        if size & (size - 1):
            # With n = 2**(32 + shift), m = floor(n / size) + 1 times size is n + e, e <= size < 2**(shift + 1):
            # exact for all x below n / e > 2**31 (Granlund and Montgomery 1994).
            shift = size.bit_length() - 1
            factor = const(2 ** (32 + shift) // size + 1, U32)
            result = shift_right(call("upper_half", whole, factor, dtype=U32), shift)
        else:
            result = shift_right(whole, size.bit_length() - 1)
        result = cast(result, x.dtype)
        return -result if divisor < 0 else result
    return div(_unknown(x, size), divisor)


def remainder(x: Lane, divisor: int, natural: bool) -> Lane:
    """What `quotient` leaves, of the sign of x."""
    size = abs(divisor)
    if natural and size < 2**31:
        if size & (size - 1):
            return x - quotient(x, size, natural) * size
        return x & (size - 1)
    return rem(_unknown(x, size), divisor)


def _unknown(x: Lane, divisor: int) -> Lane:
    """The value, of which LLVM knows nothing; as it was for a power of two, which takes no product."""
    return call("unknown", x, dtype=x.dtype) if divisor & (divisor - 1) else x


def maximum(x: Lane, y: Any) -> Lane:
    if x.dtype == BOOL:
        return x | y
    return _binary(x, y, arith.maximumf, arith.maxui if x.dtype == U32 else arith.maxsi)


def minimum(x: Lane, y: Any) -> Lane:
    if x.dtype == BOOL:
        return x & y
    return _binary(x, y, arith.minimumf, arith.minui if x.dtype == U32 else arith.minsi)


def shift_left(x: Lane, amount: Any) -> Lane:
    """Amounts must be below 32, here and for the other shifts."""
    return _binary(x, amount, None, arith.shli)


def shift_right(x: Lane, amount: Any) -> Lane:
    """Shifts copies of the sign into an int32 and zeros into a uint32."""
    return _binary(x, amount, None, arith.shrui if x.dtype == U32 else arith.shrsi)


def compare(op: str, x: Lane, y: Any) -> Lane:
    """`eq`, `ne`, `lt`, `le`, `gt` or `ge`; any comparison with NaN but `ne` is false."""
    y = _lift(y, x.dtype)
    if x.dtype == F32:
        predicate = "UNE" if op == "ne" else f"O{op.upper()}"
        return Lane(arith.cmpf(arith.CmpFPredicate[predicate], x.ir, y.ir), BOOL)
    signed = "" if op in ("eq", "ne") else ("s" if x.dtype == I32 else "u")
    return Lane(arith.cmpi(arith.CmpIPredicate[signed + op], x.ir, y.ir), BOOL)


def select(condition: Lane, if_true: Any, if_false: Any) -> Lane:
    dtype = (if_true if isinstance(if_true, Lane) else if_false).dtype
    yes, no = _lift(if_true, dtype), _lift(if_false, dtype)
    return Lane(arith.select(condition.ir, yes.ir, no.ir), dtype)


def cast(x: Lane, dtype: np.dtype) -> Lane:
    """Between integers of either sign (bits kept), from bool to numbers, from integers to float32."""
    if x.dtype == dtype:
        return x
    if dtype == F32:
        emit = arith.sitofp if x.dtype == I32 else arith.uitofp
        return Lane(emit(_f32(), x.ir), F32)
    if x.dtype == BOOL:
        return Lane(arith.extui(ir_type(dtype), x.ir), dtype)
    return Lane(x.ir, dtype)


def rounded_to(x: Lane, dtype: np.dtype) -> Lane:
    """A float32 rounded to float16 or bfloat16."""
    return Lane(arith.extf(_f32(), arith.truncf(_narrow_float(dtype), x.ir)), F32)


def _narrow_float(dtype: np.dtype) -> ir.Type:
    return ir.F16Type.get() if dtype.name == "float16" else ir.BF16Type.get()


def bfloat16_pair(word: ir.Value) -> tuple[Lane, Lane]:
    """Two neighbouring bfloat16 in one int32, the first in the low half, in one instruction each."""
    pair = Lane(word, U32)
    low, high = shift_left(pair, 16), pair & 0xFFFF0000
    return call("float32_of_bits", low), call("float32_of_bits", high)


def widened(value: ir.Value, dtype: np.dtype) -> Lane:
    """An element of an array of `dtype` in memory (int8 for bool) as a lane."""
    if dtype == BOOL:
        zero = arith.constant(_integer(8), 0)
        return Lane(arith.cmpi(arith.CmpIPredicate.ne, value, zero), BOOL)
    if dtype.kind in "iu":
        carrier = I32 if dtype.kind == "i" else U32
        if dtype.itemsize < 4:
            extend = arith.extsi if dtype.kind == "i" else arith.extui
            value = extend(_integer(32), value)
        return Lane(value, carrier)
    return Lane(value if dtype == F32 else arith.extf(_f32(), value), F32)


# -- functions --------------------------------------------------------------------------------------


def _asm(result: Callable[[], ir.Type], constraints: str, code: str) -> Emit:
    def emit(*args: ir.Value) -> ir.Value:
        return llvm.inline_asm(
            result(), list(args), code, constraints, asm_dialect=0, has_side_effects=False
        )

    return emit


def _ptx(instruction: str, args: int = 1) -> Emit:
    operands = ", ".join(f"${i}" for i in range(args + 1))
    return _asm(_f32, "=f" + ",f" * args, f"{instruction} {operands};")


_LIBDEVICE = (
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
        "copysign",
        "cos",
    ),
    *(
        "cosh",
        "ctlz",
        "ctpop",
        "erf",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "fma",
        "log",
        "log1p",
    ),
    *("powf", "round", "roundeven", "rsqrt", "sin", "sinh", "sqrt", "tan", "tanh"),
)
FUNCTIONS: dict[str, Emit] = {name: getattr(mlir_math, name) for name in _LIBDEVICE} | {
    "abs": mlir_math.absf,
    "cos.approx": _ptx("cos.approx.f32"),
    "div.approx": _ptx("div.full.f32", 2),
    "exp2.approx": _ptx("ex2.approx.ftz.f32"),
    "log2.approx": _ptx("lg2.approx.ftz.f32"),
    "rcp.approx": _ptx("rcp.approx.f32"),
    "rcp.approx.ftz": _ptx("rcp.approx.ftz.f32"),
    "rsqrt.approx": _ptx("rsqrt.approx.f32"),
    "sin.approx": _ptx("sin.approx.f32"),
    "sqrt.approx": _ptx("sqrt.approx.f32"),
    "tanh.approx": _ptx("tanh.approx.f32"),
    # Unlike LLVM's shift, this one is 0 for all amounts from 32 on.
    "shl": _asm(lambda: _integer(32), "=r,r,r", "shl.b32 $0, $1, $2;"),
    # Of a product of two uint32.
    "upper_half": _asm(lambda: _integer(32), "=r,r,r", "mul.hi.u32 $0, $1, $2;"),
    "unknown": _asm(lambda: _integer(32), "=r,r", "mov.b32 $0, $1;"),
    # Of an int32 below 2**24. LLVM must not see it: it would turn to_float(i) + 8.0 into to_float(i + 8).
    "exact_float": _asm(_f32, "=f,r", "cvt.rn.f32.s32 $0, $1;"),
    # These saturate and take NaN to 0, as XLA does; LLVM's own conversions leave such inputs undefined.
    "to_int32": _asm(lambda: _integer(32), "=r,f", "cvt.rzi.s32.f32 $0, $1;"),
    "to_uint32": _asm(lambda: _integer(32), "=r,f", "cvt.rzi.u32.f32 $0, $1;"),
    # Bit patterns of the float types; float16 and bfloat16 arrive as the float32 of equal value.
    "float32_bits": lambda x: arith.bitcast(_integer(32), x),
    "float32_of_bits": lambda x: arith.bitcast(_f32(), x),
    "bfloat16_bits": lambda x: arith.shrui(
        arith.bitcast(_integer(32), x), arith.constant(_integer(32), 16)
    ),
    "bfloat16_of_bits": lambda x: arith.bitcast(
        _f32(), arith.shli(x, arith.constant(_integer(32), 16))
    ),
    "float16_bits": lambda x: arith.extui(
        _integer(32), arith.bitcast(_integer(16), arith.truncf(ir.F16Type.get(), x))
    ),
    "float16_of_bits": lambda x: arith.extf(
        _f32(), arith.bitcast(ir.F16Type.get(), arith.trunci(_integer(16), x))
    ),
}


def call(name: str, *args: Lane, dtype: np.dtype = F32) -> Lane:
    """`FUNCTIONS[name]` of the arguments."""
    return Lane(FUNCTIONS[name](*(a.ir for a in args)), dtype)
