"""jax.jit: the same numbers, and one compilation for one shape."""

import re

import jax
import jax.numpy as jnp
import pytest

from flexjax import autodiff, create_block_mask, flex_attention
from tests.transforms.reference import (
    BLOCK,
    B,
    L,
    S,
    assert_close,
    dense,
    flex,
    masked,
    operands,
    scored,
)


@pytest.mark.smoke
def test_jitted_equals_eager_equals_dense():
    args = operands()
    eager, jitted = (
        flex(*args, return_lse=True),
        jax.jit(flex, static_argnames="return_lse")(*args, return_lse=True),
    )
    assert_close(jitted, eager)
    assert_close(jitted, dense(*args, return_lse=True))


def test_block_mask_passes_through_jit_without_retracing():
    traces = []

    @jax.jit
    def build(ids):
        return create_block_mask(masked(ids), B, None, L, S, BLOCK)

    @jax.jit
    def attend(query, key, value, bias, block_mask):
        traces.append(block_mask)
        return flex_attention(query, key, value, scored(bias), block_mask)

    for seed in range(3):
        query, key, value, bias, ids = operands(seed)
        ids = jnp.roll(ids, seed, axis=1)
        out = attend(query, key, value, bias, build(ids))
        assert_close(out, dense(query, key, value, bias, ids))
    assert len(traces) == 1


def test_fresh_lambda_with_the_same_body_does_not_recompile():
    query, key, value, bias, ids = operands()
    counts = []
    for factor in (1.0, 2.0, 3.0):
        captured = factor * bias
        out = flex_attention(
            query,
            key,
            value,
            lambda score, b, h, q, kv: score + captured[h, kv],  # noqa: B023
            create_block_mask(lambda b, h, q, kv: ids[b, q] <= ids[b, kv], B, None, L, S, BLOCK),
        )
        counts.append(autodiff._run_forward._cache_size())
        assert out.shape == (*query.shape[:-1], value.shape[-1])
    assert counts[1:] == counts[:1] * 2


def test_another_body_does_recompile():
    query, key, value, bias, _ = operands()
    before = autodiff._run_forward._cache_size()
    flex_attention(query, key, value, lambda score, b, h, q, kv: score + 3.25 * bias[h, kv])
    first = autodiff._run_forward._cache_size()
    flex_attention(query, key, value, lambda score, b, h, q, kv: score + 4.25 * bias[h, kv])
    assert (first, autodiff._run_forward._cache_size()) == (before + 1, before + 2)


def test_nested_jit():
    args = operands()
    nested = jax.jit(lambda *a: jax.jit(flex)(*a) + jax.jit(flex)(*a))
    assert_close(nested(*args), 2 * dense(*args))


def test_ahead_of_time():
    args = operands()
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    compiled = jax.jit(flex).lower(*shapes).compile()
    assert_close(compiled(*args), dense(*args))
    out = jax.eval_shape(flex, *shapes)
    assert (out.shape, out.dtype) == (compiled(*args).shape, jnp.float32)


def test_donated_operands():
    query, key, value, bias, ids = operands()
    value = jnp.concatenate(
        [value, value[..., :1]], axis=-1
    )  # Dv = D: the output fits the query's buffer
    expected = dense(query, key, value, bias, ids)
    donated = jnp.copy(query)
    out = jax.jit(flex, donate_argnums=0)(donated, key, value, bias, ids)
    assert_close(out, expected)
    assert donated.is_deleted()


def test_traced_scale_and_batch_of_one_key():
    query, key, value, bias, ids = operands()
    key, value = key[:1], value[:1]

    @jax.jit
    def scaled(scale, *args):
        return flex(*args, scale=scale)

    expected = dense(query * 0.3 * query.shape[-1] ** 0.5, key, value, bias, ids)
    assert_close(scaled(jnp.float32(0.3), query, key, value, bias, ids), expected)


@pytest.mark.parametrize("function", [flex, jax.grad(lambda *args: flex(*args).sum())])
def test_nothing_keeps_jit_from_its_fast_path(function):
    # JAX 0.11 calls programs that hold one of its high-level primitives through Python, every time.
    jitted, args = jax.jit(function), operands()
    jitted(*args)
    with jax.no_tracing():  # an error wherever a call reaches Python
        jitted(*args)


def test_equal_layers_are_in_a_program_once():
    """However many layers there are, their kernels are traced, lowered and compiled once."""
    query, key, value, bias, ids = operands()
    layers = 3
    block_mask = create_block_mask(masked(ids), B, None, L, S, BLOCK)

    def loss(query):
        for layer in range(layers):
            out = flex_attention(query, key, value, scored(bias * layer), block_mask)
            query = query + out.sum(-1, keepdims=True)
        return query.sum()

    text = jax.jit(jax.grad(loss)).lower(query).as_text()
    for name in ("_run_forward", "_run_backward"):
        assert len(re.findall(rf"func\.func private @{name}\w*\(", text)) == 1
        assert len(re.findall(rf"call @{name}\w*\(", text)) == layers
