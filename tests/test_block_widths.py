"""Narrow block lists: `compact` on masks whose contents are known, `max_blocks` inside a program."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import block_creation, create_block_mask, flex_attention, masks

LENGTH, BLOCK = 256, 16
INDICES = ("kv_indices", "full_kv_indices", "q_indices", "full_q_indices")


def build(mod, **kwargs):
    return create_block_mask(mod, 2, 1, LENGTH, LENGTH, BLOCK, **kwargs)


def widths(mask):
    return [getattr(mask, name).shape[-1] for name in INDICES]


@pytest.fixture(params=["host", "program"])
def computed(request, monkeypatch):
    if request.param == "program":
        monkeypatch.setattr(block_creation, "_HOST_BYTES", 0)


@pytest.mark.usefixtures("computed")
@pytest.mark.parametrize(
    ("mod", "expected"),
    [
        (masks.causal(), [1, 16, 1, 16]),
        (masks.sliding_window(40), [4, 1, 4, 1]),
        (masks.chunked(48), [1, 2, 1, 2]),
        (lambda b, h, q, k: q < 0, [1, 1, 1, 1]),
    ],
    ids=["causal", "window", "chunks", "nothing"],
)
def test_compact_lists_are_as_wide_as_the_fullest_row(mod, expected):
    mask, wide = build(mod, compact=True), build(mod)
    assert widths(mask) == expected
    assert widths(wide) == [16] * 4
    assert mask.overflow is None
    np.testing.assert_array_equal(mask.block_states(), wide.block_states())
    for name in INDICES:
        narrow = getattr(mask, name)
        count = np.asarray(getattr(mask, name.replace("indices", "num_blocks")))
        listed = np.arange(narrow.shape[-1]) < count[..., None]
        cut = getattr(wide, name)[..., : narrow.shape[-1]]
        np.testing.assert_array_equal(np.where(listed, narrow, -1), np.where(listed, cut, -1))


def test_compact_lists_of_captured_documents():
    ids = jnp.arange(LENGTH, dtype=jnp.int32) // 40
    mask = build(masks.document(ids), compact=True)
    assert widths(mask) == [8, 2, 8, 2]
    np.testing.assert_array_equal(mask.block_states(), build(masks.document(ids)).block_states())


def test_compact_needs_a_mask_that_is_known():
    def traced(ids):
        return build(masks.document(ids), compact=True)

    with pytest.raises(ValueError, match=r"not known while JAX is tracing.*max_blocks="):
        jax.jit(traced)(jnp.zeros(LENGTH, jnp.int32))
    # A mask without captures is known while JAX traces.
    inside = jax.jit(lambda: build(masks.causal(), compact=True))()
    chex.assert_trees_all_equal(inside, build(masks.causal(), compact=True))


@pytest.mark.parametrize(
    ("limit", "expected", "overflow"),
    [(4, [4] * 4, False), (3, [3] * 4, True), ((4, 3), [4, 4, 3, 3], True), (99, [16] * 4, False)],
)
def test_limited_lists_say_whether_they_hold_everything(limit, expected, overflow):
    ids = jnp.arange(LENGTH, dtype=jnp.int32) // 64  # documents of four blocks

    @jax.jit
    def limited(ids):
        return build(masks.document(ids), max_blocks=limit)

    mask, wide = limited(ids), build(masks.document(ids))
    assert widths(mask) == expected
    assert mask.overflow.dtype == bool
    assert bool(mask.overflow) == overflow
    for name in INDICES:
        count = name.replace("indices", "num_blocks")
        width = getattr(mask, name).shape[-1]
        expected_count = np.minimum(getattr(wide, count), width)
        np.testing.assert_array_equal(getattr(mask, count), expected_count)
        cut = getattr(wide, name)[..., :width]
        np.testing.assert_array_equal(getattr(mask, name), cut)
    assert mask[0].overflow is not None
    assert jax.tree.structure(mask) != jax.tree.structure(wide)


@pytest.mark.usefixtures("computed")
def test_limits_without_captures():
    assert not build(masks.sliding_window(16), max_blocks=2).overflow
    assert build(masks.causal(), max_blocks=2).overflow
    inference = build(masks.causal(), max_blocks=16, compute_q_blocks=False)
    assert not inference.overflow
    assert inference.inference_only


def test_attention_with_narrow_lists():
    ids = jnp.arange(LENGTH, dtype=jnp.int32) // 64
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 1, LENGTH, 8)) for key in keys)

    def loss(q, k, v, ids, **kwargs):
        mask = build(masks.document(ids, causal=True), **kwargs)
        return (flex_attention(q, k, v, block_mask=mask, backend="xla") ** 2).sum()

    wide = jax.grad(loss, (0, 1, 2))(q, k, v, ids)
    narrow = jax.jit(jax.grad(lambda *x: loss(*x, max_blocks=4), (0, 1, 2)))(q, k, v, ids)
    compact = jax.grad(lambda *x: loss(*x, compact=True), (0, 1, 2))(q, k, v, ids)
    for other in (narrow, compact):
        chex.assert_trees_all_close(wide, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_blocks": 0}, "max_blocks must be a positive integer"),
        ({"max_blocks": (1, 2, 3)}, "one number or"),
        ({"max_blocks": 4, "compact": True}, "pass one of the two"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(masks.causal(), **arguments)
