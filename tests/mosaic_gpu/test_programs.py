"""Programs of score_mods, as the machine code of one warpgroup interpreted with NumPy."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.backends.mosaic_gpu import emit, keys_ahead
from flexjax.backends.mosaic_gpu.program import Program, TileType
from flexjax.backends.mosaic_gpu.simplify import simplify
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


STARTS = {"b": 1, "h": 1, "q_start": 128, "kv_start": 256}
Q, KV = 128 + np.arange(64, dtype=np.int32)[:, None], 256 + np.arange(64, dtype=np.int32)[None]


def _expected(graph, captures, score):
    indices = {"b": np.int32(1), "h": np.int32(1), "q": Q, "kv": KV, "score": score}
    return evaluate(graph, captures, indices)[0]


@pytest.mark.parametrize(
    "mod",
    [
        lambda s, b, h, q, k: s - 0.25 * jnp.abs(q - k),
        lambda s, b, h, q, k: s + jnp.sqrt(jnp.abs(3 * k - q).astype(jnp.float32)),
        lambda s, b, h, q, k: (
            s * jnp.abs(q * k - 40000)
        ),  # its size is no constant apart from a neighbour's
    ],
)
def test_distances(mod):
    graph, captures = _traced(mod)
    score = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32)
    program = Program(graph, TILE)
    (found,) = run_program(program, [STARTS[n] for n in program.scalars], score, captures)
    np.testing.assert_allclose(found, _expected(graph, captures, score), rtol=1e-5, atol=1e-4)


def by_key(score, b, h, q, kv):
    """Two values by key, one of them made of two that are read."""
    random = np.random.default_rng(1)
    values = jnp.asarray(random.standard_normal((2, LENGTH)), jnp.float32)
    low = jnp.asarray(random.standard_normal(LENGTH), jnp.bfloat16)
    return score * (values[h, kv] + low[kv]) + jnp.where(q > kv, values[0, kv], 0.5)


@pytest.mark.parametrize("most", [0, 1, 2, 3])
def test_what_is_read_by_key_comes_first(most):
    graph, captures = _traced(by_key)
    split = keys_ahead.split(graph, most)
    assert (0 if split.ahead is None else len(split.ahead.outputs)) == min(most, 2)
    score = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32)
    rest = Program(split.rest, TILE)

    def program(ctx, *args):
        scalars, (tile, *refs) = dict(zip(STARTS, args, strict=False)), args[len(STARTS) :]
        ahead = []
        if split.ahead is not None:
            first = Program(split.ahead, TILE)
            assert not first.has_score
            ahead = first(ctx, *(scalars[n] for n in first.scalars), *refs)
        return rest(ctx, *(scalars[n] for n in rest.scalars), tile, *ahead, *refs)

    arrays = [np.asarray(c) for c in captures]
    (found,) = run_program(program, list(STARTS.values()), score, arrays)
    np.testing.assert_allclose(found, _expected(graph, captures, score), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mod", "moves"),
    [
        (lambda s, b, h, q, k: s * jnp.asarray([0.5, -2.0])[h], True),
        (lambda s, b, h, q, k: jnp.tanh(s * (1.0 + 0.01 * q)) + 0.5 * k, True),
        (lambda s, b, h, q, k: s * (1.0 + 0.01 * (q - k)), False),
        (lambda s, b, h, q, k: s * (1.0 + 0.01 * q) + s, False),
    ],
)
def test_scale_moves_into_a_factor(mod, moves):
    graph, captures = _traced(mod)
    simple = simplify(graph, 0.125)
    assert (simple.before == 1.0) == moves
    x = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32)
    expected = _expected(graph, captures, np.float32(0.125) * x)
    found = simple.after * _expected(simple.graph, captures, np.float32(simple.before) * x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
