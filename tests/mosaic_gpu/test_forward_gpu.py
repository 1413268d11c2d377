"""The forward kernel on a GPU, over the shapes, masks and scores that its code tells apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import BlockMask, masks, scores
from flexjax.backends import mosaic_gpu
from tests.mosaic_gpu.attention import Case, cases, check

pytestmark = pytest.mark.gpu

causal = masks.causal()
DOCUMENTS = np.repeat(np.arange(7, dtype=np.int32), [30, 200, 1, 99, 130, 300, 247])


def document(b, h, q_idx, kv_idx):
    ids = jnp.asarray(DOCUMENTS)
    return (ids[q_idx] == ids[kv_idx]) & (q_idx >= kv_idx)


def by_head(b, h, q_idx, kv_idx):
    return (h == 0) | (jnp.abs(q_idx - kv_idx) <= 300 // (h + 1))


def by_batch(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx + 50 * b


def some_empty_rows(b, h, q_idx, kv_idx):
    """Rows without keys inside visited blocks, and rows of blocks without any."""
    return (q_idx >= kv_idx) & (q_idx % 7 != 3) & ((q_idx < 128) | (q_idx >= 384))


def checkered(b, h, q_idx, kv_idx):
    """Quotients of queries and keys in one sum: ptxas 13.0 can take two of a thread's queries for one another."""
    lengths = jnp.asarray([93, 369, 168, 94], jnp.int32)
    light = (q_idx // 100 + kv_idx // 95) % 2 == 0
    known = (kv_idx < lengths[h]) | (q_idx == kv_idx)
    return (kv_idx < jnp.asarray([261])[b]) | (q_idx >= kv_idx) | (known & light)


def relative(score, b, h, q_idx, kv_idx):
    return score + (q_idx - kv_idx)


def ever_larger(score, b, h, q_idx, kv_idx):
    """The maximum of a causal row moves with every step."""
    return score + (kv_idx - q_idx)


def later_keys_win(score, b, h, q_idx, kv_idx):
    return score + 0.5 * kv_idx


def by_indices(score, b, h, q_idx, kv_idx):
    scale = jnp.asarray([[0.5, 1.0, 1.5], [2.0, -1.0, 0.25]])
    return score * scale[b, h] + 0.01 * q_idx


def hides_itself(score, b, h, q_idx, kv_idx):
    """A mask written as a score: rows without any finite score too."""
    return jnp.where((kv_idx <= q_idx) & (q_idx % 5 != 0), score, -jnp.inf)


def infinite_where_masked(score, b, h, q_idx, kv_idx):
    return jnp.where(kv_idx > q_idx, jnp.where(kv_idx % 2 == 0, jnp.nan, jnp.inf), score)


def symmetric(score, b, h, q_idx, kv_idx):
    """Grows by 45 units of log2 every 64 keys, before the query's own."""
    return score - 0.5 * jnp.abs(q_idx - kv_idx)


def ever_faster(score, b, h, q_idx, kv_idx):
    return score + (kv_idx / 20.0) ** 2


def by_key(score, b, h, q_idx, kv_idx):
    values = jnp.asarray(np.random.default_rng(3).normal(0, 2, (2, 1003)), jnp.float32)
    return score + values[h, kv_idx]


def by_two_keys(score, b, h, q_idx, kv_idx):
    values = np.random.default_rng(3).normal(0, 2, (2, 1003))
    gate, decay = (jnp.asarray(x, jnp.bfloat16) for x in (np.exp(0.1 * values), values))
    return score * gate[h, kv_idx] + jnp.where(q_idx > kv_idx, decay[h, kv_idx], 0.25)


def by_query(score, b, h, q_idx, kv_idx):
    values = jnp.asarray(np.random.default_rng(3).normal(0, 1, (2, 1003)), jnp.float32)
    return jnp.tanh(score * values[h, q_idx]) + jnp.tanh(values[h, 0]) * score


def capped(score, b, h, q_idx, kv_idx):
    cap = jnp.asarray(9.65, jnp.float32)
    return cap * jnp.tanh(score / cap)


def gated(score, b, h, q_idx, kv_idx):
    return jnp.tanh(score * jnp.asarray([1.5, -0.5])[h]) * 2.0


def table(score, b, h, q_idx, kv_idx):
    values = jnp.asarray(np.random.default_rng(0).standard_normal(2047), jnp.float32)
    return score + values[q_idx - kv_idx + 1006]


def dense_bias(score, b, h, q_idx, kv_idx):
    values = jnp.asarray(np.random.default_rng(1).standard_normal((2, 300, 301)), jnp.bfloat16)
    return score + values[h, q_idx, kv_idx]


def steep(score, b, h, q_idx, kv_idx):
    return score + 10.0 * (kv_idx - q_idx)


def per_batch_and_head(score, b, h, q_idx, kv_idx):
    slopes = jnp.asarray([[0.5, -0.25, 0.0], [2.0, -1.0, 1e30]])
    return score - slopes[b, h] * (q_idx - 2 * kv_idx + 3)


def rows_apart(q, k, v):
    """Every other 8 queries have scores that are larger by far."""
    return q * np.where(np.arange(q.shape[2]) // 8 % 2 == 0, 40.0, 0.5)[:, None], k, v


def larger_keys(q, k, v):
    """Scores grow by hundreds from the first block of keys to the last."""
    return q, k * np.linspace(0.1, 30.0, k.shape[2])[:, None], v


def with_garbage(mask):
    """Entries past the counts that point anywhere."""

    def spoiled(counts, indices):
        indices = jnp.pad(indices, ((0, 0), (0, 0), (0, 0), (0, 3)))
        place = jnp.broadcast_to(jnp.arange(indices.shape[-1]), indices.shape)
        garbage = jnp.where(place % 2 == 0, jnp.int32(2**31 - 1), jnp.int32(-(2**31)))
        return jnp.where(place < counts[..., None], indices, garbage)

    return dataclasses.replace(
        mask,
        kv_indices=spoiled(mask.kv_num_blocks, mask.kv_indices),
        full_kv_indices=spoiled(mask.full_kv_num_blocks, mask.full_kv_indices),
    )


def listed_blocks():
    """Block lists without a mask_mod: rows see all of the blocks that are listed."""
    counts, indices = jnp.asarray([[[1, 2, 0]]]), jnp.asarray([[[[2, 0, 0], [0, 1, 0], [0, 0, 0]]]])
    return BlockMask.from_kv_blocks(counts, indices, seq_lengths=(384, 384))


def in_listed_blocks(b, h, q_idx, kv_idx):
    row, column = q_idx // 128, kv_idx // 128
    return ((row == 0) & (column == 2)) | ((row == 1) & (column < 2))


def full_blocks_that_mask():
    """A block listed as full whose mask_mod would hide half of it: full means that the mask is not asked."""
    none = jnp.zeros((1, 1, 2), jnp.int32)
    counts, indices = jnp.asarray([[[1, 2]]]), jnp.asarray([[[[0, 0], [0, 1]]]])
    return BlockMask.from_kv_blocks(
        none, jnp.zeros((1, 1, 2, 2), jnp.int32), counts, indices, mask_mod=causal
    )


def in_full_blocks(b, h, q_idx, kv_idx):
    return kv_idx // 128 <= q_idx // 128


LENGTHS = [
    Case("one_query", q_len=1, kv_len=130),
    Case("one_key", q_len=70, kv_len=1),
    Case("len_37_causal", q_len=37, mask=causal),
    Case("len_64", q_len=64),
    Case("len_128_64", q_len=128, kv_len=64, heads=3, dim=32),
    Case("len_128_causal", q_len=128, mask=causal),
    Case("len_257", q_len=257),
    Case(
        "len_1003_causal_persistent",
        q_len=1003,
        mask=causal,
        heads=3,
        batch=2,
        options={"persistent": True},
    ),
    Case(
        "len_1003_causal", q_len=1003, mask=causal, heads=3, batch=2, options={"persistent": False}
    ),
    Case("cross_907_1003", q_len=907, kv_len=1003, mask=masks.causal(96), heads=2),
    Case("cross_1003_333", q_len=1003, kv_len=333, heads=2),
    Case("many_tiles", q_len=2048, mask=causal, batch=2, heads=10, dim=32),
    Case("many_tiles_d128", q_len=1536, mask=causal, batch=3, heads=8, dim=128),
]

HEADS = [
    Case("gqa_6_2", heads=6, kv_heads=2, q_len=300),
    Case("mqa_4_1", heads=4, kv_heads=1, q_len=200, mask=causal, batch=2),
    Case("kv_batch_1", batch=3, kv_batch=1, q_len=200, mask=causal),
    Case("mask_by_head", heads=3, q_len=700, mask=by_head, mask_shape=(None, 3)),
    Case("mask_by_batch", batch=2, heads=2, q_len=400, mask=by_batch, mask_shape=(2, None)),
    Case("mask_by_both", batch=2, heads=4, kv_heads=2, q_len=400, mask=masks.and_masks(by_head, by_batch),
         mask_shape=(2, 4), layout="BLHD"),
    Case("score_by_indices", batch=2, heads=3, q_len=150, score=by_indices),
]  # fmt: skip

DIMS = [
    *(Case(f"dim_{d}", dim=d, q_len=300, heads=2, mask=causal) for d in (8, 16, 40, 72, 80, 96)),
    *(Case(f"dim_{d}", dim=d, q_len=300, heads=2, mask=causal) for d in (128, 160, 192, 224, 256)),
    Case("dim_192_v_128", dim=192, v_dim=128, q_len=300, mask=causal),
    Case("dim_64_v_128", dim=64, v_dim=128, q_len=300),
    Case("dim_128_v_64", dim=128, v_dim=64, q_len=300, layout="BLHD"),
    Case("dim_40_v_24_float16", dim=40, v_dim=24, q_len=203, dtype="float16"),
    Case("dim_256_v_16", dim=256, v_dim=16, q_len=203, layout="BLHD", heads=2),
    Case("dim_128_float16", dim=128, q_len=300, mask=causal, dtype="float16"),
]

BLOCKS = [
    *(
        Case(f"blocks_{q}x{k}", block=(q, k), q_len=900, kv_len=801, mask=masks.sliding_window(200, 50))
        for q, k in ((64, 64), (128, 64), (64, 128), (256, 256), (256, 128), (128, 512), (192, 192), (1024, 1024))
    ),
    Case("blocks_64_d128", block=(64, 64), q_len=500, mask=causal, dim=128, heads=2),
    Case("documents", mask=document, q_len=1007, heads=2),
    Case("documents_by_batch_and_head", mask=masks.and_masks(document, by_head, by_batch), q_len=1007,
         batch=4, heads=3, mask_shape=(4, 3)),
    Case("documents_many", mask=document, q_len=1007, heads=12, batch=4),
    Case("documents_d128", mask=document, q_len=1007, heads=2, dim=128, layout="BLHD"),
    Case("checkered", score=capped, mask=checkered, q_len=601, heads=4, kv_heads=1, block=(128, 256)),
    Case("checkered_d128", mask=checkered, q_len=601, heads=4, dim=128),
    Case("empty_rows", mask=some_empty_rows, q_len=600),
    Case("garbage_past_the_counts", mask=masks.sliding_window(150, 0), q_len=700, edit_mask=with_garbage),
    Case("lists_without_mask", block_mask=listed_blocks, mask=in_listed_blocks, q_len=384),
    Case("full_blocks_ignore_the_mask", block_mask=full_blocks_that_mask, mask=in_full_blocks, q_len=256),
    Case("prefix", mask=masks.prefix_lm(300), q_len=777),
]  # fmt: skip

SCORES = [
    Case("relative", score=relative, q_len=500),
    Case("relative_d128", score=relative, q_len=500, dim=128),
    Case("ever_larger", score=ever_larger, q_len=700),
    Case("later_keys_win", score=later_keys_win, mask=causal, q_len=700),
    Case(
        "later_keys_win_float16",
        score=later_keys_win,
        mask=causal,
        q_len=700,
        dtype="float16",
        dim=128,
    ),
    Case("growing_keys", edit=larger_keys, q_len=900),
    Case("growing_keys_float16", edit=larger_keys, q_len=900, dtype="float16", mask=causal),
    Case("soft_cap", score=scores.soft_cap(2.0), mask=causal, q_len=400),
    Case("alibi", score=scores.alibi(4), mask=causal, q_len=400, heads=4),
    Case("table", score=table, mask=causal, q_len=1007),
    Case("symmetric", score=symmetric, q_len=900),
    Case("symmetric_float16_d128", score=symmetric, q_len=900, dtype="float16", dim=128),
    Case(
        "symmetric_window", score=symmetric, mask=masks.sliding_window(400, 400), q_len=900, dim=128
    ),
    Case("ever_faster", score=ever_faster, q_len=300, kv_len=1003),
    Case("ever_faster_float16", score=ever_faster, mask=causal, q_len=1003, dtype="float16"),
    Case("by_key", score=by_key, q_len=1003, heads=2),
    Case("by_key_causal", score=by_key, mask=causal, q_len=1003, heads=2, batch=2, dim=128),
    Case("by_two_keys", score=by_two_keys, mask=causal, q_len=1003, heads=2),
    Case("by_two_keys_documents", score=by_two_keys, mask=document, q_len=1003, heads=2, dim=128),
    Case(
        "by_key_producer",
        score=by_key,
        mask=masks.sliding_window(150),
        q_len=1003,
        heads=2,
        options={"self_loading": False},
    ),
    Case("by_query", score=by_query, q_len=1003, heads=2),
    Case("gated", score=gated, mask=causal, q_len=500, heads=2),
    Case("dense_bias", score=dense_bias, q_len=300, kv_len=301, heads=2),
    Case("score_that_hides", score=hides_itself, q_len=500),
    Case("infinite_where_masked", score=infinite_where_masked, mask=causal, q_len=300),
    Case("negative_scale", scale=-0.3, mask=causal, q_len=300),
    Case("zero_scale", scale=0.0, q_len=300, mask=causal),
    Case("large_scale", scale=3.0, q_len=300, mask=causal),
    Case("max_scores", score=relative, mask=some_empty_rows, q_len=600, max_scores=True),
    Case("max_scores_no_mods", q_len=333, heads=2, max_scores=True, dim=128),
]

CANVAS = (16, 64)
TILES = masks.tiled_order(CANVAS, (8, 16))
SHIFTED = masks.tiled_order(CANVAS, (8, 16), shift=(0, 6))
SQUARES = masks.tiled_order(CANVAS, (8, 8))

# Linear biases, which the softmax takes into its exponents, and masks that become words of bits.
BIASES = [
    Case("alibi_window", score=scores.alibi(4), mask=masks.sliding_window(300), q_len=900, heads=4),
    Case("alibi_float16", score=scores.alibi(4), mask=causal, q_len=700, heads=4, dtype="float16"),
    Case("alibi_documents", score=scores.alibi(2), mask=document, q_len=1007, heads=2, dim=128),
    Case("steep", score=steep, mask=causal, q_len=400, dim=128),
    Case("bias_by_batch_and_head", score=per_batch_and_head, q_len=333, heads=3, batch=2),
    Case("rows_apart", score=relative, edit=rows_apart, q_len=500),
    Case("rows_apart_window", score=relative, mask=masks.sliding_window(200, 50), edit=rows_apart, q_len=700),
    Case("rows_apart_float16", score=later_keys_win, edit=rows_apart, q_len=500, dtype="float16"),
    Case("far_keys", score=relative, q_len=64, kv_len=20000),
    Case("bias_negative_scale", score=relative, scale=-0.3, q_len=300),
    Case("bias_max_scores", score=relative, q_len=300, max_scores=True),
    Case("bias_empty_rows", score=later_keys_win, mask=some_empty_rows, q_len=600),
    Case("image_in_tiles", mask=masks.neighborhood(TILES, (5, 13)), q_len=1024, heads=2),
    Case("image_shifted_keys", mask=masks.neighborhood(TILES, (5, 13), kv_order=SHIFTED), q_len=1024,
         kv_len=SHIFTED.length, score=later_keys_win, dim=128),
    Case("image_in_squares", mask=masks.neighborhood(SQUARES, (7, 7)), q_len=1024, block=(64, 64)),
    Case("image_in_squares_128", mask=masks.neighborhood(SQUARES, (7, 7)), q_len=1024, dtype="float16"),
    Case("image_by_rows", mask=masks.neighborhood_2d((8, 128), (3, 13)), q_len=1024, block=(128, 64)),
]  # fmt: skip

OPTIONS = [
    Case(f"options_{'_'.join(f'{k}_{v}' for k, v in o.items())}", mask=causal, q_len=700, heads=2,
         options=o, dim=d)
    for d, o in (
        (64, {"trust_maximum": False}),
        (128, {"trust_maximum": False, "persistent": False}),
        (64, {"ping_pong": False}),
        (128, {"stages": 1}),
        (64, {"kv_tile": 64, "stages": 3}),
        (64, {"kv_tile": 128}),
        (64, {"self_loading": False, "kv_tile": 64}),
        (128, {"warpgroups": 1}),
        (64, {"approx_math": False}),
    )
] + [
    Case("options_warpgroups_3", mask=causal, block=(192, 128), q_len=700, options={"warpgroups": 3}),
    Case("options_warpgroups_3_no_mask", q_len=700, options={"warpgroups": 3, "kv_tile": 64}),
    Case("producer", score=scores.alibi(4), mask=masks.sliding_window(300), q_len=900, heads=4, batch=2,
         options={"self_loading": False}),
    Case("producer_documents", mask=document, q_len=1007, heads=12, batch=4, options={"self_loading": False}),
    Case("counted_documents_d128", mask=document, q_len=1007, heads=12, batch=4, dim=128, score=relative),
    Case("counted_empty_rows_d96", mask=some_empty_rows, q_len=1200, heads=6, kv_heads=2, batch=5, dim=96,
         max_scores=True, layout="BLHD"),
    Case("counted_d192", mask=causal, q_len=600, heads=8, batch=7, dim=192,
         options={"persistent": True, "stages": 1}),
    Case("dealt_d128", mask=causal, q_len=1536, batch=3, heads=8, dim=128, options={"counted": False}),
    Case("producer_no_mask", q_len=333, kv_len=1003, batch=3, heads=40, options={"self_loading": False}),
]  # fmt: skip

ALONE = {"warpgroups": 1, "self_loading": True}
SELF_LOADING = [
    Case("self_loading", mask=masks.sliding_window(300, 0), block=(64, 64), q_len=900, heads=4, kv_heads=2,
         edit_mask=with_garbage, layout="BLHD", options=ALONE),
    Case("self_loading_documents", mask=document, block=(64, 128), q_len=1007, heads=2, dim=128, options=ALONE),
    Case("self_loading_many_tiles", mask=document, block=(64, 64), q_len=900, heads=16, batch=4, score=relative),
    Case("self_loading_d256", mask=causal, block=(64, 64), q_len=500, dim=256, options=ALONE),
    Case("self_loading_no_mask", q_len=333, kv_len=1003, batch=2, dtype="float16", score=relative, options=ALONE),
    Case("self_loading_empty_rows", mask=some_empty_rows, block=(64, 64), q_len=600, max_scores=True,
         options=ALONE | {"stages": 1}),
]  # fmt: skip

LAYOUTS = [
    Case("blhd", layout="BLHD", heads=3, batch=2, q_len=300, mask=causal),
    Case(
        "blhd_gqa_odd", layout="BLHD", heads=4, kv_heads=2, batch=2, q_len=203, kv_len=333, dim=128
    ),
]


@cases(*LENGTHS, *HEADS, *DIMS, *BLOCKS, *SCORES, *BIASES, *OPTIONS, *SELF_LOADING, *LAYOUTS)
def test_forward(case):
    check(case)


def test_unvisited_blocks_are_not_read():
    """Keys and values that are not finite, in blocks that no query visits, change nothing."""
    case = Case("poison", q_len=500, mask=lambda b, h, q, k: (k < 128) & (q >= 128))
    problem, operands = case.problem()
    key, value = (x.at[:, :, 128:].set(jnp.nan) for x in (operands.key, operands.value))
    poisoned = dataclasses.replace(operands, key=key, value=value)
    clean, result = (mosaic_gpu.forward(problem, o) for o in (operands, poisoned))
    np.testing.assert_array_equal(
        np.asarray(result.out, np.float32), np.asarray(clean.out, np.float32)
    )
    np.testing.assert_array_equal(np.asarray(result.lse), np.asarray(clean.lse))


def test_results_are_the_same_every_time():
    """Bit by bit: nothing depends on the order in which CTAs run."""
    case = Case("repeated", q_len=1003, heads=5, batch=2, mask=document, layout="BLHD", dim=128)
    problem, operands = case.problem()
    run = jax.jit(lambda o: mosaic_gpu.forward(problem, o).out)
    first = np.asarray(run(operands), np.float32)
    for _ in range(5):
        np.testing.assert_array_equal(np.asarray(run(operands), np.float32), first)
