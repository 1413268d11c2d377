"""Mods on transposed tiles, [keys, queries], as the machine code of one warpgroup interpreted with NumPy."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import masks, scores
from flexjax.backends.mosaic_gpu import emit, lanes, placement
from flexjax.backends.mosaic_gpu.lanes import F32
from flexjax.backends.mosaic_gpu.program import Program, TileType
from flexjax.mods.evaluate import evaluate
from flexjax.mods.graph import ROW
from flexjax.mods.trace import index_ranges, trace_mask_mod, trace_score_mod
from tests.mosaic_gpu.mlir_numpy import run_program

Q_LEN, KV_LEN, Q_START, KV_START = 240, 200, 192, 128
TILE_TYPE = TileType(64, 64, Q_LEN, KV_LEN, plgpu.Layout.WGMMA, False, transposed=True)
RANGES = index_ranges(2, 3, Q_LEN, KV_LEN)
B, H = 1, 2


def table(score, b, h, q_idx, kv_idx):
    values = jnp.asarray(np.random.default_rng(0).standard_normal((3, 450)), jnp.float32)
    return score + values[h, q_idx - kv_idx + 200]


def vectors(score, b, h, q_idx, kv_idx):
    by_query = jnp.asarray(np.random.default_rng(1).standard_normal((2, 240)), jnp.float32)
    by_key = jnp.asarray(np.random.default_rng(2).standard_normal(200), jnp.bfloat16)
    return jnp.tanh(score * by_query[b, q_idx]) + by_key[kv_idx] * 0.01 * (q_idx - kv_idx)


def document(b, h, q_idx, kv_idx):
    ids = jnp.asarray(np.arange(240, dtype=np.int32) // 37)
    return (ids[q_idx] == ids[kv_idx]) & (q_idx >= kv_idx)


GRAPHS = {
    "table": lambda: _score(table),
    "vectors": lambda: _score(vectors),
    "alibi": lambda: _score(scores.alibi(3)),
    "soft_cap": lambda: _score(scores.soft_cap(2.0)),
    "causal": lambda: trace_mask_mod(masks.causal(), RANGES),
    "document": lambda: trace_mask_mod(document, RANGES),
}


def _score(mod):
    """(y, dy/ds) and the captured arrays."""
    score, captures = trace_score_mod(mod, RANGES)
    return score.gradient.graph.with_outputs(0, 1), captures


def _inputs(score):
    q = np.minimum(Q_START + np.arange(64, dtype=np.int32), Q_LEN - 1)
    kv = np.minimum(KV_START + np.arange(64, dtype=np.int32), KV_LEN - 1)
    indices = {"b": np.int32(B), "h": np.int32(H), "q": q[None, :], "kv": kv[:, None]}
    return indices | {"score": score}


def _run(graph, captures, score, program=None):
    plain = Program(graph, TILE_TYPE)
    values = {"b": B, "h": H, "q_start": Q_START, "kv_start": KV_START}
    arguments = [values[name] for name in plain.scalars]
    arrays = [np.asarray(c) for c in captures]
    return run_program(program or plain, arguments, score if plain.has_score else None, arrays)


# Past the end, clamped indices differ from true ones where no load is involved; nothing there counts.
INSIDE = (slice(0, KV_LEN - KV_START), slice(0, Q_LEN - Q_START))


@pytest.mark.parametrize("name", GRAPHS)
def test_program(name):
    graph, captures = GRAPHS[name]()
    score = np.random.default_rng(3).standard_normal((64, 64)).astype(np.float32)
    expected = evaluate(graph, captures, _inputs(score))
    for output, actual, exact in zip(
        graph.outputs, _run(graph, captures, score), expected, strict=True
    ):
        rank = graph.nodes[output].rank
        shape = {"row": (1, 64), "column": (64, 1), "scalar": (1, 1)}.get(rank, (64, 64))
        actual = np.broadcast_to(np.reshape(actual, shape), (64, 64))[INSIDE]
        exact = np.broadcast_to(np.asarray(exact), (64, 64))[INSIDE]
        np.testing.assert_allclose(
            actual.astype(np.float64), exact.astype(np.float64), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", ["table", "vectors", "soft_cap"])
def test_map_on_tile(name):
    """Element by element, with one number a query beside."""
    graph, captures = GRAPHS[name]()
    score = np.random.default_rng(3).standard_normal((64, 64)).astype(np.float32)
    program = Program(graph, TILE_TYPE)

    def mapped(ctx, *args):
        column = TILE_TYPE.layout_of(ROW).to_mgpu()
        first = placement.origin(TILE_TYPE.layout.to_mgpu(), (64, 64))[1]
        floats = placement.pack(lambda o: lanes.cast(first + o[0], F32), column, (64,), F32)
        return emit.emit_mapped(
            lambda y, g, column: (y + column, y * g), 2, program, ROW, ctx, floats, *args
        )

    y, g = (np.broadcast_to(x, (64, 64)) for x in evaluate(graph, captures, _inputs(score)))
    total, product = _run(graph, captures, score, mapped)
    column = np.arange(64, dtype=np.float32)[None, :]
    np.testing.assert_allclose(total[INSIDE], (y + column)[INSIDE], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(product[INSIDE], (y * g)[INSIDE], rtol=1e-4, atol=1e-5)
