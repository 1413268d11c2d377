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


def assert_invariants(cache: PagedCache) -> None:
    """What holds of the table, the counts and the free list of every cache, whatever was done to it."""
    cache = jax.tree.map(np.asarray, cache)
    page = cache.key_pages.shape[2]
    uses = np.zeros(cache.pages, int)
    for row in range(cache.batch):
        held = cache.page_table[row, : cache.held_pages[row]]
        assert len(set(held)) == len(held), "a page is held twice by one row"
        assert cache.held_pages[row] >= -(-cache.lengths[row] // page)
        if not cache.active[row]:
            assert cache.held_pages[row] == cache.lengths[row] == 0
        np.add.at(uses, held, 1)
    np.testing.assert_array_equal(cache.reference_counts, uses)
    free = cache.free_pages[: cache.free_count]
    assert sorted(free) == sorted(np.flatnonzero(uses == 0)), "the free list is not complete"
    assert cache.page_table.min() >= 0
    assert cache.page_table.max() < cache.pages


def assert_same(cache: PagedCache, dense: DenseCache) -> None:
    """The same lengths, keys and values; zeros behind them in the pages that a sequence reaches."""
    keys, values = (np.asarray(x) for x in cache.contiguous())
    pools = [np.asarray(x) for x in cache.pools()]
    table, page = np.asarray(cache.page_table), cache.page_size
    for row, pair in enumerate(dense.rows):
        length = dense.length(row)
        assert cache.lengths[row] == length
        assert cache.active[row] == (pair is not None)
        if pair is None or length == 0:
            continue
        for actual, expected in zip((keys, values), pair, strict=True):
            np.testing.assert_array_equal(actual[row, :, :length], expected)
            assert not actual[row, :, length:].any()
        last = table[row, (length - 1) // page]
        for pool in pools:
            assert not pool[:, last, (length - 1) % page + 1 :].any()
