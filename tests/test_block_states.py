"""The states of blocks: proofs, witnesses and evaluation agree with looking at every position."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import block_bits, block_lists, masks
from flexjax import block_states as module
from flexjax.block_bits import bits_of, numbered
from flexjax.block_lists import OPEN, Geometry, lists_from_states, states_from_lists
from flexjax.block_states import block_states, block_states_on_host
from flexjax.mods.evaluate import evaluate_numpy
from flexjax.mods.trace import index_ranges, trace_mask_mod


def by_looking(graph, captures, geometry, batch, heads):
    sizes = (batch, heads, geometry.q_len, geometry.kv_len)
    grid = [x.astype(np.int32) for x in np.ogrid[tuple(map(slice, sizes))]]
    inputs = dict(zip(("b", "h", "q", "kv"), grid, strict=True))
    (mask,) = evaluate_numpy(graph, [np.asarray(c) for c in captures], inputs)
    mask = np.broadcast_to(mask, sizes)
    states = np.zeros((batch, heads, geometry.rows, geometry.cols), np.int8)
    for where in np.ndindex(*states.shape):
        row, col = where[2] * geometry.q_block, where[3] * geometry.kv_block
        block = mask[where[0], where[1], row : row + geometry.q_block][
            :, col : col + geometry.kv_block
        ]
        full = block.all() and block.shape[1] == geometry.kv_block
        states[where] = 2 if full else block.any()
    return states


RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(0, 3, (2, 50)), jnp.int32)
TABLE = jnp.asarray(RNG.normal(size=(3, 120)), jnp.float32)
NOISE = jnp.asarray(RNG.random((50, 60)) < 0.9)
MODS = {
    "causal": masks.causal(),
    "window": masks.sliding_window(9, 3),
    "dilated": masks.dilated_window(5, 3),
    "shuffled documents": lambda b, h, q, k: IDS[b, q] == IDS[b, k % 50],
    "float table": lambda b, h, q, k: TABLE[h, q - k + 60] > 0.3,
    "dense": lambda b, h, q, k: NOISE[q, k],
    "inner checkerboard": lambda b, h, q, k: (q + k) % 2 == 0,
    "hole inside blocks": lambda b, h, q, k: (q % 8 != 3) | (k % 8 != 3),
    "heads": lambda b, h, q, k: (q >= k) | (h == 1),
}
GEOMETRIES = [Geometry(50, 60, 8, 8), Geometry(37, 53, 5, 16)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", MODS)
def test_states(name, geometry):
    graph, captures = trace_mask_mod(
        MODS[name], index_ranges(2, 3, geometry.q_len, geometry.kv_len)
    )
    expected = by_looking(graph, captures, geometry, 2, 3)
    states = block_states(graph, captures, geometry, 2, 3)
    np.testing.assert_array_equal(np.broadcast_to(states, expected.shape), expected)
    if not captures:
        states = block_states_on_host(graph, geometry, 2, 3)
        np.testing.assert_array_equal(np.broadcast_to(states, expected.shape), expected)


def test_a_mod_that_the_graph_cannot_hold_is_evaluated_everywhere(monkeypatch):
    monkeypatch.setattr(module, "_OPAQUE_POSITIONS", 4 * 64)  # four blocks at a time
    geometry = Geometry(61, 59, 8, 8)

    def mod(b, h, q, k):  # a loop whose length is not known
        steps = jax.lax.while_loop(lambda i: i < q, lambda i: i + 1, jnp.int32(0))
        return steps >= k

    graph, captures = trace_mask_mod(mod, index_ranges(1, 1, 61, 59))
    assert graph.opaque is not None
    plain, _ = trace_mask_mod(masks.causal(), index_ranges(1, 1, 61, 59))
    np.testing.assert_array_equal(
        block_states(graph, captures, geometry, 1, 1), by_looking(plain, [], geometry, 1, 1)
    )
    with pytest.raises(NotImplementedError, match="cannot express"):
        block_states_on_host(graph, geometry, 1, 1)


def test_work_is_taken_in_chunks_and_heads_one_by_one(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_POSITIONS", 3 * 49)
    monkeypatch.setattr(module, "_NUMBERED_BLOCKS", 10)
    monkeypatch.setattr(module, "_HOST_BLOCKS", 10)
    geometry = Geometry(50, 60, 7, 7)
    mod = MODS["hole inside blocks"]
    by_head = masks.or_masks(mod, lambda b, h, q, k: (h == 1) & (b == 0))
    for current in (mod, by_head, MODS["float table"], MODS["shuffled documents"]):
        graph, captures = trace_mask_mod(current, index_ranges(2, 3, 50, 60))
        expected = by_looking(graph, captures, geometry, 2, 3)
        found = [block_states(graph, captures, geometry, 2, 3)]
        if not captures:
            found.append(block_states_on_host(graph, geometry, 2, 3))
        for states in found:
            np.testing.assert_array_equal(np.broadcast_to(states, expected.shape), expected)


@pytest.mark.parametrize("of_columns", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 32), (9, 130)])
def test_blocks_are_ranked_and_found_by_number(shape, of_columns):
    rows, cols = shape

    @jax.jit
    def everything(blocks):
        bits = bits_of(blocks, of_columns)
        members = numbered(bits)
        places = members.place(jnp.arange(rows * cols, dtype=jnp.int32))
        sums = block_bits._sums_one_by_one(jnp.diff(bits.sums))
        return (bits.counts, bits.sums), bits.members(), bits.ranks(), sums, members.count, places

    for seed, density in itertools.product(range(3), (0, 0.03, 0.5, 1)):
        blocks = np.random.default_rng(seed).random(shape) < density
        (counts, expected_sums), members, ranks, sums, count, places = everything(
            blocks.T if of_columns else blocks
        )
        for found, expected in ((members, blocks), (ranks, blocks.cumsum(1) - blocks)):
            np.testing.assert_array_equal(found.reshape(rows, -1)[:, :cols], expected)
        np.testing.assert_array_equal(counts, blocks.sum(1))
        np.testing.assert_array_equal(expected_sums, sums)
        assert count == blocks.sum()
        for found, expected in zip(places, np.nonzero(blocks), strict=True):
            np.testing.assert_array_equal(found[: expected.size], expected)
        assert places[0].min() >= 0
        assert places[0].max() < rows
        assert places[1].min() >= 0


@pytest.mark.parametrize("of_columns", [False, True])
@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        ((1, 1), (1, 1)),
        ((3, 31), (2, 7)),
        ((2, 32), (31, 2)),
        ((5, 33), (33, 33)),
        ((4, 130), (9, 80)),
    ],
)
def test_lists_by_jax_and_by_numpy_are_the_same(shape, widths, of_columns):
    # As GPUs make them, which is no part of a program for a CPU.
    at_once = jax.jit(lambda states: block_lists._listed(states, widths, of_columns))
    for seed in range(3):
        states = np.random.default_rng(seed).integers(0, 3, (2, 1, *shape)).astype(np.int8)
        turned = states.swapaxes(2, 3) if of_columns else states
        host, inside = (
            lists_from_states(s, widths, of_columns) for s in (turned, jnp.asarray(turned))
        )
        for a, b in zip(host.arrays, inside.arrays, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype == np.int32
        counts = [(states == s).sum(-1) for s in (1, 2)]
        for a, b in zip(
            at_once(turned), (counts[0], host.arrays[1], counts[1], host.arrays[3]), strict=True
        ):
            np.testing.assert_array_equal(a, np.reshape(b, a.shape))
        fits = all((c <= w).all() for c, w in zip(counts, widths, strict=True))
        assert bool(host.overflow) == bool(inside.overflow) == (not fits)
        if fits:
            np.testing.assert_array_equal(states_from_lists(*inside.arrays, shape[1]), states)


def test_most_positions_of_usual_masks_are_never_evaluated():
    """Proofs and corners settle every block of these, so that the work is a few operations a block."""
    length, geometry = 4096, Geometry(4096, 4096, 128, 128)
    cuts = np.sort(RNG.permutation(length - 1)[:15] + 1)
    ids = jnp.asarray(np.searchsorted(cuts, np.arange(length), side="right"), jnp.int32)
    for mod in (masks.causal(), masks.sliding_window(300), masks.document(ids, causal=True)):
        graph, captures = trace_mask_mod(mod, index_ranges(1, 1, length, length))
        zero = jnp.zeros((1, 1, 1, 1), jnp.int32)
        grid = module._Grid(geometry, zero, zero, jnp.arange(geometry.rows, dtype=jnp.int32), jnp)
        states = module._proven(graph, captures, grid, module.evaluate)
        assert (np.asarray(states) != OPEN).all()
