"""BlockMask against a brute-force construction in NumPy."""

import dataclasses
import math
import operator

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from flexjax import BlockMask, block_creation, create_block_mask, create_mask, flex_attention, masks
from flexjax.block_lists import Geometry
from flexjax.block_states import block_states, block_states_on_host
from flexjax.mods.evaluate import evaluate_numpy
from flexjax.mods.trace import index_ranges, trace_mask_mod

LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
TRANSPOSED = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")


def causal(b, h, q, k):
    return q >= k


def dense_of(mod, batch, heads, q_len, kv_len):
    """The mask of a mod that NumPy can run, on all positions at once."""
    b, h, q, k = np.ogrid[:batch, :heads, :q_len, :kv_len]
    return np.broadcast_to(mod(b, h, q, k), (batch, heads, q_len, kv_len))


def states_of(dense, block_size):
    """0 for every empty block, 1 for a partial and 2 for a full one, by looking at each."""
    q_block, kv_block = block_size
    batch, heads, q_len, kv_len = dense.shape
    shape = (batch, heads, math.ceil(q_len / q_block), math.ceil(kv_len / kv_block))
    states = np.zeros(shape, np.int8)
    for b, h, row, col in np.ndindex(*shape):
        block = dense[b, h, row * q_block :, col * kv_block :][:q_block, :kv_block]
        inside = block.shape[1] == kv_block  # a block that sticks out over the last key is not full
        states[b, h, row, col] = 2 if inside and block.all() else block.any()
    return states


def listed(counts, indices, where):
    """What a list names at one place, without the entries past the count."""
    return np.asarray(indices)[where][: np.asarray(counts)[where]].tolist()


def check_lists(mask, states):
    """Lists of both directions name exactly the blocks of each state, once and in order."""
    batch, heads, rows, cols = states.shape
    for prefix, state in (("", 1), ("full_", 2)):
        counts, indices = (getattr(mask, f"{prefix}kv_{x}") for x in ("num_blocks", "indices"))
        assert counts.shape == (batch, heads, rows)
        assert indices.shape[:3] == (batch, heads, rows)
        for where in np.ndindex(batch, heads, rows):
            expected = np.flatnonzero(states[where] == state).tolist()
            assert listed(counts, indices, where) == expected
        if mask.inference_only:
            continue
        counts, indices = (getattr(mask, f"{prefix}q_{x}") for x in ("num_blocks", "indices"))
        assert counts.shape == (batch, heads, cols)
        assert indices.shape == (batch, heads, cols, rows)
        for b, h, col in np.ndindex(batch, heads, cols):
            expected = np.flatnonzero(states[b, h, :, col] == state).tolist()
            assert listed(counts, indices, (b, h, col)) == expected
    np.testing.assert_array_equal(mask.block_states(), states)
    np.testing.assert_array_equal(mask.to_dense(), states > 0)
    assert mask.sparsity() == pytest.approx(100 * (states == 0).mean())
    for name in LISTS + (() if mask.inference_only else TRANSPOSED):
        assert getattr(mask, name).dtype == jnp.int32


def check(mask, dense):
    assert mask.shape == dense.shape
    assert mask.numel() == dense.size
    check_lists(mask, states_of(dense, mask.block_size))


def states_of_lists(mask):
    """The block states that the lists state, read one by one."""
    lists = [np.asarray(getattr(mask, name)) for name in LISTS]
    states = np.zeros((*lists[0].shape, mask.geometry.cols), np.int8)
    for where in np.ndindex(lists[0].shape):
        states[where][listed(*lists[:2], where)] = 1
        states[where][listed(*lists[2:], where)] = 2
    return states


def effective(mask):
    """The dense mask that attention applies: full blocks, and the mask in the partial ones."""
    q_block, kv_block = mask.block_size
    batch, heads, q_len, kv_len = mask.shape
    states = states_of_lists(mask).repeat(q_block, 2).repeat(kv_block, 3)[:, :, :q_len, :kv_len]
    allowed = np.True_
    if mask.mask_graph is not None:
        offset = 0 if mask.q_offset is None else np.asarray(mask.q_offset)
        b, h, q, k = (x.astype(np.int32) for x in np.ogrid[:batch, :heads, :q_len, :kv_len])
        captures = [np.asarray(c) for c in mask.mask_captures]
        indices = {"b": b, "h": h, "q": q + offset, "kv": k}
        (allowed,) = evaluate_numpy(mask.mask_graph, captures, indices)
    return (states == 2) | ((states == 1) & allowed)


