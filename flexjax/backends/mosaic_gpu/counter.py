"""A counter in global memory that hands out columns, or tiles, to persistent CTAs.

They differ in length. Whoever is done takes the next one, as the hardware's scheduler does with CTAs.
"""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm

from flexjax.backends.mosaic_gpu.registers import WARPGROUP


def take_next(sums: Any, taken: int, cells: Any) -> Any:
    """The number of the next column or tile, for all threads of a warpgroup.

    Args:
        sums: reference to the array behind whose first numbers the counter lies.
        taken: how many numbers, of four bytes, come before it.
        cells: shared memory, int32; the second one is this function's.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def emit(_: Any, sums: Any, cells: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        first = arith.constant(ir.IntegerType.get_signless(64), taken)
        thread = arith.remui(mgpu.utils.thread_idx(), arith.constant(i32, WARPGROUP))
        mgpu.utils.warpgroup_barrier()  # all threads have read the one before
        mgpu.utils.inline_ptx(
            """{
                .reg .pred first;
                .reg .u32 before;
                setp.eq.u32 first, $0, 0;
                @first atom.relaxed.gpu.global.add.u32 before, [$1], 1;
                @first st.shared.u32 [$2 + 4], before;
            }""",
            thread,
            mgpu.utils.getelementptr(mgpu.utils.memref_ptr(sums), [first], i32),
            mgpu.utils.memref_ptr(cells),
            has_side_effects=True,
        )
        mgpu.utils.warpgroup_barrier()

    emit(sums, cells)
    return cells[1]


def uniform(x: Any) -> Any:
    """A number that all threads have, told to the compiler: addresses of matrix products must be of that kind."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WG_SPLAT,),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT),
    )
    def broadcast(_: Any, x: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        all_lanes, first, last = (arith.constant(i32, n) for n in (-1, 0, 31))
        value = nvvm.shfl_sync(all_lanes, x.registers.item(), first, last, nvvm.ShflKind.idx)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return broadcast(jnp.asarray(x, jnp.int32))
