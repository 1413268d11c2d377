"""The decoding kernel on a GPU, over the caches, shapes, masks and scores that its code tells apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import BlockMask, KVCache, create_block_mask, decode, flex_attention, masks, scores
from flexjax.testing import assert_close, oracle
from tests.mosaic_gpu.decoding import DecodeCase, cases, check

pytestmark = pytest.mark.gpu

causal = masks.causal()
RAGGED = (1500, 0, 37, 1024)


def by_head(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 100 * (h + 1))


def first_and_last(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & ((kv_idx < 4) | (q_idx - kv_idx < 300))


def document(b, h, q_idx, kv_idx):
    ids = jnp.asarray(np.arange(2048, dtype=np.int32) // 300)
    return (ids[q_idx] == ids[kv_idx]) & (q_idx >= kv_idx)


def nothing(b, h, q_idx, kv_idx):
    return (kv_idx > q_idx) & (b == 1)


def table(score, b, h, q_idx, kv_idx):
    values = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4095)), jnp.float32)
    return score + values[h, q_idx - kv_idx + 2047]


def by_indices(score, b, h, q_idx, kv_idx):
    gates = jnp.asarray(np.random.default_rng(1).standard_normal((4, 4)), jnp.float32)
    return score * gates[b, h] + 0.001 * (q_idx - kv_idx)


def not_finite_where_masked(score, b, h, q_idx, kv_idx):
    return jnp.where(kv_idx > q_idx, jnp.nan, score)


def later_keys_win(score, b, h, q_idx, kv_idx):
    return score + 0.5 * kv_idx


def listed(b, h, q_idx, kv_idx):
    return (kv_idx < 300 + 100 * h) | ((kv_idx >= 1024) & (kv_idx < 1100))


def listed_by_head(heads):
    return lambda: create_block_mask(listed, None, heads, 2, 1536)


def chosen(b, h, q_idx, kv_idx):
    return (kv_idx // 128) % 3 == h % 3


def chosen_blocks():
    """Blocks of keys by a score, others for every head, without a mask in them."""
    columns = jnp.arange(12)[None, None, None, :]
    heads = jnp.arange(4)[None, :, None, None]
    wanted = (columns % 3 == heads % 3).astype(jnp.float32)
    return BlockMask.from_block_scores(
        wanted, top_k=4, seq_lengths=(1, 1536), block_size=(128, 128)
    )


def case(id, lengths=RAGGED, capacity=1536, heads=4, kv_heads=2, dim=128, **rest):
    return DecodeCase(id, lengths, capacity, heads=heads, kv_heads=kv_heads, dim=dim, **rest)


SHAPES = [
    case("bare"),
    case("one_long", (1536, 1, 1, 1)),
    case("all_empty", (0, 0)),
    case("odd_capacity", (1001, 77), 1001),
    case("one_sequence", (1333,)),
    case("many_sequences", tuple(range(0, 600, 7)), 640, dim=64),
    case("mha", heads=4, kv_heads=4, mask=causal),
    case("mqa_32", (900, 1000), 1024, heads=32, kv_heads=1, mask=causal),
    case("shared_cache", (700, 700, 700), 768, kv_batch=1, mask=causal),
    case("blhd", layout="BLHD", q_len=3, mask=causal),
    case("long_cache", (40000, 131072), 131072, dim=64, mask=masks.sliding_window(1024)),
    *(case(f"queries_{n}", (1500, 300), q_len=n, mask=causal) for n in (2, 4, 16, 17, 64)),
    case("queries_16_bare", (1500, 9), q_len=16),
    case("chunk_of_a_prompt", (1500, 300), q_len=200, mask=causal, heads=8),
    *(case(f"dim_{d}", RAGGED, dim=d, mask=causal, q_len=2) for d in (16, 32, 40, 64, 80, 96, 112, 192, 256)),
    case("dim_192_v_128", dim=192, v_dim=128, mask=causal),
    case("dim_64_v_128", dim=64, v_dim=128),
    case("float16", dtype="float16", score=scores.soft_cap(5.0), mask=causal),
    case("kv_tile_128", dim=64, options={"kv_tile": 128, "stages": 2}),
    case("kv_tile_64", dim=64, options={"kv_tile": 64, "stages": 1}),
    case("few_ctas", options={"ctas": 5}),
    case("many_ctas", options={"ctas": 1000}),
    case("whole_tiles", (4096,) * 8, 4096, options={"ctas": 17}, q_len=16, mask=causal),
]  # fmt: skip

MODS = [
    case("window", mask=masks.sliding_window(200)),
    case("window_4", mask=masks.sliding_window(200), q_len=4),
    case("first_and_last", mask=first_and_last, q_len=2),
    case("by_head", mask=by_head, q_len=2),
    case("document", mask=document, q_len=2),
    case("nothing_visible", mask=nothing),
    case("dilated", mask=masks.dilated_window(100, 3)),
    case("chunked", mask=masks.chunked(256), q_len=4),
    case("alibi", score=scores.alibi(4), mask=causal, q_len=4),
    case("soft_cap", score=scores.soft_cap(3.0), mask=causal),
    case("table", score=table, mask=causal, q_len=3),
    case("by_indices", score=by_indices),
    case("later_keys_win", score=later_keys_win, q_len=2),
    case("not_finite_where_masked", score=not_finite_where_masked, mask=causal, q_len=4),
    case("negative_scale", scale=-0.2),
    case("listed_blocks", (1500, 1100), blocks=listed_by_head(4), listed=listed, q_len=2),
    case("chosen_blocks", (1500, 1100), blocks=chosen_blocks, listed=chosen),
]

PAGED = [
    *(case(f"page_{p}", page=p, mask=causal, q_len=2) for p in (16, 32, 64, 128, 256)),
    *(case(f"page_{p}_d64", page=p, dim=64, score=scores.alibi(4)) for p in (16, 128)),
    case("page_16_window", page=16, mask=masks.sliding_window(200)),
    case("page_64_pieces", page=64, mask=first_and_last, q_len=4, layout="BLHD"),
    case("page_16_blocks", (1500, 1100), page=16, blocks=chosen_blocks, listed=chosen),
    case("page_32_d256_float16", page=32, dim=256, dtype="float16", score=table),
]


@cases(*SHAPES, *MODS, *PAGED)
def test_decode(case):
    check(case, "mosaic_gpu")


def random(shape, seed):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


@pytest.mark.parametrize("mask", [None, causal, masks.causal(1990), first_and_last])
@pytest.mark.parametrize("layout", ["BHLD", "BLHD"])
def test_flex_attention_with_few_queries(mask, layout):
    """The decoding kernel computes it, and the usual one its gradients."""
    shapes = [(2, 8, 10, 64), (2, 2, 2000, 64), (2, 2, 2000, 64)]
    arrays = [random(s, i) for i, s in enumerate(shapes)]

    def swap(x):
        return jnp.swapaxes(x, 1, 2) if layout == "BLHD" else x

    def attend(*args, **options):
        args = (swap(x) for x in args)
        out = flex_attention(*args, scores.soft_cap(5.0), mask_mod=mask, layout=layout, **options)
        return swap(out)

    lowered = jax.jit(attend).lower(*arrays).as_text()
    assert "flexjax_decode" in lowered
    mods = {"score_mod": scores.soft_cap(5.0), "mask_mod": mask}
    assert_close(
        "out",
        attend(*arrays),
        oracle(*arrays, **mods).out,
        lambda: oracle(*arrays, **mods, exact=False).out,
        floor=1e-3,
    )
    mine, usual = (
        jax.grad(lambda *a, b=b: attend(*a, backend=b).astype(jnp.float32).sum(), (0, 1, 2))(
            *arrays
        )
        for b in ("mosaic_gpu", "xla")
    )
    for a, b in zip(mine, usual, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), atol=3e-2, rtol=3e-2
        )


def test_cache_grows_in_a_scan():
    """Appending and decoding, lengths as data, in one program with a donated cache."""
    q, k, v = (random((3, 4, 40, 64), i) for i in range(3))
    mask = masks.sliding_window(16)

    def generate(cache):
        def step(cache, qkv):
            query, key, value = (x[:, :, None] for x in qkv)
            cache = cache.append(key, value)
            return cache, decode(query, cache, mask_mod=mask, backend="mosaic_gpu")[:, :, 0]

        return jax.lax.scan(step, cache, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v)))

    _, out = jax.jit(generate, donate_argnums=0)(KVCache.empty(3, 4, 64, 64))
    exact = oracle(q, k, v, mask_mod=mask)
    dense = oracle(q, k, v, mask_mod=mask, exact=False)
    assert_close("out", jnp.moveaxis(out, 0, 2), exact.out, lambda: dense.out, floor=1e-3)


def test_results_are_the_same_every_time():
    """Bit by bit: the shares of the CTAs depend on the lengths alone."""
    repeated = case("repeated", mask=document, page=16, q_len=4)
    first = repeated.decode("mosaic_gpu")[0]
    for _ in range(5):
        np.testing.assert_array_equal(
            np.asarray(repeated.decode("mosaic_gpu")[0], np.float32), np.asarray(first, np.float32)
        )