# -- creation ---------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_causal_attributes():
    mask = create_block_mask(causal, 2, 3, 2048, 2048)
    assert mask.shape == (2, 3, 2048, 2048)
    assert mask.block_size == mask.BLOCK_SIZE == (128, 128)
    assert mask.seq_lengths == (2048, 2048)
    assert mask.geometry == Geometry(2048, 2048, 128, 128)
    assert mask.sparsity() == 46.875
    assert mask.numel() == 2 * 3 * 2048 * 2048
    assert mask.q_offset is None
    assert mask.mask_captures == ()
    assert not mask.inference_only
    assert mask.kv_indices.shape == (2, 3, 16, 16)
    np.testing.assert_array_equal(mask.kv_num_blocks[0, 0], np.ones(16))
    np.testing.assert_array_equal(mask.full_kv_num_blocks[0, 0], np.arange(16))


def test_causal_with_an_offset_for_every_batch_row():
    offset = jnp.arange(8, dtype=jnp.int32)
    mask = create_block_mask(lambda b, h, q, k: q + offset[b] * 128 >= k, 8, 1, 2048, 2048)
    assert mask.sparsity() == 29.1015625
    visited = np.asarray(mask.to_dense()).sum((1, 2, 3))
    assert (np.diff(visited) > 0).all()
    assert mask[0].sparsity() == 46.875
    assert mask[7].sparsity() < mask[6].sparsity()


@pytest.mark.parametrize(
    ("mod", "percent"),
    [
        (masks.noop_mask, 0.0),
        (lambda b, h, q, k: q < 0, 100.0),
        (masks.sliding_window(128), 100 * (1 - (8 + 7) / 64)),
        (masks.sliding_window(127), 100 * (1 - (8 + 7) / 64)),
        (masks.prefix_lm(256), 100 * (1 - (36 + 1) / 64)),
        (masks.chunked(256), 100 * (1 - 4 * 3 / 64)),
        (lambda b, h, q, k: (q // 128 + k // 128) % 2 == 0, 50.0),
    ],
    ids=["noop", "nothing", "window-128", "window-127", "prefix", "chunked", "checkerboard"],
)
def test_sparsity(mod, percent):
    assert create_block_mask(mod, 1, 1, 1024, 1024).sparsity() == percent


BLOCK_SIZES = [32, 256, (32, 64), (64, 32), 96, 17, (96, 17), (1, 50), (50, 1), 1000]


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
def test_block_sizes(block_size):
    mask = create_block_mask(causal, 1, 1, 200, 130, block_size)
    pair = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    assert mask.block_size == pair
    check(mask, dense_of(causal, 1, 1, 200, 130))


def test_pytorch_spelling():
    mask = create_block_mask(causal, B=None, H=None, Q_LEN=256, KV_LEN=256, BLOCK_SIZE=64)
    assert mask.shape == (1, 1, 256, 256)
    assert mask.BLOCK_SIZE == (64, 64)
    lists = [getattr(mask, name) for name in LISTS]
    assert BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=(64, 64)).BLOCK_SIZE == (64, 64)


@pytest.mark.parametrize(
    ("q_len", "kv_len"), [(1, 1), (1, 300), (300, 1), (37, 257), (257, 37), (128, 128), (129, 127)]
)
def test_lengths(q_len, kv_len):
    mod = masks.sliding_window(40, 9)
    check(create_block_mask(mod, None, None, q_len, kv_len), dense_of(mod, 1, 1, q_len, kv_len))


def test_a_block_over_the_last_key_is_partial():
    mask = create_block_mask(masks.noop_mask, 1, 1, 40, 40, 16)
    np.testing.assert_array_equal(mask.block_states()[0, 0], [[2, 2, 1]] * 3)


def atoms(batch, heads, q_len, kv_len):
    """(mod on anything that is indexed like an array, the captured array or None)."""
    length = max(q_len, kv_len)
    ids = st.integers(1, 5).flatmap(
        lambda n: st.lists(st.integers(0, n), min_size=length, max_size=length).map(sorted)
    )
    width = st.integers(0, length)
    return st.one_of(
        st.tuples(st.just("causal"), st.integers(-length, length)),
        st.tuples(st.just("window"), st.tuples(width, width)),
        st.tuples(st.just("document"), ids),
        st.tuples(st.just("chunk"), st.integers(1, length)),
        st.tuples(st.just("head"), st.integers(0, heads)),
        st.tuples(st.just("prefix"), st.lists(width, min_size=batch, max_size=batch)),
    )


COMBINE = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def compiled(tree, xp):
    """A mod out of a tree of atoms, with captured arrays of `xp`."""
    kind, *rest = tree
    if kind in COMBINE:
        left, right = (compiled(t, xp) for t in rest)
        return lambda *i: COMBINE[kind](left(*i), right(*i))
    if kind == "not":
        inner = compiled(rest[0], xp)
        return lambda *i: ~inner(*i)
    (value,) = rest
    if kind == "causal":
        return lambda b, h, q, k: q + value >= k
    if kind == "window":
        return lambda b, h, q, k: (q - k <= value[0]) & (k - q <= value[1])
    if kind == "chunk":
        return lambda b, h, q, k: q // value == k // value
    if kind == "head":
        return lambda b, h, q, k: (h < value) | (q == k)
    array = xp.asarray(value, np.int32)
    if kind == "document":
        return lambda b, h, q, k: array[q] == array[k]
    return lambda b, h, q, k: k < array[b]


# Few shapes, so that the programs on block lists compile once.
GEOMETRIES = [
    ((1, 1, 37, 53), (16, 8)),
    ((2, 3, 48, 48), (16, 16)),
    ((1, 3, 60, 29), (7, 20)),
    ((2, 1, 5, 60), (40, 13)),
]


@st.composite
def problems(draw, arrays=True):
    shape, block_size = draw(st.sampled_from(GEOMETRIES))
    leaf = atoms(*shape).filter(lambda t: arrays or t[0] not in ("document", "prefix"))
    pair = st.sampled_from(sorted(COMBINE))
    tree = st.recursive(
        leaf,
        lambda t: st.one_of(st.tuples(pair, t, t), st.tuples(st.just("not"), t)),
        max_leaves=4,
    )
    return shape, block_size, draw(tree)


@settings(max_examples=12)
@given(problems())
def test_random_masks(problem):
    shape, block_size, tree = problem
    dense = dense_of(compiled(tree, np), *shape)
    mask = create_block_mask(compiled(tree, jnp), *shape, block_size)
    check(mask, dense)
    np.testing.assert_array_equal(effective(mask), dense)
    if not mask.mask_captures and mask.mask_graph is not None:  # the host made it: by a program too
        states = block_states(mask.mask_graph, (), mask.geometry, *shape[:2])
        np.testing.assert_array_equal(
            np.broadcast_to(states, mask.to_dense().shape), mask.block_states()
        )


@settings(max_examples=60)
@given(problems(arrays=False))
def test_random_masks_on_the_host(problem):
    """NumPy finds the states of a mask without captures."""
    shape, block_size, tree = problem
    mod = compiled(tree, np)
    graph, captures = trace_mask_mod(mod, index_ranges(*shape))
    assert captures == []
    states = block_states_on_host(graph, Geometry(*shape[2:], *block_size), *shape[:2])
    expected = states_of(dense_of(mod, *shape), block_size)
    np.testing.assert_array_equal(np.broadcast_to(states, expected.shape), expected)


def test_heads_and_batch_rows_that_do_not_matter_share_the_work():
    graph, _ = trace_mask_mod(causal, index_ranges(3, 5, 64, 64))
    geometry = Geometry(64, 64, 16, 16)
    inside = block_states(graph, (), geometry, 3, 5)
    assert inside.shape == (1, 1, 4, 4)
    np.testing.assert_array_equal(inside, block_states_on_host(graph, geometry, 3, 5))
    assert create_block_mask(causal, 3, 5, 64, 64, 16).kv_indices.shape == (3, 5, 4, 4)


def test_creation_inside_jit_with_traced_captures():
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 5, 200)), jnp.int32)

    def build(ids):
        return create_block_mask(masks.document(ids, causal=True), 1, 1, 200, 200, (32, 64))

    eager, inside = build(ids), jax.jit(build)(ids)
    assert jax.tree.structure(eager) == jax.tree.structure(inside)
    chex.assert_trees_all_equal(eager, inside)
    chex.assert_trees_all_equal(
        jax.vmap(build)(jnp.stack([ids, ids])), jax.tree.map(lambda x: jnp.stack([x, x]), eager)
    )


