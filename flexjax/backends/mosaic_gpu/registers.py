"""Operations on a warpgroup's registers that Pallas has no words for, on Hopper's WGMMA layout.

A warpgroup holds a tile of 64 rows so that every thread has two rows of it, 8 apart, and every row lies in
four neighbouring lanes, with pairs of adjacent columns in one register. A *row value* has one number a row,
in a WGMMA row layout, equal in the four lanes; a *lane-partial* one has a different number in each of them, and
its four numbers still have to be added up.

All functions here emit MLIR or PTX and run on the GPU only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector

TILE = plgpu.Layout.WGMMA
ROW = TILE.reduce(1)
COLUMN = TILE.reduce(0)
WARPGROUP = 128  # threads

# Named barriers below this number belong to Mosaic.
FIRST_NAMED_BARRIER = 8


# -- registers of a fragment ------------------------------------------------------------------------


def f32(value: float) -> ir.Value:
    kind = ir.F32Type.get()
    return arith.constant(kind, ir.FloatAttr.get(kind, float(value)))


def element(register: ir.Value, position: int) -> ir.Value:
    return vector.extract(register, dynamic_position=[], static_position=[position])


def row_elements(fragment: Any) -> list[ir.Value]:
    """The thread's two elements of a row value."""
    return [element(r, 0) for r in fragment.registers.flat]


def row_fragment(like: Any, elements: Sequence[ir.Value]) -> Any:
    """A row value from the thread's two elements."""
    kind = ir.VectorType.get((1,), elements[0].type)
    registers = np.empty_like(like.registers)
    for position, value in enumerate(elements):
        registers.flat[position] = vector.from_elements(kind, [value])
    return fragment(registers, like.layout)


def fragment(registers: np.ndarray, layout: Any) -> Any:
    """A tile or row value of floats from its registers."""
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def registers_by_row(tile: Any) -> list[list[ir.Value]]:
    """The registers of the thread's two rows of a tile, in column order."""
    registers = tile.registers
    (axis,) = (a for a in range(2, registers.ndim) if registers.shape[a] != 1)
    assert (registers.shape[0], registers.shape[axis]) == (1, 2), registers.shape
    return [list(np.take(registers, row, axis=axis).reshape(-1)) for row in range(2)]


def across_lanes(combine: Callable[[Any, Any], Any], value: ir.Value) -> ir.Value:
    """Reduces a value over the four lanes of its row."""
    for distance in (1, 2):
        value = combine(value, mgpu.utils.shfl_bfly(value, distance))
    return value


def any_in_warp(condition: ir.Value) -> ir.Value:
    whole_warp = arith.constant(ir.IntegerType.get_signless(32), -1)
    return nvvm.vote_sync(whole_warp, condition, "any")


def exp2(x: ir.Value) -> ir.Value:
    return llvm.inline_asm(
        ir.F32Type.get(),
        [x],
        "ex2.approx.ftz.f32 $0, $1;",
        "=f,f",
        asm_dialect=0,
        has_side_effects=False,
    )


# -- on Pallas values -------------------------------------------------------------------------------


def row_type(rows: int) -> Any:
    return plgpu.ShapeDtypeStruct((rows,), jnp.float32, ROW)


def partial_row_sums(tile: jax.Array) -> jax.Array:
    """Lane-partial sums of a tile's rows: the shuffles wait until the end of the loop."""

    @plgpu.inline_mgpu(arg_types=(TILE, ROW), return_type=row_type(tile.shape[0]))
    def sums(_: Any, x: Any, like: Any) -> Any:
        totals = []
        for row in registers_by_row(x):
            # Two chains of additions, for the latency.
            chains = [element(row[0], 0), element(row[0], 1)]
            for register in row[1:]:
                chains = [arith.addf(c, element(register, k)) for k, c in enumerate(chains)]
            totals.append(arith.addf(*chains))
        return row_fragment(like, totals)

    like = plgpu.layout_cast(jnp.zeros((tile.shape[0],), jnp.float32), ROW)
    return sums(tile, like)


