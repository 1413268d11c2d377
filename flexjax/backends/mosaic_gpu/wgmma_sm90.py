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
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from flexjax.backends.mosaic_gpu import registers
from flexjax.backends.mosaic_gpu.launch_sm90 import swizzle_of, transforms_of

_ROWS = 64  # of a product
_DEPTH = 16  # columns of the first factor that one instruction multiplies, of 16 bits each
_TILE_ROWS = 8  # of a tile in shared memory

_SWIZZLES = {128: 1, 64: 2, 32: 3}  # bytes -> the descriptor's number


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A matrix in shared memory, in tiles of 8 rows and `swizzle` bytes; rows of tiles one behind the other.

    Attributes:
        address: int32 scalar, a sixteenth of where it begins in shared memory.
        shape: rows and columns.
        dtype: of 16 bits.
        swizzle: in bytes.
    """

    address: Any
    shape: tuple[int, int]
    dtype: Any
    swizzle: int

    def at(self, number: Any) -> Tiles:
        """The matrix so many places behind this one, in a buffer of such matrices."""
        rows, columns = self.shape
        size = rows * columns * jnp.dtype(self.dtype).itemsize
        return dataclasses.replace(self, address=self.address + number * (size >> 4))


def matrices(buffer: Any) -> Tiles:
    """The first of the matrices in a buffer [..., rows, columns] that `launch_sm90.tiles` made.

    Products take matrices by their addresses: for every reference that Mosaic is given, it looks for a layout.
    """
    swizzle = swizzle_of(buffer.dtype, buffer.shape[-1])

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(transforms_of(buffer.dtype, swizzle)),),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT),
    )
    def address(_: Any, ref: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        place = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(ref))
        place = llvm.lshr(place, arith.constant(i32, 4))
        return mgpu.FragmentedArray.splat(place, (), is_signed=True)

    return Tiles(address(buffer), tuple(buffer.shape[-2:]), buffer.dtype, swizzle)


def product(
    a: jax.Array | Tiles,
    b: Tiles,
    accumulator: jax.Array | None = None,
    *,
    transpose_b: bool = False,
) -> jax.Array:
    """Issues accumulator + a @ b and commits it as a group; awaits nothing.

    The result must not be used but for `awaited`.

    Args:
        a: bfloat16 or float16 [64, K], in shared memory or in registers.
        b: [K, N], in the dtype of `a`.
        accumulator: float32 [64, N]; zeros by default.
        transpose_b: b is [N, K] instead.
    """
    tile, scalar = registers.TILE, plgpu.Layout.WG_SPLAT
    left = None if isinstance(a, jax.Array) else _Factor(a, along_rows=False)
    right = _Factor(b, along_rows=not transpose_b)
    assert a.shape == (_ROWS, right.depth), (a.shape, b.shape, transpose_b)
    values = (a,) if isinstance(a, jax.Array) else ()
    values = values if accumulator is None else (*values, accumulator)
    columns = b.shape[0 if transpose_b else 1]
    addresses = [x.address for x in (a, b) if isinstance(x, Tiles)]
    call = plgpu.inline_mgpu(
        arg_types=(*(scalar for _ in addresses), *(tile for _ in values)),
        return_type=plgpu.ShapeDtypeStruct((_ROWS, columns), jnp.float32, tile),
    )
    emitted = functools.partial(_emit, columns, left, right)
    return call(emitted)(*addresses, *values)


def awaited(result: jax.Array, later: int = 0) -> jax.Array:
    """The result of a product, once it is there; as many as `later` products issued after it may still run."""
    tile = registers.TILE
    returned = plgpu.ShapeDtypeStruct(result.shape, jnp.float32, tile)

    @plgpu.inline_mgpu(arg_types=(tile,), return_type=returned)
    def wait(_: Any, x: Any) -> Any:
        held = _numbers(x)
        statement = f"wgmma.wait_group.sync.aligned {later};"
        return _fragment(_in_place(held, [], [], statement), x.shape)

    return wait(result)


def _emit(columns: int, left: _Factor | None, right: _Factor, _: Any, *given: Any) -> Any:
    """What `product` inlines."""
    addresses = [x.registers.item() for x in given if x.shape == ()]
    a, accumulator, *_ = [*([None] if left else []), *(x for x in given if x.shape), None]
    count = columns // 2
    held = [registers.f32(0.0)] * count if accumulator is None else _numbers(accumulator)
    inputs: list[ir.Value] = []
    constraints: list[str] = []
    numbers = itertools.count(2 * count)

    def take(values: list[ir.Value], constraint: str) -> list[str]:
        inputs.extend(values)
        constraints.extend(constraint for _ in values)
        return [f"${next(numbers)}" for _ in values]

    dtype = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(right.tiles.dtype).name]
    name = f"wgmma.mma_async.sync.aligned.m{_ROWS}n{columns}k{_DEPTH}.f32.{dtype}.{dtype}"
    results = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
    transpose_a = "" if left is None else "0, "
    lines = [
        "{ .reg .pred p; .reg .b32 t; .reg .b64 x, y; setp.eq.b32 p, 0, 0; wgmma.fence.sync.aligned;"
    ]
    starts = take(addresses, "r")
    words = take(_words(a), "r") if left is None else []
    for step in range(right.depth // _DEPTH):
        first = "{" + ", ".join(words[4 * step : 4 * step + 4]) + "}"
        if left is not None:
            first = "x"
            lines.append(left.descriptor("x", starts[0], step))
        lines.append(right.descriptor("y", starts[-1], step))
        lines.append(
            f"{name} {results}, {first}, y, p, 1, 1, {transpose_a}{int(right.along_rows)};"
        )
    lines.append("wgmma.commit_group.sync.aligned; }")
    return _fragment(_in_place(held, inputs, constraints, " ".join(lines)), (_ROWS, columns))


def _in_place(
    held: list[ir.Value], inputs: list[ir.Value], constraints: list[str], statement: str
) -> list[ir.Value]:
    """What a statement leaves in the registers of float32 numbers, which are its operands 0, 1, ...

    Args:
        held: the numbers. Their number of operands follows, since they are read as well as written.
        inputs: further operands.
        constraints: of those.
        statement: of assembly.
    """
    number, count = ir.F32Type.get(), len(held)
    struct = llvm.inline_asm(
        llvm.StructType.get_literal([number] * count),
        [*held, *inputs],
        statement,
        ",".join([*["=f"] * count, *map(str, range(count)), *constraints]),
        asm_dialect=0,
        has_side_effects=True,
    )
    return [llvm.extractvalue(number, struct, [i]) for i in range(count)]


def _numbers(tile: Any) -> list[ir.Value]:
    """The numbers that a thread holds of a float32 tile, in the order of the instruction's operands."""
    return [registers.element(r, k) for r in tile.registers.flat for k in range(2)]


