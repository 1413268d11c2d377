"""Runs an inlined program on the CPU: the MLIR of one warpgroup, interpreted with NumPy.

What `plgpu.inline_mgpu` inlines is straight-line scalar code, so that a few dozen operations cover it. Every value
is an array over the warpgroup's 128 threads (over elements, then threads, for vectors). A pointer is a number
whose upper bits name a buffer, and every load is checked against the buffer's size.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax._src.interpreters import mlir
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func
from ml_dtypes import bfloat16
from scipy import special

THREADS = 128
_BUFFER = 1 << 40


def run_program(
    program: Any, scalars: Sequence[int], score: Any, captures: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Values of a `flexjax.backends.mosaic_gpu.program.Program` on one tile.

    Args:
        program: the program.
        scalars: values of `program.scalars`.
        score: the tile of scores, or None.
        captures: the captured arrays, as kernels read them.
    """
    context = mlir.make_ir_context()
    mgpu.dialect.register_dialect(context)
    layout = plgpu.Layout.WGMMA.to_mgpu()
    with context, ir.Location.unknown():
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        pair = ir.VectorType.get((layout.vector_length,), f32)
        registers = 0 if score is None else int(np.prod(layout.registers_shape(score.shape)))
        memrefs = [ir.MemRefType.get(c.shape, _element_type(c.dtype)) for c in captures]
        types = [i32] * len(scalars) + [pair] * registers + memrefs
        module = ir.Module.create()
        for part, number in (("major", 9), ("minor", 0)):
            module.operation.attributes[f"mosaic_gpu.arch_{part}"] = ir.IntegerAttr.get(i32, number)
        with ir.InsertionPoint(module.body):
            function = func.FuncOp("program", (types, []))
        block = function.add_entry_block()
        given = list(block.arguments)
        inputs = [np.full(THREADS, s, np.int32) for s in scalars]
        with ir.InsertionPoint(block):
            args = [
                mgpu.FragmentedArray.splat(v, (), is_signed=True) for v in given[: len(scalars)]
            ]
            if score is not None:
                held = np.empty(layout.registers_shape(score.shape), object)
                held.reshape(-1)[:] = given[len(scalars) : len(scalars) + registers]
                args.append(mgpu.FragmentedArray(_registers=held, _layout=layout, _is_signed=None))
                inputs += _distribute(score, layout)
            results = program(None, *args, *given[len(scalars) + registers :])
        machine = _Machine(captures)
        inputs += [np.full(THREADS, (i + 1) * _BUFFER, np.int64) for i in range(len(captures))]
        for value, data in zip(given, inputs, strict=True):
            machine.values[value] = data
        for operation in block.operations:
            machine.run(operation)
        return [_collect(machine, result) for result in results]


def _element_type(dtype: np.dtype) -> ir.Type:
    floats = {"float32": ir.F32Type, "float16": ir.F16Type, "bfloat16": ir.BF16Type}
    if dtype.name in floats:
        return floats[dtype.name].get()
    return ir.IntegerType.get_signless(8 * dtype.itemsize)


