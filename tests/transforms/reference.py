"""What the transformation tests compare with: dense attention in a few lines of plain JAX.

`flex` and `dense` are the same function of the same arrays, with a score_mod and a mask_mod that read arrays.
Nothing of flexjax takes part in `dense`. A test applies one transformation to both and compares.
"""

import jax
import jax.numpy as jnp
import numpy as np

from flexjax import create_block_mask, flex_attention

B, HQ, HKV, L, S, D, DV = 2, 4, 2, 6, 8, 4, 3
BLOCK = 4
FLOATS = (0, 1, 2, 3)  # of the five operands, those with gradients
TOLERANCE = 2e-5


def operands(seed=0, batch=B):
    """(query, key, value, bias, ids) of `flex` and `dense`.

    Row 0 holds two documents, row 1 two with padding (-1) between: queries 2 and 3 see no key at all.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = (batch, HQ, L, D), (batch, HKV, S, D), (batch, HKV, S, DV), (HQ, S)
    floats = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    ids = np.array([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, -1, -1, 1, 1, 1, 1]], np.int32)
    return *floats, jnp.asarray(np.resize(ids, (batch, S)))


def scored(bias):
    """A score_mod that is not linear in the score, and reads `bias` twice."""
    return lambda score, b, h, q, kv: jnp.tanh(score) + bias[h, q] * bias[h, kv]


def masked(ids):
    """A mask_mod: the query's document up to two positions ahead."""
    return lambda b, h, q, kv: (ids[b, q] == ids[b, kv]) & (ids[b, q] >= 0) & (kv <= q + 2)


def flex(query, key, value, bias, ids, **options):
    block_mask = create_block_mask(masked(ids), ids.shape[0], None, L, S, BLOCK)
    return flex_attention(query, key, value, scored(bias), block_mask, **options)


def dense(query, key, value, bias, ids, **options):
    return dense_attention(query, key, value, scored(bias), masked(ids), **options)


def dense_attention(query, key, value, score_mod=None, mask_mod=None, return_lse=False):
    """softmax(score_mod(Q K^T / sqrt(D)), masked) V; a row without keys gives out 0 and lse -inf."""
    (batch, heads, q_len, dim), kv_len = query.shape, key.shape[2]
    key, value = (jnp.repeat(x, heads // x.shape[1], axis=1) for x in (key, value))
    key, value = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in (key, value))
    scores = jnp.einsum("bhld,bhsd->bhls", query, key, precision="highest") * dim**-0.5
    axes = (jnp.arange(n, dtype=jnp.int32) for n in (batch, heads, q_len, kv_len))
    indices = jnp.meshgrid(*axes, indexing="ij")
    if score_mod is not None:
        scores = _everywhere(score_mod)(scores, *indices)
    allowed = jnp.ones(scores.shape, bool)
    if mask_mod is not None:
        allowed = _everywhere(mask_mod)(*indices)
    dead = ~allowed.any(-1, keepdims=True)
    top = jnp.where(dead, 0.0, jnp.where(allowed, scores, -jnp.inf).max(-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - top, 0.0)), 0.0)
    total = jnp.where(dead, 1.0, weights.sum(-1, keepdims=True))
    out = jnp.einsum("bhls,bhsd->bhld", weights / total, value, precision="highest")
    lse = jnp.where(dead, -jnp.inf, jnp.log(total) + top)[..., 0]
    return (out, lse) if return_lse else out


def _everywhere(mod):
    for _ in range(4):
        mod = jax.vmap(mod)
    return mod


def scalar(function):
    """A loss of the function's output, with curvature of its own."""
    return lambda *args: jnp.sum(jnp.sin(function(*args)))


def check(transform, *args, flex=flex, dense=dense):
    """Compares `transform(flex)` with `transform(dense)`, both compiled."""
    assert_close(jax.jit(transform(flex))(*args), jax.jit(transform(dense))(*args))


def assert_close(actual, expected, tolerance=TOLERANCE):
    """Same structure, shapes and dtypes, and every array close in the relative 2-norm."""
    actual_leaves, actual_tree = jax.tree.flatten(actual)
    expected_leaves, expected_tree = jax.tree.flatten(expected)
    assert actual_tree == expected_tree
    for i, (a, e) in enumerate(zip(actual_leaves, expected_leaves, strict=True)):
        assert a.shape == e.shape, f"output {i}: {a.shape} instead of {e.shape}"
        assert a.dtype == e.dtype, f"output {i}: {a.dtype} instead of {e.dtype}"
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(e))
        np.testing.assert_array_equal(a[~np.isfinite(e)], e[~np.isfinite(e)])
        a, e = a[np.isfinite(e)], e[np.isfinite(e)]
        error, size = np.linalg.norm(a - e), np.linalg.norm(e)
        assert error <= tolerance * max(size, 1.0), f"output {i}: error {error:.2e} of {size:.2e}"
