"""Stores the first rows of a tile to global memory, and leaves out the others."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from flexjax.backends.mosaic_gpu import placement
from flexjax.backends.mosaic_gpu.registers import TILE


def store_rows(
    ref: Any, lead: Any, first_row: Any, first_column: Any, tile: Any, limit: int, interpret: bool
) -> None:
    """ref[lead, first_row + i, first_column + j] = tile[i, j], for rows below the limit.

    Few of a tile's rows are queries; the others would cost as much memory traffic as all keys of a short step.
    """
    size, columns = tile.shape
    if interpret:  # where the array has whole tiles
        ref[lead, pl.ds(first_row, size), pl.ds(first_column, columns)] = tile
        return

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), TILE, *(plgpu.Layout.WG_SPLAT,) * 3),
    )
    def store(_: Any, ref: Any, x: Any, lead: Any, first_row: Any, first_column: Any) -> None:
        i64 = ir.IntegerType.get_signless(64)
        memref = ir.MemRefType(ref.type)
        strides, _ = memref.get_strides_and_offset()
        pointer = mgpu.utils.memref_ptr(ref)
        lead, first_row, first_column = (
            v.registers.item() for v in (lead, first_row, first_column)
        )
        origin = [lane.ir for lane in placement.origin(x.layout, x.shape)]
        places = placement.static_offsets(x.layout, x.shape)
        by_row: dict[int, list[tuple[int, Any]]] = {}
        for register, offsets in zip(x.registers.reshape(-1), places, strict=True):
            by_row.setdefault(offsets[0][0], []).append((offsets[0][1], register))

        def wide(value: Any) -> Any:
            return arith.extsi(i64, value)

        def times(value: Any, stride: int) -> Any:
            return arith.muli(wide(value), arith.constant(i64, stride))

        i32 = ir.IntegerType.get_signless(32)
        for offset, registers in by_row.items():
            row = arith.addi(arith.addi(first_row, origin[0]), arith.constant(i32, offset))
            column = arith.addi(first_column, origin[1])
            with mgpu.when(arith.cmpi(arith.CmpIPredicate.slt, row, arith.constant(i32, limit))):
                place = arith.addi(times(lead, strides[0]), times(row, strides[1]))
                place = arith.addi(place, wide(column))
                base = mgpu.utils.getelementptr(pointer, [place], memref.element_type)
                for at, register in registers:
                    target = mgpu.utils.getelementptr(base, [at], memref.element_type)
                    llvm.store(register, target)

    store(ref, tile, *(jnp.asarray(v, jnp.int32) for v in (lead, first_row, first_column)))
