"""vmap of grad, grad of vmap, vmap of jvp: gradients of every example, of shared and of own arrays."""

import jax
import jax.numpy as jnp
import pytest

from tests.transforms.reference import FLOATS, assert_close, dense, flex, operands, scalar
from tests.transforms.test_vmap import NAMES, stacked


def axes_of(mapped):
    return tuple(0 if name in mapped else None for name in NAMES)


def check(transform, args):
    assert_close(jax.jit(transform(flex))(*args), jax.jit(transform(dense))(*args))


@pytest.mark.smoke
@pytest.mark.parametrize(
    "mapped", [["query"], ["key", "ids"], ["bias"], list(NAMES)], ids=lambda m: "+".join(m)
)
def test_gradients_of_every_example(mapped):
    """A gradient for every lane, also of the arrays that all lanes share."""
    check(lambda f: jax.vmap(jax.grad(scalar(f), FLOATS), axes_of(mapped)), stacked(mapped))


@pytest.mark.parametrize("mapped", [["query", "ids"], ["value", "bias"]], ids="+".join)
def test_gradient_of_the_sum_over_lanes(mapped):
    """Arrays that all lanes share collect the gradients of every lane."""
    check(lambda f: jax.grad(scalar(jax.vmap(f, axes_of(mapped))), FLOATS), stacked(mapped))


def test_gradients_of_every_batch_row_of_a_shared_capture():
    """Per-example gradients, batch rows as examples: the usual recipe of differential privacy."""
    query, key, value, bias, ids = operands()

    def per_row(attend):
        def loss(bias, *row):
            query, key, value, ids = (x[None] for x in row)
            return scalar(attend)(query, key, value, bias, ids)

        return jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0, 0, 0)))

    args = bias, query, key, value, ids
    rows = per_row(flex)(*args)
    assert_close(rows, per_row(dense)(*args))
    assert_close(rows.sum(0), jax.grad(scalar(flex), 3)(query, key, value, bias, ids))


def test_vmap_of_jvp():
    *floats, ids = operands()
    keys = jax.random.split(jax.random.key(1), 2)
    tangents = tuple(jax.vmap(lambda k, x=x: jax.random.normal(k, x.shape))(keys) for x in floats)

    def pushed(attend):
        def push(*tangents):
            return jax.jvp(lambda *p: attend(*p, ids), tuple(floats), tangents)

        return jax.jit(jax.vmap(push))

    assert_close(pushed(flex)(*tangents), pushed(dense)(*tangents))


def test_vmap_of_vjp_over_cotangents():
    *floats, ids = operands()

    def pulled(attend):
        out, pull = jax.vjp(lambda *p: attend(*p, ids), *floats)
        cotangents = jnp.stack([out, jnp.cos(out)])
        return jax.jit(jax.vmap(pull))(cotangents)

    assert_close(pulled(flex), pulled(dense))


def test_vmap_of_a_hessian_vector_product():
    mapped = ["query", "bias"]

    def product(attend):
        def hvp(query, key, value, bias, ids):
            def gradient(query, bias):
                return jax.grad(scalar(attend), (0, 3))(query, key, value, bias, ids)

            return jax.jvp(gradient, (query, bias), (query[::-1], bias[::-1]))[1]

        return jax.vmap(hvp, axes_of(mapped))

    check(product, stacked(mapped))