def hidden(tile: jax.Array, allowed: jax.Array, words: jax.Array) -> jax.Array:
    """The tile with -inf where it is not allowed, by elements and by words of bits (see row_words.py)."""
    result = plgpu.ShapeDtypeStruct(tile.shape, jnp.float32, TILE)

    @plgpu.inline_mgpu(arg_types=(TILE, TILE, ROW), return_type=result)
    def select(_: Any, x: Any, elements: Any, bits: Any) -> Any:
        shown, zero = {}, _zero_at_run_time()
        for row, conditions, word in zip(
            registers_by_row(x), registers_by_row(elements), row_elements(bits), strict=True
        ):
            # After a logical operation ptxas would take the bits from its operands, one at a time.
            word = arith.addi(word, zero)
            for i, (register, condition) in enumerate(zip(row, conditions, strict=True)):
                pair = [_with_bit(element(register, k), word, 2 * i + k) for k in range(2)]
                pair = [_if(element(condition, k), value) for k, value in enumerate(pair)]
                shown[id(register)] = vector.from_elements(register.type, pair)
        registers = np.empty_like(x.registers)
        for position, register in np.ndenumerate(x.registers):
            registers[position] = shown[id(register)]
        return fragment(registers, x.layout)

    return select(tile, allowed, words)


def _with_bit(x: ir.Value, word: ir.Value, bit: int) -> ir.Value:
    """x, or -inf where the bit is 0: just so that ptxas moves seven bits to predicates at a time."""
    return llvm.inline_asm(
        ir.F32Type.get(),
        [x, word],
        "{ .reg .pred p; .reg .b32 t; "
        f"and.b32 t, $2, {1 << bit:#x}; setp.ne.s32 p, t, 0; selp.f32 $0, $1, 0fFF800000, p; }}",
        "=f,f,r",
        asm_dialect=0,
        has_side_effects=False,
    )


def _if(condition: ir.Value, x: ir.Value) -> ir.Value:
    """x, or -inf. LLVM would make two selections of `p and q ? x : -inf`; it does not see into this one."""
    return llvm.inline_asm(
        ir.F32Type.get(),
        [x, condition],
        "selp.f32 $0, $1, 0fFF800000, $2;",
        "=f,f,b",
        asm_dialect=0,
        has_side_effects=False,
    )


def finish_row_sums(partial: jax.Array) -> jax.Array:
    """Row values from lane-partial sums."""

    @plgpu.inline_mgpu(arg_types=(ROW,), return_type=row_type(partial.shape[0]))
    def finish(_: Any, x: Any) -> Any:
        return row_fragment(x, [across_lanes(arith.addf, e) for e in row_elements(x)])

    return finish(partial)


def scale_rows(tile: jax.Array, factors: jax.Array) -> jax.Array:
    """The tile times factors[:, None]; a warp whose factors are all 1 skips the products."""
    result = plgpu.ShapeDtypeStruct(tile.shape, jnp.float32, TILE)

    @plgpu.inline_mgpu(arg_types=(TILE, ROW), return_type=result)
    def scale(_: Any, x: Any, by: Any) -> Any:
        factors = row_elements(by)
        needed = [arith.cmpf(arith.CmpFPredicate.UNE, f, f32(1.0)) for f in factors]
        row_of = {id(r): i for i, row in enumerate(registers_by_row(x)) for r in row}
        old = list(x.registers.flat)
        branch = scf.IfOp(any_in_warp(arith.ori(*needed)), [r.type for r in old], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.yield_(
                [arith.mulf(r, vector.broadcast(r.type, factors[row_of[id(r)]])) for r in old]
            )
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(old)
        registers = np.empty_like(x.registers)
        registers.reshape(-1)[:] = list(branch.results)
        return fragment(registers, x.layout)

    return scale(tile, factors)


def zero_unless_allowed(tile: jax.Array, allowed: jax.Array) -> jax.Array:
    """The tile with zeros where it is not allowed, by one selection an element.

    Of `p and q ? x : 0` LLVM makes a selection by p and one by q; it does not see into these.
    """
    result = plgpu.ShapeDtypeStruct(tile.shape, jnp.float32, TILE)

    @plgpu.inline_mgpu(arg_types=(TILE, TILE), return_type=result)
    def select(_: Any, x: Any, conditions: Any) -> Any:
        registers = np.empty_like(x.registers)
        for position, register in np.ndenumerate(x.registers):
            condition = conditions.registers[position]
            pair = [
                llvm.inline_asm(
                    ir.F32Type.get(),
                    [element(register, k), element(condition, k)],
                    "selp.f32 $0, $1, 0f00000000, $2;",
                    "=f,f,b",
                    asm_dialect=0,
                    has_side_effects=False,
                )
                for k in range(2)
            ]
            registers[position] = vector.from_elements(register.type, pair)
        return fragment(registers, x.layout)

    return select(tile, allowed)


def zero_unless(condition: jax.Array, tile: jax.Array) -> jax.Array:
    """A 16-bit tile, or zeros: by its words, as LLVM would select every element by itself."""
    result = plgpu.ShapeDtypeStruct(tile.shape, tile.dtype, TILE)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, TILE), return_type=result)
    def zero(_: Any, bits: Any, x: Any) -> Any:
        return _on_words(x, lambda word: arith.andi(word, bits.registers.item()))

    return zero(jnp.where(condition, jnp.int32(-1), jnp.int32(0)), tile)


