"""Sums that leave a tile by atomics, as the machine code of one warpgroup interpreted with NumPy."""

import numpy as np
import pytest

from flexjax.backends.mosaic_gpu import placement, reductions
from flexjax.mods.graph import COLUMN, ROW, SCALAR
from tests.mosaic_gpu.mlir_numpy import run_program


def tile_of(columns: int) -> np.ndarray:
    """Small integers, whose sums are exact in any order."""
    rng = np.random.default_rng(columns)
    return rng.integers(-50, 50, (64, columns)).astype(np.float32)


@pytest.mark.parametrize("columns", [64, 128])
def test_column_sums(columns):
    tile, target = tile_of(columns), np.zeros(300, np.float32)

    def program(ctx, start, x, ref):
        reductions.emit_column_sums(ctx, ref, x, start)
        return []

    run_program(program, [34], tile, [target])
    expected = np.zeros(300, np.float32)
    expected[34 : 34 + columns] = tile.sum(0)
    np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize("columns", [64, 128])
def test_diagonal_sums(columns):
    tile, zero = tile_of(columns), 129
    target = np.zeros(129 + columns + 128, np.float32)

    def program(ctx, zero, x, ref):
        reductions.emit_diagonal_sums(ctx, ref, x, zero)
        return []

    run_program(program, [zero], tile, [target])
    expected = np.zeros_like(target)
    for d in range(-63, columns):
        expected[zero + d] = np.trace(tile, d)
    np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_elements(transposed):
    """At [scalar, row], with the tile's own axes as rows or columns."""
    tile = tile_of(64)
    tile[3, 5] = 0.0
    target = np.zeros((2, 64, 3), np.float32)
    axes = {ROW: int(transposed), COLUMN: int(not transposed)}

    def program(ctx, one, x, ref):
        origin = placement.origin(x.layout, x.shape)[axes[ROW]]
        layout = x.layout.reduce((1 - axes[ROW],))
        index = placement.pack(lambda o: origin + o[0], layout, (64,), np.dtype("int32"))
        ranks, strides = (SCALAR, ROW, SCALAR), (192, 3, 1)
        reductions.emit_elements(ranks, strides, axes, ctx, ref, x, one, index, one)
        return []

    run_program(program, [1], tile, [target])
    expected = np.zeros_like(target)
    expected[1, :, 1] = tile.sum(axis=1 - axes[ROW])
    np.testing.assert_array_equal(target, expected)
