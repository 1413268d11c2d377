"""jax.lax.scan and other control flow around attention, differentiated from outside and inside."""

import jax
import jax.numpy as jnp
import pytest

from flexjax import create_block_mask, flex_attention
from tests.transforms.reference import (
    BLOCK,
    HQ,
    B,
    D,
    S,
    assert_close,
    dense_attention,
    scalar,
)

LAYERS = 3
KEYS = jax.random.split(jax.random.key(11), 3)
STREAM = jax.random.normal(KEYS[0], (B, HQ, S, D))
WEIGHTS = jax.random.normal(KEYS[1], (LAYERS, 3, D, D)) / 2
SLOPES = jax.random.uniform(KEYS[2], (LAYERS, HQ))


def causal(b, h, q, kv):
    return q >= kv


def layer(attend, x, weights, slopes, mask):
    query, key, value = (jnp.tanh(x @ w) for w in weights)

    def score_mod(score, b, h, q, kv):
        return score - slopes[h] * (q - kv)

    return x + attend(query, key, value, score_mod, **mask)


FLEX = flex_attention, {"block_mask": create_block_mask(causal, None, None, S, S, BLOCK)}
DENSE = dense_attention, {"mask_mod": causal}


def stack_of_layers(kind, remat=False, unroll=1):
    attend, mask = kind

    def body(x, layer_weights):
        return layer(attend, x, *layer_weights, mask), None

    body = jax.checkpoint(body) if remat else body

    def run(x, weights, slopes):
        return jax.lax.scan(body, x, (weights, slopes), unroll=unroll)[0]

    return run


@pytest.mark.smoke
@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
def test_gradient_of_scanned_layers(remat):
    args = STREAM, WEIGHTS, SLOPES

    def grads(kind, remat=False):
        loss = scalar(stack_of_layers(kind, remat))
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*args)

    assert_close(grads(FLEX, remat), grads(DENSE))


def test_scan_equals_a_python_loop():
    x = STREAM
    for weights, slopes in zip(WEIGHTS, SLOPES, strict=True):
        x = layer(*FLEX[:1], x, weights, slopes, FLEX[1])
    assert_close(stack_of_layers(FLEX)(STREAM, WEIGHTS, SLOPES), x)


def test_gradient_inside_the_body():
    """Steps of gradient descent on a captured array, which is the carry."""

    def descend(kind):
        attend, mask = kind

        def step(slopes, _):
            gradient = jax.grad(lambda s: scalar(layer)(attend, STREAM, WEIGHTS[0], s, mask))(
                slopes
            )
            return slopes - 0.1 * gradient, gradient

        return jax.jit(lambda s: jax.lax.scan(step, s, length=LAYERS))(SLOPES[0])

    assert_close(descend(FLEX), descend(DENSE))


def test_forward_mode_through_scanned_layers():
    args = STREAM, WEIGHTS, SLOPES

    def push(kind):
        return jax.jit(lambda *a: jax.jvp(stack_of_layers(kind), a, a))(*args)

    assert_close(push(FLEX), push(DENSE))


def test_vmapped_scan():
    weights = jnp.stack([WEIGHTS, -WEIGHTS])

    def many(kind):
        run = jax.vmap(scalar(stack_of_layers(kind)), (None, 0, None))
        return jax.jit(jax.grad(lambda w: jnp.sum(run(STREAM, w, SLOPES) ** 2)))(weights)

    assert_close(many(FLEX), many(DENSE))


def test_scanned_block_masks():
    """A mask of its own for every layer: the stacked BlockMask is a scanned operand."""
    windows = jnp.array([1, 3, 8])

    def window(w):
        return lambda b, h, q, kv: (q >= kv) & (q - kv <= w)

    masks = jax.vmap(lambda w: create_block_mask(window(w), None, None, S, S, BLOCK))(windows)

    def run_flex(x):
        def body(x, mask):
            return x + flex_attention(x, x, x, block_mask=mask), None

        return jax.lax.scan(body, x, masks)[0]

    def run_dense(x):
        for w in windows:
            x = x + dense_attention(x, x, x, mask_mod=window(w))
        return x

    actual, expected = (jax.jit(jax.value_and_grad(scalar(f))) for f in (run_flex, run_dense))
    assert_close(actual(STREAM), expected(STREAM))


def test_cond_and_while():
    def run(attend):
        def step(carry):
            i, x = carry
            masked = lambda x: attend(x, x, x, mask_mod=causal)
            x = jax.lax.cond(i % 2 == 0, masked, lambda x: attend(x, x, x), x)
            return i + 1, x

        return jax.jit(lambda x: jax.lax.while_loop(lambda c: c[0] < 3, step, (0, x))[1])(STREAM)

    assert_close(run(flex_attention), run(dense_attention))


def test_gradient_of_a_switch():
    def run(attend):
        def value(x, which):
            branches = [
                lambda x: attend(x, x, x, mask_mod=causal),
                lambda x: attend(x, x, x, lambda score, b, h, q, kv: jnp.tanh(score)),
            ]
            return scalar(jax.lax.switch)(which, branches, x)

        return jax.jit(jax.vmap(jax.grad(value), (None, 0)))(STREAM, jnp.arange(2))

    assert_close(run(flex_attention), run(dense_attention))
