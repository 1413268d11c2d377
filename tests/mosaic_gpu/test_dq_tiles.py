"""Sums of dQ in the order of registers, as the machine code of one warpgroup interpreted with NumPy."""

import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from flexjax.backends.mosaic_gpu import dq_tiles
from tests.mosaic_gpu.mlir_numpy import run_program

PARTS = pytest.mark.parametrize(
    ("rows", "column", "columns", "dim"),
    [(64, 0, 64, 64), (64, 64, 64, 128), (64, 16, 16, 32), (128, 0, 16, 16)],
)
PUBLISH = pytest.mark.parametrize("publish", [False, True])


def check_added_twice(emit, rows, column, columns, dim):
    """A tile, added twice, stands at its rows and columns once the sums are in order, and nowhere else.

    Args:
        emit: adds a tile, from (row, tile, sums, staged).
        rows, column, columns: of the tile.
        dim: of the head.
    """
    rng = np.random.default_rng(columns)
    tile = rng.integers(-50, 50, (rows, columns)).astype(np.float32)
    sums = np.ones(256 * dim, np.float32)
    staged = np.full(rows * columns, np.nan, np.float32)

    def program(ctx, row, x, sums, staged):
        for _ in range(2):
            emit(row.registers.item(), x, sums, staged)
        return []

    run_program(program, [64], tile, [sums, staged])
    expected = np.ones((256, dim), np.float32)
    expected[64 : 64 + rows, column : column + columns] += 2 * tile
    np.testing.assert_array_equal(dq_tiles.in_order(sums, dim), expected)


@PARTS
@PUBLISH
def test_add(rows, column, columns, dim, publish):
    def emit(row, x, sums, staged):
        dq_tiles.emit_add(row, x, sums, staged, column, dim, publish)

    check_added_twice(emit, rows, column, columns, dim)


@PARTS
@PUBLISH
def test_hand_over(rows, column, columns, dim, publish):
    """The same, added by a single thread."""

    def emit(row, x, sums, staged):
        dq_tiles.emit_hand_over(x, staged, 1, publish)
        i32 = ir.IntegerType.get_signless(32)
        number = arith.constant(i32, 37)
        one = arith.cmpi(arith.CmpIPredicate.eq, mgpu.utils.thread_idx(), number)
        warps = [arith.constant(i32, warp) for warp in range(4)]
        dq_tiles.emit_reduce(row, warps, sums, staged, x.shape, column, dim, one)

    check_added_twice(emit, rows, column, columns, dim)