def _on_words(tile: Any, operation: Callable[[ir.Value], ir.Value]) -> Any:
    """A 16-bit tile after an operation on its pairs, as 32-bit words."""
    kind = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    registers = np.empty_like(tile.registers)
    for position, register in np.ndenumerate(tile.registers):
        word = operation(element(vector.bitcast(kind, register), 0))
        registers[position] = vector.bitcast(register.type, vector.from_elements(kind, [word]))
    return fragment(registers, tile.layout)


# -- holding the compiler's scheduler ---------------------------------------------------------------


def keep_above_next_wait(row_sums: jax.Array) -> None:
    """Keeps the exponentials that were summed up from sinking below the next wait for a matrix product.

    ptxas otherwise hoists the wait above all of them, and nothing overlaps. The sums are never negative, so that
    the predicated instruction never runs; but ptxas does not know.
    """

    @plgpu.inline_mgpu(arg_types=(ROW,))
    def keep(_: Any, x: Any) -> None:
        mgpu.utils.inline_ptx(
            "{ .reg .pred p; setp.lt.f32 p, $0, 0fBF800000; @p nanosleep.u32 1; }",
            arith.addf(*row_elements(x)),
            has_side_effects=True,
        )

    keep(row_sums)


def in_fresh_registers(tile: jax.Array) -> jax.Array:
    """A 16-bit tile in other registers, by an operation that ptxas cannot see through.

    Registers that a matrix product still reads must not be written: when ptxas coalesces the next product's
    operand with them, it gives up and waits after every product. The operand is therefore OR-ed with a zero
    that is read at run time.
    """
    result = plgpu.ShapeDtypeStruct(tile.shape, tile.dtype, TILE)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=result)
    def move(_: Any, x: Any) -> Any:
        zero = _zero_at_run_time()
        return _on_words(x, lambda word: arith.ori(word, zero))

    return move(tile)


def _zero_at_run_time() -> ir.Value:
    """A zero that ptxas does not know to be one: the grid has one axis."""
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(
        i32, [], "mov.u32 $0, %ctaid.y;", "=r", asm_dialect=0, has_side_effects=False
    )


def zero_at_run_time() -> Any:
    """A zero, int32, that neither LLVM nor ptxas knows to be one."""
    scalar = plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(), return_type=scalar)
    def zero(_: Any) -> Any:
        return mgpu.FragmentedArray.splat(_zero_at_run_time(), (), is_signed=True)

    return zero()


# -- turns of warpgroups ----------------------------------------------------------------------------


def wait_for_turn(warpgroup: Any) -> None:
    """Waits until another warpgroup has handed the turn to this one."""
    _named_barrier("bar.sync", warpgroup)


def give_turn_to(warpgroup: Any) -> None:
    _named_barrier("bar.arrive", warpgroup)


def publish_and_meet(warpgroups: int) -> None:
    """Makes what was stored to shared memory visible to matrix products and copies; waits for all warpgroups.

    One barrier in place of the two that `commit_smem` and a barrier between the warpgroups take.
    """

    @plgpu.inline_mgpu(arg_types=())
    def meet(_: Any) -> None:
        mgpu.utils.inline_ptx(
            f"fence.proxy.async.shared::cta; bar.sync {FIRST_NAMED_BARRIER}, {warpgroups * WARPGROUP};",
            has_side_effects=True,
        )

    meet()


def wait_for_own_warps(warpgroup: Any) -> None:
    """Waits until all warps of this warpgroup are here, in kernels without turns."""
    _named_barrier("bar.sync", warpgroup, WARPGROUP)


def _named_barrier(instruction: str, number: Any, threads: int = 2 * WARPGROUP) -> None:
    """By default of a warpgroup that waits and one that hands over."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def barrier(_: Any, n: Any) -> None:
        mgpu.utils.inline_ptx(
            f"{instruction} $0, {threads};", n.registers.item(), has_side_effects=True
        )

    barrier(number + FIRST_NAMED_BARRIER)
