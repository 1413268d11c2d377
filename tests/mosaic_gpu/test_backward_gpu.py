"""The backward kernels on a GPU, over the shapes, masks, scores and captures that their code tells apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import masks, scores
from flexjax.backends import mosaic_gpu
from flexjax.block_mask import BlockMask
from tests.mosaic_gpu.attention import cases
from tests.mosaic_gpu.gradients import GradientCase, check_gradients
from tests.mosaic_gpu.test_forward_gpu import (
    by_batch,
    by_head,
    by_indices,
    checkered,
    document,
    relative,
    some_empty_rows,
)

pytestmark = pytest.mark.gpu

causal = masks.causal()
DETERMINISTIC = {"deterministic": True}


def empty_columns(b, h, q_idx, kv_idx):
    """Keys that no query sees, whole blocks of them too."""
    return (kv_idx % 5 != 0) & ((kv_idx < 128) | (kv_idx > 400)) & (kv_idx <= q_idx + 300)


def not_finite_where_masked(score, b, h, q_idx, kv_idx):
    """Infinite or NaN where masked, and in its derivative; and past the last query and key."""
    bad = jnp.where(kv_idx % 2 == 0, jnp.nan, jnp.inf)
    beyond = 1.0 / (299 - q_idx + 1) + jnp.sqrt(1.0 * (299 - kv_idx))
    return score * jnp.where(kv_idx > q_idx, bad, 1.0) + 0.1 * beyond


def finite(score, b, h, q_idx, kv_idx):
    return score + 0.1 * (1.0 / (299 - q_idx + 1) + jnp.sqrt(1.0 * (299 - kv_idx)))


def hides_itself(score, b, h, q_idx, kv_idx):
    return jnp.where((kv_idx <= q_idx) & (q_idx % 5 != 0), score, -jnp.inf)


def random(*shapes, dtype=jnp.float32):
    return lambda rng: tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)


# -- what score_mods capture ------------------------------------------------------------------------


def slopes(captured):
    (gate,) = captured
    return lambda s, b, h, q, k: s * gate[h]


def scalar(captured):
    (factor,) = captured
    return lambda s, b, h, q, k: s * factor


def by_batch_and_head(captured):
    (gate,) = captured
    return lambda s, b, h, q, k: s + gate[b, h] * (q - k) * 0.01


def by_query(captured):
    (bias,) = captured
    return lambda s, b, h, q, k: s + bias[h, q] * jnp.sin(k * 0.1)


def by_key(captured):
    (bias,) = captured
    return lambda s, b, h, q, k: s + bias[k]


def symmetric(captured):
    """One array read twice, which PyTorch refuses."""
    (bias,) = captured
    return lambda s, b, h, q, k: s + bias[q] * bias[k]


def table(captured):
    (values,) = captured
    return lambda s, b, h, q, k: s + values[h, q - k + 500]


def clipped_table(captured):
    (values,) = captured
    return lambda s, b, h, q, k: s * (1.0 + 0.1 * values[jnp.clip(q - k, -20, 20) + 20])


def buckets(captured):
    """Distances in logarithmic buckets, as T5 has them."""
    (values,) = captured

    def score_mod(s, b, h, q, k):
        distance = jnp.maximum(q - k, 0)
        large = 8 + (jnp.log((distance + 0.5) / 8.0) / np.log(16.0) * 8).astype(jnp.int32)
        return s + values[h, jnp.where(distance < 8, distance, jnp.minimum(large, 15))]

    return score_mod


def dense_bias(captured):
    (bias,) = captured
    return lambda s, b, h, q, k: s + bias[b, h, q, k]


def shared_bias(captured):
    (bias,) = captured
    return lambda s, b, h, q, k: s + bias[q, k]


def indirect(captured):
    (bias,) = captured
    order = jnp.asarray(np.random.default_rng(3).integers(0, 50, 300), jnp.int32)
    return lambda s, b, h, q, k: s + bias[order[q], order[k]]


def everything(captured):
    gate, rows, columns, values = captured

    def score_mod(s, b, h, q, k):
        return jnp.tanh(s * gate[h] + rows[h, q]) + columns[b, k] * values[q - k + 300]

    return score_mod


LENGTHS = [
    GradientCase("one_query", q_len=1, kv_len=130),
    GradientCase("one_key", q_len=70, kv_len=1),
    GradientCase("len_37_causal", q_len=37, mask=causal),
    GradientCase("len_64", q_len=64),
    GradientCase("len_128_causal_d128", q_len=128, mask=causal, dim=128),
    GradientCase("len_257", q_len=257, cotangents_of_lse=True),
    GradientCase("len_1003_causal", q_len=1003, mask=causal, heads=3, batch=2),
    GradientCase("len_1003_causal_d128", q_len=1003, mask=causal, heads=3, batch=2, dim=128),
    GradientCase("cross_907_1003", q_len=907, kv_len=1003, mask=masks.causal(96), heads=2, dim=128),
    GradientCase("cross_1003_333", q_len=1003, kv_len=333, heads=2, cotangents_of_lse=True),
    GradientCase("many_tiles", q_len=2048, mask=causal, batch=2, heads=10, dim=32),
    GradientCase("many_tiles_empty_columns", q_len=2048, mask=empty_columns, batch=2, heads=10),
    GradientCase("many_tiles_gqa", q_len=1100, mask=masks.sliding_window(300), batch=2, heads=40, kv_heads=20,
                 cotangents_of_lse=True),
]  # fmt: skip

HEADS = [
    GradientCase("gqa_6_2", heads=6, kv_heads=2, q_len=300, dim=128),
    GradientCase("mqa_4_1", heads=4, kv_heads=1, q_len=200, mask=causal, batch=2),
    GradientCase("kv_batch_1", batch=3, kv_batch=1, heads=2, q_len=200, mask=causal, dim=128),
    GradientCase("mask_by_head", heads=3, q_len=700, mask=by_head, mask_shape=(None, 3)),
    GradientCase("mask_by_both", batch=2, heads=4, kv_heads=2, q_len=400, layout="BLHD",
                 mask=masks.and_masks(by_head, by_batch), mask_shape=(2, 4)),
    GradientCase("score_by_indices", batch=2, heads=3, q_len=150, score=by_indices),
    GradientCase("blhd_gqa_odd", layout="BLHD", heads=4, kv_heads=2, batch=2, q_len=203, kv_len=333, dim=128),
]  # fmt: skip

DIMS = [
    *(GradientCase(f"dim_{d}", dim=d, q_len=300, heads=2, mask=causal) for d in (8, 16, 40, 72, 80, 96, 112)),
    *(GradientCase(f"dim_{d}", dim=d, q_len=300, heads=2, mask=causal) for d in (160, 192, 224, 256)),
    GradientCase("dim_256_blhd_gqa", dim=256, q_len=203, kv_len=333, heads=4, kv_heads=2, layout="BLHD"),
    GradientCase("dim_192_v_128", dim=192, v_dim=128, q_len=300, mask=causal),
    GradientCase("dim_64_v_128", dim=64, v_dim=128, q_len=300),
    GradientCase("dim_128_v_64", dim=128, v_dim=64, q_len=300, layout="BLHD"),
    GradientCase("dim_16_v_128", dim=16, v_dim=128, q_len=203),
    GradientCase("dim_40_v_24_float16", dim=40, v_dim=24, q_len=203, dtype="float16"),
    GradientCase("dim_128_float16", dim=128, q_len=300, mask=causal, dtype="float16"),
]  # fmt: skip

BLOCKS = [
    *(
        GradientCase(f"blocks_{q}x{k}", block=(q, k), q_len=900, kv_len=801, mask=masks.sliding_window(200, 50))
        for q, k in ((64, 64), (128, 64), (64, 128), (256, 256), (128, 512), (192, 192), (1024, 1024))
    ),
    GradientCase("blocks_64_d128", block=(64, 64), q_len=500, mask=causal, dim=128, heads=2),
    GradientCase("documents", mask=document, q_len=1007, heads=2),
    GradientCase("documents_d128", mask=document, q_len=1007, heads=2, dim=128, layout="BLHD"),
    GradientCase("checkered", mask=checkered, q_len=601, heads=4, kv_heads=2),
    GradientCase("checkered_d128", mask=checkered, q_len=601, heads=4, dim=128),
    GradientCase("empty_rows", mask=some_empty_rows, q_len=600, cotangents_of_lse=True),
    GradientCase("empty_columns", mask=empty_columns, q_len=600, dim=128),
    GradientCase("prefix", mask=masks.prefix_lm(300), q_len=777),
]  # fmt: skip

SCORES = [
    GradientCase("relative", score=relative, q_len=500),
    GradientCase("soft_cap", score=scores.soft_cap(2.0), mask=causal, q_len=400, heads=2),
    GradientCase("soft_cap_d128", score=scores.soft_cap(2.0), mask=causal, q_len=400, dim=128),
    GradientCase("alibi_d128", score=scores.alibi(4), mask=causal, q_len=400, heads=4, dim=128),
    GradientCase("not_finite_where_masked", score=not_finite_where_masked, exact_score=finite, mask=causal,
                 q_len=299),
    GradientCase("score_that_hides", score=hides_itself, exact_score=lambda s, b, h, q, k: s, q_len=300,
                 mask=lambda b, h, q, k: (k <= q) & (q % 5 != 0), block=None),
    GradientCase("negative_scale", scale=-0.3, mask=causal, q_len=300),
]  # fmt: skip

CAPTURES = [
    GradientCase("scalar", score=scalar, captures=random(()), q_len=200, heads=2),
    GradientCase("slopes", score=slopes, captures=random((3,)), q_len=300, heads=3, mask=causal, dim=128),
    GradientCase("by_batch_and_head", score=by_batch_and_head, captures=random((2, 2)), batch=2, heads=2,
                 q_len=200),
    GradientCase("by_query", score=by_query, captures=random((2, 300)), heads=2, q_len=300),
    GradientCase("by_query_d128", score=by_query, captures=random((2, 300)), heads=2, q_len=300, dim=128),
    GradientCase("by_key_bfloat16", score=by_key, captures=random((333,), dtype=jnp.bfloat16), heads=2,
                 q_len=300, kv_len=333),
    GradientCase("symmetric", score=symmetric, captures=random((300,)), q_len=300, mask=causal),
    GradientCase("table", score=table, captures=random((2, 1001)), q_len=500, heads=2, mask=causal),
    GradientCase("table_d128", score=table, captures=random((2, 1001)), q_len=500, kv_len=400, heads=2, dim=128),
    GradientCase("clipped_table", score=clipped_table, captures=random((41,)), q_len=300, batch=2, heads=2),
    GradientCase("buckets", score=buckets, captures=random((2, 16)), q_len=300, heads=2, mask=causal),
    GradientCase("dense_bias", score=dense_bias, captures=random((2, 2, 203, 205)), q_len=203, kv_len=205,
                 heads=2, batch=2, dim=128),
    GradientCase("shared_bias", score=shared_bias, captures=random((203, 205)), q_len=203, kv_len=205, heads=3),
    GradientCase("indirect", score=indirect, captures=random((50, 50)), q_len=300, heads=2),
    GradientCase("everything", score=everything, captures=random((2,), (2, 290), (2, 290), (600,)), q_len=290,
                 batch=2, heads=2, mask=causal, kv_heads=1),
]  # fmt: skip

# Full steps overlap.
OVERLAPPED = [
    GradientCase("overlapped_d128", q_len=300, kv_len=768, heads=4, kv_heads=2, batch=2, dim=128),
    GradientCase("overlapped_one_step", q_len=64, kv_len=128, dim=128),
    GradientCase("overlapped_d96_blhd", q_len=640, heads=2, dim=96, layout="BLHD", cotangents_of_lse=True),
    GradientCase("overlapped_dense_bias", score=everything, captures=random((2,), (2, 384), (2, 384), (800,)),
                 q_len=384, batch=2, heads=2, kv_heads=1, dim=128),
]  # fmt: skip

WHOLE = {"backward_shares": 1}
# Small problems have few columns, which are shared out unless they are told not to be.
SEVERAL_ROWS = [
    GradientCase("rows_gqa_6_2_d128", heads=6, kv_heads=2, q_len=300, dim=128, options=WHOLE),
    GradientCase("rows_causal_d128", heads=4, kv_heads=2, q_len=300, mask=causal, dim=128, options=WHOLE),
    GradientCase("rows_kv_batch_1", batch=3, kv_batch=1, heads=2, q_len=200, mask=causal, dim=128, options=WHOLE),
    GradientCase("rows_mqa_4_1", heads=4, kv_heads=1, q_len=200, mask=causal, batch=2, options=WHOLE),
    GradientCase("rows_blhd_odd", layout="BLHD", heads=4, kv_heads=2, batch=2, q_len=203, kv_len=333, dim=128,
                 options=WHOLE),
    GradientCase("rows_d256", dim=256, q_len=203, kv_len=333, heads=4, kv_heads=2, layout="BLHD", options=WHOLE),
    GradientCase("rows_blocks_64", block=(64, 64), heads=4, kv_heads=2, q_len=500, mask=causal, options=WHOLE),
    GradientCase("rows_everything", score=everything, captures=random((2,), (2, 290), (2, 290), (600,)), q_len=290,
                 batch=2, heads=2, mask=causal, kv_heads=1, options=WHOLE),
    GradientCase("rows_everything_d128", score=everything, captures=random((2,), (2, 384), (2, 384), (800,)),
                 q_len=384, batch=2, heads=2, kv_heads=1, dim=128, options=WHOLE),
]  # fmt: skip

PERSISTENT = {"backward_persistent": True}
# More columns than multiprocessors.
MANY_COLUMNS = [
    GradientCase("columns_causal_d64", q_len=1100, batch=2, heads=10, mask=causal, options=PERSISTENT),
    GradientCase("columns_causal_d48", q_len=1100, batch=2, heads=10, mask=causal, dim=48, options=PERSISTENT),
    GradientCase("columns_causal_d40_blhd", q_len=1100, batch=2, heads=10, kv_heads=5, mask=causal, dim=40,
                 layout="BLHD", options=PERSISTENT),
    GradientCase("columns_document_d32_f16", q_len=1100, batch=2, heads=10, mask=document, dim=32,
                 dtype="float16", options=PERSISTENT),
    GradientCase("columns_few_keys_d16", q_len=1111, kv_len=70, batch=3, heads=4, kv_heads=1, dim=16,
                 options=PERSISTENT),
    GradientCase("columns_empty_d64", q_len=1100, batch=2, heads=10, options=PERSISTENT,
                 mask=lambda b, h, q, k: (q >= k) & (k // 256 % 2 == 0)),
    GradientCase("columns_noop_d64", q_len=1100, batch=2, heads=10, options=PERSISTENT),
    GradientCase("columns_slopes", score=slopes, captures=random((10,)), q_len=1100, batch=2, heads=10,
                 mask=causal, options=PERSISTENT),
]  # fmt: skip

OPTIONS = [
    GradientCase(f"options_{i}_{'_'.join(f'{k}_{v}' for k, v in o.items())}_d{d}", mask=m, q_len=700, heads=2,
                 options=o, dim=d)
    for i, (d, m, o) in enumerate((
        (128, causal, {"backward_order": "dk_first"}),
        (64, None, {"backward_order": "dq_first"}),
        (64, causal, {"backward_q_tile": 64}),
        (128, causal, {"backward_stages": 1}),
        (128, causal, {"backward_warpgroups": 1}),
        (64, causal, {"approx_math": False}),
    ))
]  # fmt: skip

DETERMINED = [
    GradientCase("deterministic_causal_d128", mask=causal, q_len=1003, heads=2, dim=128, options=DETERMINISTIC),
    GradientCase("deterministic_gqa_blhd", layout="BLHD", heads=4, kv_heads=2, batch=2, q_len=203, kv_len=333,
                 options=DETERMINISTIC, cotangents_of_lse=True),
    GradientCase("deterministic_blocks_64", block=(64, 64), q_len=500, mask=document, options=DETERMINISTIC),
    GradientCase("deterministic_symmetric", score=symmetric, captures=random((300,)), q_len=300, mask=causal,
                 options=DETERMINISTIC),
    GradientCase("deterministic_slopes", score=slopes, captures=random((3,)), q_len=300, heads=3, dim=128,
                 options=DETERMINISTIC),
    GradientCase("deterministic_d256", mask=causal, q_len=300, dim=256, options=DETERMINISTIC),
    # Without a block mask columns add to dQ one after another.
    GradientCase("deterministic_noop_d128", q_len=1003, kv_len=1100, heads=2, batch=2, dim=128,
                 options=DETERMINISTIC),
    GradientCase("deterministic_noop_gqa", q_len=333, kv_len=700, heads=6, kv_heads=2, batch=2, layout="BLHD",
                 options=DETERMINISTIC),
    GradientCase("deterministic_noop_d256", q_len=300, kv_len=500, heads=2, dim=256, options=DETERMINISTIC),
    GradientCase("deterministic_noop_d16", q_len=200, kv_len=300, dim=16,
                 options=DETERMINISTIC | {"backward_q_tile": 64}),
    GradientCase("deterministic_empty_rows", mask=some_empty_rows, q_len=600, options=DETERMINISTIC),
]  # fmt: skip

ALONE = {"backward_warpgroups": 1, "backward_self_loading": True}
SELF_LOADING = [
    GradientCase("self_loading", mask=some_empty_rows, block=(64, 64), q_len=600, kv_len=500, heads=4, kv_heads=2,
                 layout="BLHD", options=ALONE),
    GradientCase("self_loading_d128", mask=document, block=(64, 64), q_len=500, heads=2, dim=128, options=ALONE),
    GradientCase("self_loading_captures", score=everything, captures=random((2,), (2, 290), (2, 290), (600,)),
                 q_len=290, heads=2, mask=causal, block=(64, 64), options=ALONE),
]  # fmt: skip


@cases(
    *LENGTHS,
    *HEADS,
    *DIMS,
    *BLOCKS,
    *SCORES,
    *CAPTURES,
    *OVERLAPPED,
    *SEVERAL_ROWS,
    *MANY_COLUMNS,
    *OPTIONS,
    *DETERMINED,
    *SELF_LOADING,
)
def test_backward(case):
    check_gradients(case)


def spoiled(mask: BlockMask) -> BlockMask:
    """Entries past the counts of the transposed lists that point anywhere."""

    def garbage(counts, indices):
        indices = jnp.pad(indices, ((0, 0), (0, 0), (0, 0), (0, 3)))
        place = jnp.broadcast_to(jnp.arange(indices.shape[-1]), indices.shape)
        anywhere = jnp.where(place % 2 == 0, jnp.int32(2**31 - 1), jnp.int32(-(2**31)))
        return jnp.where(place < counts[..., None], indices, anywhere)

    return dataclasses.replace(
        mask,
        q_indices=garbage(mask.q_num_blocks, mask.q_indices),
        full_q_indices=garbage(mask.full_q_num_blocks, mask.full_q_indices),
    )


def test_garbage_past_the_counts():
    check_gradients(
        GradientCase(
            "garbage", mask=masks.sliding_window(150, 0), q_len=700, edit_mask=spoiled, dim=128
        )
    )


def _equal(x, y):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


@pytest.mark.parametrize("options", [{}, DETERMINISTIC], ids=["fused", "deterministic"])
def test_unvisited_blocks_are_not_read(options):
    """What is not finite in blocks that nobody visits changes nothing."""
    case = GradientCase("poison", q_len=500, mask=lambda b, h, q, k: (k < 128) & (q >= 128))
    problem, operands, result, d_out, d_lse = case.inputs(**options)
    key, value = (x.at[:, :, 128:].set(jnp.nan) for x in (operands.key, operands.value))
    query = operands.query.at[:, :, :128].set(jnp.nan)
    poisoned = dataclasses.replace(operands, query=query, key=key, value=value)
    clean, other = (
        mosaic_gpu.backward(problem, o, result, d_out, d_lse) for o in (operands, poisoned)
    )
    _equal(clean, other)


@pytest.mark.parametrize("dim", [32, 64])
def test_a_batch_row_spoils_no_other(dim):
    """CTAs that take a column of one batch row after that of another leave nothing of it behind."""
    case = GradientCase("spoiled_row", q_len=1100, batch=2, heads=10, mask=causal, dim=dim)
    problem, operands, *others = case.inputs(backward_persistent=True)
    spoiled = dataclasses.replace(operands, key=operands.key.at[1].set(jnp.nan))
    clean, other = (mosaic_gpu.backward(problem, x, *others) for x in (operands, spoiled))
    for name in ("query", "key", "value"):
        a, b = (np.asarray(getattr(x, name)[0], np.float64) for x in (clean, other))
        np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02 * np.abs(a).max())


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "attention",
    [
        {"mask": document, "score": symmetric, "captures": random((1003,)), "layout": "BLHD", "heads": 5},
        {"score": slopes, "captures": random((4,)), "heads": 4, "kv_len": 2100},
        {"heads": 6, "kv_heads": 2, "layout": "BLHD", "kv_len": 1500},
    ],
    ids=["mask", "slopes", "groups"],
)  # fmt: skip
def test_deterministic_results_are_the_same_every_time(dim, attention):
    """Bit by bit, captured arrays included."""
    case = GradientCase(
        "repeated", q_len=1003, batch=2, dim=dim, options=DETERMINISTIC, **attention
    )
    problem, *args = case.inputs()
    run = jax.jit(lambda *args: mosaic_gpu.backward(problem, *args))
    first = run(*args)
    for _ in range(5):
        _equal(run(*args), first)