def all_primitives(jaxpr):
    found = set()
    for eqn in jaxpr.eqns:
        found.add(eqn.primitive.name)
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found |= all_primitives(inner)
    return found


def test_a_mask_without_captures_is_constant_in_a_traced_program(monkeypatch):
    def build():
        return create_block_mask(masks.sliding_window(300), 1, 1, 2048, 2048)

    def fresh():
        return lambda: build()  # JAX keeps the jaxpr of a function that it has seen

    assert not all_primitives(jax.make_jaxpr(fresh())().jaxpr)
    chex.assert_trees_all_equal(jax.jit(fresh())(), build())
    monkeypatch.setattr(block_creation, "_HOST_BYTES", 0)
    assert {"while", "scatter"} <= all_primitives(jax.make_jaxpr(fresh())().jaxpr)
    chex.assert_trees_all_equal(jax.jit(fresh())(), build())


def test_an_operation_that_numpy_lacks_is_computed_in_the_program():
    def build():
        return create_block_mask(
            lambda b, h, q, k: jnp.atan2(q * 1.0, k + 1.0) > 0.5, 1, 1, 70, 90, 32
        )

    chex.assert_trees_all_equal(jax.jit(build)(), build())


@pytest.mark.parametrize("kind", ["causal", "document"])
def test_building_a_large_mask_takes_little_memory(kind, monkeypatch):
    monkeypatch.setattr(block_creation, "_HOST_BYTES", 0)
    length = 262144
    ids = jax.ShapeDtypeStruct((length,), jnp.int32)

    def build(ids):
        mod = masks.document(ids, causal=True) if kind == "document" else masks.causal()
        return create_block_mask(mod, None, None, length, length)

    memory = jax.jit(build).lower(ids).compile().memory_analysis()
    blocks = (length // 128) ** 2
    assert memory.output_size_in_bytes < 16.1 * blocks + 4 * length
    assert memory.temp_size_in_bytes < 0.25 * memory.output_size_in_bytes + 8e6


# -- slicing ----------------------------------------------------------------------------------------

IDS = np.sort(np.random.default_rng(3).integers(0, 4, (2, 80)), axis=1).astype(np.int32)
REACH = np.array([3, 20, 80], np.int32)


def sliceable(q_len=50, **kwargs):
    """A mask that depends on everything and captures two arrays; [2, 3, 50, 70] in blocks of (16, 32)."""
    ids, reach = jnp.asarray(IDS), jnp.asarray(REACH)

    def mod(b, h, q, k):
        return (ids[b, q] == ids[b, k]) & (q - k < reach[h]) | (k == 69)

    return create_block_mask(mod, 2, 3, q_len, 70, (16, 32), **kwargs)


def tokens(rows, q_len, q_block=16):
    """The queries of rows of blocks given as an index."""
    whole = np.arange(q_len)
    chosen = np.atleast_1d(np.arange(math.ceil(q_len / q_block))[rows])
    return np.concatenate([whole[r * q_block : (r + 1) * q_block] for r in chosen])


def reference_slice(dense, index):
    index = index if isinstance(index, tuple) else (index,)
    for axis, part in enumerate(index[:2]):
        chosen = np.atleast_1d(np.arange(dense.shape[axis])[part])
        dense = np.take(dense, chosen, axis)
    return dense[:, :, tokens(index[2], dense.shape[2])] if len(index) == 3 else dense


everything = slice(None)
INDICES = [
    0,
    -1,
    (1, 2),
    (0, -2),
    (everything, slice(1, None)),
    (everything, slice(None, None, 2)),
    (everything, slice(None, None, -1)),
    ([1, 0, 0],),
    (everything, np.array([2, -1, 0])),
    (np.array([-1]), [0, 1]),
    (everything, everything, 0),
    (everything, everything, 3),
    (everything, everything, -1),
    (everything, everything, slice(1, 3)),
    (everything, everything, slice(2, None)),
    (everything, everything, slice(-2, None)),
    (everything, everything, everything),
    (1, [2, 0], slice(0, 2)),
    (-2, -1, -3),
]


@pytest.mark.smoke
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_slice(index):
    mask = sliceable()
    dense = effective(mask)
    part = mask[index]
    expected = reference_slice(dense, index)
    assert part.shape == expected.shape
    np.testing.assert_array_equal(effective(part), expected)
    rows = index[2] if isinstance(index, tuple) and len(index) == 3 else None
    if rows is None:
        assert part.q_offset is None
        check(part, expected)
    else:
        assert int(part.q_offset) == tokens(rows, 50)[0]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (0, (0, [2, 1])),
        ((everything, [2, 1]), (1, -1)),
        ((everything, everything, slice(1, None)), (everything, everything, slice(1, 3))),
        ((everything, everything, slice(1, 4)), (0, 2, -1)),
        ((1, [0, 2], slice(1, None)), (everything, 1, 0)),
    ],
    ids=str,
)
def test_slice_of_a_slice(first, second):
    mask = sliceable()
    expected = reference_slice(reference_slice(effective(mask), first), second)
    np.testing.assert_array_equal(effective(mask[first][second]), expected)