def _fragment(numbers: list[ir.Value], shape: tuple[int, ...]) -> Any:
    """The tile of such numbers."""
    layout, pair = registers.TILE.to_mgpu(), ir.VectorType.get((2,), ir.F32Type.get())
    out, rest = np.empty(layout.registers_shape(tuple(shape)), dtype=object), iter(numbers)
    for position in np.ndindex(out.shape):
        out[position] = vector.from_elements(pair, [next(rest), next(rest)])
    return registers.fragment(out, layout)


def _words(a: Any) -> list[ir.Value]:
    """A factor's registers, of which every instruction takes four."""
    word = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    return [registers.element(vector.bitcast(word, r), 0) for r in a.registers.flat]


@dataclasses.dataclass(frozen=True)
class _Factor:
    """A factor in shared memory.

    Attributes:
        tiles: where it is.
        along_rows: whether products sum over its rows, else over its columns.
    """

    tiles: Tiles
    along_rows: bool

    @property
    def depth(self) -> int:
        """How many numbers products sum over."""
        return self.tiles.shape[0 if self.along_rows else 1]

    @property
    def _strides(self) -> tuple[int, int]:
        """Bytes from tile to tile, down and across."""
        columns, size = self.tiles.shape[1], jnp.dtype(self.tiles.dtype).itemsize
        return _TILE_ROWS * columns * size, _TILE_ROWS * self.tiles.swizzle

    def descriptor(self, name: str, address: str, step: int) -> str:
        """The statements that make the descriptor of an instruction's part.

        It tells where the part lies, how far tiles lie apart, and the swizzle.
        """
        down, across = self._strides
        # Of tiles side by side an instruction reads several only where it sums over rows.
        leading = across if self.along_rows else 0
        low = (leading >> 4) << 16 | self._offset(step) >> 4
        high = _SWIZZLES[self.tiles.swizzle] << 30 | down >> 4
        return f"add.u32 t, {address}, {low:#x}; mov.b64 {name}, {{t, {high:#x}}};"

    def _offset(self, step: int) -> int:
        """Bytes to an instruction's part."""
        down, across = self._strides
        if self.along_rows:
            return step * (_DEPTH // _TILE_ROWS) * down
        tile, rest = divmod(step * 2 * _DEPTH, self.tiles.swizzle)
        return tile * across + rest
