"""jax.vmap: whichever arrays are mapped, each lane is an attention of its own.

`dense` under the same vmap, which is JAX's own batching of plain operations, says what should come out.
"""

import jax
import jax.numpy as jnp
import pytest

from flexjax import create_block_mask, flex_attention
from tests.transforms.reference import (
    BLOCK,
    HKV,
    B,
    D,
    L,
    S,
    assert_close,
    dense,
    dense_attention,
    flex,
    masked,
    operands,
    scored,
)

LANES = 3
NAMES = "query", "key", "value", "bias", "ids"


def stacked(mapped, axis=0):
    """Operands of which the named ones differ from lane to lane, along `axis`."""
    lanes = [operands(seed) for seed in range(LANES)]
    lanes = [(*x[:4], jnp.roll(x[4], seed, 1)) for seed, x in enumerate(lanes)]
    columns = zip(NAMES, zip(*lanes, strict=True), strict=True)
    return tuple(jnp.stack(x, axis) if name in mapped else x[0] for name, x in columns)


def check(in_axes, args, out_axes=0):
    actual, expected = (jax.jit(jax.vmap(f, in_axes, out_axes))(*args) for f in (flex, dense))
    assert_close(actual, expected)


@pytest.mark.parametrize(
    "mapped",
    [
        ["query"],
        ["key"],
        ["key", "value"],
        ["bias"],
        ["ids"],
        ["query", "ids"],
        pytest.param(list(NAMES), marks=pytest.mark.smoke),
    ],
    ids=lambda mapped: "+".join(mapped),
)
def test_mapped_operands(mapped):
    check([0 if name in mapped else None for name in NAMES], stacked(mapped))


def test_axes_other_than_the_first():
    args = stacked(["query", "key", "bias"], axis=2)
    check((2, -3, None, 2, None), args, out_axes=2)


def test_nested():
    query, key, value, bias, ids = operands()
    queries = jnp.stack([query, 2 * query, -query])
    biases = jnp.stack([bias, -bias])

    def nested(attend):
        inner = jax.vmap(attend, (None, None, None, 0, None))
        return jax.jit(jax.vmap(inner, (0, None, None, None, None), out_axes=1))

    args = queries, key, value, biases, ids
    assert_close(nested(flex)(*args), nested(dense)(*args))


def test_eager():
    args = stacked(NAMES)
    assert_close(jax.vmap(flex)(*args), jax.vmap(dense)(*args))


def test_logsumexp():
    args = stacked(["query", "ids"])
    axes = (0, None, None, None, 0)
    actual, expected = (
        jax.vmap(lambda *a, f=f: f(*a, return_lse=True), axes)(*args) for f in (flex, dense)
    )
    assert_close(actual, expected)


def test_mapped_block_mask():
    """One BlockMask a lane, built outside, with a leading axis on every leaf."""
    query, key, value, bias, ids = stacked(["query", "ids"])

    def build(ids):
        return create_block_mask(masked(ids), B, None, L, S, BLOCK)

    block_masks = jax.jit(jax.vmap(build))(ids)

    def attend(query, block_mask):
        return flex_attention(query, key, value, scored(bias), block_mask)

    expected = jax.vmap(dense, (0, None, None, None, 0))(query, key, value, bias, ids)
    assert_close(jax.jit(jax.vmap(attend))(query, block_masks), expected)


def test_one_block_mask_for_all_lanes():
    query, key, value, bias, ids = stacked(["query"])
    block_mask = create_block_mask(masked(ids), B, None, L, S, BLOCK)

    def attend(query):
        return flex_attention(query, key, value, scored(bias), block_mask)

    expected = jax.vmap(dense, (0, None, None, None, None))(query, key, value, bias, ids)
    assert_close(jax.vmap(attend)(query), expected)


def test_rows_of_a_sliced_mask():
    """A q offset that differs from lane to lane: every row of blocks as a lane of its own."""
    x = jax.random.normal(jax.random.key(0), (B, HKV, 3 * BLOCK, D))
    block_mask = create_block_mask(
        lambda b, h, q, kv: q >= kv, None, None, *x.shape[2:3] * 2, BLOCK
    )
    slope = jnp.linspace(0.5, 1.0, 3 * BLOCK)

    def score_mod(score, b, h, q, kv):
        return score * slope[q] + (q - kv)

    def attend(row, query):
        return flex_attention(query, x, x, score_mod, block_mask[:, :, row])

    rows = x.reshape(B, HKV, 3, BLOCK, D)
    out = jax.vmap(attend, (0, 2), 2)(jnp.arange(3), rows)
    expected = dense_attention(x, x, x, score_mod, lambda b, h, q, kv: q >= kv)
    assert_close(out.reshape(x.shape), expected)


def test_batch_index_counts_inside_the_lane():
    query, key, value, *_ = stacked(["query", "key", "value"])

    def by_row(attend):
        def function(*args):
            return attend(*args, lambda score, b, h, q, kv: score + 3.0 * b * kv)

        return jax.vmap(function)

    args = query, key, value
    assert_close(by_row(flex_attention)(*args), by_row(dense_attention)(*args))


def test_unbatched_lanes_through_spmd_axis_name():
    """`jax.vmap(..., axis_size=)` with nothing mapped repeats the result."""
    query, key, value, *_ = operands()
    out = jax.vmap(lambda: flex_attention(query, key, value), axis_size=2)()
    assert_close(out, jnp.stack([dense_attention(query, key, value)] * 2))


def test_shared_keys_within_a_lane():
    query, key, value, bias, ids = stacked(["query", "key"])
    check((0, 0, None, None, None), (query, key[:, :1], value[:1], bias, ids))


def test_collectives_over_the_mapped_axis():
    args = stacked(["query"])
    axes = (0, None, None, None, None)

    def mean(attend):
        return jax.vmap(lambda *a: jax.lax.pmean(attend(*a), "lanes"), axes, axis_name="lanes")

    assert_close(mean(flex)(*args), mean(dense)(*args))