@pytest.mark.parametrize("index", [(0, 1, 2), (-1, -2, -1), (1, 2, -3)], ids=str)
def test_slice_by_traced_indices(index):
    mask = sliceable(q_len=48)
    part = jax.jit(lambda mask, i: mask[i[0], i[1], i[2]])(mask, jnp.asarray(index))
    np.testing.assert_array_equal(effective(part), reference_slice(effective(mask), index))


def test_slice_by_a_traced_array():
    mask, heads = sliceable(), jnp.asarray([2, -3, 1, 1])
    part = jax.jit(lambda mask, heads: mask[:, heads])(mask, heads)
    expected = reference_slice(effective(mask), (everything, np.asarray(heads)))
    np.testing.assert_array_equal(effective(part), expected)


def test_slice_of_what_depends_on_nothing_keeps_its_graph():
    mask = create_block_mask(causal, 2, 3, 64, 64, 16)
    part = mask[1, [0, 2]]
    assert part.mask_graph is mask.mask_graph
    assert part.shape == (1, 2, 64, 64)


def test_slices_of_one_kind_are_one_pytree():
    """Decoding walks along the rows without retracing."""
    mask = create_block_mask(causal, 1, 1, 64, 64, 16)
    structures = {jax.tree.structure(mask[:, :, row]) for row in range(4)}
    assert len(structures) == 1


