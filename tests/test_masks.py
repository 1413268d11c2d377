"""Masks as pure predicates: each against a formula written another way, and without any kernel."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import masks


@pytest.fixture(autouse=True)
def _strict_jax():
    """No mask may lean on implicit broadcasting or on implicit dtype promotion."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def dense(mod, q_len, kv_len, batch=1):
    """(batch, q_len, kv_len) booleans, by vmap over the scalar function."""
    over = functools.reduce(
        lambda f, axis: jax.vmap(f, [0 if i == axis else None for i in range(4)]), (3, 2, 0), mod
    )
    indices = [jnp.arange(n, dtype=jnp.int32) for n in (batch, q_len, kv_len)]
    return jax.jit(over)(indices[0], jnp.int32(0), indices[1], indices[2])


def grid(mod, q_len, kv_len, b=0):
    result = np.asarray(dense(mod, q_len, kv_len, b + 1))[b]
    assert result.dtype == np.bool_
    return result


def brute(allowed_keys, q_len, kv_len):
    """The mask in which query q may attend exactly the keys that `allowed_keys(q)` yields."""
    result = np.zeros((q_len, kv_len), bool)
    for q in range(q_len):
        keys = [k for k in allowed_keys(q) if 0 <= k < kv_len]
        result[q, keys] = True
    return result


