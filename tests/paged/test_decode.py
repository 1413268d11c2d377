"""flexjax.decode over a cache that sequences grew in and forked in."""

import jax
import numpy as np

from flexjax import AuxRequest, decode, masks, paged, scores
from flexjax.paged import PagedCache
from flexjax.testing import assert_close, oracle

H, HKV, DIM, VALUE_DIM, PAGE, LONGEST = 4, 2, 8, 12, 16, 49
STARTS = np.array([37, 15, 0, 0], np.int32)  # row 2 forks from row 0, row 3 stays empty


def test_decode_of_growing_forks():
    """Pages are shared, copied and crossed into, as in one pass over whole sequences; lengths are data."""
    rng, batch, traced = np.random.default_rng(0), len(STARTS), []
    mods = scores.alibi(H), masks.causal()
    query, key, value = (
        rng.normal(size=(batch, h, LONGEST, d)).astype(np.float32)
        for h, d in ((H, DIM), (HKV, DIM), (HKV, VALUE_DIM))
    )
    for x in key, value:
        x[2, :, :37] = x[0, :, :37]
    whole = oracle(query, key, value, score_mod=mods[0], mask_mod=mods[1])

    @jax.jit
    def start(cache):
        cache = paged.allocate(cache, np.array([0, 1]))
        cache = paged.append(cache, key[:, :, :37], value[:, :, :37], STARTS)
        return paged.fork(cache, 0, np.array([2]))

    @jax.jit
    def step(cache, query, key, value, counts):
        traced.append(query.shape[2])
        cache = paged.append(cache, key, value, counts)
        return cache, *decode(query, cache, *mods, return_aux=AuxRequest(lse=True))

    cache = start(
        PagedCache.create(batch, 16, PAGE, HKV, DIM, value_dim=VALUE_DIM, dtype="float32")
    )
    assert int(cache.reference_counts.max()) == 2, "the fork shares nothing"
    lengths, live = STARTS[[0, 1, 0, 3]], np.array([1, 1, 1, 0], np.int32)
    for length in (3, 1, 3, 1, 3, 1):
        place = (lengths[:, None] + np.arange(length))[:, None, :, None]
        new = (np.take_along_axis(x, place, 2) for x in (query, key, value))
        cache, out, aux = step(cache, *new, live * length)
        lengths = lengths + live * length
        exact = np.take_along_axis(np.asarray(whole.out), place, 2)
        lse = np.take_along_axis(np.asarray(whole.lse), place[..., 0], 2)
        assert_close("out", out, np.where(live[:, None, None, None], exact, 0.0))
        assert_close("lse", aux.lse, np.where(live[:, None, None], lse, -np.inf))
    assert cache.check().lengths.tolist() == lengths.tolist() == [49, 27, 49, 0]
    table = np.asarray(cache.page_table)
    assert (table[0, :2] == table[2, :2]).all(), "full pages are no longer shared"
    assert (table[0, 2:4] != table[2, 2:4]).all(), "pages that were written to are shared"
    assert sorted(traced) == [1, 3], "a step was traced again as lengths grew"
