"""The block size that a mask chooses, and masks of blocks of several sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import BlockMask, create_block_mask, flex_attention, masks
from flexjax.block_sizes import COSTS, coarsened, estimated_cost
from flexjax.testing import assert_close


@pytest.mark.parametrize("lengths", [(256, 320), (200, 130), (1000, 77)], ids=str)
def test_coarser_states_are_those_of_coarser_blocks(lengths):
    """Also where blocks stick out, and are full or not for that."""
    for mod in (masks.causal(), masks.sliding_window(70, 90), masks.noop_mask):
        fine = np.asarray(create_block_mask(mod, None, None, *lengths, 16).block_states())
        for rows, cols in ((2, 2), (4, 1), (1, 3)):
            size = (16 * rows, 16 * cols)
            exact = create_block_mask(mod, None, None, *lengths, size).block_states()
            np.testing.assert_array_equal(coarsened(fine, rows, cols), exact)
            np.testing.assert_array_equal(coarsened(jnp.asarray(fine), rows, cols), exact)


@pytest.mark.parametrize(
    ("mod", "size"),
    [
        (masks.noop_mask, (128, 128)),
        (masks.causal(), (128, 128)),
        (masks.sliding_window(512), (128, 128)),
        (masks.within_groups(masks.causal(), 40), (64, 64)),
        (masks.within_groups(masks.causal(), 64), (64, 64)),
    ],
    ids=["noop", "causal", "window", "short groups", "aligned groups"],
)
def test_dense_masks_get_large_blocks_and_short_groups_small_ones(mod, size):
    mask = create_block_mask(mod, None, None, 4096, 4096, "auto", compute_q_blocks=False)
    assert mask.block_size == size
    exact = create_block_mask(mod, None, None, 4096, 4096, size, compute_q_blocks=False)
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        np.testing.assert_array_equal(getattr(mask, name), getattr(exact, name))


def test_the_chosen_size_has_the_lowest_cost():
    mod = masks.within_groups(masks.causal(), 96)
    states = np.asarray(create_block_mask(mod, None, None, 2048, 2048, 64).block_states())
    costs = {}
    for size in COSTS:
        mask = create_block_mask(mod, None, None, 2048, 2048, size)
        visited = int(np.asarray(mask.to_dense()).sum())
        costs[size] = visited * size[0] * size[1] * COSTS[size]
        assert estimated_cost(states, size) == costs[size]
    chosen = create_block_mask(mod, None, None, 2048, 2048, BLOCK_SIZE="auto").block_size
    assert costs[chosen] == min(costs.values())


def test_the_alias_of_a_block_size_has_precedence_over_auto():
    mask = create_block_mask(masks.causal(), None, None, 256, 256, "auto", BLOCK_SIZE=32)
    assert mask.block_size == (32, 32)


def test_auto_inside_jit_takes_what_is_known_and_refuses_what_is_not():
    ids = jnp.arange(1024) // 64

    @jax.jit
    def known():
        mask = create_block_mask(masks.document(ids), None, None, 1024, 1024, "auto")
        assert mask.block_size == (64, 64)
        return mask.to_dense()

    np.testing.assert_array_equal(known()[0, 0], np.eye(16, dtype=int))
    with pytest.raises(ValueError, match="follows from the mask's contents"):
        jax.jit(lambda ids: create_block_mask(masks.document(ids), None, None, 1024, 1024, "auto"))(
            ids
        )


def levels_of(seed, lengths=(90, 75)):
    """A coarse level for both heads and a fine one for each."""
    random = np.random.default_rng(seed)
    coarse = random.random((1, 1, -(-lengths[0] // 24), -(-lengths[1] // 32))) < 0.3
    fine = random.random((1, 2, -(-lengths[0] // 12), -(-lengths[1] // 8))) < 0.1
    return [((24, 32), jnp.asarray(coarse)), ((12, 8), jnp.asarray(fine))]


def test_mixed_blocks_visit_what_any_level_names():
    """Against a dense mask, forward and backward, from traced levels."""
    levels = levels_of(0)
    shape = (1, 2, 90, 75)
    positions = np.zeros(shape, bool)
    for (rows, cols), blocks in levels:
        wide = np.asarray(blocks).repeat(rows, 2).repeat(cols, 3)[:, :, :90, :75]
        positions |= wide
    q, kv = np.ogrid[:90, :75]
    positions &= (kv <= q)[None, None]
    keys = jax.random.split(jax.random.key(0), 4)
    query, d_out = (jax.random.normal(k, (1, 2, 90, 8)) for k in keys[:2])
    key, value = (jax.random.normal(k, (1, 2, 75, 8)) for k in keys[2:])

    @jax.jit
    def found(levels, *operands):
        mask = BlockMask.from_mixed_blocks(
            [(size, blocks) for size, blocks in zip(((24, 32), (12, 8)), levels, strict=True)],
            seq_lengths=(90, 75),
            mask_mod=masks.causal(),
        )
        attend = lambda *x: flex_attention(*x, block_mask=mask, backend="xla")
        out, pull = jax.vjp(attend, *operands)
        return (out, *pull(d_out)), mask.block_states()

    @jax.jit
    def dense(query, key, value):
        scores = jnp.where(positions, query @ key.mT * 8**-0.5, -1e30)
        weights = jnp.where(positions, jax.nn.softmax(scores), 0)
        return weights @ value

    results, states = found([blocks for _, blocks in levels], query, key, value)
    out, pull = jax.vjp(dense, query, key, value)
    for name, actual, exact in zip(
        ("out", "dq", "dk", "dv"), results, (out, *pull(d_out)), strict=True
    ):
        assert_close(name, actual, exact)
    # No more blocks than hold something, and full ones are known as such.
    padded = np.pad(positions, ((0, 0), (0, 0), (0, 6), (0, 5)))
    some = padded.reshape(1, 2, 8, 12, 10, 8).any(axis=(3, 5))
    np.testing.assert_array_equal(np.asarray(states) > 0, some)
    assert (np.asarray(states) == 2).any()


@pytest.mark.parametrize(
    ("levels", "kind", "message"),
    [
        ([], ValueError, "at least one level"),
        ([(32, jnp.ones((1, 1, 2, 2), int))], TypeError, "of size .32, 32. are int"),
        ([(32, jnp.ones((1, 1, 3, 2), bool))], ValueError, r"shape \[B, H, 2, 2\]"),
        (
            [(32, jnp.ones((1, 1, 2, 2), bool)), ((24, 16), jnp.ones((1, 1, 3, 4), bool))],
            ValueError,
            r"multiple of the finest, \(24, 16\), but one is \(32, 32\)",
        ),
    ],
    ids=["none", "dtype", "shape", "multiple"],
)
def test_levels_that_do_not_fit(levels, kind, message):
    with pytest.raises(kind, match=message):
        BlockMask.from_mixed_blocks(levels, seq_lengths=(64, 64))