def _places(layout: Any, shape: tuple[int, ...]) -> list[list[np.ndarray]]:
    """Linear index of every element of every register, for each thread. Not how the program finds them."""
    lane, warp = np.arange(THREADS) % 32, np.arange(THREADS) // 32
    origin_row, origin_column = 16 * warp + lane // 4, 2 * (lane % 4)
    if len(shape) == 2:
        rows, columns = shape
        assert layout.registers_shape(shape)[:2] == (rows // 64, columns // 8)
        return [
            [
                (64 * tile_row + 8 * half + origin_row) * columns
                + 8 * tile_column
                + origin_column
                + element
                for element in range(2)
            ]
            for tile_row in range(rows // 64)
            for tile_column in range(columns // 8)
            for half in range(2)
        ]
    if layout == plgpu.Layout.WGMMA.reduce(1).to_mgpu():
        return [
            [64 * t + 8 * half + origin_row] for t in range(shape[0] // 64) for half in range(2)
        ]
    return [[8 * t + origin_column + e for e in range(2)] for t in range(shape[0] // 8)]


def _distribute(array: np.ndarray, layout: Any) -> list[np.ndarray]:
    flat = np.asarray(array).reshape(-1)
    return [np.stack([flat[i] for i in register]) for register in _places(layout, array.shape)]


def _collect(machine: "_Machine", array: mgpu.FragmentedArray) -> np.ndarray:
    """The whole array, from what each thread holds of it."""
    if not array.shape:
        values = machine.values[array.registers.item()]
        assert len(np.unique(values[values == values])) <= 1
        return values[0]
    out = None
    places = _places(array.layout, array.shape)
    for register, indices in zip(array.registers.reshape(-1), places, strict=True):
        for element, index in enumerate(indices):
            values = machine.values[register][element]
            if out is None:
                out = np.full(int(np.prod(array.shape)), np.zeros((), values.dtype))
                seen = np.zeros(out.shape, bool)
            np.testing.assert_array_equal(out[index][seen[index]], values[seen[index]])
            out[index], seen[index] = values, True
    assert seen.all()
    return out.reshape(array.shape)


def _in_double(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *xs: function(*(x.astype(np.float64) for x in xs)).astype(xs[0].dtype)


def _round_away(x: np.ndarray) -> np.ndarray:
    return np.trunc(x) + np.sign(x) * (np.abs(x - np.trunc(x)) >= 0.5)


def _saturate(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    limits = np.iinfo(dtype)

    def convert(x: np.ndarray) -> np.ndarray:
        whole = np.nan_to_num(
            np.trunc(x.astype(np.float64)), nan=0, posinf=2.0**40, neginf=-(2.0**40)
        )
        return np.clip(whole, limits.min, limits.max).astype(np.int64).astype(np.int32)

    return convert


def _packed(dtype: Any) -> Callable[..., np.ndarray]:
    def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        pairs = np.stack([low, high], axis=1).astype(dtype)
        return np.ascontiguousarray(pairs).view(np.int32)[:, 0]

    return pack


def _of_lanes(values: np.ndarray, lanes: np.ndarray) -> np.ndarray:
    """Each thread's value from another lane of its warp."""
    return values[np.arange(THREADS) // 32 * 32 + lanes]


def _upper_half(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    product = x.view(np.uint32).astype(np.uint64) * y.view(np.uint32).astype(np.uint64)
    return (product >> np.uint64(32)).astype(np.uint32).view(np.int32)


_ASM = {
    "shfl.sync.idx.b32": _of_lanes,
    "cos.approx.f32": _in_double(np.cos),
    "div.full.f32": _in_double(np.divide),
    "ex2.approx.ftz.f32": _in_double(np.exp2),
    "lg2.approx.ftz.f32": _in_double(np.log2),
    "mov.b32": lambda x: x,
    "mov.f32": lambda x: x,
    "mul.hi.u32": _upper_half,
    "rcp.approx.f32": _in_double(np.reciprocal),
    "rcp.approx.ftz.f32": _in_double(np.reciprocal),
    "rsqrt.approx.f32": _in_double(lambda x: 1 / np.sqrt(x)),
    "sin.approx.f32": _in_double(np.sin),
    "shl.b32": lambda x, n: np.where(n.view(np.uint32) < 32, x << (n & 31), 0).astype(np.int32),
    "sqrt.approx.f32": _in_double(np.sqrt),
    "tanh.approx.f32": _in_double(np.tanh),
    "cvt.rn.bf16x2.f32": _packed(bfloat16),
    "cvt.rn.f16x2.f32": _packed(np.float16),
    "cvt.rn.f32.s32": lambda x: x.astype(np.float32),
    "cvt.rzi.s32.f32": _saturate(np.int32),
    "cvt.rzi.u32.f32": _saturate(np.uint32),
}

# Assembly that orders what threads and copies do, which here happens at once.
_ORDERING = ("bar.sync", "bar.arrive", "cp.async.bulk.wait_group", "cp.async.bulk.commit_group")

_MATH = {
    "absf": np.abs,
    "ceil": np.ceil,
    "copysign": np.copysign,
    "ctlz": lambda x: np.array([32 - int(v).bit_length() for v in x.view(np.uint32)], np.int32),
    "ctpop": lambda x: np.array([int(v).bit_count() for v in x.view(np.uint32)], np.int32),
    "floor": np.floor,
    "fma": _in_double(lambda x, y, z: x * y + z),
    "powf": _in_double(np.power),
    "round": _round_away,
    "roundeven": np.round,
    "rsqrt": _in_double(lambda x: 1 / np.sqrt(x)),
    "atan2": _in_double(np.arctan2),
    "erf": _in_double(special.erf),
    "erfc": _in_double(special.erfc),
}
for _name in ("cbrt", "cos", "cosh", "exp", "exp2", "expm1", "log", "log1p", "sin", "sinh", "sqrt"):
    _MATH[_name] = _in_double(getattr(np, _name))
for _name in ("tan", "tanh"):
    _MATH[_name] = _in_double(getattr(np, _name))
for _name in ("acos", "acosh", "asin", "asinh", "atan", "atanh"):
    _MATH[_name] = _in_double(getattr(np, "arc" + _name[1:]))

_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_CMPI = ("eq", "ne", "slt", "sle", "sgt", "sge", "ult", "ule", "ugt", "uge")
_CMPF = {1: "eq", 2: "gt", 3: "ge", 4: "lt", 5: "le", 13: "ne"}  # O.., and UNE


def _unsigned(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == bool else x.view(x.dtype.name.replace("int", "uint"))


def _as_signed(x: np.ndarray) -> np.ndarray:
    return x.view(x.dtype.name.replace("uint", "int"))


def _unsigned_op(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, y: _as_signed(function(_unsigned(x), _unsigned(y)))


def _defined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Division: fails where LLVM leaves the result undefined."""

    def run(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        assert (y != 0).all(), "division by zero"
        if x.dtype == np.int32:
            assert not ((x == -(2**31)) & (y == -1)).any(), "the quotient overflows"
        wide = function(x.astype(np.int64), y.astype(np.int64))
        return wide.astype(x.dtype)

    return run


def _shift(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        assert ((y >= 0) & (y < 8 * x.dtype.itemsize)).all(), "shift beyond the width"
        return function(x, y)

    return run


def _truncating_div(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y))


_ARITH = {
    "addf": np.add,
    "subf": np.subtract,
    "mulf": np.multiply,
    "divf": np.divide,
    "maximumf": np.maximum,
    "minimumf": np.minimum,
    "negf": np.negative,
    "addi": np.add,
    "subi": np.subtract,
    "muli": np.multiply,
    "andi": np.bitwise_and,
    "ori": np.bitwise_or,
    "xori": np.bitwise_xor,
    "divsi": _defined(_truncating_div),
    "remsi": _defined(np.fmod),
    "divui": _unsigned_op(_defined(np.floor_divide)),
    "remui": _unsigned_op(_defined(np.remainder)),
    "maxsi": np.maximum,
    "minsi": np.minimum,
    "maxui": _unsigned_op(np.maximum),
    "minui": _unsigned_op(np.minimum),
    "shli": _shift(np.left_shift),
    "shrsi": _shift(np.right_shift),
    "shrui": _unsigned_op(_shift(np.right_shift)),
    "select": lambda c, x, y: np.where(c, x, y),
}
_CASTS = {"extf", "truncf", "extsi", "trunci", "sitofp", "index_cast"}


class _Machine:
    """Values of all threads while the operations run one by one."""

    def __init__(self, captures: Sequence[np.ndarray]):
        self.values: dict[Any, Any] = {}
        self.buffers = [np.ascontiguousarray(c) for c in captures]

    def run(self, operation: Any) -> None:
        op = operation.operation
        args = [self.values[o] for o in op.operands]
        dialect, name = op.name.split(".", 1)
        with np.errstate(all="ignore"):
            result = getattr(self, f"_{dialect}")(name, op, args)
        if len(op.results):
            self.values[op.results[0]] = result

    def _arith(self, name: str, op: Any, args: list[np.ndarray]) -> np.ndarray:
        if name == "constant":
            kind = _numpy_type(op.results[0].type)
            return np.full(THREADS, op.attributes["value"].value).astype(kind)
        if name in _ARITH:
            return _ARITH[name](*args)
        if name == "cmpi":
            predicate = _CMPI[op.attributes["predicate"].value]
            if predicate[0] == "u":
                args = list(map(_unsigned, args))
            return _COMPARE[predicate[-2:]](*args)
        if name == "cmpf":
            return _COMPARE[_CMPF[op.attributes["predicate"].value]](*args)
        kind = _numpy_type(op.results[0].type)
        if name in _CASTS:
            return args[0].astype(kind)
        if name in ("extui", "uitofp", "index_castui"):
            return _unsigned(args[0]).astype(kind)
        assert name == "bitcast", name
        return args[0].view(kind)

    def _math(self, name: str, op: Any, args: list[np.ndarray]) -> np.ndarray:
        return _MATH[name](*args)

    def _vector(self, name: str, op: Any, args: list[np.ndarray]) -> np.ndarray:
        if name == "from_elements":
            return np.stack(args)
        if name == "extract":
            (index,) = op.attributes["static_position"]
            return args[0][index]
        assert name == "bitcast", name
        kind = _numpy_type(ir.VectorType(op.results[0].type).element_type)
        return np.ascontiguousarray(args[0].T).view(kind).T

    def _gpu(self, name: str, op: Any, args: list[np.ndarray]) -> np.ndarray:
        if name == "thread_id":
            threads = np.arange(THREADS) if "x" in str(op.attributes["dimension"]) else 0
            return np.broadcast_to(np.int64(threads), THREADS)
        assert name == "block_dim", name
        return np.full(THREADS, THREADS if "x" in str(op.attributes["dimension"]) else 1)

    def _builtin(self, name: str, op: Any, args: list[np.ndarray]) -> np.ndarray:
        assert name == "unrealized_conversion_cast", name
        return args[0]  # a memref becomes the descriptor that holds its pointer

    def _llvm(self, name: str, op: Any, args: list[np.ndarray]) -> np.ndarray:
        if name == "extractvalue":
            (field,) = op.attributes["position"]
            return args[0] if field == 1 else np.zeros(THREADS, np.int64)
        if name in ("ptrtoint", "inttoptr", "addrspacecast"):
            return args[0]
        if name in ("mul", "add"):
            return (np.multiply if name == "mul" else np.add)(*args)
        if name == "mlir.undef":
            return np.zeros(THREADS, np.int32)
        if name == "getelementptr":
            (static,) = op.attributes["rawConstantIndices"]
            bits = re.search(r"\d+", str(op.attributes["elem_type"])).group()
            offset = args[1] if len(args) > 1 else np.int64(static)
            return args[0] + offset * (int(bits) // 8)
        if name == "inline_asm" and "red." in str(op.attributes["asm_string"]):
            self._reduce(str(op.attributes["asm_string"]), *args)
            return None
        if name == "inline_asm" and "cp.reduce" in str(op.attributes["asm_string"]):
            self._reduce_copy(*args)
            return None
        if name == "inline_asm" and any(s in str(op.attributes["asm_string"]) for s in _ORDERING):
            return None
        if name == "inline_asm":
            return _ASM[str(op.attributes["asm_string"]).strip('"').split()[0]](*args)
        if name == "store":
            self._store(*args)
            return None
        assert name == "load", name
        return self._load(args[0], _numpy_type(op.results[0].type), op)

    def _nvvm(self, name: str, op: Any, args: list[np.ndarray]) -> np.ndarray | None:
        if name in ("bar.warp.sync", "fence.proxy"):
            return None
        if name == "elect.sync":
            return np.arange(THREADS) % 32 == 0
        assert name == "shfl.sync", name
        if "idx" in str(op.attributes["kind"]):
            return _of_lanes(args[1], args[2])
        assert "bfly" in str(op), op
        return _of_lanes(args[1], np.arange(THREADS) % 32 ^ args[2])

    def _buffer(self, pointers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The one array of float32 numbers that all pointers lie in, flat, and the offsets in it."""
        number, offset = pointers // _BUFFER - 1, pointers % _BUFFER
        assert (number == number[0]).all(), "an access left its array"
        data = self.buffers[number[0]].reshape(-1)
        assert data.dtype == np.float32
        return data, offset // 4

    def _store(self, values: np.ndarray, pointers: np.ndarray) -> None:
        """Stores vectors of float32 numbers, aligned to their size."""
        data, offset = self._buffer(pointers)
        assert (offset % len(values) == 0).all(), "a store is not aligned"
        for i, value in enumerate(values):
            data[offset + i] = value

    def _reduce_copy(self, elected: Any, targets: Any, sources: Any, size: Any, *_: Any) -> None:
        """Adds float32 numbers that lie together in shared memory to others in global memory."""
        (target, to), (source, start) = self._buffer(targets), self._buffer(sources)
        for thread in np.flatnonzero(elected):
            assert to[thread] % 4 == 0, "a copy is not aligned"
            assert start[thread] % 4 == 0, "a copy is not aligned"
            count = size[thread] // 4
            part = source[start[thread] : start[thread] + count]
            target[to[thread] : to[thread] + count] += part

    def _reduce(self, code: str, pointers: np.ndarray, *values: np.ndarray) -> None:
        """Adds float32 numbers in memory; the assembly may leave out zeros."""
        number, offset = pointers // _BUFFER - 1, pointers % _BUFFER
        assert (number == number[0]).all(), "an addition left its array"
        assert (offset >= 0).all(), "an addition left its array"
        assert (offset % (4 * len(values)) == 0).all(), "an addition is not aligned"
        data = self.buffers[number[0]].reshape(-1)
        assert data.dtype == np.float32
        assert ("v2" in code) == (len(values) == 2)
        wanted = values[0] != 0 if "setp.neu.f32" in code else np.full(THREADS, True)
        assert (offset[wanted] // 4 + len(values) <= data.size).all(), "an addition left its array"
        for i, value in enumerate(values):
            np.add.at(data, offset[wanted] // 4 + i, value[wanted])

    def _load(self, pointers: np.ndarray, kind: np.dtype, op: Any) -> np.ndarray:
        number, offset = pointers // _BUFFER - 1, pointers % _BUFFER
        assert (number == number[0]).all(), "a load left its array"
        data = self.buffers[number[0]]
        assert (offset >= 0).all(), "a load left its array"
        assert (offset + kind.itemsize <= data.nbytes).all(), "a load left its array"
        assert (offset % kind.itemsize == 0).all(), "a load is not aligned"
        raw = data.reshape(-1).view(np.uint8)
        gathered = raw[offset[:, None] + np.arange(kind.itemsize)]
        return np.ascontiguousarray(gathered).view(kind)[:, 0]


def _numpy_type(kind: ir.Type) -> np.dtype:
    names = {"bf16": bfloat16, "f16": np.float16, "f32": np.float32, "index": np.int64, "i1": bool}
    text = str(kind)
    return np.dtype(names.get(text) or f"int{text[1:]}")
