"""Masks and scores made at random, as the machine code of one warpgroup interpreted with NumPy.

FLEXJAX_RANDOM=1000:2000 takes other seeds than CI does.
"""

import functools

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
import pytest

from flexjax.backends.mosaic_gpu.program import Program, TileType
from flexjax.mods.evaluate import evaluate
from flexjax.mods.graph import COLUMN, ROW, TILE
from flexjax.mods.trace import index_ranges, trace_mask_mod, trace_score_mod
from tests.behaviour.random_cases import Maker, seeds
from tests.mosaic_gpu.mask_elements import mask_elements
from tests.mosaic_gpu.mlir_numpy import run_program

SEEDS = seeds(30)


class Place:
    """A random tile of a random attention, and what mods make of it.

    Attributes:
        rng: what everything is drawn from.
        maker: makes mods for the attention.
        ranges: of its indices.
        tile: static properties of the tile.
    """

    def __init__(self, seed, transposed=False):
        self.rng = np.random.default_rng(seed)
        q_len, kv_len = self.rng.integers(1, 700, 2).tolist()
        batch, heads = self.rng.integers(1, 4, 2).tolist()
        self.maker = Maker(self.rng, batch, heads, q_len, kv_len)
        self.ranges = index_ranges(batch, heads, q_len, kv_len)
        kv_tile = 64 if transposed else int(self.rng.choice([64, 128]))
        layout = plgpu.Layout.WGMMA
        self.tile = TileType(64, kv_tile, q_len, kv_len, layout, False, transposed)
        b, h = (int(self.rng.integers(n)) for n in (batch, heads))
        q_start = 64 * int(self.rng.integers(-(-q_len // 64)))
        kv_start = kv_tile * int(self.rng.integers(-(-kv_len // kv_tile)))
        self.starts = {"b": b, "h": h, "q_start": q_start, "kv_start": kv_start}
        self.score = self.rng.normal(0, 3, self.tile.shape_of(TILE)).astype(np.float32)

    def found(self, graph, captures, run=None):
        """The outputs of a graph by its program, or by `run(program, ...)`; where the tile has elements."""
        program = Program(graph, self.tile)
        scalars = [self.starts[name] for name in program.scalars]
        score = self.score if program.has_score else None
        run = program if run is None else functools.partial(run, program)
        values = run_program(run, scalars, score, [np.asarray(c) for c in captures])
        ranks = [graph.nodes[output].rank for output in graph.outputs]
        return [self._inside(x, rank) for x, rank in zip(values, ranks, strict=True)]

    def expected(self, graph, captures):
        """The same by evaluation of the graph."""
        indices = {name: np.int32(self.starts[name]) for name in ("b", "h")}
        for name, rank, limit in (
            ("q", ROW, self.tile.q_limit),
            ("kv", COLUMN, self.tile.kv_limit),
        ):
            (size,) = self.tile.shape_of(rank)
            every = np.minimum(self.starts[f"{name}_start"] + np.arange(size), limit - 1)
            indices[name] = np.expand_dims(every.astype(np.int32), 1 - self.tile.axis_of(rank))
        values = evaluate(graph, captures, indices | {"score": self.score})
        return [self._inside(x, TILE) for x in values]

    def _inside(self, value, rank):
        """A value of a rank as a tile, without what lies past the last query or key."""
        rows = self.tile.q_limit - self.starts["q_start"]
        columns = self.tile.kv_limit - self.starts["kv_start"]
        inside = (slice(rows), slice(columns))
        inside = inside[::-1] if self.tile.transposed else inside
        value = np.asarray(value)
        if value.ndim == 1:
            value = np.expand_dims(value, 1 - self.tile.axis_of(rank))
        return np.broadcast_to(value, self.tile.shape_of(TILE))[inside]


@pytest.mark.parametrize("seed", SEEDS)
def test_masks(seed):
    """By words where there are any, by elements elsewhere."""
    place = Place(seed)
    graph, captures = trace_mask_mod(place.maker.mask(2), place.ranges)
    (found,) = place.found(graph, captures, mask_elements)
    (expected,) = place.expected(graph, captures)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_scores(seed, transposed):
    """The score and its derivative, on tiles of both passes."""
    place = Place(seed, transposed)
    function = place.maker.score(place.maker.number(0, 3))
    mod = functools.partial(function, place.maker.captures)
    traced, captures = trace_score_mod(mod, place.ranges)
    graph = traced.gradient.graph.with_outputs(0, 1)
    pairs = zip(place.found(graph, captures), place.expected(graph, captures), strict=True)
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
