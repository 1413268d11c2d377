"""Thousands of random steps against a plain cache."""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest

from flexjax import paged
from flexjax.paged import PagedCache
from tests.paged.dense_cache import DenseCache, assert_invariants, assert_same, on_host

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


def test_random_steps():
    rng = np.random.default_rng(7)
    cache = PagedCache.create(
        BATCH,
        17,
        PAGE,
        HEADS,
        DIM,
        max_length=96,
        value_dim=VALUE_DIM,
        dtype="float32",
        bounds=True,
    )
    host, dense = on_host(cache), DenseCache(BATCH, HEADS, DIM, VALUE_DIM)
    done = collections.Counter()
    for step in range(2000):
        kind = rng.choice(len(NAMES), p=ODDS)
        row, other = (np.int32(x) for x in rng.integers(0, BATCH, 2))
        tokens = np.int32(rng.integers(0, 60))
        key = rng.normal(size=(BATCH, HEADS, CHUNK, DIM)).astype(np.float32)
        value = rng.normal(size=(BATCH, HEADS, CHUNK, VALUE_DIM)).astype(np.float32)
        counts = rng.integers(0, CHUNK + 1, BATCH).astype(np.int32)
        if rng.random() < 0.8:  # else rows without a sequence are appended to, or freed
            counts *= host.active
        before = host
        cache = run(cache, np.int32(kind), row, other, tokens, key, value, counts)
        host, name = on_host(cache), NAMES[kind]
        refused = bool(host.errors)
        assert refused == expected_refusal(before, name, row, other, tokens, counts)
        done[name, refused] += 1
        if refused:
            cache = cache.cleared()
            host = dataclasses.replace(host, errors=before.errors)
            for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(host), strict=True):
                np.testing.assert_array_equal(old, new)
            continue
        follow(dense, name, row, other, key, value, counts)
        assert_invariants(host)
        if step % 3 == 0:
            assert_same(host, dense)
    assert all(done[name, refused] > 2 for name in NAMES for refused in (False, True)), done


def follow(dense, name, row, other, key, value, counts):
    """The same step on the plain cache."""
    match name:
        case "allocate":
            dense.allocate(row)
        case "token" | "chunks":
            for r in range(BATCH):
                n = counts[r] if name == "chunks" else 1
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


def expected_refusal(cache, kind, row, other, tokens, counts):
    """Whether a step must be refused, worked out one row after another."""
    open_rows = cache.active
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
            return bool(np.any((counts > CHUNK // 2) & ~open_rows))
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
