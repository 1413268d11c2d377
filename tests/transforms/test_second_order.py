"""Derivatives of derivatives, in every order of forward and reverse mode."""

import jax
import jax.numpy as jnp
import pytest

from flexjax import flex_attention
from tests.transforms.reference import assert_close, dense, dense_attention, flex, operands, scalar

FEW = 2, 1, 3, 2  # batch rows, heads, length, head dimension: small enough for whole Hessians


def few(seed=1):
    """(query, key, value, bias), a handful of numbers each."""
    *keys, last = jax.random.split(jax.random.key(seed), 4)
    return *(jax.random.normal(k, FEW) for k in keys), jax.random.normal(last, (3,))


def small(attend):
    """A loss of `few()`: a capture read twice, and a row without keys (the first)."""

    def loss(query, key, value, bias):
        def score_mod(score, b, h, q, kv):
            return jnp.sin(score) * bias[q] + bias[kv]

        def mask_mod(b, h, q, kv):
            return q > kv

        return jnp.sum(jnp.sin(attend(query, key, value, score_mod, mask_mod=mask_mod)))

    return loss


ORDERS = {
    "forward over reverse": lambda f, argnums: jax.jacfwd(jax.jacrev(f, argnums), argnums),
    "reverse over forward": lambda f, argnums: jax.jacrev(jax.jacfwd(f, argnums), argnums),
    "forward over forward": lambda f, argnums: jax.jacfwd(jax.jacfwd(f, argnums), argnums),
    "reverse over reverse": lambda f, argnums: jax.jacrev(jax.jacrev(f, argnums), argnums),
}


@pytest.mark.parametrize("order", ORDERS)
def test_whole_hessian(order):
    args = few()
    hessian = jax.jit(ORDERS[order](small(flex_attention), (0, 1, 2, 3)))(*args)
    assert_close(hessian, jax.jit(jax.hessian(small(dense_attention), (0, 1, 2, 3)))(*args))


@pytest.mark.smoke
def test_hessian_vector_product():
    args = operands()
    *floats, ids = args

    def product(attend):
        def gradient(*floats):
            return jax.grad(scalar(attend), (0, 1, 2, 3))(*floats, ids)

        return jax.jit(lambda *v: jax.jvp(gradient, tuple(floats), v))

    vectors = tuple(x[..., ::-1] for x in floats)
    assert_close(product(flex)(*vectors), product(dense)(*vectors))


def test_gradient_penalty():
    args = operands()

    def penalty(attend):
        def value(*args):
            gradients = jax.grad(scalar(attend), (0, 2, 3))(*args)
            return sum(jnp.sum(g**2) for g in gradients)

        return jax.jit(jax.grad(value, (0, 1, 2, 3)))

    assert_close(penalty(flex)(*args), penalty(dense)(*args))


def test_second_derivative_through_the_logsumexp():
    query, key, value, _ = few()

    def loss(attend):
        return lambda query: jnp.sum(jnp.sin(attend(query, key, value, return_lse=True)[1]))

    assert_close(
        jax.hessian(loss(flex_attention))(query), jax.hessian(loss(dense_attention))(query)
    )


def test_inner_step_of_gradient_descent():
    """Meta-learning: a gradient with respect to where an inner gradient step started."""
    args = few()

    def adapted(attend):
        def value(query, *rest):
            loss = small(attend)
            return loss(query - 0.1 * jax.grad(loss)(query, *rest), *rest)

        return jax.jit(jax.grad(value, (0, 3)))

    assert_close(adapted(flex_attention)(*args), adapted(dense_attention)(*args))
