"""Lengths, heads, head dimensions, dtypes, layouts and block sizes."""

import jax.numpy as jnp

from flexjax import masks, scores
from tests.behaviour.harness import Case, cases, check, normal

causal = masks.causal()


def head_dependent(b, h, q_idx, kv_idx):
    """Head 0 sees everything, the others ever narrower windows."""
    return (h == 0) | (jnp.abs(q_idx - kv_idx) <= 24 // (h + 1))


def batch_dependent(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx + 5 * b


def with_batch_and_head(captures):
    """A score that is wrong as soon as b or h is."""
    return lambda score, b, h, q_idx, kv_idx: score * captures["scale"][b, h]


LENGTHS = [
    Case("len_2", batch=1, q_len=2, kv_len=2),
    Case("len_37", batch=1, q_len=37, kv_len=37, mask=causal, smoke=True),
    Case("len_257_block_128", batch=1, q_len=257, kv_len=257, mask=causal, block=128),
    Case("len_257_without_mask", batch=1, q_len=257, kv_len=257),
    Case("len_1023_block_128", batch=1, heads=1, q_len=1023, kv_len=1023, mask=causal, block=128),
    Case("one_query_masked", batch=1, q_len=1, kv_len=65, mask=masks.causal(64)),
    Case("one_key_for_many_queries", batch=1, q_len=37, kv_len=2, mask=causal),
    Case("fewer_queries_than_keys", batch=1, q_len=37, kv_len=150, mask=masks.causal(113)),
    Case(
        "more_queries_than_keys",
        batch=1,
        q_len=150,
        kv_len=37,
        mask=masks.sliding_window(120, 20),
    ),
]

HEADS = [
    Case("gqa_4_2", heads=4, kv_heads=2, batch=1, mask=causal, smoke=True),
    Case(
        "one_batch_row_and_one_head",
        heads=1,
        batch=1,
        score=with_batch_and_head,
        captures={"scale": normal(1, 1)},
        mask=causal,
    ),
    Case("mqa_4_1", heads=4, kv_heads=1, batch=1, mask=causal),
    Case("gqa_without_mask", heads=6, kv_heads=2, batch=1, q_len=150, kv_len=140),
    Case(
        "gqa_with_a_mask_per_head",
        heads=4,
        kv_heads=2,
        batch=1,
        mask=head_dependent,
        mask_shape=(1, 4),
    ),
    Case(
        "mqa_with_a_mask_per_batch_and_head",
        heads=3,
        kv_heads=1,
        batch=2,
        mask=masks.and_masks(head_dependent, batch_dependent),
        mask_shape=(2, 3),
    ),
    Case(
        "gqa_with_a_score_per_query_head",
        heads=4,
        kv_heads=2,
        score=with_batch_and_head,
        captures={"scale": normal(2, 4)},
        mask=causal,
    ),
]

BROADCAST = [
    Case("keys_shared_by_the_batch", batch=3, kv_batch=1, mask=causal),
    Case(
        "keys_shared_by_the_batch_gqa",
        batch=3,
        kv_batch=1,
        heads=4,
        kv_heads=2,
        score=with_batch_and_head,
        captures={"scale": normal(3, 4)},
        mask=batch_dependent,
        mask_shape=(3, None),
    ),
    Case("mask_per_head", mask=head_dependent, mask_shape=(None, 2)),
    Case("mask_for_all_of_them", mask=causal, mask_shape=(2, 2)),
]

DIMS = [
    *(Case(f"dim_{d}", dim=d, batch=1, q_len=33, kv_len=33) for d in (17, 24, 94, 121, 128)),
    Case("dim_256", dim=256, batch=1, heads=1, q_len=33, kv_len=33, mask=causal),
    Case("dim_16_values_40", dim=16, v_dim=40, batch=1, mask=causal),
    Case("dim_40_values_3", dim=40, v_dim=3, batch=1, mask=causal),
]

BLOCKS = [
    Case(f"block_{name}", block=size, batch=1, q_len=150, kv_len=100, mask=masks.causal())
    for name, size in {
        "16": 16,
        "48": 48,
        "64": 64,
        "128": 128,
        "32_by_64": (32, 64),
        "128_by_32": (128, 32),
        "larger_than_the_lengths": 256,
    }.items()
]

LAYOUTS = [
    Case("blhd", layout="BLHD", batch=1, q_len=37, kv_len=50, heads=3, smoke=True),
    Case(
        "blhd_gqa_masked",
        layout="BLHD",
        q_len=37,
        kv_len=50,
        heads=4,
        kv_heads=2,
        v_dim=5,
        score=with_batch_and_head,
        captures={"scale": normal(2, 4)},
        mask=masks.causal(13),
        sinks=normal(4),
    ),
]

DTYPES = [
    *(
        Case(
            f"{dtype}_soft_capped",
            dtype=dtype,
            batch=1,
            q_len=75,
            kv_len=75,
            dim=32,
            score=lambda c: scores.soft_cap(2.0),
            mask=causal,
        )
        for dtype in ("bfloat16", "float16")
    ),
    Case("bfloat16", dtype="bfloat16", batch=1, q_len=37, kv_len=150, dim=64),
    Case("float16", dtype="float16", batch=1, q_len=37, kv_len=150, dim=64),
    Case(
        "bfloat16_learned_bias",
        dtype="bfloat16",
        batch=1,
        score=lambda c: lambda s, b, h, q, k: s + c["bias"][h, q, k],
        captures={"bias": normal(2, 40, 40)},
        mask=causal,
    ),
    Case("float32_with_bfloat16_keys", kv_dtype="bfloat16", batch=1, mask=causal),
    Case(
        "bfloat16_with_float8_keys",
        dtype="bfloat16",
        kv_dtype="float8_e4m3fn",
        batch=1,
        mask=causal,
        grads=False,
    ),
]


@cases(*LENGTHS, *HEADS, *BROADCAST, *DIMS, *BLOCKS, *LAYOUTS, *DTYPES)
def test_attention(case, backend):
    check(case, backend)
