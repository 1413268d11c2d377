"""Combinators of masks: the laws of Boolean algebra, names, and refusals."""

import functools

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given

from flexjax import masks
from flexjax.visualize import mask_grid


@st.composite
def mask_tables(draw, count):
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    bits = st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)
    return [np.array(draw(bits)).reshape(rows, columns) for _ in range(count)]


def table_mod(table):
    return lambda b, h, q_idx, kv_idx: table[q_idx, kv_idx]


def on_grid(mod, shape):
    """Calls the mod on NumPy indices of a whole grid: hundreds of examples without compiling."""
    allowed = mod(0, 0, np.arange(shape[0])[:, None], np.arange(shape[1])[None, :])
    return np.broadcast_to(allowed, shape)


def assert_same(left, right, shape):
    np.testing.assert_array_equal(on_grid(left, shape), on_grid(right, shape))


@given(mask_tables(2))
def test_combinators_are_elementwise(tables):
    a, b = map(table_mod, tables)
    shape = tables[0].shape
    np.testing.assert_array_equal(on_grid(masks.and_masks(a, b), shape), tables[0] & tables[1])
    np.testing.assert_array_equal(on_grid(masks.or_masks(a, b), shape), tables[0] | tables[1])
    np.testing.assert_array_equal(on_grid(masks.not_mask(a), shape), ~tables[0])


@given(mask_tables(2))
def test_de_morgan(tables):
    a, b = map(table_mod, tables)
    shape = tables[0].shape
    both, either, complement = masks.and_masks, masks.or_masks, masks.not_mask
    assert_same(complement(both(a, b)), either(complement(a), complement(b)), shape)
    assert_same(complement(either(a, b)), both(complement(a), complement(b)), shape)


@given(mask_tables(3), st.sampled_from([masks.and_masks, masks.or_masks]))
def test_commutative_associative_idempotent(tables, combine):
    a, b, c = map(table_mod, tables)
    shape = tables[0].shape
    assert_same(combine(a, b), combine(b, a), shape)
    assert_same(combine(a, combine(b, c)), combine(a, b, c), shape)
    assert_same(combine(a, a), a, shape)


@given(mask_tables(2))
def test_absorption_and_neutral_elements(tables):
    a, b = map(table_mod, tables)
    shape = tables[0].shape
    everything, nothing = masks.and_masks(), masks.or_masks()
    assert_same(masks.or_masks(a, masks.and_masks(a, b)), a, shape)
    assert_same(masks.and_masks(a, masks.noop_mask), a, shape)
    assert_same(masks.and_masks(a, everything), a, shape)
    assert_same(masks.or_masks(a, nothing), a, shape)
    assert_same(masks.not_mask(masks.not_mask(a)), a, shape)
    assert_same(masks.not_mask(masks.noop_mask), nothing, shape)
    assert on_grid(everything, shape).all()
    assert not on_grid(nothing, shape).any()


def test_combinators_trace():
    """Nested, mixed with constants, and as scalars under vmap and jit."""
    mod = masks.or_masks(
        masks.and_masks(masks.causal(), masks.not_mask(masks.sliding_window(3)), masks.noop_mask),
        masks.document([0, 0, 0, 1, 1, 1, 1, 2]),
        masks.or_masks(),
    )
    ids = [0, 0, 0, 1, 1, 1, 1, 2]
    expected = [[k < q - 3 or ids[k] == ids[q] for k in range(8)] for q in range(8)]
    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_array_equal(mask_grid(mod, 8, 8), expected)


@pytest.mark.parametrize(
    ("mod", "name"),
    [
        (masks.and_masks(masks.causal(), masks.document([0])), "causal_and_document"),
        (
            masks.or_masks(masks.sliding_window(8), masks.prefix_lm(4)),
            "sliding_window_8_or_prefix_lm_4",
        ),
        (masks.not_mask(masks.causal()), "not_causal"),
        (
            masks.and_masks(masks.or_masks(masks.causal(), masks.padding(3)), masks.chunked(2)),
            "(causal_or_padding_3)_and_chunked_2",
        ),
        (
            masks.or_masks(masks.and_masks(masks.causal(), masks.padding(3)), masks.chunked(2)),
            "(causal_and_padding_3)_or_chunked_2",
        ),
        (
            masks.not_mask(masks.and_masks(masks.causal(), masks.padding(3))),
            "not_(causal_and_padding_3)",
        ),
        (masks.and_masks(lambda b, h, q, k: k < q, masks.causal()), "lambda_and_causal"),
        (
            masks.and_masks(functools.partial(lambda n, b, h, q, k: k < n, 3)),
            "lambda",
        ),
        (masks.and_masks(), "all_true"),
        (masks.or_masks(), "all_false"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_names_of_combinations(mod, name):
    assert mod.__name__ == name
    assert name in repr(mod)


@pytest.mark.parametrize(
    "combine", [masks.and_masks, masks.or_masks, masks.not_mask], ids=lambda f: f.__name__
)
def test_combinators_refuse_a_mask_of_integers(combine):
    mod = combine(lambda b, h, q, k: q - k)
    with pytest.raises(TypeError, match=rf"{combine.__name__}.*must return a boolean.*int32"):
        mask_grid(mod, 2, 2)