def natten_start(position, length, window):
    """Of all windows inside the sequence, the one that starts nearest to the centred place."""
    return min(range(length - window + 1), key=lambda start: abs(start - (position - window // 2)))


def natten_pixels(q, canvas, window):
    height, width = canvas
    top = natten_start(q // width, height, window[0])
    left = natten_start(q % width, width, window[1])
    for row, column in itertools.product(range(window[0]), range(window[1])):
        yield (top + row) * width + left + column


def diffusion_keys(q, seq_len, block):
    """Noised tokens are 0 .. seq_len - 1, clean ones follow."""
    blocks = [range(i, min(i + block, seq_len)) for i in range(0, seq_len, block)]
    if q < seq_len:
        own = q // block
        yield from blocks[own]
        yield from (seq_len + k for i in range(own) for k in blocks[i])
    else:
        own = (q - seq_len) // block
        yield from (seq_len + k for i in range(own + 1) for k in blocks[i])


def causal_keys(q):
    return range(q + 1)


GLOBAL = np.isin(np.arange(40), [0, 7, 30])

FORMULAS = [
    pytest.param(masks.noop_mask, lambda q: range(99), "noop_mask", id="noop"),
    pytest.param(masks.causal(), causal_keys, "causal", id="causal"),
    pytest.param(masks.causal(5), lambda q: range(q + 6), "causal_offset_5", id="causal-ahead"),
    pytest.param(masks.causal(-3), lambda q: range(q - 2), "causal_offset_-3", id="causal-behind"),
    pytest.param(
        masks.causal(jnp.int32(4)), lambda q: range(q + 5), "causal_offset_dynamic", id="causal-0d"
    ),
    pytest.param(
        masks.sliding_window(0), lambda q: [q], "sliding_window_0", id="sliding-window-self"
    ),
    pytest.param(
        masks.sliding_window(4),
        lambda q: range(q - 4, q + 1),
        "sliding_window_4",
        id="sliding-left",
    ),
    pytest.param(
        masks.sliding_window(3, 2),
        lambda q: range(q - 3, q + 3),
        "sliding_window_3_2",
        id="sliding-both",
    ),
    pytest.param(
        masks.prefix_lm(9), lambda q: [*range(9), *range(q + 1)], "prefix_lm_9", id="prefix-lm"
    ),
    pytest.param(masks.prefix_lm(0), causal_keys, "prefix_lm_0", id="prefix-lm-none"),
    pytest.param(masks.padding(11), lambda q: range(11), "padding_11", id="padding-static"),
    pytest.param(
        masks.dilated_window(7, 3),
        lambda q: range(q - 6, q + 7, 3),
        "dilated_window_7_3",
        id="dilated",
    ),
    pytest.param(
        masks.global_window(2, GLOBAL),
        lambda q: range(99) if GLOBAL[q] else [*range(q - 2, q + 3), *np.flatnonzero(GLOBAL)],
        "global_window_2",
        id="global-window",
    ),
    pytest.param(
        masks.strided(5),
        lambda q: [*range(q - 5, q + 1), *range(q, -1, -5)],
        "strided_5",
        id="strided",
    ),
    pytest.param(
        masks.fixed(6, 2),
        lambda q: [
            *range(q - q % 6, q + 1),
            *(k for end in range(6, 60, 6) for k in (end - 2, end - 1) if k <= q),
        ],
        "fixed_6_2",
        id="fixed",
    ),
    pytest.param(masks.chunked(8), lambda q: range(q - q % 8, q + 1), "chunked_8", id="chunked"),
    pytest.param(
        masks.neighborhood_1d(40, 7),
        lambda q: range(natten_start(q, 40, 7), natten_start(q, 40, 7) + 7),
        "neighborhood_1d_40_7",
        id="neighborhood-1d",
    ),
]


@pytest.mark.parametrize(("q_len", "kv_len"), [(37, 37), (13, 40), (40, 13)], ids=str)
@pytest.mark.parametrize(("mod", "keys", "name"), FORMULAS)
def test_predicate(mod, keys, name, q_len, kv_len):
    np.testing.assert_array_equal(grid(mod, q_len, kv_len), brute(keys, q_len, kv_len))
    assert mod.__name__ == name


@pytest.mark.parametrize(
    ("seq_len", "block"), [(12, 4), (10, 4), (6, 1), (5, 9)], ids=["even", "ragged", "ar", "one"]
)
def test_block_diffusion(seq_len, block):
    mod = masks.block_diffusion(seq_len, block)
    expected = brute(lambda q: diffusion_keys(q, seq_len, block), 2 * seq_len, 2 * seq_len)
    np.testing.assert_array_equal(grid(mod, 2 * seq_len, 2 * seq_len), expected)
    assert mod.__name__ == f"block_diffusion_{seq_len}_{block}"


@pytest.mark.parametrize(
    ("canvas", "window"),
    [((6, 7), (3, 5)), ((5, 4), (4, 2)), ((3, 8), (3, 8)), ((1, 9), (1, 3))],
    ids=["odd", "even", "whole", "row"],
)
def test_neighborhood_2d(canvas, window):
    tokens = canvas[0] * canvas[1]
    result = grid(masks.neighborhood_2d(canvas, window), tokens, tokens)
    expected = brute(lambda q: natten_pixels(q, canvas, window), tokens, tokens)
    np.testing.assert_array_equal(result, expected)
    # What sets NATTEN apart from a window that is cut off: every pixel sees equally many.
    assert (result.sum(axis=1) == window[0] * window[1]).all()


def test_per_batch_numbers():
    numbers = np.array([0, 4, 9])
    for b, n in enumerate(numbers):
        np.testing.assert_array_equal(
            grid(masks.prefix_lm(numbers), 12, 12, b), grid(masks.prefix_lm(int(n)), 12, 12)
        )
        np.testing.assert_array_equal(
            grid(masks.padding(numbers), 5, 12, b), np.tile(np.arange(12) < n, (5, 1))
        )
        np.testing.assert_array_equal(
            grid(masks.causal(numbers), 5, 12, b), grid(masks.causal(int(n)), 5, 12)
        )
    assert masks.prefix_lm(numbers).__name__ == "prefix_lm_per_batch"
    assert masks.padding(numbers).__name__ == "padding_per_batch"
    assert masks.causal(numbers).__name__ == "causal_offset_per_batch"


def test_global_window_per_batch():
    flags = np.zeros((2, 20), bool)
    flags[0, 3] = flags[1, 15] = True
    mod = masks.global_window(1, flags)
    for b in range(2):
        alone = grid(masks.global_window(1, flags[b]), 20, 20)
        np.testing.assert_array_equal(grid(mod, 20, 20, b), alone)
        assert alone[:, flags[b]].all()
        assert alone[flags[b]].all()


# Documents


def packed_ids(lengths, total):
    """The documents of packed positions, in plain Python; None behind the last."""
    ids = [i for i, n in enumerate(lengths) for _ in range(n)]
    return ids + [None] * (total - len(ids))


def document_grid(ids, causal=False):
    n = len(ids)
    return np.array(
        [
            [ids[q] is not None and ids[q] == ids[k] and (k <= q or not causal) for k in range(n)]
            for q in range(n)
        ]
    )


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(
    ("lengths", "total"),
    [([5, 3, 4], 12), ([5, 3, 4], 17), ([4, 0, 0, 6], 10), ([0, 3, 0], 5), ([7], 7), ([0], 3)],
    ids=["exact", "padded", "empty-inside", "empty-ends", "single", "nothing"],
)
def test_documents_from_lengths_offsets_and_ids_agree(lengths, total, causal):
    expected = document_grid(packed_ids(lengths, total), causal)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    for mod in (
        masks.document_from_lengths(lengths, total, causal),
        masks.document_from_offsets(offsets, total, causal),
        masks.document_from_cu_seqlens(jnp.asarray(offsets), total, causal),
        # Repeated last offsets are how variable-length batches are padded to a fixed width.
        masks.document_from_offsets([*offsets, offsets[-1], offsets[-1]], total, causal),
    ):
        np.testing.assert_array_equal(grid(mod, total, total), expected)
        assert mod.__name__ == ("causal_document" if causal else "document")
    if sum(lengths) == total:
        ids = np.asarray(packed_ids(lengths, total))
        np.testing.assert_array_equal(
            grid(masks.document(ids, causal=causal), total, total), expected
        )
        by_sum = masks.document_from_lengths(lengths, causal=causal)
        np.testing.assert_array_equal(grid(by_sum, total, total), expected)


def test_document_ids_may_be_in_any_order():
    ids = [3, 3, -1, 3, 7, -1]
    np.testing.assert_array_equal(grid(masks.document(ids), 6, 6), document_grid(ids))


def test_document_cross_attention_ids():
    q_ids, kv_ids = np.array([0, 1, 1, 2]), np.array([1, 1, 5, 2, 0, 0])
    result = grid(masks.document(q_ids, kv_ids), 4, 6)
    np.testing.assert_array_equal(result, q_ids[:, None] == kv_ids[None, :])
    assert not result[:, 2].any()


def test_documents_per_batch():
    lengths = np.array([[3, 4, 0], [1, 1, 7]])
    from_lengths = masks.document_from_lengths(lengths)
    ids = np.array([packed_ids(row, 9) for row in lengths])
    from_offsets = masks.document_from_offsets(
        np.concatenate([np.zeros((2, 1), int), lengths.cumsum(1)], axis=1)
    )
    for b in range(2):
        expected = document_grid(ids[b].tolist())
        np.testing.assert_array_equal(grid(from_lengths, 9, 9, b), expected)
        np.testing.assert_array_equal(grid(from_offsets, 9, 9, b), expected)
    full = np.array([[0, 0, 1], [4, 5, 5]])
    for b in range(2):
        np.testing.assert_array_equal(
            grid(masks.document(full), 3, 3, b), document_grid(full[b].tolist())
        )
    # One row of queries, shared by the batch, against a row of keys for each batch entry.
    mixed = masks.document(full[:1], full)
    np.testing.assert_array_equal(grid(mixed, 3, 3, 1), full[0][:, None] == full[1][None, :])


# Shared prefix


def shared_prefix_grid(lengths, prefix_of, total):
    ids = packed_ids(lengths, total)
    result = np.zeros((total, total), bool)
    for q, k in itertools.product(range(total), repeat=2):
        if ids[q] is None or ids[k] is None:
            continue
        in_prefix = ids[k] == prefix_of[ids[q]] and ids[q] != prefix_of[ids[q]]
        result[q, k] = in_prefix or (ids[q] == ids[k] and k <= q)
    return result


@pytest.mark.parametrize(
    ("lengths", "prefix", "total"),
    [
        ([6, 3, 4], 0, 13),
        ([6, 3, 4], 0, 16),
        ([3, 5, 2], 1, 10),
        ([4, 2, 3, 5, 2, 1], [0, 0, 0, 3, 3, 3], 20),
    ],
    ids=["grpo", "padded", "prefix-in-the-middle", "two-prompts"],
)
def test_shared_prefix(lengths, prefix, total):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    prefix_of = [prefix] * len(lengths) if isinstance(prefix, int) else prefix
    mod = masks.shared_prefix(offsets, total, prefix=prefix)
    expected = shared_prefix_grid(lengths, prefix_of, total)
    np.testing.assert_array_equal(grid(mod, total, total), expected)
    assert mod.__name__ == "shared_prefix"


def test_shared_prefix_per_batch():
    lengths = np.array([[4, 2, 2], [1, 3, 1]])
    offsets = np.concatenate([np.zeros((2, 1), int), lengths.cumsum(1)], axis=1)
    mod = masks.shared_prefix(offsets)
    for b in range(2):
        expected = shared_prefix_grid(lengths[b], [0, 0, 0], 8)
        np.testing.assert_array_equal(grid(mod, 8, 8, b), expected)


# Under jit, with arrays that are traced

TRACED = [
    pytest.param(masks.causal, np.int32(3), np.int32(-1), id="causal"),
    pytest.param(masks.causal, [0, 4], [-2, 1], id="causal-per-batch"),
    pytest.param(masks.prefix_lm, [2, 5], [0, 8], id="prefix-lm"),
    pytest.param(masks.padding, [6, 3], [8, 0], id="padding"),
    pytest.param(masks.document, [0, 0, 1, 1, 1, 2, 2, 2], [5, 5, 5, 5, 0, 0, 0, 0], id="document"),
    pytest.param(
        masks.document,
        np.arange(16).reshape(2, 8) // 3,
        np.arange(16).reshape(2, 8) // 5,
        id="document-per-batch",
    ),
    pytest.param(
        lambda ids: masks.document(ids, ids[::-1]),
        np.arange(8) // 2,
        np.arange(8) // 3,
        id="document-kv-ids",
    ),
    pytest.param(
        lambda n: masks.document_from_lengths(n, 8), [3, 0, 4], [2, 2, 2], id="from-lengths"
    ),
    pytest.param(
        lambda n: masks.document_from_lengths(n, 8, causal=True),
        [[3, 4], [1, 7]],
        [[8, 0], [2, 2]],
        id="from-lengths-per-batch",
    ),
    pytest.param(
        lambda o: masks.document_from_offsets(o, 8), [0, 3, 8], [0, 7, 7], id="from-offsets"
    ),
    pytest.param(
        lambda o: masks.document_from_cu_seqlens(o, 8), [0, 2, 5], [0, 1, 8], id="cu-seqlens"
    ),
    pytest.param(
        lambda flags: masks.global_window(1, flags),
        np.arange(8) % 5 == 0,
        np.arange(8) == 3,
        id="global-window",
    ),
    pytest.param(
        lambda o: masks.shared_prefix(o, 8), [0, 3, 5, 8], [0, 1, 6, 7], id="shared-prefix"
    ),
    pytest.param(
        lambda p: masks.shared_prefix([0, 2, 4, 6, 8], prefix=p),
        [0, 0, 2, 2],
        [1, 1, 1, 1],
        id="shared-prefix-groups",
    ),
]


@pytest.mark.parametrize(("factory", "first", "second"), TRACED)
def test_traced_arrays(factory, first, second):
    traces = []

    @jax.jit
    def traced(array):
        traces.append(array)
        return dense(factory(array), 8, 8, batch=2)

    grids = []
    for array in (np.asarray(first), np.asarray(second)):
        grids.append(np.asarray(traced(array)))
        np.testing.assert_array_equal(grids[-1], dense(factory(array), 8, 8, batch=2))
    assert (grids[0] != grids[1]).any()
    assert len(traces) == 1, "new values of an array must not trace again"


# Bad input

BATCHES = (np.zeros((2, 4), int), np.zeros((3, 4), int))

ERRORS = [
    (lambda: masks.causal(1.5), TypeError, "causal.*offset must be integers.*float"),
    (lambda: masks.causal(True), TypeError, "offset must be integers.*bool"),
    (lambda: masks.causal(np.zeros((2, 2), int)), ValueError, r"shape \(\) or \(B,\).*\(2, 2\)"),
    (lambda: masks.sliding_window(-1), ValueError, "left must be at least 0, but it is -1"),
    (lambda: masks.sliding_window(4, -2), ValueError, "right must be at least 0, but it is -2"),
    (lambda: masks.sliding_window(4.0), TypeError, "left must be a Python integer.*4.0.*float"),
    (lambda: masks.sliding_window((4, 4)), TypeError, "left must be a Python integer.*tuple"),
    (lambda: masks.prefix_lm(-1), ValueError, "n must be at least 0"),
    (lambda: masks.prefix_lm([0.5]), TypeError, r"n must be integers.*astype\(jnp.int32\)"),
    (lambda: masks.padding(np.int64(-4)), ValueError, "lengths must be at least 0"),
    (lambda: masks.padding("abc"), TypeError, "lengths must be an array of numbers"),
    (lambda: masks.document(np.zeros(4)), TypeError, "ids must be integers.*float"),
    (lambda: masks.document(np.array([object()])), TypeError, "ids must be an array of numbers"),
    (lambda: masks.document(3), ValueError, r"ids must have shape \(S,\) or \(B, S\).*\(\)"),
    (lambda: masks.document([1], [0.0]), TypeError, "kv_ids must be integers"),
    (lambda: masks.document(*BATCHES), ValueError, r"same batch size.*\(2, 4\).*\(3, 4\)"),
    (lambda: masks.document_from_lengths([3, -1]), ValueError, r"negative.*\[3, -1\]"),
    (lambda: masks.document_from_lengths([3, 4], 6), ValueError, "end at 7.*total_length=6"),
    (lambda: masks.document_from_lengths([3.0]), TypeError, "lengths must be integers"),
    (lambda: masks.document_from_lengths(7), ValueError, r"shape \(N,\) or \(B, N\)"),
    (lambda: masks.document_from_lengths([3], 4.5), TypeError, "total_length must be a Python int"),
    (lambda: masks.document_from_lengths([3], 0), ValueError, "total_length must be at least 1"),
    (lambda: masks.document_from_offsets([1, 4]), ValueError, "start at 0 and never decrease"),
    (lambda: masks.document_from_offsets([0, 4, 3]), ValueError, "document_from_lengths"),
    (lambda: masks.document_from_offsets([0, 9], 8), ValueError, "end at 9"),
    (lambda: masks.document_from_offsets(np.zeros(0, int)), ValueError, "at least the offset 0"),
    (lambda: masks.document_from_cu_seqlens([2, 1]), ValueError, "cu_seqlens must start at 0"),
    (lambda: masks.dilated_window(-1, 1), ValueError, "window must be at least 0"),
    (lambda: masks.dilated_window(4, 0), ValueError, "dilation must be at least 1"),
    (lambda: masks.global_window(2, np.arange(4)), TypeError, "is_global must be boolean.*!= 0"),
    (lambda: masks.global_window(2, np.True_), ValueError, r"shape \(S,\) or \(B, S\)"),
    (lambda: masks.global_window(-2, GLOBAL), ValueError, "window must be at least 0"),
    (lambda: masks.strided(0), ValueError, "stride must be at least 1"),
    (lambda: masks.fixed(4, 5), ValueError, "summary must be at most block, but it is 5.*4"),
    (lambda: masks.fixed(4, 0), ValueError, "summary must be at least 1"),
    (lambda: masks.chunked(0), ValueError, "chunk must be at least 1"),
    (lambda: masks.chunked(jnp.float32(2)), TypeError, "chunk must be a Python integer"),
    (lambda: masks.block_diffusion(0, 4), ValueError, "seq_len must be at least 1"),
    (lambda: masks.block_diffusion(8, 0), ValueError, "block must be at least 1"),
    (lambda: masks.shared_prefix([0, 3], prefix=1), ValueError, "one of the 1 documents.* 1. Doc"),
    (lambda: masks.shared_prefix([0, 3], prefix=-1), ValueError, "prefix must be at least 0"),
    (lambda: masks.shared_prefix([0, 3, 5], prefix=[0]), ValueError, "or 2 such indices"),
    (lambda: masks.shared_prefix([0, 3], prefix=[0.0]), TypeError, "prefix must be integers"),
    (lambda: masks.shared_prefix([3, 2]), ValueError, "offsets must start at 0"),
    (lambda: masks.neighborhood_1d(4, 5), ValueError, "window must be at most.*5.*length 4"),
    (lambda: masks.neighborhood_2d(16, (3, 3)), TypeError, "canvas must be a pair"),
    (lambda: masks.neighborhood_2d((4, 4), (3, 3, 3)), TypeError, "window must be a pair"),
    (lambda: masks.neighborhood_2d((4, 4), (3, 5)), ValueError, "window's width must be at most"),
    (
        lambda: masks.neighborhood_2d((4, 0), (3, 1)),
        ValueError,
        "canvas's width must be at least 1",
    ),
    (lambda: masks.and_masks(np.eye(2)), TypeError, r"argument 0 is an array of shape \(2, 2\)"),
    (lambda: masks.or_masks(masks.causal(), None), TypeError, "argument 1 is None"),
    (lambda: masks.not_mask(True), TypeError, r"not_mask\(\) combines mask_mods.*argument 0"),
    (lambda: masks.and_masks(masks.causal), TypeError, r"factory.*call it first.*causal\(\.\.\.\)"),
    (lambda: masks.or_masks(lambda q, k: q > k), TypeError, "lambda.*cannot be called so"),
]


@pytest.mark.parametrize(
    ("build", "error", "message"), ERRORS, ids=[re.sub(r"\W+", "-", e[2])[:40] for e in ERRORS]
)
def test_bad_arguments(build, error, message):
    with pytest.raises(error, match=f"(?s){message}") as caught:
        build()
    assert str(caught.value).endswith((".", ")"))  # a whole sentence


@pytest.mark.parametrize(
    "factory",
    [
        masks.document_from_lengths,
        masks.document_from_offsets,
        masks.document_from_cu_seqlens,
        masks.shared_prefix,
    ],
    ids=lambda factory: factory.__name__,
)
def test_traced_lengths_need_a_total(factory):
    with pytest.raises(ValueError, match=rf"{factory.__name__}.*traced.*Pass total_length="):
        jax.jit(lambda n: dense(factory(n), 4, 4))(jnp.array([0, 4]))


@pytest.mark.parametrize("factory", [masks.sliding_window, masks.chunked], ids=["window", "chunk"])
def test_static_numbers_must_not_be_traced(factory):
    with pytest.raises(TypeError, match="must be known while tracing"):
        jax.jit(lambda n: dense(factory(n), 4, 4))(4)
