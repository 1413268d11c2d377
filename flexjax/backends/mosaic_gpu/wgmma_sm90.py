"""Matrix products of a warpgroup on Hopper, each as one piece of inline assembly.

A product over K columns is K / 16 instructions on the same accumulators. Mosaic emits every one of them by itself,
with all accumulators as operands and results: a product of 64 x 128 x 128 is a thousand operations for MLIR and
LLVM to carry along. Here its instructions are one statement, with the accumulators once; the assembler sees the
same instructions.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from flexjax.backends.mosaic_gpu import registers
from flexjax.backends.mosaic_gpu.launch_sm90 import swizzle_of, transforms_of

_ROWS = 64  # of a product
_DEPTH = 16  # columns of the first factor that one instruction multiplies, of 16 bits each
_TILE_ROWS = 8  # of a tile in shared memory

_SWIZZLES = {128: 1, 64: 2, 32: 3}  # bytes -> the descriptor's number


def product(
    a: Any,
    b: Any,
    accumulator: Any = None,
    *,
    transpose_b: bool = False,
    swizzle: int | None = None,
) -> jax.Array:
    """Issues accumulator + a @ b and commits it as a group; awaits nothing.

    Until it has been awaited, and an optimization barrier has tied it to that, the result must not be used.

    Args:
        a: bfloat16 or float16 [64, K], in shared memory or in registers.
        b: reference to shared memory [K, N], in the dtype of `a`.
        accumulator: float32 [64, N]; zeros by default.
        transpose_b: b is [N, K] instead.
        swizzle: in bytes, of what is in shared memory; by default as `launch_sm90.tiles` chooses it.
    """
    swizzle = swizzle or swizzle_of(b.dtype, b.shape[-1])
    in_memory = plgpu.RefType(transforms_of(b.dtype, swizzle))
    tile = registers.TILE
    added = () if accumulator is None else (accumulator,)
    columns = b.shape[-2] if transpose_b else b.shape[-1]
    call = plgpu.inline_mgpu(
        arg_types=(
            tile if isinstance(a, jax.Array) else in_memory,
            in_memory,
            *(tile for _ in added),
        ),
        return_type=plgpu.ShapeDtypeStruct((_ROWS, columns), jnp.float32, tile),
    )
    return call(functools.partial(_emit, columns, transpose_b, swizzle))(a, b, *added)


def awaited(result: jax.Array) -> jax.Array:
    """The result of a product, once all products are done."""
    plgpu.wgmma_wait(0)
    return lax.optimization_barrier(result)


def _emit(
    columns: int, transpose_b: bool, swizzle: int, _: Any, a: Any, b: Any, accumulator: Any = None
) -> Any:
    """What `product` inlines."""
    right = _Factor.of(b, swizzle, along_rows=not transpose_b)
    in_registers = isinstance(a, mgpu.FragmentedArray)
    if in_registers:
        assert a.shape == (_ROWS, right.depth), (a.shape, right.depth)
        left, transpose_a = None, ""
    else:
        left, transpose_a = _Factor.of(a, swizzle, along_rows=False), "0, "
        assert left.depth == right.depth, (left.depth, right.depth)

    number, count = ir.F32Type.get(), columns // 2
    if accumulator is None:
        held = [registers.f32(0.0)] * count
    else:
        held = [registers.element(r, k) for r in accumulator.registers.flat for k in range(2)]
    # Results first; the accumulators are in the same registers.
    inputs, constraints = held, ["=f"] * count + [str(i) for i in range(count)]
    numbers = itertools.count(2 * count)

    def take(values: list[ir.Value], constraint: str) -> list[str]:
        inputs.extend(values)
        constraints.extend(constraint for _ in values)
        return [f"${next(numbers)}" for _ in values]

    dtype = str(b.type.element_type)
    name = f"wgmma.mma_async.sync.aligned.m{_ROWS}n{columns}k{_DEPTH}.f32.{dtype}.{dtype}"
    results = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
    lines = ["{ .reg .pred p; .reg .b64 x, y; setp.eq.b32 p, 0, 0; wgmma.fence.sync.aligned;"]
    if in_registers:
        words = take(_words(a), "r")
    else:
        (start_a,) = take([left.address()], "l")
    (start_b,) = take([right.address()], "l")
    for step in range(right.depth // _DEPTH):
        if in_registers:
            first = "{" + ", ".join(words[4 * step : 4 * step + 4]) + "}"
        else:
            first = "x"
            lines.append(left.descriptor("x", start_a, step))
        lines.append(right.descriptor("y", start_b, step))
        lines.append(f"{name} {results}, {first}, y, p, 1, 1, {transpose_a}{int(not transpose_b)};")
    struct = llvm.inline_asm(
        llvm.StructType.get_literal([number] * count),
        inputs,
        " ".join([*lines, "wgmma.commit_group.sync.aligned; }"]),
        ",".join(constraints),
        asm_dialect=0,
        has_side_effects=True,
    )
    layout = registers.TILE.to_mgpu()
    out = np.empty(layout.registers_shape((_ROWS, columns)), dtype=object)
    kind = ir.VectorType.get((2,), number)
    new = iter([llvm.extractvalue(number, struct, [i]) for i in range(count)])
    for position in np.ndindex(out.shape):
        out[position] = vector.from_elements(kind, [next(new), next(new)])
    return registers.fragment(out, layout)


def _words(a: Any) -> list[ir.Value]:
    """A factor's registers, of which every instruction takes four."""
    word = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    return [registers.element(vector.bitcast(word, r), 0) for r in a.registers.flat]


