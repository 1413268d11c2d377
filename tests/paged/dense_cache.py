"""A plain cache: a list of rows for every sequence, and what a paged one must obey beside it."""

import jax
import numpy as np

from flexjax.paged import PagedCache


class DenseCache:
    """Keys and values of each row as (Hkv, length, D) arrays; None in rows without a sequence."""

    def __init__(self, batch, heads, dim, value_dim):
        self.empty = (
            np.zeros((heads, 0, dim), np.float32),
            np.zeros((heads, 0, value_dim), np.float32),
        )
        self.rows = [None] * batch

    def allocate(self, row):
        self.rows[row] = self.empty

    def append(self, row, key, value):
        old_key, old_value = self.rows[row]
        self.rows[row] = np.concatenate([old_key, key], 1), np.concatenate([old_value, value], 1)

    def fork(self, source, target):
        self.rows[target] = self.rows[source]

    def free(self, row):
        self.rows[row] = None

    def length(self, row):
        return 0 if self.rows[row] is None else self.rows[row][0].shape[1]


def on_host(cache: PagedCache) -> PagedCache:
    """The cache with NumPy arrays for leaves."""
    return jax.tree.map(np.asarray, cache)


def assert_invariants(cache: PagedCache) -> None:
    """What holds of table, counts and free list of every cache on the host, whatever was done to it."""
    page = cache.key_pages.shape[2]
    uses = np.zeros(cache.pages, int)
    for row in range(cache.batch):
        held = cache.page_table[row, : cache.held_pages[row]]
        assert len(set(held.tolist())) == len(held), "a page is held twice by one row"
        assert cache.held_pages[row] >= -(-cache.lengths[row] // page)
        if not cache.active[row]:
            assert cache.held_pages[row] == cache.lengths[row] == 0
        np.add.at(uses, held, 1)
    np.testing.assert_array_equal(cache.reference_counts, uses)
    free = cache.free_pages[: cache.free_count]
    assert sorted(free) == np.flatnonzero(uses == 0).tolist(), "the free list is not complete"
    assert cache.page_table.min() >= 0
    assert cache.page_table.max() < cache.pages


def assert_same(cache: PagedCache, dense: DenseCache) -> None:
    """The same lengths, keys and values; zeros behind them in the pages that a sequence reaches."""
    page = cache.page_size
    for row, pair in enumerate(dense.rows):
        length = dense.length(row)
        assert cache.lengths[row] == length
        assert cache.active[row] == (pair is not None)
        if not length:
            continue
        table = cache.page_table[row, : -(-length // page)]
        for pool, expected in zip((cache.key_pages, cache.value_pages), pair, strict=True):
            stored = pool[:, table].reshape(pool.shape[0], -1, pool.shape[-1])
            np.testing.assert_array_equal(stored[:, :length], expected)
            assert not stored[:, length:].any()
            if cache.key_min is not None and pool is cache.key_pages:
                pieces = [expected[:, i : i + page] for i in range(0, length, page)]
                for bound, reduce in ((cache.key_min, np.min), (cache.key_max, np.max)):
                    exact = np.stack([reduce(piece, axis=1) for piece in pieces], 1)
                    np.testing.assert_array_equal(bound[:, table], exact)
