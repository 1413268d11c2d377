"""jax.jvp, jax.linearize, jax.jacfwd: forward mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import flex_attention
from tests.transforms.reference import assert_close, dense, dense_attention, flex, operands


def directions(floats, seed=5):
    keys = jax.random.split(jax.random.key(seed), len(floats))
    return tuple(jax.random.normal(k, x.shape) for k, x in zip(keys, floats, strict=True))


def with_lse(attend, ids):
    """Output and logsumexp, as a function of the operands that have tangents."""

    def function(*floats):
        out, lse = attend(*floats, ids, return_lse=True)
        return out, jnp.where(jnp.isfinite(lse), lse, 0.0)

    return function


@pytest.mark.smoke
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_jvp_by_every_float_operand(jit):
    *floats, ids = operands()
    tangents = directions(floats)

    def run(attend, transform):
        push = transform(lambda p, t: jax.jvp(with_lse(attend, ids), p, t))
        return push(tuple(floats), tangents)

    assert_close(run(flex, jax.jit if jit else lambda f: f), run(dense, jax.jit))


@pytest.mark.parametrize("which", [0, 3], ids=["query", "capture"])
def test_jvp_by_one_operand(which):
    *floats, ids = operands()
    tangent = directions(floats)[which]

    def run(attend):
        def of_one(x):
            return attend(*floats[:which], x, *floats[which + 1 :], ids)

        return jax.jvp(of_one, (floats[which],), (tangent,))

    assert_close(run(flex), run(dense))


def test_jvp_agrees_with_finite_differences():
    *floats, ids = operands()
    tangents = directions(floats)
    _, moved = jax.jvp(lambda *p: flex(*p, ids), tuple(floats), tangents)
    step = 1e-2
    ahead, behind = (
        flex(*(x + s * t for x, t in zip(floats, tangents, strict=True)), ids)
        for s in (step, -step)
    )
    np.testing.assert_allclose(moved, (ahead - behind) / (2 * step), rtol=0.05, atol=2e-3)


def test_linearize_and_its_transpose():
    *floats, ids = operands()
    tangents = directions(floats)
    outs, linear = jax.linearize(with_lse(flex, ids), *floats)
    expected, linear_dense = jax.linearize(with_lse(dense, ids), *floats)
    assert_close(outs, expected)
    assert_close(linear(*tangents), linear_dense(*tangents))
    back = jax.linear_transpose(linear, *tangents)
    back_dense = jax.linear_transpose(linear_dense, *tangents)
    assert_close(back(outs), back_dense(outs))


def test_jacfwd_equals_jacrev():
    query, key, value, bias, ids = operands()
    row = query[:, :, :1]

    def of_row(row):
        return flex(jnp.concatenate([row, query[:, :, 1:]], 2), key, value, bias, ids)[0, 0, 0]

    assert_close(jax.jacfwd(of_row)(row), jax.jacrev(of_row)(row))


def test_tangents_of_bfloat16_operands():
    query, key, value, *_ = (x.astype(jnp.bfloat16) for x in operands()[:4])
    tangents = tuple(x[::-1] for x in (query, key, value))
    out, moved = jax.jvp(flex_attention, (query, key, value), tangents)
    assert out.dtype == moved.dtype == jnp.bfloat16
    wide = (
        jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in ((query, key, value), tangents)
    )
    _, expected = jax.jvp(dense_attention, *wide)
    assert_close(moved.astype(jnp.float32), expected, tolerance=2e-2)
