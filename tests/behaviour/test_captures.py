"""Arrays that a score_mod captures: every way of reading them, and the gradient of every element."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import create_block_mask, flex_attention, masks
from flexjax.testing import assert_close, oracle_grads
from tests.behaviour.harness import Case, cases, check, normal


def reads(name, bias, captures, *, mask=masks.causal(), **options):
    """A case whose score_mod adds `bias(captures, b, h, q, k)` to the score."""

    def score(c):
        return lambda s, b, h, q, k: s + bias(c, b, h, q, k)

    return Case(name, score=score, captures=captures, mask=mask, **options)


def modifies(name, score, captures, *, mask=masks.causal(), **options):
    """A case whose score_mod is `score(captures, s, b, h, q, k)`."""

    def with_captures(c):
        return lambda s, b, h, q, k: score(c, s, b, h, q, k)

    return Case(name, score=with_captures, captures=captures, mask=mask, **options)


OFFSETS = jnp.asarray(np.random.default_rng(5).permutation(40), jnp.int32)

# One read of a bias, indexed in every way there is.
BIASES = [
    reads("per_head", lambda c, b, h, q, k: c["a"][h], {"a": normal(2)}),
    reads("per_batch_and_head", lambda c, b, h, q, k: c["a"][b, h], {"a": normal(2, 2)}),
    reads("per_query", lambda c, b, h, q, k: c["a"][q], {"a": normal(40)}, mask=None),
    reads("per_key", lambda c, b, h, q, k: c["a"][k], {"a": normal(40)}),
    reads("query_by_key", lambda c, b, h, q, k: c["a"][q, k], {"a": normal(40, 40)}),
    reads("key_by_query", lambda c, b, h, q, k: c["a"][k, q], {"a": normal(40, 40)}),
    reads(
        "batch_by_query_by_key", lambda c, b, h, q, k: c["a"][b, q, k], {"a": normal(2, 40, 40)}
    ),
    reads(
        "head_by_query_by_key", lambda c, b, h, q, k: c["a"][h, q, k], {"a": normal(2, 40, 40)}
    ),
    reads(
        "every_index", lambda c, b, h, q, k: c["a"][b, h, q, k], {"a": normal(2, 2, 40, 40)}
    ),
    reads("relative", lambda c, b, h, q, k: c["a"][q - k + 39], {"a": normal(79)}, mask=None),
    reads("relative_by_head", lambda c, b, h, q, k: c["a"][q - k, h], {"a": normal(40, 2)}),
    reads("chained", lambda c, b, h, q, k: c["a"][h][q][k], {"a": normal(2, 40, 40)}),
    reads("of_a_transposed_view", lambda c, b, h, q, k: c["a"].T[q, k], {"a": normal(40, 40)}),
    reads("of_a_strided_view", lambda c, b, h, q, k: c["a"][::2, 1:][q, k], {"a": normal(80, 41)}),
    reads("of_a_slice_inside", lambda c, b, h, q, k: c["a"][q, 3:20][k % 17], {"a": normal(40, 24)}),
    reads(
        "dynamic_slice",
        lambda c, b, h, q, k: jax.lax.dynamic_slice(c["a"], (q, k), (1, 1))[0, 0],
        {"a": normal(40, 40)},
    ),
    reads(
        "indirect",
        lambda c, b, h, q, k: c["a"][c["offsets"][q]],
        {"a": normal(40), "offsets": OFFSETS},
        mask=None,
    ),
    reads(
        "indirect_both_ways",
        lambda c, b, h, q, k: c["a"][c["offsets"][k], c["offsets"][q] // 2],
        {"a": normal(40, 20), "offsets": OFFSETS},
    ),
    reads("element_of_one", lambda c, b, h, q, k: c["a"][0], {"a": normal(1)}),
    reads("same_element_for_all", lambda c, b, h, q, k: c["a"][1, 2], {"a": normal(3, 4)}),
    reads("computed_outside", lambda c, b, h, q, k: jnp.sin(c["a"])[q] * 2.0, {"a": normal(40)}, mask=None),
]  # fmt: skip

# One array read several times, several arrays, and reads that do more than add.
MULTIPLE = [
    reads(
        "symmetric_two_reads_of_one_array",
        lambda c, b, h, q, k: c["a"][q] + c["a"][k],
        {"a": normal(40)},
        mask=None,
        smoke=True,
    ),
    reads("product_of_two_reads", lambda c, b, h, q, k: c["a"][h, q] * c["a"][h, k], {"a": normal(2, 40)}),
    reads(
        "three_reads_of_one_table",
        lambda c, b, h, q, k: c["a"][q, k] + c["a"][k, q] - c["a"][q, q],
        {"a": normal(40, 40)},
    ),
    reads("a_read_indexed_at_itself", lambda c, b, h, q, k: c["a"][q, 0] * c["a"][0, q], {"a": normal(40, 40)}, mask=None),
    reads(
        "distinct_arrays",
        lambda c, b, h, q, k: c["head"][h] + c["query"][q] * c["key"][k] + c["batch"][b],
        {"head": normal(2), "query": normal(40), "key": normal(40, seed=1), "batch": normal(2, seed=2)},
    ),
    modifies(
        "multiplied_in_all_dimensions",
        lambda c, s, b, h, q, k: s * c["batch"][b] * c["head"][h] * c["query"][q] * c["key"][k],
        {"batch": normal(2), "head": normal(2), "query": normal(40), "key": normal(40, seed=1)},
    ),
    modifies("multiplied_by_a_table", lambda c, s, b, h, q, k: s * c["a"][q, k], {"a": normal(40, 40)}),
    modifies(
        "gate_inside",
        lambda c, s, b, h, q, k: s * jax.nn.sigmoid(c["gate"][h]),
        {"gate": normal(2)},
    ),
    modifies(
        "gate_of_query_and_key",
        lambda c, s, b, h, q, k: jnp.tanh(s * c["w"][q]) * jax.nn.softplus(c["w"][k]),
        {"w": normal(40)},
        mask=None,
    ),
    modifies("captured_scalar", lambda c, s, b, h, q, k: s * c["a"], {"a": jnp.float32(0.7)}),
    modifies("captured_scalar_squared", lambda c, s, b, h, q, k: s + c["a"] ** 2 * (q - k), {"a": jnp.float32(0.1)}),
    modifies(
        "local_window_bias",
        lambda c, s, b, h, q, k: jnp.where(
            jnp.abs(q - k) <= 8, s + c["a"][jnp.clip(q - k + 8, 0, 16)], -jnp.inf
        ),
        {"a": normal(17)},
        mask=None,
    ),
    modifies(
        "global_tokens_bias",
        lambda c, s, b, h, q, k: s + jnp.where(c["flag"][k] | (q < 2), c["a"][h, k], 0.0),
        {"a": normal(2, 40), "flag": jnp.arange(40) % 7 == 0},
    ),
    modifies(
        "stopped_gradient",
        lambda c, s, b, h, q, k: s + c["a"][q] * jax.lax.stop_gradient(c["a"][k]),
        {"a": normal(40)},
    ),
]  # fmt: skip

DTYPES = [
    reads("bfloat16_array", lambda c, b, h, q, k: c["a"][q, k], {"a": normal(40, 40, dtype="bfloat16")}),
    reads("bfloat16_array_read_twice", lambda c, b, h, q, k: c["a"][q] * c["a"][k], {"a": normal(40, dtype="bfloat16")}),
    reads("float16_scalar", lambda c, b, h, q, k: c["a"] * (k - q), {"a": jnp.float16(0.125)}),
    reads("int_array", lambda c, b, h, q, k: c["n"][q, k] * 0.25, {"n": jnp.arange(1600, dtype=jnp.int32).reshape(40, 40) % 11}),
    reads("uint8_array", lambda c, b, h, q, k: c["a"][c["n"][k]], {"a": normal(5), "n": jnp.arange(40, dtype=jnp.uint8) % 5}),
    modifies("bool_array", lambda c, s, b, h, q, k: jnp.where(c["keep"][q, k], s, 0.5 * s), {"keep": normal(40, 40) > 0}),
]  # fmt: skip

# Indices out of range mean what they mean in JAX: scalar indexing clamps, negative ones count from the end.
RANGES = [
    reads("beyond_the_end_clamps", lambda c, b, h, q, k: c["a"][q + 30], {"a": normal(40)}, mask=None),
    reads("far_beyond_the_end_clamps", lambda c, b, h, q, k: c["a"][k * 1000000], {"a": normal(40)}),
    reads("below_the_start_clamps", lambda c, b, h, q, k: c["a"][k - 70], {"a": normal(40)}, mask=None),
    reads("negative_constant", lambda c, b, h, q, k: c["a"][-1, q], {"a": normal(3, 40)}, mask=None),
    reads("negative_wraps", lambda c, b, h, q, k: c["a"][q - k], {"a": normal(40)}, mask=None),
    reads("flipped", lambda c, b, h, q, k: c["a"][-1 - q, 39 - k], {"a": normal(40, 40)}),
    reads("too_few_heads_clamp", lambda c, b, h, q, k: c["a"][h + 1], {"a": normal(2)}),
    reads("take_fills", lambda c, b, h, q, k: jnp.take(c["a"], q + k, mode="fill", fill_value=0.5), {"a": normal(40)}, mask=None),
    reads("take_clips", lambda c, b, h, q, k: jnp.take(c["a"], q - k, mode="clip"), {"a": normal(20)}, mask=None),
    reads("take_wraps", lambda c, b, h, q, k: jnp.take(c["a"], q + k, mode="wrap"), {"a": normal(13)}, mask=None),
    reads("get_fills", lambda c, b, h, q, k: c["a"].at[h, q + 5].get(mode="fill", fill_value=-1.0), {"a": normal(2, 40)}, mask=None),
    reads("get_drops_negative", lambda c, b, h, q, k: c["a"].at[q - k].get(mode="fill", fill_value=0.0, wrap_negative_indices=False), {"a": normal(40)}, mask=None),
]  # fmt: skip


@cases(*BIASES)
def test_read(case, backend):
    check(case, backend)


@cases(*MULTIPLE)
def test_several_reads(case, backend):
    check(case, backend)


@cases(*DTYPES)
def test_dtype(case, backend):
    check(case, backend)


@cases(*RANGES)
def test_out_of_range(case, backend):
    check(case, backend)


def test_only_the_bias_is_differentiated(backend):
    case = reads("only_bias", lambda c, b, h, q, k: c["a"][h, q - k], {"a": normal(2, 40)})
    d_out, _ = case.cotangents

    @jax.jit
    def gradient(bias):
        def loss(bias):
            block_mask = create_block_mask(case.mask, None, None, 40, 40, 16)
            out = flex_attention(
                *case.operands, case.score({"a": bias}), block_mask, backend=backend
            )
            return (out * d_out).sum()

        return jax.grad(loss)(bias)

    exact = oracle_grads(
        *case.operands, d_out, captures=case.captures, score_mod=case.score, mask_mod=case.mask
    )
    assert_close("bias", gradient(case.captures["a"]), exact.captures["a"])


def test_float_captures_of_a_mask_have_zero_gradient(backend):
    case = Case("threshold")

    def loss(threshold):
        mask = lambda b, h, q, k: jnp.abs(q - k) * 0.1 < threshold[h]
        block_mask = create_block_mask(mask, None, 2, 40, 40, 16)
        return flex_attention(*case.operands, block_mask=block_mask, backend=backend).sum()

    gradient = jax.jit(jax.grad(loss))(jnp.asarray([0.5, 3.0]))
    assert not np.asarray(gradient).any()