def test_slice_of_an_inference_only_mask():
    mask = sliceable(compute_q_blocks=False)
    part = mask[1, :, 1:3]
    assert part.inference_only
    np.testing.assert_array_equal(
        effective(part), reference_slice(effective(mask), (1, everything, slice(1, 3)))
    )


def test_attention_over_a_slice_is_the_slice_of_the_attention():
    mask = sliceable()
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 3, n, 8)), jnp.float32) for n in (50, 70, 70))
    slopes = jnp.asarray([0.1, 0.2, 0.3])

    def alibi(s, b, h, q, k):
        return s + slopes[h] * (k - q)

    whole = flex_attention(q, k, v, alibi, mask)
    part = flex_attention(q[:, :, 16:48], k, v, alibi, mask[:, :, 1:3])
    np.testing.assert_allclose(part, whole[:, :, 16:48], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ((0, 0, 0, 0), r"up to three indices \(batch, head, row of blocks\), but got 4"),
        (2, "batch index 2 is out of range for 2 of them"),
        (-3, "batch index -3 is out of range"),
        ((0, 3), "head index 3 is out of range for 3 of them"),
        ((0, [0, 7]), r"head index \[0, 7\] is out of range"),
        ((0, 0, 4), "Row 4 is out of range for 4 rows of blocks"),
        ((0, 0, -5), "Row -5 is out of range"),
        (slice(2, None), "selects nothing"),
        (1.0, "must be an integer, a slice or a 1-D integer array, but it is 1.0"),
        (True, "must be an integer, a slice or a 1-D integer array, but it is True"),
        (None, "must be an integer, a slice or a 1-D integer array, but it is None"),
        (..., "must be an integer, a slice or a 1-D integer array, but it is Ellipsis"),
        (np.zeros((1, 1), int), "1-D integer array"),
        ((0, 0, [0, 1]), "one query offset"),
        ((0, 0, 1.0), "by an integer or a contiguous slice"),
        ((0, 0, True), "by an integer or a contiguous slice"),
        ((0, 0, None), "by an integer or a contiguous slice"),
        ((0, 0, slice(None, None, 2)), "sliced contiguously and not empty"),
        ((0, 0, slice(3, 1)), "sliced contiguously and not empty"),
    ],
    ids=str,
)
def test_index_errors(index, message):
    with pytest.raises(IndexError, match=message):
        sliceable()[index]


def test_a_traced_row_of_a_ragged_mask_is_an_error():
    with pytest.raises(IndexError, match="50 queries do not divide into blocks of 16"):
        jax.jit(lambda mask, i: mask[:, :, i])(sliceable(), 1)


# -- from lists -------------------------------------------------------------------------------------


def lists_of(mask):
    return [np.asarray(getattr(mask, name)) for name in LISTS]


def test_lists_make_the_same_mask():
    mask = sliceable()
    again = BlockMask.from_kv_blocks(
        *lists_of(mask), mask.block_size, mask.mask_mod, seq_lengths=(50, 70)
    )
    check_lists(again, np.asarray(mask.block_states()))
    np.testing.assert_array_equal(effective(again), effective(mask))


def test_lists_without_full_blocks():
    mask = BlockMask.from_kv_blocks(
        np.array([[[2, 1, 0]]]), np.array([[[[1, 0], [1, 9], [-4, 7]]]]), block_size=(8, 16)
    )
    assert mask.shape == (1, 1, 24, 32)
    assert not mask.full_kv_num_blocks.any()
    np.testing.assert_array_equal(mask.block_states()[0, 0], [[1, 1], [0, 1], [0, 0]])


def test_garbage_past_the_counts_is_never_read():
    mask = sliceable()
    counts, indices, full_counts, full_indices = lists_of(mask)
    rng = np.random.default_rng(0)

    def spoil(counts, indices):
        past = np.arange(indices.shape[-1]) >= counts[..., None]
        assert past.any()
        return np.where(past, rng.choice([-7, 0, 1, 99, 2**31 - 1], indices.shape), indices)

    indices, full_indices = spoil(counts, indices), spoil(full_counts, full_indices)
    spoilt = BlockMask.from_kv_blocks(
        counts, indices, full_counts, full_indices, (16, 32), mask.mask_mod, (50, 70)
    )
    spoilt_inside = dataclasses.replace(mask, kv_indices=jnp.asarray(indices, jnp.int32))
    q, k, v = (jnp.asarray(rng.normal(size=(2, 3, n, 8)), jnp.float32) for n in (50, 70, 70))
    expected = flex_attention(q, k, v, block_mask=mask)
    for other in (spoilt, spoilt_inside):
        np.testing.assert_array_equal(effective(other), effective(mask))
        np.testing.assert_allclose(
            flex_attention(q, k, v, block_mask=other), expected, rtol=1e-6, atol=1e-6
        )


def test_order_within_a_row_does_not_matter():
    mask = BlockMask.from_kv_blocks([[[3]]], [[[[2, 0, 1]]]], block_size=8)
    np.testing.assert_array_equal(mask.block_states(), [[[[1, 1, 1]]]])
    assert mask.mask_graph is None
    assert effective(mask).all()


