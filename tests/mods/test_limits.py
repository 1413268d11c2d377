"""Mods that the IR cannot express: they stay whole, and the reason names the primitive and the user's line."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flexjax.mods.builder import NODE_BUDGET
from flexjax.mods.errors import UnsupportedMod
from flexjax.mods.evaluate import evaluate, evaluate_numpy
from flexjax.mods.interpret import MAX_TRIPS
from flexjax.mods.trace import index_ranges, trace_mask_mod, trace_score_mod
from flexjax.mods.views import MAX_UNROLL
from tests.mods import zoo

RANGES = index_ranges(zoo.B, zoo.H, zoo.Q, zoo.K)
WIDE = jnp.linspace(-1, 1, MAX_UNROLL + 1)
MATRIX = jnp.ones((MAX_UNROLL + 1, 3))


def reason(mod):
    opaque = trace_score_mod(mod, RANGES)[0].forward.opaque
    return None if opaque is None else opaque.reason


@pytest.mark.parametrize(
    ("mod", "what"),
    [
        (lambda s, b, h, q, k: jnp.sort(WIDE[:3] * s)[0], "it uses the JAX primitive `sort`"),
        (lambda s, b, h, q, k: jnp.cumsum(WIDE[:3] * s)[q], "it uses the JAX primitive `cumsum`"),
        (lambda s, b, h, q, k: s + jnp.sum(WIDE * s), "it uses 257 elements of a captured array"),
        (lambda s, b, h, q, k: s + lax.dynamic_slice(WIDE, (q,), (257,)).sum(), "it uses 257 el"),
        (lambda s, b, h, q, k: s + jnp.full(257, s).sum(), r"it broadcasts to shape \(257,\)"),
        (lambda s, b, h, q, k: s + jnp.arange(257)[q], r"it makes an iota of shape \(257,\)"),
        (lambda s, b, h, q, k: s + MATRIX[:, h].sum(), "it uses 257 elements"),
        (
            lambda s, b, h, q, k: s + WIDE[q + jnp.zeros(257, jnp.int32)].sum(),
            r"it broadcasts to shape \(257,\)",
        ),
        (
            lambda s, b, h, q, k: s + (MATRIX[:3] @ (MATRIX[0] * s))[0],
            "it multiplies matrices; only dot products of small vectors are unrolled",
        ),
        (
            lambda s, b, h, q, k: s + jnp.tensordot(WIDE[:2], WIDE[:2] * s, axes=0)[0, 1],
            "it multiplies matrices",
        ),
        (
            lambda s, b, h, q, k: lax.fori_loop(0, MAX_TRIPS + 1, lambda i, x: x * 0.9, s),
            "it loops 65 times; loops of at most 64 are unrolled",
        ),
        (
            lambda s, b, h, q, k: lax.while_loop(lambda x: x > 1, lambda x: x / 2, s),
            "it contains a loop whose trip count is not known when it is traced",
        ),
        (
            lambda s, b, h, q, k: (s * WIDE[:4])[jnp.stack([q, k])].sum(),
            "it gathers from an array that the mod itself computes",
        ),
        (
            lambda s, b, h, q, k: lax.bitcast_convert_type(s, jnp.uint16)[0] * 0.5,
            "it reinterprets bits as a type of another width",
        ),
    ],
    ids=lambda x: x[:24] if isinstance(x, str) else "",
)
def test_reason_names_what_and_where(mod, what):
    line = mod.__code__.co_firstlineno
    found = reason(mod)
    assert found is not None
    assert re.match(what, found), found
    assert f", at {__file__}:{line}" in found


def test_reason_inside_a_called_function_names_the_innermost_line():
    def helper(x):
        return jnp.sort(jnp.stack([x, -x]))[0]

    found = reason(lambda s, b, h, q, k: jax.jit(helper)(s))
    assert f"test_limits.py:{helper.__code__.co_firstlineno + 1}" in found
    assert found.count(", at ") == 1


def test_error_is_a_sentence():
    error = UnsupportedMod("it uses the JAX primitive `sort`", "mods.py:3 (mask)")
    assert str(error) == (
        "The mod cannot be inlined into a kernel: it uses the JAX primitive `sort`, at mods.py:3 (mask)."
    )
    assert isinstance(error, NotImplementedError)
    assert UnsupportedMod("it is too large").reason == "it is too large"


def test_node_budget():
    def polynomial(terms):
        def mod(s, b, h, q, k):
            for i in range(terms):
                s = s * (1 + i / 7) + i
            return s

        return mod

    assert reason(polynomial(20)) is None
    assert f"more than the {NODE_BUDGET} that a kernel can hold" in reason(
        polynomial(NODE_BUDGET // 3)
    )


def test_what_is_computed_but_not_needed_does_not_count():
    def mod(s, b, h, q, k):
        unused = s
        for i in range(NODE_BUDGET):
            unused = unused * (1 + i / 7)
        return s

    assert reason(mod) is None


def test_interpretation_stops_long_before_memory_does():
    def mod(s, b, h, q, k):
        x = jnp.full(MAX_UNROLL, s)
        for i in range(80):
            x = x * (q + i) + WIDE[:MAX_UNROLL]
        return x.sum()

    assert f"it unrolls to more than {8 * NODE_BUDGET} scalar operations, at " in reason(mod)


@pytest.mark.parametrize("count", [0, 1, MAX_TRIPS])
def test_loops_within_the_limit_are_unrolled(count):
    def mod(s, b, h, q, k):
        return lax.fori_loop(0, count, lambda i, x: x + WIDE[i], s)

    traced, captures = trace_score_mod(mod, RANGES)
    assert traced.forward.opaque is None
    inputs = zoo.grid() | {"score": jnp.zeros((1, 1, 1, 1))}
    (actual,) = evaluate(traced.forward, captures, inputs)
    np.testing.assert_allclose(actual.item(), WIDE[:count].sum(), rtol=1e-5, atol=1e-6)


def test_vectors_within_the_limit_are_unrolled():
    assert reason(lambda s, b, h, q, k: jnp.dot(WIDE[:99], WIDE[:99] * s)) is None


def test_an_opaque_mod_keeps_its_reason_apart_from_its_identity():
    """The same body on another line is the same mod."""
    first, _ = trace_mask_mod(lambda b, h, q, k: jnp.sort(jnp.stack([q, k]))[0] < 3, RANGES)
    other, _ = trace_mask_mod(lambda b, h, q, k: jnp.sort(jnp.stack([q, k]))[0] < 3, RANGES)
    assert first.opaque.reason != other.opaque.reason
    assert first == other
    assert hash(first) == hash(other)


def test_an_opaque_mod_runs_under_vmap_only():
    graph, captures = trace_mask_mod(lambda b, h, q, k: jnp.sort(jnp.stack([q, k]))[0] < 3, RANGES)
    with pytest.raises(NotImplementedError, match="opaque has no NumPy counterpart"):
        evaluate_numpy(graph, captures, zoo.grid(np))
