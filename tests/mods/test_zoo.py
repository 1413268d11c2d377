"""Every mod of the zoo, traced into the IR, against `jax.vmap` of the user's function and its autodiff."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.mods.evaluate import evaluate, evaluate_numpy
from flexjax.mods.ops import OPS, is_float
from flexjax.mods.trace import index_ranges, trace_mask_mod, trace_score_mod
from tests.mods import zoo

SHAPE = (zoo.B, zoo.H, zoo.Q, zoo.K)
RANGES = index_ranges(*SHAPE)
SCORES = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE) * 2, jnp.float32)
COTANGENT = jnp.asarray(np.random.default_rng(2).normal(size=SHAPE), jnp.float32)

close = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-5)


def wide(arrays):
    """The same arrays without half precision, in which autodiff would add up its cotangents."""
    return {n: a.astype(jnp.float32) if is_float(a.dtype) else a for n, a in arrays.items()}


def split(arrays):
    floats = {n: a for n, a in arrays.items() if is_float(a.dtype)}
    return floats, {n: a for n, a in arrays.items() if n not in floats}


def expected_gradients(factory, arrays):
    """(by the scores, by every float array) from JAX."""
    floats, integers = split(wide(arrays))

    def run(scores, floats):
        return zoo.everywhere(factory(**floats, **integers), scored=True)(scores)

    _, pullback = jax.vjp(run, SCORES, floats)
    return pullback(COTANGENT)


def gradients_by_loads(factory, arrays):
    """The same from the mod's gradient graph, one contribution for every single score."""
    floats, integers = split(arrays)

    def read(floats):
        mod, captures = trace_score_mod(factory(**floats, **integers), RANGES)
        return [c for c in captures if is_float(c.dtype)], (mod, captures)

    _, pullback, (mod, captures) = jax.vjp(read, floats, has_aux=True)
    inputs = zoo.grid() | {"score": SCORES}
    outputs = [jnp.broadcast_to(o, SHAPE) for o in evaluate(mod.gradient.graph, captures, inputs)]
    totals = {i: jnp.zeros(c.shape) for i, c in enumerate(captures) if is_float(c.dtype)}
    for load in mod.gradient.loads:
        where = tuple(outputs[i] for i in load.indices)
        contribution = COTANGENT * outputs[load.derivative]
        total = totals[load.capture]
        totals[load.capture] = (
            total.at[where].add(contribution) if where else total + contribution.sum()
        )
    (by_array,) = pullback([t.astype(captures[i].dtype) for i, t in totals.items()])
    return COTANGENT * outputs[1], by_array


def compare_with_numpy(graph, captures, inputs, expected):
    """NumPy computes the same, or says that it lacks an operation."""
    captures = [np.asarray(c) for c in captures]
    lacking = {n.op for n in graph.nodes if n.op in OPS and OPS[n.op].numpy is None}
    if lacking:
        with pytest.raises(NotImplementedError, match="no NumPy counterpart"):
            evaluate_numpy(graph, captures, inputs)
        return
    (actual,) = evaluate_numpy(graph, captures, inputs)
    assert np.asarray(actual).dtype == graph.nodes[graph.outputs[0]].dtype
    close(np.broadcast_to(actual, SHAPE), np.asarray(expected))


@pytest.mark.parametrize(
    "factory", zoo.params(zoo.MASKS, smoke=("document", "neighbourhood", "document_of_offsets"))
)
def test_mask(factory):
    arrays = zoo.captured(factory)
    expected = jax.jit(zoo.everywhere(factory(**arrays), scored=False))()
    graph, captures = trace_mask_mod(factory(**arrays), RANGES)
    assert graph.opaque is None
    (actual,) = evaluate(graph, captures, zoo.grid())
    assert actual.dtype == jnp.bool_
    np.testing.assert_array_equal(jnp.broadcast_to(actual, SHAPE), expected)
    compare_with_numpy(graph, captures, zoo.grid(np), expected)


@pytest.mark.parametrize(
    "factory", zoo.params(zoo.SCORES, smoke=("t5_buckets", "other_gradient", "scan_over_an_array"))
)
def test_score(factory):
    arrays = zoo.captured(factory)
    expected = jax.jit(zoo.everywhere(factory(**arrays), scored=True))(SCORES)
    mod, captures = trace_score_mod(factory(**arrays), RANGES)
    assert mod.forward.opaque is None
    (actual,) = evaluate(mod.forward, captures, zoo.grid() | {"score": SCORES})
    assert actual.dtype == jnp.float32
    close(jnp.broadcast_to(actual, SHAPE), expected.astype(jnp.float32))
    inputs = zoo.grid(np) | {"score": np.asarray(SCORES)}
    compare_with_numpy(mod.forward, captures, inputs, expected)


@pytest.mark.parametrize("factory", zoo.params(zoo.SCORES, smoke=("two_reads_of_one_table",)))
def test_gradient_of_a_score(factory):
    arrays = zoo.captured(factory)
    by_score, by_array = jax.jit(gradients_by_loads, static_argnums=0)(factory, arrays)
    expected_by_score, expected_by_array = jax.jit(expected_gradients, static_argnums=0)(
        factory, arrays
    )
    close(by_score, expected_by_score)
    assert by_array.keys() == expected_by_array.keys()
    for name, gradient in by_array.items():
        assert gradient.dtype == arrays[name].dtype
        rounding = 2 * float(jnp.finfo(gradient.dtype).eps)
        expected = expected_by_array[name]
        scale = float(jnp.abs(expected).max())
        error = float(jnp.abs(gradient.astype(jnp.float32) - expected).max())
        assert error <= max(rounding, 2e-5) * max(scale, 1.0), (name, error, scale)


@pytest.mark.parametrize("factory", zoo.params(zoo.OPAQUE_MASKS))
def test_opaque_mask(factory):
    arrays = zoo.captured(factory)
    graph, captures = trace_mask_mod(factory(**arrays), RANGES)
    assert graph.opaque is not None
    (actual,) = jax.jit(evaluate, static_argnums=0)(graph, captures, zoo.grid())
    expected = jax.jit(zoo.everywhere(factory(**arrays), scored=False))()
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("factory", zoo.params(zoo.OPAQUE_SCORES))
def test_opaque_score_is_differentiated_by_jax(factory):
    arrays = zoo.captured(factory)
    floats, integers = split(arrays)

    def run(scores, floats):
        mod, captures = trace_score_mod(factory(**floats, **integers), RANGES)
        assert mod.forward.opaque is not None
        assert mod.gradient is None
        (y,) = evaluate(mod.forward, captures, zoo.grid() | {"score": scores})
        return y

    def expected(scores, floats):
        return zoo.everywhere(factory(**floats, **integers), scored=True)(scores)

    def value_and_gradients(f):
        value, pullback = jax.vjp(f, SCORES, floats)
        return value, pullback(COTANGENT)

    close(
        jax.jit(value_and_gradients, static_argnums=0)(run),
        jax.jit(value_and_gradients, static_argnums=0)(expected),
        atol=2e-4,
    )
