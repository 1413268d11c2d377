"""Pages chosen by bounds: the bounds hold, the choice is the best, and both ways to attend to it agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import flex_attention, masks, paged, scores
from flexjax.paged import PagedCache
from flexjax.testing import assert_close
from tests.paged.sequences import LENGTHS, filled, queries

B, H, HKV, PAGE, COUNT = len(LENGTHS), 4, 2, 16, 7
SINKS = np.linspace(-1.0, 1.0, H, dtype=np.float32)
MODS = {
    "alibi": (scores.alibi(H), masks.causal()),
    "heads": (None, lambda b, h, q, kv: (q >= kv) & ((h < 2) | (kv < 32) | (kv > q - 20))),
}


def chosen(name, length, top_k):
    """(query, cache, selection, output by table, logsumexp, output by block mask)."""
    cache, _, _ = filled()
    query = queries(B, length, seed=3) * 3
    score_mod, mask_mod = MODS[name]

    @jax.jit
    def run(query, cache):
        selection = paged.select_pages(query, cache, top_k, score_mod, mask_mod)
        by_table = paged.adaptive_attention(
            query, cache, top_k, score_mod, mask_mod, return_lse=True, sinks=SINKS, backend="xla"
        )
        blocks = paged.selected_block_mask(cache, selection, H, length, mask_mod)
        offset = cache.lengths - length

        def score(s, b, h, q, kv):
            return score_mod(s, b, h, q + offset[b], kv)

        by_blocks = flex_attention(
            query, *cache.contiguous(), score_mod and score, blocks, sinks=SINKS, backend="xla"
        )
        return selection, *by_table, by_blocks

    return query, cache, *run(query, cache)


def modified(name, query, key, length):
    """Scores (B, H, L, S) of the last positions, -inf where masked or past the end, by the oracle's formula."""
    score_mod, mask_mod = MODS[name]
    lengths = np.array(LENGTHS)
    b, h, i, kv = np.ogrid[:B, :H, :length, : key.shape[2]]
    q = i + lengths[b] - length
    s = np.einsum("bhld,bhsd->bhls", query, np.repeat(key, H // HKV, 1)) / np.sqrt(key.shape[-1])
    s = s if score_mod is None else np.asarray(score_mod(s.astype(np.float32), b, h, q, kv))
    seen = (kv < lengths[b]) & (q >= 0)
    seen = seen if mask_mod is None else seen & mask_mod(b, h, q, kv)
    return np.where(seen, s, -np.inf)


def by_page(s):
    pad = np.pad(
        s, ((0, 0), (0, 0), (0, 0), (0, COUNT * PAGE - s.shape[-1])), constant_values=-np.inf
    )
    return pad.reshape(*s.shape[:3], COUNT, PAGE)


@pytest.mark.parametrize(("name", "length", "top_k"), [("alibi", 3, 1), ("heads", 1, 2)])
def test_choice(name, length, top_k):
    query, _, selection, out, lse, by_blocks = chosen(name, length, top_k)
    _, key, value = filled()
    s = modified(name, query, key, length)
    most = by_page(s).max(-1).reshape(B, HKV, -1, COUNT).max(2)
    importance, picked = np.asarray(selection.importance), np.asarray(selection.chosen)
    assert (importance >= most - 1e-5).all(), "not a bound"
    assert (importance[most == -np.inf] == -np.inf).all(), "a page without visible keys has a bound"
    for b, h in np.ndindex(B, HKV):
        used = -(-LENGTHS[b] // PAGE)
        recent = max(1, (length + PAGE - 2) // PAGE + 1)
        kept = {c for c in range(used) if c < 1 or c >= used - recent}
        others = [c for c in range(used) if c not in kept and importance[b, h, c] > -np.inf]
        best = sorted(others, key=lambda c: -importance[b, h, c])[:top_k]
        assert set(np.flatnonzero(picked[b, h])) == kept | set(best)
        pages, n = np.asarray(selection.pages)[b, h], int(selection.counts[b, h])
        assert set(pages[:n]) == kept | set(best)
        if n:
            assert pages[n - 1] == used - 1
        assert (np.diff(importance[b, h, pages[: max(n - 1, 0)]]) <= 0).all()
    weights = np.repeat(np.repeat(picked, H // HKV, 1), PAGE, 2)[..., : s.shape[-1]][:, :, None]
    s = np.where(weights, s, -np.inf)
    with np.errstate(divide="ignore"):
        exact_lse = np.log(np.exp(s).sum(-1))
    p = np.exp(s - np.where(np.isfinite(exact_lse), exact_lse, 0.0)[..., None])
    p /= 1 + np.exp(SINKS[:, None] - np.where(np.isfinite(exact_lse), exact_lse, 0.0))[..., None]
    exact = np.einsum("bhls,bhsd->bhld", p, np.repeat(value, H // HKV, 1))
    assert_close("out", out, exact)
    assert_close("lse", lse, exact_lse)
    assert_close("out by blocks", by_blocks, exact)


def test_a_page_is_eligible_though_its_mod_is_nan_where_the_mask_hides_it():
    def nan_outside(s, b, h, q, kv):
        return s + jnp.sqrt(20.0 - (q - kv))

    cache, _, _ = filled()
    run = jax.jit(lambda q, c: paged.select_pages(q, c, 1, nan_outside, masks.sliding_window(20)))
    importance = run(queries(B, 1), cache).importance
    place, last = np.arange(COUNT * PAGE).reshape(COUNT, PAGE), np.array(LENGTHS)[:, None, None] - 1
    seen = ((place <= last) & (last - place <= 20)).any(-1)
    np.testing.assert_array_equal(
        importance > -np.inf, np.broadcast_to(seen[:, None], importance.shape)
    )


def test_few_pages_hold_a_peaked_attention():
    """Four pages in a row are about one thing; each query looks for one of sixteen things."""
    rng = np.random.default_rng(0)
    length, dim, page, margin = 1024, 32, 16, 1.0
    topics = rng.normal(size=(16, dim))
    key = topics[np.arange(length) // (4 * page)] + 0.2 * rng.normal(size=(1, 2, length, dim))
    value = rng.normal(size=(1, 2, length, dim)).astype(np.float32)
    query = 2 * topics[[3, 3, 9, 9]][None, :, None]
    key, query = key.astype(np.float32), query.astype(np.float32)
    cache = PagedCache.create(1, 64, page, 2, dim, dtype="float32", bounds=True)

    @jax.jit
    def run(cache):
        cache = paged.append(paged.allocate(cache, 0), key, value)
        few = paged.select_pages(query, cache, 4)
        return few.chosen, paged.select_pages(query, cache, 64, margin=margin)

    few, selection = run(cache)

    s = np.einsum("hd,hsd->hs", query[0, :, 0], key[0].repeat(2, 0)) / np.sqrt(dim)

    def attention(pages):
        p = np.exp(s - s.max()) * pages.repeat(2, 0).repeat(page, 1)
        return np.einsum("hs,hsd->hd", p / p.sum(1, keepdims=True), value[0].repeat(2, 0))

    exact = attention(np.ones((2, 64)))
    recent = attention(np.broadcast_to(np.arange(64) >= 64 - 6, (2, 64)))
    error, blind = (
        np.linalg.norm(x - exact) / np.linalg.norm(exact)
        for x in (attention(np.asarray(few)[0]), recent)
    )
    assert error < 0.05 < 0.8 < blind, (error, blind)

    # What a margin leaves out weighs as little as it says.
    pages = s.reshape(4, 64, page).max(-1)
    left = ~np.asarray(selection.chosen)[0].repeat(2, 0)
    assert (np.where(left, pages, -np.inf).max(1) <= s.max(1) - margin).all()
    assert 4 <= int(selection.counts.min()) <= int(selection.counts.max()) < 32


def test_bounds_are_needed():
    cache = PagedCache.create(1, 4, 16, 2, 8)
    with pytest.raises(ValueError, match="bounds=True"):
        paged.select_pages(queries(1, 1), cache, 1)
    cache = PagedCache.create(1, 4, 16, 2, 8, bounds=True)
    with pytest.raises(ValueError, match="recent at least 1"):
        paged.select_pages(queries(1, 1), cache, 1, recent=0)
    with pytest.raises(ValueError, match="multiple of its 2 key heads"):
        paged.select_pages(queries(1, 1, heads=3), cache, 1)