@dataclasses.dataclass(frozen=True)
class _Factor:
    """A factor in shared memory, in tiles of 8 rows and `swizzle` bytes.

    Attributes:
        ref: of the tiles, [rows / 8, columns / width, 8, width].
        swizzle: in bytes.
        along_rows: whether products sum over its rows, else over its columns.
        depth: how many they sum over.
        tile_strides: bytes from tile to tile, down and across.
    """

    ref: ir.Value
    swizzle: int
    along_rows: bool
    depth: int
    tile_strides: tuple[int, int]

    @classmethod
    def of(cls, ref: ir.Value, swizzle: int, along_rows: bool) -> _Factor:
        kind = ir.MemRefType(ref.type)
        down, across, tile_rows, width = kind.shape
        strides, _ = kind.get_strides_and_offset()
        size = mgpu.utils.bytewidth(kind.element_type)
        assert (tile_rows, width * size) == (_TILE_ROWS, swizzle), (list(kind.shape), swizzle)
        assert list(strides[2:]) == [width, 1], strides
        depth = down * tile_rows if along_rows else across * width
        return cls(ref, swizzle, along_rows, depth, (strides[0] * size, strides[1] * size))

    def address(self) -> ir.Value:
        """Where it lies, as descriptors have it."""
        address = llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(self.ref))
        return llvm.lshr(llvm.and_(address, _i64(0x3FFFF)), _i64(4))

    def descriptor(self, name: str, address: str, step: int) -> str:
        """The statement that makes the descriptor of an instruction's part.

        It tells where the part lies, how far tiles lie apart, and the swizzle.
        """
        down, across = self.tile_strides
        # Of tiles side by side an instruction reads several only where it sums over rows.
        leading = across if self.along_rows else 0
        constant = _SWIZZLES[self.swizzle] << 62 | (down >> 4) << 32 | (leading >> 4) << 16
        return f"add.s64 {name}, {address}, {constant + (self._offset(step) >> 4):#x};"

    def _offset(self, step: int) -> int:
        """Bytes to an instruction's part."""
        down, across = self.tile_strides
        if self.along_rows:
            return step * (_DEPTH // _TILE_ROWS) * down
        tile, rest = divmod(step * 2 * _DEPTH, self.swizzle)
        return tile * across + rest


def _i64(value: int) -> ir.Value:
    return arith.constant(ir.IntegerType.get_signless(64), value)
