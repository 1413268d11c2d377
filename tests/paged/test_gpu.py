"""Attention to pages by the kernels of a GPU, and what a step costs its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import create_block_mask, flex_attention, masks, paged, scores
from flexjax.paged import PagedCache
from flexjax.testing import assert_close, oracle

pytestmark = pytest.mark.gpu
LENGTHS, HEADS, DIM, PAGE = (700, 129, 1024), 8, 64, 64
MODS = scores.alibi(HEADS), masks.causal()


@pytest.fixture(scope="module")
def filled():
    """(cache, keys, values) in bfloat16, appended to by chunks and then by single tokens."""
    key, value = jax.random.normal(jax.random.key(0), (2, 3, 2, 1024, DIM), jnp.bfloat16)
    cache = PagedCache.create(3, 64, PAGE, 2, DIM, max_length=1024, bounds=True)
    cache = paged.allocate(cache, np.arange(3))
    step = jax.jit(paged.append, donate_argnums=0)
    for start in range(0, 1024, 200):
        counts = np.clip(np.array(LENGTHS) - 4 - start, 0, min(200, 1024 - start)).astype(np.int32)
        cache = step(cache, *(x[:, :, start : start + 200] for x in (key, value)), counts)
    for i in range(4):
        place = (np.array(LENGTHS) - 4 + i)[:, None, None, None]
        cache = step(cache, *(np.take_along_axis(x, place, 2) for x in (key, value)))
    return cache.check(), key, value


def truth(query, key, value, first, **options):
    """The oracle for L queries of which the first is position `first[b]`."""
    lengths, offset = jnp.asarray(LENGTHS), jnp.asarray(first)
    score_mod, mask_mod = MODS

    def score(s, b, h, q, kv):
        return score_mod(s, b, h, q + offset[b], kv)

    def mask(b, h, q, kv):
        return (kv < lengths[b]) & mask_mod(b, h, q + offset[b], kv)

    return oracle(query, key, value, score_mod=score, mask_mod=mask, **options)


def check(name, out, query, key, value, first):
    exact = truth(query, key, value, first)
    assert_close(name, out, exact.out, lambda: truth(query, key, value, first, exact=False).out)


def queries(length):
    return jax.random.normal(jax.random.key(1), (3, HEADS, length, DIM), jnp.bfloat16)


def test_prefill(filled):
    cache, key, value = filled
    query = queries(128)
    run = jax.jit(lambda q, c: paged.prefill(q, c, *MODS, backend="mosaic_gpu"))
    check("out", run(query, cache), query, key, value, np.array(LENGTHS) - 128)


def test_physical_positions(filled):
    cache, key, value = filled
    query = queries(128)

    @jax.jit
    def run(query, cache):
        mask = create_block_mask(masks.causal(), 3, None, 128, 1024, (64, PAGE))
        return flex_attention(
            query,
            *paged.physical_pools(cache),
            paged.get_score_mod(MODS[0], cache),
            paged.convert_logical_block_mask(mask, cache),
            backend="mosaic_gpu",
        )

    check("out", run(query, cache), query, key, value, np.zeros(3, np.int32))


def test_all_pages_chosen(filled):
    cache, key, value = filled
    query = queries(64)
    run = jax.jit(lambda q, c: paged.adaptive_attention(q, c, 16, *MODS, backend="mosaic_gpu"))
    check("out", run(query, cache), query, key, value, np.array(LENGTHS) - 64)


def test_a_step_reserves_little_beside_the_cache():
    cache = jax.eval_shape(lambda: PagedCache.create(32, 4096, 64, 8, 128, max_length=8192))
    new = jax.ShapeDtypeStruct((32, 8, 1, 128), jnp.bfloat16)
    step = jax.jit(paged.append, donate_argnums=0).lower(cache, new, new).compile()
    pool = 8 * 4096 * 64 * 128 * 2
    assert step.memory_analysis().alias_size_in_bytes > 2 * pool
    assert step.memory_analysis().temp_size_in_bytes < pool // 10
