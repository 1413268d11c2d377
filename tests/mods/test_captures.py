"""Captured arrays that are tracers of whatever transformation is going on outside."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.mods.evaluate import evaluate
from flexjax.mods.ops import is_float
from flexjax.mods.trace import index_ranges, trace_mask_mod, trace_score_mod
from tests.mods import zoo

RANGES = index_ranges(zoo.B, zoo.H, zoo.Q, zoo.K)
SHAPE = (zoo.B, zoo.H, zoo.Q, zoo.K)
SCORES = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE), jnp.float32)

FACTORIES = [
    zoo.captured_cap,
    zoo.two_reads_of_one_table,
    zoo.computed_before_the_kernel,
    zoo.computed_inside_the_mod,
    zoo.logarithmic_distance,
    zoo.median_of_three,
]
factories = pytest.mark.parametrize(
    "factory",
    zoo.params({f.__name__: f for f in FACTORIES}, smoke=("computed_inside_the_mod",)),
)


def through_the_graph(factory):
    """The modified scores as a function of the captured arrays: the mod is made and traced inside."""

    def run(arrays):
        mod, captures = trace_score_mod(factory(**arrays), RANGES)
        (y,) = evaluate(mod.forward, captures, zoo.grid() | {"score": SCORES})
        return jnp.broadcast_to(y, SHAPE)

    return run


def by_vmap(factory):
    return lambda arrays: zoo.everywhere(factory(**arrays), scored=True)(SCORES)


def floats(factory):
    arrays = zoo.captured(factory)
    assert all(is_float(a.dtype) for a in arrays.values())
    return arrays


def stacked(arrays):
    return {name: jnp.stack([a, 0.5 * a, a - 0.25]) for name, a in arrays.items()}


def compare(transformed, factory, arrays):
    """`transformed(f)(arrays)` is the same whether f goes through the graph or through vmap."""
    actual, expected = (
        jax.jit(transformed(f(factory)))(arrays) for f in (through_the_graph, by_vmap)
    )
    chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=2e-4)


@factories
def test_jit(factory):
    compare(lambda f: f, factory, floats(factory))


@factories
def test_grad(factory):
    compare(lambda f: jax.grad(lambda a: (f(a) * SCORES).sum()), factory, floats(factory))


@factories
def test_vmap(factory):
    compare(jax.vmap, factory, stacked(floats(factory)))


@factories
def test_scan(factory):
    def scanned(f):
        return lambda xs: jax.lax.scan(lambda total, x: (total + f(x), f(x)[0, 0]), SCORES, xs)

    compare(scanned, factory, stacked(floats(factory)))


def test_grad_of_vmap_of_remat():
    def transformed(f):
        return jax.grad(lambda a: (jax.vmap(jax.checkpoint(f))(a) ** 2).sum())

    factory = zoo.computed_inside_the_mod
    compare(transformed, factory, stacked(floats(factory)))


@pytest.mark.smoke
@pytest.mark.parametrize("factory", zoo.params(zoo.MASKS))
def test_mask_of_traced_arrays_has_the_graph_of_concrete_ones(factory):
    graphs = []

    def trace(arrays):
        graph, captures = trace_mask_mod(factory(**arrays), RANGES)
        graphs.append(graph)
        return captures

    arrays = zoo.captured(factory)
    captures = trace(arrays)
    chex.assert_trees_all_equal(jax.jit(trace)(arrays), captures)
    if arrays:
        jax.vmap(trace)({name: jnp.stack([a, a]) for name, a in arrays.items()})
    assert len(set(graphs)) == 1


class TestWideTypes:
    """Mods are traced in 32 bits; what they capture may be wider."""

    @pytest.fixture(autouse=True)
    def _x64(self):
        with jax.enable_x64(True):
            yield

    def test_documents(self):
        ids = jnp.asarray(np.sort(np.arange(zoo.K) % 3))
        assert ids.dtype == jnp.int64
        graph, captures = trace_mask_mod(
            lambda b, h, q, k: (ids[q] == ids[k]) & (ids[k] <= q), RANGES
        )
        (actual,) = evaluate(graph, captures, zoo.grid())
        ids = np.asarray(ids)
        q, k = np.ogrid[: zoo.Q, : zoo.K]
        np.testing.assert_array_equal(actual[0, 0], (ids[q] == ids[k]) & (ids[k] <= q))

    def test_slopes(self):
        slopes = jnp.asarray([1.0, 2.0, 3.0, 1 / 3])
        assert slopes.dtype == jnp.float64
        mod, captures = trace_score_mod(lambda s, b, h, q, k: s * slopes[h] + 2 * slopes[0], RANGES)
        (actual,) = evaluate(mod.forward, captures, zoo.grid() | {"score": SCORES})
        assert actual.dtype == jnp.float32
        expected = SCORES * slopes.astype(jnp.float32).reshape(1, -1, 1, 1) + 2
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
