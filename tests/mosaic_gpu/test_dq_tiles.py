"""Sums of dQ in the order of registers, as the machine code of one warpgroup interpreted with NumPy."""

import numpy as np
import pytest

from flexjax.backends.mosaic_gpu import dq_tiles
from tests.mosaic_gpu.mlir_numpy import run_program


@pytest.mark.parametrize(
    ("rows", "column", "columns", "dim"),
    [(64, 0, 64, 64), (64, 64, 64, 128), (64, 16, 16, 32), (128, 0, 16, 16)],
)
@pytest.mark.parametrize("publish", [False, True])
def test_add(rows, column, columns, dim, publish):
    """A tile, added twice, stands at its rows and columns once the sums are in order, and nowhere else."""
    rng = np.random.default_rng(columns)
    tile = rng.integers(-50, 50, (rows, columns)).astype(np.float32)
    sums = np.ones(256 * dim, np.float32)
    staged = np.full(rows * columns, np.nan, np.float32)

    def program(ctx, row, x, sums, staged):
        for _ in range(2):
            dq_tiles.emit_add(row.registers.item(), x, sums, staged, column, dim, publish)
        return []

    run_program(program, [64], tile, [sums, staged])
    expected = np.ones((256, dim), np.float32)
    expected[64 : 64 + rows, column : column + columns] += 2 * tile
    np.testing.assert_array_equal(dq_tiles.in_order(sums, dim), expected)
