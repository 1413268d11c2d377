"""jax.grad, jax.vjp, jax.value_and_grad: reverse mode, by every operand and every captured array."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import AuxRequest, create_block_mask, flex_attention
from tests.transforms.reference import (
    BLOCK,
    FLOATS,
    HQ,
    B,
    L,
    S,
    assert_close,
    dense,
    dense_attention,
    flex,
    masked,
    operands,
    scalar,
    scored,
)


@pytest.mark.smoke
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_grad_of_every_float_operand(jit):
    args = operands()
    grads = jax.value_and_grad(scalar(flex), FLOATS)
    grads = jax.jit(grads) if jit else grads
    assert_close(grads(*args), jax.value_and_grad(scalar(dense), FLOATS)(*args))


def finite(lse):
    return jnp.where(jnp.isfinite(lse), lse, 0.0)


@pytest.mark.parametrize("outputs", ["lse", "both"])
def test_grad_through_the_logsumexp(outputs):
    args = operands()

    def loss(attend):
        def value(*args):
            out, lse = attend(*args, return_lse=True)
            total = jnp.sum(jnp.sin(finite(lse)))
            return total + (jnp.sum(jnp.sin(out)) if outputs == "both" else 0.0)

        return value

    actual = jax.jit(jax.grad(loss(flex), FLOATS))(*args)
    assert_close(actual, jax.grad(loss(dense), FLOATS)(*args))


def test_vjp_pulls_back_several_cotangents():
    *floats, ids = operands()
    out, pull = jax.vjp(lambda *a: flex(*a, ids), *floats)
    expected, pull_dense = jax.vjp(lambda *a: dense(*a, ids), *floats)
    assert_close(out, expected)
    for seed in range(2):
        cotangent = jax.random.normal(jax.random.key(seed), out.shape)
        assert_close(pull(cotangent), pull_dense(cotangent))


def test_rows_without_keys_have_zero_gradients():
    args = operands()
    d_query = jax.grad(scalar(flex))(*args)
    np.testing.assert_array_equal(d_query[1, :, 2:4], 0.0)
    assert np.all(np.any(np.asarray(d_query[0]) != 0.0, axis=-1))


def test_integer_captures_have_no_gradient():
    args = operands()
    d_ids = jax.grad(scalar(flex), 4, allow_int=True)(*args)
    assert d_ids.dtype == jax.dtypes.float0
    assert d_ids.shape == args[4].shape


def test_float_captures_of_a_mask_have_zero_gradients():
    query, key, value, *_ = operands()

    def loss(threshold):
        block_mask = create_block_mask(
            lambda b, h, q, kv: threshold[q] > threshold[kv], None, None, L, S, BLOCK
        )
        return scalar(flex_attention)(query, key, value, None, block_mask)

    np.testing.assert_array_equal(jax.grad(loss)(jnp.arange(float(S))), 0.0)


def test_max_scores_carry_no_gradient():
    query, key, value, *_ = operands()

    def loss(query):
        _, aux = flex_attention(query, key, value, return_aux=AuxRequest(max_scores=True))
        return aux.max_scores.sum()

    np.testing.assert_array_equal(jax.grad(loss)(query), 0.0)


def test_grad_of_scale_and_sinks():
    query, key, value, bias, ids = operands()
    sinks = jnp.linspace(-1.0, 1.0, HQ)

    def flex_loss(scale, sinks):
        return jnp.sum(jnp.sin(flex(query, key, value, bias, ids, scale=scale, sinks=sinks)))

    def dense_loss(scale, sinks):
        out, lse = dense(query * scale * 2.0, key, value, bias, ids, return_lse=True)
        weight = jax.nn.sigmoid(finite(lse) - sinks[None, :, None])
        return jnp.sum(jnp.sin(out * weight[..., None]))

    args = jnp.float32(0.7), sinks
    assert_close(jax.jit(jax.grad(flex_loss, (0, 1)))(*args), jax.grad(dense_loss, (0, 1))(*args))


def test_shared_keys_collect_gradients_from_every_batch_row():
    query, key, value, bias, ids = operands()
    args = query, key[:1], value[:1], bias, ids
    assert_close(jax.grad(scalar(flex), FLOATS)(*args), jax.grad(scalar(dense), FLOATS)(*args))


def test_one_array_as_query_key_and_captured():
    x = jax.random.normal(jax.random.key(3), (B, HQ, S, S))

    def loss(attend):
        def value(x):
            def score_mod(score, b, h, q, kv):
                return score + x[b, h, q, kv] * x[b, h, kv, q]

            return jnp.sum(jnp.sin(attend(x, x, x, score_mod)))

        return value

    assert_close(jax.jit(jax.grad(loss(flex_attention)))(x), jax.grad(loss(dense_attention))(x))


def test_gradients_have_the_dtypes_of_their_operands():
    query, key, value, bias, ids = operands()
    args = *(x.astype(jnp.bfloat16) for x in (query, key, value)), bias.astype(jnp.float16), ids
    grads = jax.jit(jax.grad(lambda *a: flex(*a).astype(jnp.float32).sum(), FLOATS))(*args)
    assert [g.dtype for g in grads] == [a.dtype for a in args[:4]]


def test_finite_differences():
    """The dense computation itself is differentiated by JAX: this is independent of that too."""
    args = operands()
    direction = jax.random.normal(jax.random.key(9), args[0].shape)
    slope = jnp.vdot(jax.grad(scalar(flex))(*args), direction)
    step = 1e-2
    ahead, behind = (scalar(flex)(args[0] + s * direction, *args[1:]) for s in (step, -step))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=2e-3)


def test_nothing_is_computed_for_arrays_that_are_not_differentiated():
    """The program of a gradient holds sums for those captured arrays only that it is asked for."""
    query, key, value, bias, ids = operands()
    other = 1.0 + jnp.arange(7 * 11, dtype=jnp.float32).reshape(7, 11)

    def loss(query, bias, other):
        def score_mod(score, b, h, q, kv):
            return scored(bias)(score, b, h, q, kv) * other[q, kv]

        out = flex_attention(query, key, value, score_mod, mask_mod=masked(ids), backend="xla")
        return jnp.sum(jnp.sin(out))

    def sums_up_other(which):
        program = jax.jit(jax.grad(loss, which)).lower(query, bias, other).as_text()
        return re.search(r"\}\) : \(tensor<7x11xf32>.*-> tensor<7x11xf32>", program) is not None

    assert not sums_up_other((0, 1))
    assert sums_up_other((0, 1, 2))
