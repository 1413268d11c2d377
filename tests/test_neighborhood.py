"""Neighbourhoods of tokens in any order: permutations, masks by brute force, attention beside dense attention."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import create_block_mask, flex_attention, masks
from flexjax.masks import CanvasOrder, morton_order, row_order, tiled_order
from flexjax.testing import assert_close
from flexjax.visualize import mask_grid

ORDERS = [
    row_order((5, 7)),
    tiled_order((6, 8), (2, 4)),
    tiled_order((5, 7), (2, 4)),
    tiled_order((5, 7), (3, 2), shift=(2, 1)),
    morton_order((5, 7)),
    row_order((3, 4, 5)),
    tiled_order((3, 4, 5), (2, 2, 2), shift=(0, 1, 0)),
    morton_order((3, 4, 5)),
    tiled_order((11,), (4,)),
]
ids = [f"{o.name}-{len(o.canvas)}d-{o.tokens}" for o in ORDERS]


def window_keys(place, size, window, dilation):
    """The visible coordinates of one dimension: of all dilated windows inside, the best centred one."""
    starts = [s for s in range(size - dilation * (window - 1)) if s % dilation == place % dilation]
    start = min(starts, key=lambda s: abs(s - (place - dilation * (window // 2))))
    return {start + dilation * i for i in range(window)}


def brute(order, window, dilation):
    """The mask between tokens, which are numbered in row order, by their coordinates."""
    result = np.zeros((order.tokens, order.tokens), bool)
    places = list(itertools.product(*map(range, order.canvas)))
    for q, place in enumerate(places):
        seen = [window_keys(*x) for x in zip(place, order.canvas, window, dilation, strict=True)]
        for kv, other in enumerate(places):
            result[q, kv] = all(x in keys for x, keys in zip(other, seen, strict=True))
    return result


@pytest.mark.parametrize("order", ORDERS, ids=ids)
def test_an_order_holds_every_token_once(order):
    assert sorted(order.token_of_slot[order.filled]) == list(range(order.tokens))
    tokens = jnp.arange(order.tokens * 3, dtype=jnp.float32).reshape(order.tokens, 3) + 1
    arranged = order.arrange(tokens)
    assert arranged.shape == (order.length, 3)
    assert (np.asarray(arranged[:, 0] == 0) == ~order.filled).all()
    np.testing.assert_array_equal(order.restore(arranged), tokens)
    flags = order.arrange(tokens[None, :, 0] > 0, axis=1)
    assert flags.dtype == bool
    np.testing.assert_array_equal(flags[0], order.filled)
    np.testing.assert_array_equal(order.restore(arranged.T, axis=-1), tokens.T)


def test_tiles_and_aligned_squares_are_contiguous():
    order = tiled_order((6, 8), (2, 4))
    first = order.coordinates[:, :8]
    assert first.tolist() == [[0] * 4 + [1] * 4, [0, 1, 2, 3] * 2]
    assert order.coordinates[:, 8].tolist() == [0, 4]
    morton = morton_order((16, 24)).coordinates.reshape(2, -1, 64)
    assert (np.ptp(morton, axis=-1) == 7).all()
    assert (morton.min(axis=-1) % 8 == 0).all()


@pytest.mark.parametrize("order", ORDERS, ids=ids)
def test_masks_follow_the_tokens(order):
    dims = len(order.canvas)
    for window, dilation in (((3, 4, 2)[:dims], (1,) * dims), ((1, 1, 2)[:dims], (3, 2, 2)[:dims])):
        mod = masks.neighborhood(order, window, dilation=dilation)
        slots = mask_grid(mod, order.length, order.length)
        tokens = slots[np.ix_(order.slot_of_token, order.slot_of_token)]
        expected = brute(order, window, dilation)
        np.testing.assert_array_equal(tokens, expected)
        # Every token sees equally many; empty slots are seen by nothing, not even by one another.
        assert (expected.sum(axis=1) == np.prod(window)).all()
        assert not slots[:, ~order.filled].any()


@pytest.mark.parametrize(
    ("canvas", "window", "factory"),
    [
        ((5, 7), (3, 4), masks.neighborhood_2d),
        ((3, 4, 5), (2, 3, 4), masks.neighborhood_3d),
        ((2, 3, 3), (2, 3, 1), masks.neighborhood_3d),
    ],
    ids=["2d", "3d", "3d_small"],
)
def test_row_order_is_arithmetic(canvas, window, factory):
    tokens = int(np.prod(canvas))
    mod = factory(canvas, window)
    expected = brute(row_order(canvas), window, (1,) * len(canvas))
    np.testing.assert_array_equal(mask_grid(mod, tokens, tokens), expected)
    sizes = ["x".join(map(str, x)) for x in (canvas, window)]
    assert mod.__name__ == f"{factory.__name__}_{sizes[0]}_{sizes[1]}"
    assert masks.neighborhood(row_order(canvas), window).__name__ == (
        f"neighborhood_{sizes[1]}_rows"
    )


@pytest.mark.parametrize(
    ("order", "kv_order", "window", "dilation", "block"),
    [
        (
            tiled_order((9, 7), (2, 4)),
            tiled_order((9, 7), (4, 2), shift=(1, 1)),
            (4, 3),
            1,
            (16, 8),
        ),
        (morton_order((6, 11)), None, (3, 3), (2, 3), 16),
    ],
    ids=["shifted keys", "morton dilated"],
)
def test_attention_equals_that_of_the_canvas(order, kv_order, window, dilation, block):
    """Arranged, computed and restored, forward and backward, against dense attention in row order."""
    keys = order if kv_order is None else kv_order
    mod = masks.neighborhood(order, window, kv_order=kv_order, dilation=dilation)
    block_mask = create_block_mask(mod, None, None, order.length, keys.length, block)
    operands = jax.random.normal(jax.random.key(0), (4, 1, 2, order.tokens, 8))
    steps = (dilation,) * len(order.canvas) if isinstance(dilation, int) else dilation
    allowed = brute(order, window, steps)[None, None]

    def arranged(query, key, value):
        slots = order.arrange(query), keys.arrange(key), keys.arrange(value)
        return order.restore(flex_attention(*slots, block_mask=block_mask, backend="xla"))

    def dense(query, key, value):
        scores = jnp.where(allowed, query @ key.mT * 8**-0.5, -jnp.inf)
        return jax.nn.softmax(scores) @ value

    @partial(jax.jit, static_argnums=0)
    def with_gradients(attend, *operands):
        out, pull = jax.vjp(attend, *operands[:3])
        return out, *pull(operands[3])

    results = with_gradients(arranged, *operands), with_gradients(dense, *operands)
    for name, actual, exact in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_close(name, actual, exact)


def visited_keys(order, block, kv_order=None):
    """Keys that the blocks of a query hold, on average, of a window of 13 x 13."""
    kv_order = order if kv_order is None else kv_order
    mod = masks.neighborhood(order, (13, 13), kv_order=kv_order)
    mask = create_block_mask(
        mod, None, None, order.length, kv_order.length, block, compute_q_blocks=False
    )
    counts = np.asarray(mask.kv_num_blocks + mask.full_kv_num_blocks)[0, 0]
    return counts.mean() * mask.block_size[1]


def test_tiles_visit_as_few_blocks_as_predicted():
    """The numbers on which benchmarks/NOTES.md builds its prediction, for a canvas of 128 x 128."""
    canvas = (128, 128)
    rows = create_block_mask(masks.neighborhood_2d(canvas, (13, 13)), None, None, 16384, 16384)
    assert np.asarray(rows.kv_num_blocks + rows.full_kv_num_blocks).mean() * 128 == 1664
    wide, square = tiled_order(canvas, (8, 16)), tiled_order(canvas, (8, 8))
    assert visited_keys(wide, 128, tiled_order(canvas, (8, 16), shift=(0, 6))) == 736
    assert visited_keys(square, 64) == 529


ERRORS = [
    (lambda: row_order(8), TypeError, "canvas must be a tuple of integers.*8 of type int"),
    (lambda: row_order((8, 8, 8, 8)), ValueError, "canvas must have one to three entries"),
    (lambda: morton_order((0, 8)), ValueError, "an entry of canvas must be at least 1.*is 0"),
    (lambda: tiled_order((8, 8), (4,)), ValueError, "tile must have 2, one for each size"),
    (lambda: tiled_order((8, 8), (4, 4), shift=(0, 4)), ValueError, "shift must be less than the"),
    (lambda: ORDERS[0].arrange(jnp.ones((4, 3))), ValueError, "the 35 tokens of the canvas along"),
    (
        lambda: ORDERS[0].restore(jnp.ones(35), axis=1),
        ValueError,
        "slots of the order along axis 1",
    ),
    (lambda: masks.neighborhood((8, 8), (3, 3)), TypeError, "order must be a CanvasOrder"),
    (lambda: masks.neighborhood(ORDERS[0], (3,)), ValueError, "window must have 2, one for each"),
    (
        lambda: masks.neighborhood(ORDERS[0], (3, 3), dilation=2),
        ValueError,
        re.escape("canvas is (5, 7), the window (3, 3) and the dilation (2, 2)"),
    ),
    (
        lambda: masks.neighborhood(ORDERS[0], (3, 3), kv_order=ORDERS[1]),
        ValueError,
        re.escape("order has (5, 7) and kv_order (6, 8)"),
    ),
    (lambda: masks.neighborhood_3d((4, 4), (3, 3)), TypeError, "canvas must be a triple"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_an_order_says_what_it_is():
    assert isinstance(ORDERS[3], CanvasOrder)
    assert repr(ORDERS[3]) == "CanvasOrder(tiles_3x2_shifted_2x1, canvas=(5, 7), length=72)"
