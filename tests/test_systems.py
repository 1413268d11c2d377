"""Systems against dense attention written out: Longformer, Reformer, Perceiver, Linformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import systems
from flexjax.testing import assert_close


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def dense(query, key, value, allowed, own=None):
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if own is not None:
        scores = jnp.where(own, -1e5, scores)
    return jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf)) @ value


def with_gradients(function, cotangent, *operands):
    def run(*operands):
        out, pull = jax.vjp(function, *operands)
        return out, *pull(cotangent)

    return jax.jit(run)(*operands)


def check(function, exact, cotangent, *operands):
    found, expected = (with_gradients(f, cotangent, *operands) for f in (function, exact))
    for number, (actual, truth) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"result {number}", actual, truth)


def test_longformer():
    """A dilated window and two global tokens with projections of their own; the second row is padded."""
    query, key, value, *wide, cotangent = normal(7, 2, 2, 40, 8)
    tokens, lengths = [0, 17], jnp.array([40, 29])
    distance = np.subtract.outer(np.arange(40), np.arange(40))
    window = (abs(distance) <= 6) & (distance % 3 == 0) | np.isin(np.arange(40), tokens)
    valid = (np.arange(40) < np.array(lengths)[:, None])[:, None, None]

    def exact(query, key, value, *wide):
        local = dense(query, key, value, window[None, None] & valid)
        everywhere = dense(*wide, valid)
        is_global = np.isin(np.arange(40), tokens)[None, None, :, None]
        return jnp.where(is_global, everywhere, local)

    def found(query, key, value, *wide):
        return systems.longformer_attention(
            query, key, value, 6, tokens, global_projections=wide, dilation=3, lengths=lengths
        )

    check(found, exact, cotangent, query, key, value, *wide)
    plain = systems.longformer_attention(query, key, value, 4, [], backend="reference")
    assert_close("window", plain, dense(query, key, value, (abs(distance) <= 4)[None, None]))


def seen_in_rounds(buckets, chunk, causal):
    """(rounds, B, H, L, L): which pairs each round sees, from its buckets alone."""
    buckets = np.asarray(buckets)
    length = buckets.shape[-1]
    places = np.argsort(np.argsort(buckets, axis=-1, kind="stable"), axis=-1) // chunk
    behind = places[..., :, None] - places[..., None, :]
    seen = (buckets[..., :, None] == buckets[..., None, :]) & (behind >= 0) & (behind <= 1)
    return seen & np.tri(length, dtype=bool) if causal else seen


def test_reformer_is_the_softmax_over_what_the_rounds_see():
    num_hashes, causal = 2, True
    query, value, cotangent = normal(3, 1, 2, 44, 8)
    rng, chunk = jax.random.key(5), 8
    buckets = systems.lsh_buckets(query, 8, num_hashes, rng)
    seen = seen_in_rounds(buckets, chunk, causal)
    # The case must be one: rounds that differ, pairs that several rounds see, pairs across chunks.
    assert not seen.all(axis=0).all()
    allowed = seen.any(axis=0)

    def found(query, value):
        options = {"num_buckets": 8, "chunk": chunk, "num_hashes": num_hashes, "causal": causal}
        return systems.reformer_attention(query, value, rng, **options)

    def exact(query, value):
        key = query / jnp.linalg.norm(query, axis=-1, keepdims=True)
        return dense(query, key, value, allowed, jnp.eye(44, dtype=bool)[None, None])

    check(found, exact, cotangent, query, value)
    out = systems.reformer_attention(
        query, value, rng, num_buckets=8, chunk=chunk, backend="reference"
    )
    one = systems.lsh_buckets(query, 8, 1, rng)
    key = query / jnp.linalg.norm(query, axis=-1, keepdims=True)
    own = jnp.eye(44, dtype=bool)[None, None]
    assert_close("out", out, dense(query, key, value, seen_in_rounds(one, chunk, False)[0], own))


def test_buckets_are_those_of_the_nearest_axis():
    vectors = normal(3, 5, 8)
    buckets = systems.lsh_buckets(vectors, 6, 4, jax.random.key(1))
    assert buckets.shape == (4, 3, 5)
    np.testing.assert_array_equal(
        buckets, systems.lsh_buckets(3 * vectors, 6, 4, jax.random.key(1))
    )
    opposite = systems.lsh_buckets(-vectors, 6, 4, jax.random.key(1))
    np.testing.assert_array_equal((buckets + 3) % 6, opposite)


def test_perceiver():
    """Against the same network with dense attention, and blind to padded inputs."""
    parameters = systems.init_perceiver(
        jax.random.key(0), latents=5, latent_dim=16, input_dim=12, heads=2, self_layers=1
    )
    inputs, lengths = normal(2, 30, 12), jnp.array([30, 21])

    def normalized(x):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def layer(p, x, z, valid):
        y, z = normalized(x) * p["norm"], normalized(z) * p["norm_inputs"]
        heads = [
            jnp.einsum("bld,dhk->bhlk", a, p[n])
            for a, n in ((y, "query"), (z, "key"), (z, "value"))
        ]
        x = x + jnp.einsum("bhlk,hkd->bld", dense(*heads, valid), p["out"])
        return x + jax.nn.gelu((normalized(x) * p["norm_mlp"]) @ p["widen"]) @ p["narrow"]

    valid = (np.arange(30) < np.array(lengths)[:, None])[:, None, None]

    def exact(parameters):
        x = jnp.broadcast_to(parameters["latents"][None], (2, 5, 16))
        x = layer(parameters["cross"], x, inputs, valid)
        return layer(parameters["self"][0], x, x, np.ones((1, 1, 1, 1), bool))

    @jax.jit
    def found(inputs):
        return systems.perceiver(parameters, inputs, lengths, backend="reference")

    out = found(inputs)
    assert_close("latents", out, jax.jit(exact)(parameters))
    np.testing.assert_array_equal(found(inputs.at[1, 21:].set(9.0)), out)


def test_linformer():
    """One projection a key head, shared by a group of query heads, and padded rows."""
    query, key, value = normal(2, 4, 9, 8), normal(2, 2, 20, 8, seed=1), normal(2, 2, 20, 8, seed=2)
    projection, lengths = normal(2, 6, 20, seed=3), jnp.array([20, 13])
    valid = (np.arange(20) < np.array(lengths)[:, None])[:, None, :, None]
    keys, values = (
        jnp.einsum("hks,bhsd->bhkd", projection, x * valid).repeat(2, axis=1) for x in (key, value)
    )
    found = systems.linformer_attention(
        query, key, value, projection, kv_lengths=lengths, backend="reference"
    )
    assert_close("out", found, dense(query, keys, values, jnp.ones((1, 1, 1, 1), bool)))


ONE = jnp.ones((1, 2, 16, 8))
ERRORS = [
    (lambda: systems.longformer_attention(ONE, ONE, ONE, 2, [16]), ValueError, "from 0 to 15"),
    (
        lambda: systems.longformer_attention(ONE, ONE, ONE, 2, [0], dilation=0),
        ValueError,
        "dilation must be at least 1",
    ),
    (
        lambda: systems.longformer_attention(
            ONE, ONE, ONE, 2, [9], global_projections=(ONE[:, :, :4], ONE, ONE)
        ),
        ValueError,
        r"one length L, but they have .*\(1, 2, 4, 8\)",
    ),
    (lambda: systems.lsh_buckets(ONE, 3, 1, jax.random.key(0)), ValueError, "must be even"),
    (
        lambda: systems.reformer_attention(ONE, ONE[:, :1], jax.random.key(0), num_buckets=4),
        ValueError,
        "heads are not grouped",
    ),
    (
        lambda: systems.init_perceiver(
            jax.random.key(0), latents=4, latent_dim=6, input_dim=4, heads=4
        ),
        ValueError,
        "4 heads do not divide latent_dim=6",
    ),
    (
        lambda: systems.linformer_attention(
            ONE, ONE, ONE, jnp.ones((4, 16)), kv_lengths=jnp.array([3, 4])
        ),
        ValueError,
        r"kv_lengths must have shape \(1,\)",
    ),
    (
        lambda: systems.linformer_attention(ONE, ONE, ONE, jnp.ones((4, 15))),
        ValueError,
        r"key_projection must have shape \(K, 16\)",
    ),
    (
        lambda: systems.linformer_attention(
            ONE, ONE, ONE, jnp.ones((4, 16)), mask_mod=lambda b, h, q, k: q >= k
        ),
        ValueError,
        "takes no mask_mod.*the future least of all",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[e[2][:30] for e in ERRORS])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
