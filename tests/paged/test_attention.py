"""Attention to pages against the dense oracle of each sequence alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import create_block_mask, flex_attention, masks, paged, scores
from flexjax.paged import PagedCache
from flexjax.testing import assert_close, oracle
from tests.paged.sequences import LENGTHS, expected, filled, queries

B, H, XLA = len(LENGTHS), 4, "xla"  # float32 is not what kernels are for
MODS = {
    "none": (None, None),
    "alibi": (scores.alibi(H), masks.causal()),
    "window": (scores.soft_cap(3.0), masks.sliding_window(20)),
    "heads": (None, lambda b, h, q, kv: (q >= kv) & ((kv + h + b) % 3 > 0)),
}


@pytest.mark.parametrize(
    ("name", "length", "counts"),
    [
        ("alibi", 40, (37, 20, 0, 0, 40)),
        ("window", 30, None),
        ("heads", 1, None),
    ],
)
def test_prefill(name, length, counts):
    cache, key, value = filled()
    query = queries(B, length)
    counts = np.array(np.minimum(LENGTHS, length) if counts is None else counts)
    run = jax.jit(
        lambda q, c, n: paged.prefill(q, c, *MODS[name], counts=n, return_lse=True, backend=XLA)
    )
    out, lse = run(query, cache, jnp.asarray(counts))
    exact, exact_lse = expected(query, key, value, LENGTHS, counts, *MODS[name])
    assert_close("out", out, exact)
    assert_close("lse", lse, exact_lse)


@pytest.mark.parametrize("name", ["none", "heads"])
def test_physical_positions(name):
    """PyTorch's conversions, over the whole pool."""
    score_mod, mask_mod = MODS[name]
    cache, key, value = filled()
    n = 37  # queries count from 0 here, as in PyTorch
    query = queries(B, n)

    @jax.jit
    def run(query, cache):
        mask = create_block_mask(mask_mod or masks.noop_mask, B, H, n, 90, (16, 16))
        converted = paged.convert_logical_block_mask(mask, cache)
        assert converted.shape == (B, H, n, 40 * 16)
        score = paged.get_score_mod(score_mod, cache)
        pools = paged.physical_pools(cache)
        return flex_attention(query, *pools, score, converted, return_lse=True, backend=XLA)

    out, lse = run(query, cache)
    lengths = jnp.asarray(LENGTHS)

    def mask(b, h, q, kv):
        return (kv < lengths[b]) & (True if mask_mod is None else mask_mod(b, h, q, kv))

    exact = oracle(query, key, value, score_mod=score_mod, mask_mod=mask)
    assert_close("out", out, exact.out)
    assert_close("lse", lse, exact.lse)


def test_a_converted_slice_remembers_its_offset_and_a_mask_alone_will_do():
    cache, _, _ = filled()
    query, score_mod = queries(B, 64), scores.alibi(H)

    @jax.jit
    def run(query, cache):
        whole = create_block_mask(masks.causal(), 1, 1, 64, 90, (16, 16))
        pools, score = paged.physical_pools(cache), paged.get_score_mod(score_mod, cache)
        sliced = paged.convert_logical_block_mask(whole[:, :, 2:], cache)
        out = flex_attention(query[:, :, 32:], *pools, score, sliced, backend=XLA)
        return out, flex_attention(
            query,
            *pools,
            score,
            mask_mod=paged.get_mask_mod(masks.causal(), cache),
            backend=XLA,
        )

    out, whole = run(query, cache)
    np.testing.assert_allclose(out, whole[:, :, 32:], rtol=1e-5, atol=1e-6)


@pytest.mark.smoke
def test_forks_share_what_they_attend_to():
    cache, key, _ = filled()
    new = np.random.default_rng(5).normal(size=(B, 2, 1, 20)).astype(np.float32)
    query = jnp.broadcast_to(queries(1, 1), (B, H, 1, 8))

    @jax.jit
    def run(cache, new):
        cache = paged.fork(paged.free(cache, np.array([1, 2])), 0, np.array([1, 2]))
        out = paged.prefill(query, cache, backend=XLA)
        return cache, out, paged.append(cache, new[..., :8], new[..., 8:])

    shared, out, cache = run(cache, new)
    np.testing.assert_array_equal(out[0], out[1])
    np.testing.assert_array_equal(out[0], out[2])
    assert int(shared.free_count) == 40 - 3 - 6
    # Two of three copy the page that they all end in, the empty row takes its first, the last one has room.
    assert int(cache.check().free_count) == 40 - 3 - 6 - 3
    keys, _ = cache.contiguous()
    np.testing.assert_array_equal(keys[:3, :, 37], new[:3, :, 0, :8])
    np.testing.assert_array_equal(keys[:3, :, :37], np.broadcast_to(key[:1, :, :37], (3, 2, 37, 8)))


def test_what_lay_in_a_page_before_does_not_matter():
    """Pools full of NaN: only what was written is read, and zeros stand behind it."""
    _, key, value = filled()
    empty = PagedCache.create(B, 40, 16, 2, 8, max_length=112, value_dim=12, dtype="float32")
    poisoned = dataclasses.replace(
        empty,
        key_pages=jnp.full_like(empty.key_pages, jnp.nan),
        value_pages=jnp.full_like(empty.value_pages, jnp.nan),
    )
    query, before = queries(B, 1), np.array(LENGTHS) - 1

    @jax.jit
    def run(cache):
        cache = paged.allocate(cache, np.arange(B) != 3)
        cache = paged.append(cache, key, value, np.maximum(before, 0))
        last = np.maximum(before, 0)[:, None, None, None]
        cache = paged.append(cache, *(np.take_along_axis(x, last, 2) for x in (key, value)))
        return cache, paged.prefill(query, cache, backend=XLA)

    cache, out = run(poisoned)
    counts = np.minimum(LENGTHS, 1)
    assert_close("out", out, expected(query, key, value, LENGTHS, counts)[0])
    page = int(cache.check().page_table[0, 2])
    assert not np.asarray(cache.value_pages[:, page, 37 % 16 :]).any()
    assert np.asarray(cache.value_pages[:, page, : 37 % 16]).all()