def test_lists_of_one_row_may_leave_out_batch_and_heads():
    mask = BlockMask.from_kv_blocks(np.array([1, 2]), np.array([[0, 0], [0, 1]]), block_size=8)
    assert mask.shape == (1, 1, 16, 16)
    np.testing.assert_array_equal(mask.to_dense()[0, 0], [[1, 0], [1, 1]])


def test_full_blocks_over_the_last_key_become_partial():
    """Kernels need no bounds check in full blocks, whoever made the lists."""
    counts, indices = np.array([[[2]]]), np.array([[[[1, 0]]]])
    none = np.zeros((1, 1, 1), int), np.zeros((1, 1, 1, 1), int)
    for build in (lambda f: f, jax.jit):
        mask = build(
            lambda *lists: BlockMask.from_kv_blocks(*lists, block_size=16, seq_lengths=(16, 20))
        )(*none, counts, indices)
        np.testing.assert_array_equal(mask.block_states(), [[[[2, 1]]]])
        assert effective(mask).all()


def test_traced_lists_drop_what_is_unsound():
    def build(counts, indices, full_counts, full_indices):
        return BlockMask.from_kv_blocks(
            counts, indices, full_counts, full_indices, block_size=8, seq_lengths=(16, 24)
        )

    mask = jax.jit(build)(
        jnp.array([[[3, 9]]]),
        jnp.array([[[[1, 1, 2], [-1, 0, 5]]]]),
        jnp.array([[[1, 0]]]),
        jnp.array([[[[2], [0]]]]),
    )
    np.testing.assert_array_equal(mask.block_states()[0, 0], [[0, 1, 2], [1, 0, 0]])


ONE = np.zeros((1, 1, 1), int)
ROW = np.zeros((1, 1, 1, 2), int)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"full_kv_num_blocks": ONE}, "pass both or neither"),
        ({"kv_num_blocks": ONE[0, 0, 0]}, r"must have shape \[B, H, rows\]"),
        ({"kv_indices": ROW[:, :, :, :0]}, r"they have \(1, 1, 1\) and \(1, 1, 1, 0\)"),
        ({"kv_indices": np.zeros((1, 2, 1, 2), int)}, r"they have \(1, 1, 1\) and \(1, 2, 1, 2\)"),
        ({"kv_num_blocks": ONE * 1.0}, "kv_num_blocks must hold integers, but it is float32"),
        ({"kv_indices": ROW * 1.0}, "kv_indices must hold integers, but it is float32"),
        (
            {
                "full_kv_num_blocks": np.zeros((1, 1, 2), int),
                "full_kv_indices": np.zeros((1, 1, 2, 1), int),
            },
            r"kv_num_blocks has shape \(1, 1, 1\) and full_kv_num_blocks \(1, 1, 2\)",
        ),
        ({"seq_lengths": (20, 16)}, "lists 1 rows of blocks, but 20 queries in blocks of 8 make 3"),
        ({"kv_num_blocks": ONE + 3}, "kv_num_blocks must lie between 0 and 2 .* span 3 to 3"),
        ({"kv_num_blocks": ONE - 1}, "must lie between 0 and 2 .* span -1 to -1"),
        (
            {"kv_num_blocks": ONE + 1, "kv_indices": ROW + 2},
            "from 0 to 1, but the listed ones span 2 to 2",
        ),
        (
            {"kv_num_blocks": ONE + 1, "kv_indices": ROW - 1},
            "from 0 to 1, but the listed ones span -1",
        ),
        (
            {"kv_num_blocks": ONE + 2},
            r"Block \(row 0, column 0\) of batch 0, head 0 is listed more than once",
        ),
        (
            {"kv_num_blocks": ONE + 1, "full_kv_num_blocks": ONE + 1, "full_kv_indices": ROW},
            "is listed more than once",
        ),
        ({"seq_lengths": (8, 0)}, "KV_LEN must be a positive integer"),
        ({"block_size": 0}, "The block size must be a positive integer"),
    ],
    ids=lambda x: "" if isinstance(x, str) else "-".join(x),
)
@pytest.mark.filterwarnings("ignore:.*dtype float64.*:UserWarning")
def test_unsound_lists_are_errors(arguments, message):
    sound = {"kv_num_blocks": ONE, "kv_indices": ROW, "block_size": 8}
    with pytest.raises(ValueError, match=message) as error:
        BlockMask.from_kv_blocks(**sound | arguments)
    assert str(error.value).endswith(".")


# -- from a dense mask ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(45, 60), (3, 45, 60), (2, 3, 45, 60), (1, 3, 45, 60)], ids=str)
def test_dense_mask(shape):
    dense = np.random.default_rng(0).random(shape) < 0.02
    mask = BlockMask.from_dense(jnp.asarray(dense), block_size=(16, 8))
    dense = dense.reshape((1,) * (4 - len(shape)) + shape)
    check(mask, dense)
    np.testing.assert_array_equal(effective(mask), dense)


