"""Masks and scores of the systems' gallery, each against a formula written another way."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import flex_attention, masks, scores
from flexjax.testing import assert_close
from flexjax.visualize import mask_grid, score_grid


def brute(sees, q_len, kv_len):
    return np.array([[bool(sees(q, kv)) for kv in range(kv_len)] for q in range(q_len)])


def same(mod, sees, q_len, kv_len, h=0):
    np.testing.assert_array_equal(mask_grid(mod, q_len, kv_len, h=h), brute(sees, q_len, kv_len))


def test_big_bird_has_its_window_its_global_blocks_and_its_draw():
    mod = masks.big_bird(60, 4, window=3, global_blocks=3, random_blocks=2, heads=2, seed=3)
    draws = []
    for head in range(4):
        grid = mask_grid(mod, 60, 60, h=head)
        blocks = grid[::4, ::4]
        np.testing.assert_array_equal(grid, blocks.repeat(4, 0).repeat(4, 1))
        is_global = np.isin(np.arange(15), [0, 1, 14])
        known = np.abs(np.subtract.outer(np.arange(15), np.arange(15))) <= 1
        known = known | is_global | is_global[:, None]
        assert blocks[known].all()
        drawn = blocks & ~known
        assert (drawn.sum(axis=1)[~is_global] == 2).all()
        draws.append(drawn)
    assert (draws[0] != draws[1]).any()
    np.testing.assert_array_equal(draws[:2], draws[2:])
    again = jax.jit(lambda q: masks.big_bird(60, 4, global_blocks=3, random_blocks=2, heads=2, seed=3)(
        0, 1, q, jnp.arange(60)))  # fmt: skip
    np.testing.assert_array_equal(again(jnp.int32(20)), mask_grid(mod, 60, 60, h=1)[20])
    few = mask_grid(masks.big_bird(5, 2, random_blocks=9), 5, 5)
    assert few.all()


def test_sliding_tile_is_a_neighbourhood_of_tiles():
    canvas, tile, window = (4, 6, 4), (2, 2, 2), (1, 3, 1)
    order = masks.tiled_order(canvas, tile)
    places = order.coordinates.T // np.array(tile)

    def sees(q, kv):
        if max(q, kv) >= order.length:
            return True
        starts = [
            min(max(x - w // 2, 0), n // t - w)
            for x, w, n, t in zip(places[q], window, canvas, tile, strict=True)
        ]
        return all(s <= x < s + w for s, x, w in zip(starts, places[kv], window, strict=True))

    mod = masks.sliding_tile(canvas, tile, window, text_length=5)
    same(mod, sees, order.length + 5, order.length + 5)
    grid = mask_grid(masks.sliding_tile(canvas, tile, window), order.length, order.length)
    blocks = grid.reshape(12, 8, 12, 8)
    assert (blocks.all(axis=(1, 3)) == blocks.any(axis=(1, 3))).all()


@pytest.mark.parametrize(("prompt", "reach"), [(0, 0), (3, 1)])
def test_video_heads(prompt, reach):
    frames, size = 4, 5
    total = prompt + frames * size
    cells = [(-1, -1)] * prompt + list(itertools.product(range(frames), range(size)))
    text = [i < prompt for i in range(total)]

    def spatial(q, kv):
        near = abs(cells[q][0] - cells[kv][0]) <= reach
        return text[q] or text[kv] or cells[kv][0] == 0 or near

    def temporal(q, kv):
        return text[q] or text[kv] or abs(cells[q][1] - cells[kv][1]) <= reach

    same(masks.spatial_head(frames, size, prompt=prompt, reach=reach), spatial, total, total)
    frame_major = masks.temporal_head(frames, size, prompt=prompt, reach=reach)
    same(frame_major, temporal, total, total)
    turned = np.arange(frames * size).reshape(frames, size).T.reshape(-1) + prompt
    order = np.concatenate([np.arange(prompt), turned])
    band = masks.temporal_head(frames, size, prompt=prompt, reach=reach, frame_major=False)
    expected = brute(temporal, total, total)[np.ix_(order, order)]
    np.testing.assert_array_equal(mask_grid(band, total, total), expected)


def test_text_sees_its_images():
    intervals = np.array([[0, 4], [4, 9], [6, 6], [9, 12]])
    mod = masks.image_text(intervals, 3)
    same(mod, lambda q, kv: intervals[kv // 3, 0] <= q < intervals[kv // 3, 1], 12, 12)


@pytest.mark.parametrize("prefix", [0, 3])
def test_a_tree_shows_ancestors(prefix):
    random = np.random.default_rng(0)
    for _ in range(3):
        parents = [int(random.integers(-1, i)) if i else -1 for i in range(14)]

        def ancestors(token, parents=parents):
            while token >= 0:
                yield token
                token = parents[token]

        def sees(q, kv):
            if q < prefix or kv < prefix:
                return kv <= q
            return kv - prefix in set(ancestors(q - prefix))

        same(masks.tree(parents, prefix), sees, prefix + 14, prefix + 14)


def test_masks_within_parts():
    offsets, inner = [0, 5, 5, 12, 18], masks.prefix_lm(2)
    ids = np.repeat([0, 2, 3, -1], [5, 7, 6, 2])
    start = np.repeat([0, 5, 12, 0], [5, 7, 6, 2])

    def sees(q, kv):
        q_in, kv_in = q - start[q], kv - start[q]
        return ids[q] == ids[kv] != -1 and (kv_in < 2 or kv_in <= q_in)

    same(masks.within_documents(inner, offsets, 20), sees, 20, 20)
    rows = masks.within_documents(inner, np.array([[0, 20, 20, 20, 20], offsets]), 20)
    np.testing.assert_array_equal(mask_grid(rows, 20, 20, b=1), brute(sees, 20, 20))
    groups = masks.within_groups(inner, 6)
    same(groups, lambda q, kv: q // 6 == kv // 6 and (kv % 6 < 2 or kv <= q), 20, 20)
    assert groups.__name__ == "prefix_lm_2_within_groups_6"


def test_sandwich_is_the_product_of_sinusoidal_embeddings():
    heads, length, dim = 4, 20, 16
    angles = np.outer(np.arange(length), 10000.0 ** (-2 * np.arange(dim // 2) / dim))
    embedded = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    expected = (embedded @ embedded.T - dim / 2) / (8 * 3 / heads)
    found = score_grid(scores.sandwich(heads, length, dim), length, length, h=2)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_graph_biases():
    random = np.random.default_rng(0)
    hops = random.integers(0, 9, (2, 6, 6))
    table = random.normal(size=(3, 5)).astype(np.float32)
    mod = scores.graph_distance_bias(table, hops)
    found = score_grid(mod, 6, 6, b=1, h=2)
    np.testing.assert_allclose(found, table[2][np.minimum(hops[1], 4)])
    lengths = random.integers(0, 4, (6, 6))
    edges = np.where(np.arange(3) < lengths[..., None], random.integers(0, 4, (6, 6, 3)), -1)
    weights = random.normal(size=(3, 3, 4)).astype(np.float32)

    def mean(q, kv):
        values = [weights[1, i, t] for i, t in enumerate(edges[q, kv]) if t >= 0]
        return np.mean(values) if values else 0.0

    expected = [[mean(q, kv) for kv in range(6)] for q in range(6)]
    found = score_grid(scores.graph_edge_bias(weights, edges), 6, 6, h=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_graph_biases_learn():
    """Gradients of tables that are read several times a score, against dense attention."""
    hops = jnp.asarray(np.random.default_rng(1).integers(0, 3, (12, 12)))
    edges = jnp.asarray(np.random.default_rng(2).integers(-1, 2, (12, 12, 2)))
    query, key, value, weights = jax.random.normal(jax.random.key(0), (4, 1, 2, 12, 8))
    tables = {"hops": jnp.ones((2, 3)), "edges": jax.random.normal(jax.random.key(1), (2, 2, 2))}

    def flex(tables):
        mod = scores.compose(
            scores.graph_distance_bias(tables["hops"], hops),
            scores.graph_edge_bias(tables["edges"], edges),
        )
        return (flex_attention(query, key, value, mod, backend="xla") * weights).sum()

    def dense(tables):
        there = (edges >= 0)[None]
        each = tables["edges"][:, jnp.arange(2), jnp.maximum(edges, 0)]
        bias = (each * there).sum(-1) / jnp.maximum(there.sum(-1), 1)
        logits = query @ key.mT * 8**-0.5 + (tables["hops"][:, hops] + bias)[None]
        return (jax.nn.softmax(logits) @ value * weights).sum()

    found, expected = (jax.jit(jax.grad(f))(tables) for f in (flex, dense))
    for name in tables:
        assert_close(name, found[name], expected[name])


def test_attention_without_softmax():
    offset = 0.25
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 2, 10, 8))
    mod = scores.activation(jax.nn.sigmoid, offset)
    out, lse = flex_attention(query, key, value, mod, return_lse=True, backend="reference")
    found = scores.without_softmax(out, lse, value.sum(axis=-2), offset)
    expected = jax.nn.sigmoid(query @ key.mT * 8**-0.5) @ value
    assert_close("out", found, expected, floor=1e-5)


ERRORS = [
    (lambda: masks.big_bird(64, window=2), ValueError, "window must be odd.*2"),
    (lambda: masks.sliding_tile((6, 6), (4, 2), (1, 1)), ValueError, "tile must divide the canvas"),
    (lambda: masks.sliding_tile((8, 8), (4, 4), (3, 1)), ValueError, "window counts tiles"),
    (lambda: masks.spatial_head(0, 4), ValueError, "frames must be at least 1"),
    (lambda: masks.image_text(jnp.ones((3, 3), int), 4), ValueError, r"shape \(N, 2\)"),
    (lambda: masks.image_text([[3, 2]], 4), ValueError, "must not end before it starts"),
    (lambda: masks.tree([0, 0]), ValueError, "stand before its child"),
    (lambda: masks.tree([0.5]), TypeError, "list of integers"),
    (lambda: masks.within_groups(3, 4), TypeError, "argument 0 is 3"),
    (lambda: masks.within_documents(masks.causal(), [1, 2]), ValueError, "start at 0"),
    (lambda: scores.sandwich(4, 8, 7), ValueError, "dim must be even"),
    (
        lambda: scores.graph_edge_bias(jnp.ones((1, 2, 3)), jnp.zeros((4, 4, 3), int)),
        ValueError,
        "agree in the number of places",
    ),
    (
        lambda: scores.graph_edge_bias(jnp.ones((1, 2, 3)), jnp.full((4, 4, 2), 3)),
        ValueError,
        "must be less than 3.*one is 3",
    ),
    (lambda: scores.activation(jax.nn.relu, -1.0), ValueError, "finite and not negative"),
    (
        lambda: scores.without_softmax(jnp.ones((1, 1, 2, 3)), jnp.ones((1, 1, 2)), 0.0, 0.0),
        ValueError,
        r"value_sum \(B, H, Dv\)",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[e[2][:30] for e in ERRORS])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
