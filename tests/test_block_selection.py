"""Masks whose blocks are chosen by score, under jit, vmap and differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flexjax import BlockMask, flex_attention, masks

L, S, BLOCK = 56, 72, (8, 16)
ROWS, COLS = 7, 5


def scores_of(seed, batch=2, heads=3):
    return jax.random.normal(jax.random.key(seed), (batch, heads, ROWS, COLS))


def blocks_of(mod):
    """Which blocks a mask leaves anything in."""
    q, k = np.ogrid[: ROWS * BLOCK[0], : COLS * BLOCK[1]]
    dense = np.broadcast_to(mod(0, 0, q, k), (ROWS * BLOCK[0], COLS * BLOCK[1])) & (k < S)
    return dense.reshape(ROWS, BLOCK[0], COLS, BLOCK[1]).any((1, 3))


def chosen(scores, eligible, top_k, threshold, kept):
    """By hand, one row at a time."""
    scores = np.asarray(scores)
    out = np.broadcast_to(kept, scores.shape).copy()
    for where in np.ndindex(scores.shape[:3]):
        row = where[2]
        candidates = [
            (-scores[(*where, c)], c)
            for c in range(COLS)
            if eligible[row, c] and not kept[row, c] and scores[(*where, c)] > -np.inf
        ]
        if threshold is not None:
            candidates = [x for x in candidates if -x[0] >= threshold]
        for _, c in sorted(candidates)[:top_k]:
            out[(*where, c)] = True
    return out


@pytest.mark.parametrize("always", [None, masks.sliding_window(4)], ids=["", "window"])
@pytest.mark.parametrize("mod", [None, masks.causal()], ids=["", "causal"])
@pytest.mark.parametrize(
    ("top_k", "threshold"), [(1, None), (2, None), (9, None), (None, 0.3), (2, -0.2)]
)
def test_choice(top_k, threshold, mod, always):
    scores = scores_of(0).at[0, 1, 3].set(jnp.nan).at[1, 0, 6].set(-jnp.inf)
    scores = scores.at[1, 2, 5].set(0.5)  # ties: the first columns

    def build(scores):
        return BlockMask.from_block_scores(
            scores,
            top_k=top_k,
            threshold=threshold,
            mask_mod=mod,
            always=always,
            seq_lengths=(L, S),
            block_size=BLOCK,
        )

    mask = jax.jit(build)(scores)
    eligible = blocks_of(mod or masks.noop_mask)
    kept = np.zeros((ROWS, COLS), bool) if always is None else blocks_of(always)
    expected = chosen(scores, eligible, top_k, threshold, kept) & eligible
    np.testing.assert_array_equal(mask.to_dense(), expected)
    assert mask.shape == (2, 3, L, S)
    if top_k is not None and always is None:
        assert mask.kv_indices.shape[-1] == min(top_k, COLS)
    for name in ("q_num_blocks", "full_q_num_blocks"):
        assert getattr(mask, name).shape == (2, 3, COLS)
    listed = np.asarray(mask.q_num_blocks + mask.full_q_num_blocks)
    np.testing.assert_array_equal(listed, expected.sum(2))


def dense_attention(q, k, v, visited, allowed):
    visited = visited.repeat(BLOCK[0], 2).repeat(BLOCK[1], 3)[:, :, :L, :S]
    s = jnp.einsum("bhqd,bhkd->bhqk", q, k, precision="highest") / np.sqrt(q.shape[-1])
    s = jnp.where(visited & allowed, s, -jnp.inf)
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(s), v, precision="highest")


def operands(seed=1):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(2, 3, L, 8), (2, 3, S, 8), (2, 3, S, 8), (2, 3, L, 8)]
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def sparse_attention(q, k, v, scores):
    mask = BlockMask.from_block_scores(
        scores,
        top_k=2,
        mask_mod=masks.causal(),
        always=masks.sliding_window(0),
        seq_lengths=(L, S),
        block_size=BLOCK,
    )
    return flex_attention(q, k, v, block_mask=mask, backend="xla")


def test_attention_and_its_gradients_follow_the_choice():
    q, k, v, cotangent = operands()
    scores = scores_of(2)
    kept = blocks_of(masks.sliding_window(0))
    visited = chosen(scores, blocks_of(masks.causal()), 2, None, kept)
    rows, cols = np.ogrid[:L, :S]
    allowed = (cols <= rows)[None, None]

    @jax.jit
    def step(q, k, v, scores):
        out, pullback = jax.vjp(sparse_attention, q, k, v, scores)
        return out, pullback(cotangent)

    out, (*grads, d_scores) = step(q, k, v, scores)
    expected, pullback = jax.vjp(lambda *x: dense_attention(*x, visited, allowed), q, k, v)
    for actual, wanted in zip((out, *grads), (expected, *pullback(cotangent)), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=2e-5)
    assert not np.asarray(d_scores).any()  # the choice itself has no gradient


def test_scores_made_from_the_queries_choose_anew_in_every_step():
    """A training step compiles once, whatever it chooses."""

    @jax.jit
    def loss(q, k, v):
        pooled = q.reshape(2, 3, ROWS, BLOCK[0], -1).mean(3)
        blocks = jnp.pad(k, ((0, 0), (0, 0), (0, COLS * BLOCK[1] - S), (0, 0)))
        blocks = blocks.reshape(2, 3, COLS, BLOCK[1], -1).mean(3)
        return (sparse_attention(q, k, v, pooled @ blocks.swapaxes(-1, -2)) ** 2).sum()

    step = jax.jit(jax.value_and_grad(loss))
    for seed in range(3):
        value, gradient = step(*operands(seed)[:3])
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
    assert step._cache_size() == 1


def test_choice_under_vmap():
    def dense(scores):
        mask = BlockMask.from_block_scores(
            scores, top_k=2, mask_mod=masks.causal(), seq_lengths=(L, S), block_size=BLOCK
        )
        return mask.to_dense()

    stacked = jnp.stack([scores_of(3), scores_of(4)])
    np.testing.assert_array_equal(
        jax.vmap(dense)(stacked), jnp.stack([dense(stacked[0]), dense(stacked[1])])
    )
    many = operands(5)[:3]
    out = jax.vmap(sparse_attention, (None, None, None, 0))(*many, stacked)
    for lane in range(2):
        expected = sparse_attention(*many, stacked[lane])
        np.testing.assert_allclose(out[lane], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_choice_on_a_mesh(kind):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(getattr(AxisType, kind),))
    scores = scores_of(7)

    def dense(scores):
        mask = BlockMask.from_block_scores(
            scores, top_k=2, mask_mod=masks.causal(), seq_lengths=(L, S), block_size=BLOCK
        )
        return mask.to_dense()

    if kind == "Auto":
        run = jax.shard_map(dense, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        actual = jax.jit(run)(scores)
    else:
        with jax.set_mesh(mesh):
            sharded = jax.device_put(scores, NamedSharding(mesh, P("x")))
            actual = jax.jit(dense)(sharded)
    np.testing.assert_array_equal(actual, dense(scores))


def test_threshold_of_every_row_and_lengths_by_default():
    scores = scores_of(6, 1, 1)
    median = jnp.median(scores, -1, keepdims=True)
    mask = BlockMask.from_block_scores(scores, threshold=median, block_size=BLOCK)
    assert mask.seq_lengths == (ROWS * BLOCK[0], COLS * BLOCK[1])
    assert mask.mask_graph is None
    np.testing.assert_array_equal(mask.to_dense(), scores >= median)


def test_limited_lists_of_chosen_blocks():
    scores = jnp.zeros((1, 1, ROWS, COLS)).at[..., 0].set(1.0)
    mask = BlockMask.from_block_scores(scores, top_k=2, max_blocks=(4, 3), block_size=BLOCK)
    assert mask.full_kv_indices.shape[-1] == 2
    assert mask.full_q_indices.shape[-1] == 3
    assert mask.overflow  # every row wants the first column


@pytest.mark.parametrize(
    ("scores", "arguments", "error", "message"),
    [
        (jnp.zeros((1, 1, 7, 5), int), {"top_k": 1}, TypeError, "must be floating-point"),
        (jnp.zeros((7, 5)), {"top_k": 1}, ValueError, r"must have shape \[B, H"),
        (jnp.zeros((1, 1, 7, 5)), {}, ValueError, "pass top_k="),
        (jnp.zeros((1, 1, 7, 5)), {"top_k": 0}, ValueError, "top_k must be a positive"),
        (
            jnp.zeros((1, 1, 7, 5)),
            {"top_k": 1, "seq_lengths": (64, 64)},
            ValueError,
            r"shape \[B, H, 8, 4\]",
        ),
    ],
)
def test_errors(scores, arguments, error, message):
    with pytest.raises(error, match=message):
        BlockMask.from_block_scores(scores, block_size=BLOCK, **arguments)
