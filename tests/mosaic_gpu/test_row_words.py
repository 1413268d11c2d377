"""Masks as words of bits, as the machine code of one warpgroup interpreted with NumPy."""

import functools

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import masks
from flexjax.backends.mosaic_gpu.program import Program, TileType
from flexjax.backends.mosaic_gpu.row_words import RowWords
from flexjax.mods.evaluate import evaluate
from flexjax.mods.trace import index_ranges, trace_mask_mod
from tests.mosaic_gpu.mask_elements import mask_elements
from tests.mosaic_gpu.mlir_numpy import run_program

LENGTH, HEADS = 1024, 2
RANGES = index_ranges(2, HEADS, LENGTH, LENGTH)
TILES = masks.tiled_order((32, 32), (8, 16))
SHIFTED = masks.tiled_order((32, 32), (8, 16), shift=(0, 6))
SQUARES = masks.tiled_order((32, 32), (8, 8))


def capture(values, dtype=np.int32):
    return jnp.asarray(np.asarray(values, dtype))


def by_head(b, h, q_idx, kv_idx):
    return kv_idx < capture([2**31 - 1, 300])[h]


def from_a_table(b, h, q_idx, kv_idx):
    """Bounds of any size, which differences with an index overflow."""
    extremes = [-(2**31), 2**31 - 1, 300, -5, 700]
    low = capture(np.tile(extremes, 205)[:LENGTH])
    return (low[q_idx] <= kv_idx) | (kv_idx >= low[q_idx] + 77)


def document(b, h, q_idx, kv_idx):
    ids = capture(np.arange(LENGTH) // 37)
    return (ids[q_idx] == ids[kv_idx]) & (q_idx >= kv_idx)


def documents_in_a_window(b, h, q_idx, kv_idx):
    near = (q_idx - kv_idx < 99) & (q_idx >= kv_idx) & (kv_idx % 16 < 9)
    return near & document(b, h, q_idx, kv_idx)


# The mask, and whether elements are compared too.
MASKS = {
    "causal": (masks.causal(), False),
    "shifted_causal": (masks.causal(-3), False),
    "strict": (lambda b, h, q, k: (q > k) ^ (k > q + 5), False),
    "window": (masks.sliding_window(70, 20), False),
    "prefix": (masks.prefix_lm(285), False),
    "by_head": (by_head, False),
    "rows_only": (lambda b, h, q, k: (q % 3 == 0) & (h == 1), False),
    "columns_only": (lambda b, h, q, k: k // 16 % 4 != 2, False),
    "nothing_like_it": (lambda b, h, q, k: ~((q >= k) & (k // 64 * 64 <= q - 100)), False),
    "twice_as_fast": (lambda b, h, q, k: 2 * k <= q + 290, False),
    "from_a_table": (from_a_table, False),
    "every_third": (lambda b, h, q, k: (q - k) % 3 == 0, True),
    "same": (lambda b, h, q, k: q == k, True),
    "document": (document, True),
    "documents_in_a_window": (documents_in_a_window, True),
    "image_by_rows": (masks.neighborhood_2d((8, 128), (3, 13)), False),
    "image_in_tiles": (masks.neighborhood(TILES, (13, 13)), False),
    "image_in_squares": (masks.neighborhood(SQUARES, (5, 7)), False),
}  # fmt: skip


@pytest.mark.parametrize("kv_tile", [64, 128])
@pytest.mark.parametrize("name", MASKS)
def test_words(name, kv_tile):
    """On the diagonal and beside it; every word is the mask's."""
    graph, captures = trace_mask_mod(MASKS[name][0], RANGES)
    tile = TileType(64, kv_tile, LENGTH, LENGTH, plgpu.Layout.WGMMA, False)
    program = Program(graph, tile)
    seen = set()
    for q_start, kv_start in ((256, 256), (320, 256), (512, 384), (64, 128)):
        values = {"b": 1, "h": 1, "q_start": q_start, "kv_start": kv_start}
        arguments = [values[n] for n in program.scalars]
        run = functools.partial(mask_elements, program)
        (found,) = run_program(run, arguments, None, [np.asarray(c) for c in captures])
        q, kv = q_start + np.arange(64), kv_start + np.arange(kv_tile)
        indices = {"b": np.int32(1), "h": np.int32(1)}
        indices |= {"q": q[:, None].astype(np.int32), "kv": kv[None, :].astype(np.int32)}
        (expected,) = evaluate(graph, captures, indices)
        expected = np.broadcast_to(expected, found.shape)
        np.testing.assert_array_equal(found, expected)
        seen |= set(np.unique(expected))
    assert seen == {False, True}


@pytest.mark.parametrize("name", MASKS)
def test_what_is_a_word(name):
    graph, captures = trace_mask_mod(MASKS[name][0], RANGES)
    program = Program(graph, TileType(64, 128, LENGTH, LENGTH, plgpu.Layout.WGMMA, False))
    others = []

    def count(ctx, *args):
        others.extend(RowWords(program.start(args, on_demand=True)).terms(graph.outputs[0])[1])
        return []

    run_program(count, [0] * len(program.scalars), None, [np.asarray(c) for c in captures])
    assert bool(others) == MASKS[name][1]
