"""Thousands of random steps against a plain cache."""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest

from flexjax import paged
from flexjax.paged import PagedCache
from tests.paged.dense_cache import DenseCache, assert_invariants, assert_same

BATCH, HEADS, DIM, VALUE_DIM, PAGE = 6, 2, 3, 4, 16
CHUNK = 40


@functools.partial(jax.jit, donate_argnums=0)
def run(cache, name, row, other, tokens, key, value, counts):
    """One step of any kind, so that one program serves them all."""
    steps = (
        lambda c: paged.allocate(c, row, tokens),
        lambda c: paged.reserve(c, row, tokens),
        lambda c: paged.append(c, key[:, :, :1], value[:, :, :1]),
        lambda c: paged.append(c, key, value, counts),
        lambda c: paged.append(c, key[row][None], value[row][None], counts[row], row),
        lambda c: paged.fork(c, row, other),
        lambda c: paged.free(c, row),
        lambda c: paged.free(c, counts > CHUNK // 2),
    )
    return jax.lax.switch(name, steps, cache)


NAMES = ("allocate", "reserve", "token", "chunks", "chunk", "fork", "free", "free some")
ODDS = (0.14, 0.05, 0.3, 0.12, 0.12, 0.14, 0.1, 0.03)


@pytest.mark.parametrize("bounds", [False, True], ids=["", "bounds"])
def test_random_steps(bounds):
    rng = np.random.default_rng(7 + bounds)
    cache = PagedCache.create(
        BATCH,
        17,
        PAGE,
        HEADS,
        DIM,
        max_length=96,
        value_dim=VALUE_DIM,
        dtype="float32",
        bounds=bounds,
    )
    dense = DenseCache(BATCH, HEADS, DIM, VALUE_DIM)
    done = collections.Counter()
    for step in range(1500):
        name = rng.choice(len(NAMES), p=ODDS)
        row, other = (np.int32(x) for x in rng.integers(0, BATCH, 2))
        tokens = np.int32(rng.integers(0, 60))
        key = rng.normal(size=(BATCH, HEADS, CHUNK, DIM)).astype(np.float32)
        value = rng.normal(size=(BATCH, HEADS, CHUNK, VALUE_DIM)).astype(np.float32)
        counts = rng.integers(0, CHUNK + 1, BATCH).astype(np.int32)
        if rng.random() < 0.8:  # else rows without a sequence are appended to, or freed
            counts *= [r is not None for r in dense.rows]
        before = [np.asarray(x) for x in jax.tree.leaves(cache)]
        cache = run(cache, np.int32(name), row, other, tokens, key, value, counts)
        kind = NAMES[name]
        refused = not cache.ok
        assert refused == expected_refusal(
            dense, before_cache(cache, before), kind, row, other, tokens, counts
        )
        done[kind, refused] += 1
        if refused:
            cache = cache.cleared()
            for old, new in zip(before, jax.tree.leaves(cache), strict=True):
                np.testing.assert_array_equal(old, new)
            continue
        match kind:
            case "allocate":
                dense.allocate(row)
            case "token" | "chunks":
                for r in range(BATCH):
                    n = counts[r] if kind == "chunks" else 1
                    if dense.rows[r] is not None:
                        dense.append(r, key[r, :, :n], value[r, :, :n])
            case "chunk":
                if counts[row]:
                    dense.append(row, key[row, :, : counts[row]], value[row, :, : counts[row]])
            case "fork":
                dense.fork(row, other)
            case "free":
                dense.free(row)
            case "free some":
                for r in np.flatnonzero(counts > CHUNK // 2):
                    dense.free(r)
        assert_invariants(cache)
        if step % 5 == 0:
            assert_same(cache, dense)
            if bounds:
                assert_bounds(cache)
    assert all(done[kind, refused] > 2 for kind in NAMES for refused in (False, True)), done


def before_cache(cache, leaves):
    return jax.tree.unflatten(jax.tree.structure(cache), leaves)


def expected_refusal(dense, cache, kind, row, other, tokens, counts):
    """Whether a step must be refused, worked out one row after another."""
    open_rows = [r is not None for r in dense.rows]
    grows = {}
    match kind:
        case "allocate":
            if open_rows[row]:
                return True
            grows = {row: tokens}
        case "reserve" | "chunk":
            grows = {row: tokens if kind == "reserve" else counts[row]}
        case "token":
            grows = {r: 1 for r in range(BATCH) if open_rows[r]}
        case "chunks":
            grows = dict(enumerate(counts))
        case "fork":
            return not open_rows[row] or open_rows[other]
        case "free":
            return not open_rows[row]
        case "free some":
            return bool(np.any((counts > CHUNK // 2) & ~np.array(open_rows)))
    references, free = cache.reference_counts.copy(), int(cache.free_count)
    for r, n in grows.items():
        length, held = int(cache.lengths[r]), int(cache.held_pages[r])
        if kind != "allocate" and not open_rows[r] and (n > 0 or kind == "reserve"):
            return True
        if length + n > cache.capacity:
            return True
        if n and length % PAGE:
            page = cache.page_table[r, length // PAGE]
            if references[page] > 1:
                references[page] -= 1
                free -= 1
        free -= max(0, -(-(length + n) // PAGE) - held)
    return free < 0


def assert_bounds(cache):
    """The bounds of every page in use are those of the keys in it, or, after a copy, looser."""
    keys, low, high = (np.asarray(x) for x in (cache.key_pages, cache.key_min, cache.key_max))
    for row in range(BATCH):
        for i in range(-(-int(cache.lengths[row]) // PAGE)):
            page = cache.page_table[row, i]
            n = min(PAGE, int(cache.lengths[row]) - i * PAGE)
            np.testing.assert_array_equal(low[:, page], keys[:, page, :n].min(1))
            np.testing.assert_array_equal(high[:, page], keys[:, page, :n].max(1))


def test_a_refusal_stays_until_it_is_cleared():
    cache = PagedCache.create(2, 4, PAGE, HEADS, DIM)
    refused = jax.jit(lambda c: paged.free(c, 0))(cache)
    later = jax.jit(lambda c: paged.allocate(c, 1))(refused)
    assert not refused.ok
    assert not later.ok
    assert later.active[1]
    with pytest.raises(paged.PageError, match="was freed before"):
        later.check()
    assert later.cleared().check().ok
    assert dataclasses.replace(later, errors=cache.errors).ok