def test_dense_mask_inside_jit():
    dense = jnp.asarray(np.random.default_rng(0).random((45, 60)) < 0.02)
    eager = BlockMask.from_dense(dense, 16)
    chex.assert_trees_all_equal(jax.jit(lambda d: BlockMask.from_dense(d, 16))(dense), eager)


def test_dense_mask_errors():
    with pytest.raises(TypeError, match=r"must be boolean .* but it is float32. Pass `mask != 0`"):
        BlockMask.from_dense(jnp.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"\(L, S\), .* but it has \(4,\)"):
        BlockMask.from_dense(jnp.zeros(4, bool))


# -- printing ---------------------------------------------------------------------------------------


def test_printed_picture():
    mask = create_block_mask(causal, None, None, 64, 48, 16)
    assert str(mask).splitlines() == [
        "BlockMask(shape=(1, 1, 64, 48), block_size=(16, 16), sparsity=25.00%)",
        "(0, 0)",
        "░░    ",
        "██░░  ",
        "████░░",
        "██████",
    ]


def test_printed_pictures_of_many_heads():
    lines = str(create_block_mask(causal, 2, 3, 32, 32, 16)).splitlines()
    assert lines[1::3] == ["(0, 0)", "(0, 1)", "(0, 2)", "(1, 0)", "... and 2 more"]


def test_representation():
    mask = create_block_mask(causal, 2, 3, 32, 32, 16)
    expected = "BlockMask(shape=(2, 3, 32, 32), block_size=(16, 16), inference_only=False)"
    assert repr(mask) == expected
    shown = []
    jax.jit(lambda m: shown.append((str(m), repr(m))))(mask)
    assert shown == [(expected, expected)]


# -- as a pytree ------------------------------------------------------------------------------------


def test_leaves_are_the_lists_and_the_captures():
    mask = sliceable()
    leaves = jax.tree.leaves(mask)
    assert len(leaves) == 8 + 2
    assert any(x is mask.mask_captures[0] for x in leaves)
    assert len(jax.tree.leaves(mask[:, :, 1:])) == 8 + 2 + 1


def test_leaves_may_be_anything():
    mask = sliceable()
    leaves, tree = jax.tree.flatten(mask)
    placeholders = [object() for _ in leaves]
    copy = jax.tree.unflatten(tree, placeholders)
    assert all(x is y for x, y in zip(jax.tree.leaves(copy), placeholders, strict=True))
    assert copy.seq_lengths == mask.seq_lengths
    assert copy.mask_graph == mask.mask_graph
    assert (
        str(copy)
        == repr(copy)
        == ("BlockMask(seq_lengths=(50, 70), block_size=(16, 32), inference_only=False)")
    )
    names = [str(path[0]) for path, _ in jax.tree_util.tree_flatten_with_path(mask)[0]]
    assert names[:2] == [".kv_num_blocks", ".kv_indices"]
    assert names.count(".mask_captures") == 2


def test_tree_map():
    mask = sliceable()
    doubled = jax.tree.map(lambda x: jnp.concatenate([x, x]), mask)
    assert isinstance(doubled, BlockMask)
    assert doubled.kv_num_blocks.shape == (4, 3, 4)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x, mask), mask)
    shapes = jax.eval_shape(lambda m: m, mask)
    assert shapes.shape == mask.shape


def test_rebuilt_mask_passes_through_jit_without_retracing():
    traces = []

    @jax.jit
    def visited(mask):
        traces.append(mask)
        return mask.to_dense().sum()

    rng = np.random.default_rng(0)
    counts = set()
    for _ in range(4):
        ids = jnp.asarray(np.sort(rng.integers(0, 6, 256)), jnp.int32)
        counts.add(int(visited(create_block_mask(masks.document(ids), 1, 1, 256, 256, 16))))
    assert len(traces) == 1
    assert len(counts) > 1
    visited(create_block_mask(masks.document(ids, causal=True), 1, 1, 256, 256, 16))
    assert len(traces) == 2


@pytest.mark.parametrize("field", ["seq_lengths", "block_size", "mask_graph"])
def test_static_fields_are_part_of_the_structure(field):
    mask = create_block_mask(causal, 1, 1, 64, 64, 16)
    other = {"seq_lengths": (63, 64), "block_size": (16, 8), "mask_graph": None}[field]
    changed = dataclasses.replace(mask, **{field: other})
    assert jax.tree.structure(changed) != jax.tree.structure(mask)


# -- masks for inference ----------------------------------------------------------------------------


