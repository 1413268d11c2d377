"""Creation, views, layers, refusals on the host, and what a donated step costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import paged
from flexjax.paged import PagedCache, PageError


def small(**options):
    return PagedCache.create(3, 6, 16, 2, 4, **({"max_length": 64, "dtype": "float32"} | options))


def tokens(n, length, fill=1.0):
    return jnp.full((n, 2, length, 4), fill), jnp.full((n, 2, length, 4), -fill)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"page_size": 24}, r"one of \(16, 32, 64, 128, 256\), but it is 24"),
        ({"page_size": 512}, "page_size must be one of"),
        ({"batch": 0}, "batch must be a positive integer"),
        ({"pages": 2.5}, "pages must be a positive integer"),
        ({"max_length": 0}, "max_length must be a positive integer"),
        ({"layers": 0}, "layers must be a positive integer"),
    ],
)
def test_sizes_that_a_cache_cannot_have(change, match):
    sizes = {"batch": 2, "pages": 4, "page_size": 16, "kv_heads": 1, "head_dim": 8} | change
    with pytest.raises(ValueError, match=match):
        PagedCache.create(**sizes)


def test_dtypes_that_a_cache_cannot_have():
    with pytest.raises(TypeError, match="must be a float type"):
        small(dtype="int8")


def test_a_cache_knows_its_sizes():
    cache = small(value_dim=8, max_length=40)
    assert (cache.batch, cache.pages, cache.page_size, cache.max_pages) == (3, 6, 16, 3)
    assert cache.capacity == 48
    assert cache.value_pages.shape == (2, 6, 16, 8)
    assert "page_size=16" in repr(cache)
    assert jax.tree.map(lambda x: x, cache).layers is None
    assert repr(jax.tree.map(lambda _: None, cache)) == "PagedCache(...)"


def test_refusals_on_the_host_are_sentences_and_change_nothing():
    """Every operation that cannot be carried out, on one cache."""
    cache = paged.append(paged.allocate(small(), [0, 1]), *tokens(3, 20))
    assert int(cache.free_count) == 2
    before = [np.asarray(x) for x in jax.tree.leaves(cache)]
    refused = [
        (
            lambda: paged.append(cache, *tokens(1, 45), rows=0),
            "64 tokens .4 pages of 16.*larger max_length",
        ),
        (lambda: paged.append(cache, *tokens(3, 20), counts=[20, 0, 20]), "holds no sequence"),
        (lambda: paged.append(cache, *tokens(3, 20), counts=[21, 0, 0]), "exceeds the tokens"),
        (lambda: paged.append(cache, *tokens(3, 20), counts=[-1, 0, 0]), "is negative"),
        (lambda: paged.allocate(cache, 1), "still holds a sequence"),
        (lambda: paged.allocate(cache, 2, tokens=48), r"\(now 2 of 6 are free\).*more pages"),
        (lambda: paged.reserve(cache, 2, 1), "holds no sequence"),
        (lambda: paged.free(cache, 2), "was freed before"),
        (lambda: paged.free(cache, [0, 0]), "named twice"),
        (lambda: paged.free(cache, 3), r"out of the range \[0, 3\)"),
        (lambda: paged.free(cache, -1), r"out of the range \[0, 3\)"),
        (lambda: paged.free(cache, 2**32), r"out of the range \[0, 3\)"),
        (lambda: paged.fork(cache, 2**32, 2), r"out of the range \[0, 3\)"),
        (lambda: paged.reserve(cache, 0, 2**32 + 1), "larger max_length"),
        (lambda: paged.fork(cache, 0, 1), "still holds a sequence"),
        (lambda: paged.fork(cache, 2, 2), "holds no sequence"),
    ]
    for operation, match in refused:
        with pytest.raises(PageError, match=match):
            operation()
    for old, new in zip(before, jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("operation", "error", "match"),
    [
        (lambda c: paged.free(c, 0.5), TypeError, "rows must be integers"),
        (lambda c: paged.free(c, None), TypeError, "rows must be integers"),
        (lambda c: paged.free(c, np.ones(2, bool)), ValueError, r"shape \(3,\), but it has \(2,\)"),
        (lambda c: paged.allocate(c, [0, 1], [1, 2, 3]), ValueError, "one for each of 2 rows"),
        (lambda c: paged.allocate(c, 0, 1.5), TypeError, "tokens must be integers"),
        (lambda c: paged.fork(c, [0, 1], [2]), ValueError, "one for each of 1 targets"),
        (lambda c: paged.fork(c, 0.0, 1), TypeError, "source must be a row"),
        (lambda c: paged.append(c, *tokens(2, 1)), ValueError, "n = 3 rows, Hkv = 2, D = 4"),
        (lambda c: paged.append(c, *tokens(3, 1), layout="HBLD"), ValueError, "layout must be"),
        (lambda c: paged.append(c, jnp.ones((3, 2, 1, 4), int), tokens(3, 1)[1]), TypeError, "array of floats"),
        (lambda c: paged.write(c, *tokens(3, 1), 1, layer=0), ValueError, "has no layers"),
        (lambda c: c.layer(0), ValueError, "has no layers"),
        (lambda c: small(layers=2).layer(2), ValueError, "no layer 2 in a cache of 2"),
        (lambda c: paged.write(small(layers=2), *tokens(3, 1), 1, layer=-1), ValueError, "no layer -1"),
        (lambda c: paged.prefill(jnp.ones((3, 2, 4, 4)), c, counts=5), ValueError, "between 0 and the 4 queries"),
        (lambda c: paged.prefill(jnp.ones((3, 2, 0, 4)), c), ValueError, "L >= 1"),
        (lambda c: c.contiguous(65), ValueError, "at most 64 tokens"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(operation, error, match):
    with pytest.raises(error, match=match):
        operation(small())


@pytest.mark.smoke
def test_layers_share_one_table():
    cache = small(layers=2, bounds=True)
    with pytest.raises(ValueError, match="2 layers: choose one"):
        cache.pools()
    key, value = tokens(3, 1)

    @jax.jit
    def step(cache):
        cache = paged.allocate(cache, np.array([0, 2]))
        cache, counts = paged.extend(cache, 1, most=1)
        for layer in range(2):
            cache = paged.write(cache, (layer + 1) * key, value, counts, layer=layer)
        return cache

    cache = step(cache)
    np.testing.assert_array_equal(cache.lengths, [1, 0, 1])
    for layer in range(2):
        keys, values = cache.layer(layer).contiguous(2)
        np.testing.assert_array_equal(
            keys[:, :, 0], (layer + 1) * key[:, :, 0] * np.array([1, 0, 1])[:, None, None]
        )
        np.testing.assert_array_equal(values[[0, 2], :, 0], value[:2, :, 0])
        assert not np.asarray(keys[:, :, 1]).any()
        np.testing.assert_array_equal(
            cache.layer(layer).key_max[:, cache.page_table[0, 0]], (layer + 1) * key[0, :, 0]
        )


def test_reserved_pages_are_there_for_the_row_alone():
    cache = paged.allocate(small(), 0, tokens=64)
    assert int(cache.free_count) == 2
    cache = paged.allocate(cache, 1)
    with pytest.raises(PageError, match="not enough free pages"):
        paged.append(cache, *tokens(1, 40), rows=1)
    cache = paged.append(cache, *tokens(1, 40), rows=0)
    assert int(cache.free_count) == 2
    assert int(cache.held_pages[0]) == 4
    assert int(paged.free(cache, 0).free_count) == 6


@pytest.mark.parametrize("name", ["token", "chunk", "fork", "free"])
def test_a_donated_cache_is_changed_in_place(name):
    """XLA needs no copy of a pool: what it reserves beside the cache is a small part of one."""
    cache = jax.eval_shape(lambda: PagedCache.create(4, 256, 32, 2, 32, max_length=1024))
    pool = 4 * 256 * 32 * 2 * 32 // 2
    length = {"token": 1, "chunk": 40}.get(name)
    row = jax.ShapeDtypeStruct((), jnp.int32)
    if length:
        new = jax.ShapeDtypeStruct((4, 2, length, 32), jnp.bfloat16)
        operation, arguments = paged.append, (new, new)
    else:
        operation, arguments = getattr(paged, name), (row, row) if name == "fork" else (row,)
    step = jax.jit(operation, donate_argnums=0).lower(cache, *arguments).compile()
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes > 2 * pool
    assert memory.temp_size_in_bytes < pool // 4


def test_one_program_serves_all_lengths():
    traced = []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, key, value):
        traced.append(1)
        return paged.append(cache, key, value)

    cache = paged.allocate(small(), [0, 1])
    for _ in range(20):
        cache = step(cache, *tokens(3, 1))
    assert len(traced) == 1
    np.testing.assert_array_equal(cache.check().lengths, [20, 20, 0])
    assert int(cache.free_count) == 2
