"""flexjax.decode and KVCache, on the portable backend: what a user sees."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexjax
from flexjax import (
    AuxRequest,
    BlockMask,
    KVCache,
    create_block_mask,
    decode,
    flex_attention,
    masks,
    scores,
)
from tests.mosaic_gpu.decoding import DecodeCase, cases, check

causal = masks.causal()
RAGGED = (150, 0, 37)


def by_all(score, b, h, q_idx, kv_idx):
    gates = jnp.asarray([[0.5, 1.0], [2.0, -1.0], [0.3, 0.7]])
    return score * gates[b, h] + 0.01 * (q_idx - kv_idx)


def document(b, h, q_idx, kv_idx):
    ids = jnp.asarray(np.arange(160, dtype=np.int32) // 50)
    return (ids[q_idx] == ids[kv_idx]) & (q_idx >= kv_idx)


def listed(b, h, q_idx, kv_idx):
    return (kv_idx < 30 + 10 * h) | (kv_idx >= 64)


def listed_blocks():
    return create_block_mask(listed, None, 2, 4, 160, (128, 32))


def random(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


small = functools.partial(DecodeCase, capacity=160, dtype="float32", dim=16)


@cases(
    small("causal_alibi_4", RAGGED, score=scores.alibi(4), mask=causal, heads=4, kv_heads=2, q_len=4),
    small("captured_arrays_paged", (160, 0, 17), score=by_all, mask=document, page=32, layout="BLHD", v_dim=24),
    small("listed_blocks", RAGGED, blocks=listed_blocks, listed=listed, q_len=4),
    small("shared_cache_bare", (90, 90, 90), q_len=3, kv_batch=1, scale=0.7),
)  # fmt: skip
def test_decode(case):
    check(case)


def test_decoding_gives_what_training_saw():
    """Token by token, from an empty cache in a scan, as one pass over the whole sequence: the same mods."""
    batch, heads, length, dim = 2, 2, 12, 8
    q, k, v = (random(batch, heads, length, dim, seed=i) for i in range(3))
    score, mask = scores.alibi(heads), masks.sliding_window(5)
    sinks = jnp.asarray([0.5, -1.0])
    whole = flex_attention(q, k, v, score, mask_mod=mask, sinks=sinks)

    @jax.jit
    def generate(cache):
        def step(cache, qkv):
            query, key, value = (x[:, :, None] for x in qkv)
            cache = cache.append(key, value)
            return cache, decode(query, cache, score, mask, sinks=sinks)[:, :, 0]

        return jax.lax.scan(step, cache, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v)))

    cache, out = generate(KVCache.empty(batch, heads, 16, dim, dtype=jnp.float32))
    np.testing.assert_allclose(jnp.moveaxis(out, 0, 2), whole, atol=2e-6)
    assert cache.lengths.tolist() == [length, length]


def test_lengths_are_data():
    traced = []

    @functools.partial(jax.jit, donate_argnums=1)
    def step(query, cache):
        traced.append(1)
        cache = cache.append(query, query)
        return cache, decode(query, cache, mask_mod=causal)

    cache = KVCache.empty(1, 1, 8, 4, dtype=jnp.float32)
    for i in range(4):
        cache, _ = step(random(1, 1, 1, 4, seed=i), cache)
    assert (len(traced), cache.lengths.tolist()) == (1, [4])


def test_vmap():
    """Lanes with lengths, tables and pools of their own."""
    lanes = [small(f"lane_{i}", n, page=16, q_len=2) for i, n in enumerate([(150, 0), (9, 80)])]
    query = jnp.stack([c.query for c in lanes])
    caches = jax.tree.map(lambda *x: jnp.stack(x), *(c.cache for c in lanes))
    step = jax.jit(decode)
    apart = np.stack([step(c.query, c.cache) for c in lanes])
    np.testing.assert_allclose(jax.jit(jax.vmap(decode))(query, caches), apart, atol=1e-6)


def test_gradients():
    """Of a contiguous cache, as of any attention; pages have none, and say so."""
    case = small("gradients", (150, 30), mask=causal, q_len=3)
    query, cache = case.query, jax.tree.map(jnp.nan_to_num, case.cache)

    def loss(query, key, value):
        return jnp.sum(jnp.sin(decode(query, KVCache(key, value, cache.lengths), mask_mod=causal)))

    def dense(query, key, value):
        def mask(b, h, q, k):
            return q + cache.lengths[b] - 3 >= k

        return jnp.sum(
            jnp.sin(flex_attention(query, key, value, mask_mod=mask, backend="reference"))
        )

    args = query, cache.key, cache.value
    mine, exact = (jax.jit(jax.grad(f, (0, 1, 2)))(*args) for f in (loss, dense))
    for a, b in zip(mine, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    paged = small("paged", (150, 30), page=16)
    with pytest.raises(NotImplementedError, match="no gradients"):
        jax.eval_shape(jax.grad(lambda q: decode(q, paged.cache).sum()), paged.query)


def test_traced_lengths_are_clamped():
    """Lengths that cannot be checked count as those of a full, or of an empty cache."""
    q, k = random(2, 1, 2, 8), random(2, 1, 5, 8, seed=1)
    step = jax.jit(lambda n: decode(q, KVCache(k, k, n), scores.alibi(1), causal))
    inside, outside = (jnp.asarray(n, jnp.int32) for n in ((5, 0), (9, -3)))
    np.testing.assert_array_equal(step(outside), step(inside))


def test_append():
    cache = KVCache.empty(2, 1, 4, 2, dtype=jnp.float32, layout="BLHD")
    new = jnp.arange(8, dtype=jnp.float32).reshape(2, 2, 1, 2)
    cache = cache.append(new, -new)
    cache = flexjax.KVCache(cache.key, cache.value, jnp.asarray([1, 2], jnp.int32), "BLHD")
    grown = cache.append(new, new)
    np.testing.assert_array_equal(grown.key[0, :3, 0], [[0, 1], [0, 1], [2, 3]])
    np.testing.assert_array_equal(grown.key[1, :, 0], [[4, 5], [6, 7], [4, 5], [6, 7]])
    assert grown.lengths.tolist() == [3, 4]
    with pytest.raises(ValueError, match=r"2 tokens do not fit .* \[3, 4\] .* capacity 4"):
        grown.append(new, new)
    with pytest.raises(ValueError, match="number of new tokens"):
        cache.append(new[:, :, 0], new)
    # Nothing is overwritten where there is no room; the length tells.
    after = jax.jit(lambda c: c.append(new[:, :1], new[:, :1]))(grown)
    np.testing.assert_array_equal(after.key[1], grown.key[1])
    np.testing.assert_array_equal(after.key[0, 3, 0], [0, 1])
    assert after.lengths.tolist() == [4, 4]


def test_append_leaves_alone_what_has_no_valid_length():
    new = np.ones((1, 1, 1, 8), np.float32)
    empty = np.zeros((1, 1, 16, 8), np.float32)
    with pytest.raises(ValueError, match="at least 0"):
        KVCache(empty, empty, jnp.array([-1])).append(new, new)
    append = jax.jit(lambda c: c.append(new, new))
    for length in (-1, 2**31 - 1):
        after = append(KVCache(empty, empty, jnp.array([length])))
        assert not after.key.any()
        assert after.lengths.tolist() == [length]
    with pytest.raises(ValueError, match=r"integers of shape \(1,\)"):
        KVCache(empty, empty, jnp.array([1, 2])).append(new, new)
    with pytest.raises(ValueError, match="dtype float32"):
        KVCache(empty, empty, jnp.array([1.0])).append(new, new)
    assert KVCache(empty, empty, 3).append(new, new).key[0, 0, 3].all()


def test_defaults():
    """Lengths may be left out or be one for all; a query without tokens gives an empty output."""
    q, k = random(2, 2, 1, 8), random(2, 1, 5, 8, seed=1)
    step = jax.jit(decode)
    full = step(q, KVCache(k, k))
    np.testing.assert_array_equal(full, step(q, KVCache(k, k, jnp.int32(5))))
    out, aux = decode(q[:, :, :0], KVCache(k, k), return_aux=AuxRequest(lse=True))
    assert (out.shape, aux.lse.shape) == ((2, 2, 0, 8), (2, 2, 0))


K = np.zeros((2, 1, 8, 4), np.float32)
Q = np.zeros((2, 2, 2, 4), np.float32)
POOL = np.zeros((1, 3, 16, 4), np.float32)
TABLE = np.zeros((2, 2), np.int32)


def pages(**changed):
    parts = {
        "key_pages": POOL,
        "value_pages": POOL,
        "page_table": TABLE,
        "lengths": np.full(2, 9, np.int32),
    }
    return types.SimpleNamespace(**parts | changed)


@pytest.mark.parametrize(
    ("cache", "options", "error", "message"),
    [
        (KVCache(K, K, np.asarray([9, 2])), {}, ValueError, r"room for 8 tokens .* \[9, 2\]"),
        (KVCache(K, K, np.asarray([8, 1])), {}, ValueError, r"last 2 tokens .* \[8, 1\]"),
        (KVCache(K, K, np.asarray([8, 1, 2])), {}, ValueError, r"one for each of the 2 batch rows"),
        (KVCache(K, K, np.asarray([8.0, 2.0])), {}, ValueError, "must be integers"),
        (KVCache(K, K, layout="BLHD"), {}, ValueError, "layout='BLHD'"),
        (KVCache(K, K), {"layout": "LBHD"}, ValueError, "layout must be"),
        (KVCache(K, K), {"return_aux": True}, TypeError, "AuxRequest"),
        (KVCache(K[:, :, :, :3], K), {}, ValueError, "head dimension"),
        ((K, K), {}, TypeError, "of type tuple"),
        (pages(page_table=TABLE[:1]), {}, ValueError, "a row of pages for every batch row"),
        (pages(value_pages=POOL[:, :2]), {}, ValueError, r"\(Hkv, pages, page, D\)"),
        (pages(lengths=np.full(2, 33)), {}, ValueError, "room for 32 tokens"),
        (
            KVCache(K, K),
            {"mask_mod": BlockMask.from_dense(np.ones((2, 8), bool))},
            TypeError,
            "block_mask",
        ),
        (KVCache(K, K), {"block_mask": causal}, TypeError, "mask_mod"),
        (
            KVCache(K, K),
            {"block_mask": BlockMask.from_dense(np.ones((2, 8), bool)), "mask_mod": causal},
            ValueError,
            "both given",
        ),
    ],
)
def test_errors(cache, options, error, message):
    with pytest.raises(error, match=message):
        decode(jnp.asarray(Q), cache, **options)


@pytest.mark.parametrize(("page", "reason"), [(48, "Use pages of"), (4, "too small")])
def test_pages_that_the_kernel_cannot_take(page, reason):
    """Refused by name; without a name another backend computes them."""
    pool = jnp.zeros((1, 3, page, 16), jnp.bfloat16)
    cache, query = pages(key_pages=pool, value_pages=pool), jnp.zeros((2, 2, 2, 16), jnp.bfloat16)
    cache.lengths = np.full(2, 2 * page, np.int32)
    with pytest.raises(NotImplementedError, match=reason):
        decode(query, cache, backend="mosaic_gpu")
    assert jax.eval_shape(lambda: decode(query, cache)).shape == query.shape