def test_inference_only_mask_is_a_smaller_pytree():
    whole, small = sliceable(), sliceable(compute_q_blocks=False)
    assert small.inference_only
    assert all(getattr(small, name) is None for name in TRANSPOSED)
    assert len(jax.tree.leaves(small)) == len(jax.tree.leaves(whole)) - 4
    check_lists(small, np.asarray(whole.block_states()))
    assert "inference_only=True" in repr(small)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 3, n, 8)), jnp.float32) for n in (50, 70, 70))
    chex.assert_trees_all_equal(
        flex_attention(q, k, v, block_mask=small), flex_attention(q, k, v, block_mask=whole)
    )


def test_inference_only_masks_from_lists_and_dense_masks():
    mask = sliceable()
    lists = BlockMask.from_kv_blocks(
        *lists_of(mask), mask.block_size, mask.mask_mod, (50, 70), compute_q_blocks=False
    )
    dense = BlockMask.from_dense(effective(mask), mask.block_size, compute_q_blocks=False)
    assert lists.inference_only
    assert dense.inference_only
    check_lists(dense, np.asarray(mask.block_states()))


# -- mask_mod and create_mask -----------------------------------------------------------------------


def test_mask_mod_of_a_mask_makes_new_masks():
    mask = sliceable()
    both = masks.and_masks(mask.mask_mod, causal)
    again = create_block_mask(both, *mask.shape, (8, 8))
    check(again, effective(mask) & dense_of(causal, *mask.shape))
    part = mask[:, :, 1:3]
    np.testing.assert_array_equal(create_mask(part.mask_mod, *part.shape), effective(part))


def test_mask_mod_without_a_graph_allows_everything():
    mask = BlockMask.from_kv_blocks([[[1]]], [[[[0]]]], block_size=8)
    assert create_mask(mask.mask_mod, *mask.shape).all()


def test_create_mask_of_a_mask_mod():
    dense = create_mask(lambda b, h, q, k: (q >= k) & (h > b), 2, 3, 7, 9)
    assert dense.dtype == jnp.bool_
    np.testing.assert_array_equal(
        dense, dense_of(lambda b, h, q, k: (q >= k) & (h > b), 2, 3, 7, 9)
    )
    assert create_mask(causal, None, None, 4, 5).shape == (1, 1, 4, 5)


def test_create_mask_of_a_score_mod():
    def mod(s, b, h, q, k):
        return jnp.where(q >= k, s * 2, -jnp.inf)

    np.testing.assert_array_equal(create_mask(mod, 2, 1, 7, 9), dense_of(causal, 2, 1, 7, 9))
    assert create_mask(lambda s, b, h, q, k: s + 1, 1, 1, 3, 3).all()


def test_everything_is_32_bit_under_x64():
    def types(mask):
        return {x.dtype.name for x in jax.tree.leaves(mask)}

    with jax.enable_x64(True):
        mask = create_block_mask(causal, 2, 2, 50, 50, 16)
        assert types(mask) == types(mask[1, [0, 1], 1:]) == {"int32"}
        counts, indices = (np.asarray(x, np.int64) for x in lists_of(mask)[:2])
        assert types(BlockMask.from_kv_blocks(counts, indices, block_size=16)) == {"int32"}
        inside = jax.jit(lambda: create_block_mask(causal, 2, 2, 50, 50, 16))
        assert types(inside()) == {"int32"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"Q_LEN": 0}, "The number of queries Q_LEN must be a positive integer .* it is 0"),
        ({"KV_LEN": -3}, "The number of keys KV_LEN must be a positive integer .* it is -3"),
        ({"Q_LEN": 8.0}, "Q_LEN must be a positive integer known when tracing, but it is 8.0"),
        ({"B": 0}, "B must be a positive integer"),
        ({"H": True}, "H must be a positive integer known when tracing, but it is True"),
        ({"block_size": (8, 8, 8)}, r"one length or \(q_block, kv_block\), but it is \(8, 8, 8\)"),
        ({"block_size": 0}, "The block size must be a positive integer"),
        ({"BLOCK_SIZE": -1}, "The block size must be a positive integer"),
    ],
    ids=lambda x: "" if isinstance(x, str) else str(x),
)
def test_creation_errors(arguments, message):
    sound = {"mask_mod": causal, "B": 1, "H": 1, "Q_LEN": 8, "KV_LEN": 8}
    with pytest.raises(ValueError, match=message) as error:
        create_block_mask(**sound | arguments)
    assert str(error.value).endswith(".")


def test_lengths_known_only_at_run_time_are_an_error():
    with pytest.raises(ValueError, match="must be a positive integer known when tracing"):
        jax.jit(lambda n: create_block_mask(causal, 1, 1, n, 8))(8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1)], ids=str)
def test_broadcast_masks_serve_every_batch_row_and_head(shape):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 3, 40, 8)), jnp.float32) for _ in range(3))
    whole = flex_attention(q, k, v, block_mask=create_block_mask(causal, 2, 3, 40, 40, 16))
    part = flex_attention(q, k, v, block_mask=create_block_mask(causal, *shape, 40, 40, 16))
    np.testing.assert_allclose(part, whole, rtol=1e-6, atol=1e-6)
