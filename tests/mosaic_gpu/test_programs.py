"""Programs of score_mods, as the machine code of one warpgroup interpreted with NumPy."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.backends.mosaic_gpu import emit
from flexjax.backends.mosaic_gpu.program import Program, TileType
from flexjax.mods.evaluate import evaluate
from flexjax.mods.trace import index_ranges, trace_score_mod
from tests.mosaic_gpu.mlir_numpy import run_program

assert emit  # fills the table of operations

LENGTH, HEADS = 1024, 2
RANGES = index_ranges(2, HEADS, LENGTH, LENGTH)
TILE = TileType(64, 64, LENGTH, LENGTH, plgpu.Layout.WGMMA, approx=True)


def _traced(mod):
    score, captures = trace_score_mod(mod, RANGES)
    return score.forward, captures


@pytest.mark.parametrize("function", [jnp.log1p, jnp.expm1])
def test_approximations(function):
    """Errors are relative also where the result is small, which is what these functions are for."""
    graph, _ = _traced(lambda s, b, h, q, k: function(s))
    rng = np.random.default_rng(0)
    x = 10.0 ** rng.uniform(-9, 1, (64, 64)) * rng.choice([-1, 1], (64, 64))
    x = np.where(x <= -1, -x, x).astype(np.float32)
    (found,) = run_program(Program(graph, TILE), [], x, [])
    exact = getattr(np, function.__name__)(x.astype(np.float64))
    np.testing.assert_allclose(found, exact, rtol=2.0**-17)


def added_twice(score, b, h, q, kv):
    """A product by key that serves two sums, and one that serves one."""
    factors = jnp.asarray(np.random.default_rng(1).standard_normal((2, LENGTH)), jnp.float32)
    product, other = factors[0, kv] * 0.5, factors[1, kv] * factors[0, kv]
    return (score + product) * (q + product) - other


def test_products_by_key():
    graph, captures = _traced(added_twice)
    score = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32)
    program, starts = Program(graph, TILE), {"q_start": 128, "kv_start": 256}
    scalars = [starts[name] for name in program.scalars]
    (found,) = run_program(program, scalars, score, [np.asarray(c) for c in captures])
    q, kv = 128 + np.arange(64), 256 + np.arange(64)
    indices = {"q": q[:, None].astype(np.int32), "kv": kv[None].astype(np.int32), "score": score}
    (expected,) = evaluate(graph, captures, indices)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
