"""Reformer: attention inside buckets of a locality-sensitive hash."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from flexjax.attention import flex_attention
from flexjax.block_creation import create_block_mask
from flexjax.masks._arguments import check_integer

# What a token's score with itself is set to: it weighs nothing unless there is nothing else.
_OWN_SCORE = -1e5


def lsh_buckets(
    vectors: Float[Array, "*batch D"], num_buckets: int, num_hashes: int, rng: PRNGKeyArray
) -> Int32[Array, "R *batch"]:
    """The buckets of vectors under random rotations: near vectors often share one.

    Args:
        vectors: (..., D).
        num_buckets: how many buckets a hash has, even and >= 2.
        num_hashes: how many hashes R are drawn, >= 1.
        rng: a random key.

    Returns:
        int32 (R, ...), numbers from 0 to `num_buckets - 1`; without gradients.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if it is out of its range.

    Source: Andoni et al., "Practical and Optimal LSH for Angular Distance", arXiv 1509.02897, as in Kitaev
    et al., "Reformer", arXiv 2001.04451, section 2: argmax([x R; -x R]).
    """
    where = "lsh_buckets()"
    num_buckets = check_integer(where, "num_buckets", num_buckets, at_least=2)
    num_hashes = check_integer(where, "num_hashes", num_hashes, at_least=1)
    if num_buckets % 2:
        raise ValueError(f"{where}: num_buckets must be even, but it is {num_buckets}.")
    vectors = jax.lax.stop_gradient(vectors).astype(jnp.float32)
    shape = (num_hashes, vectors.shape[-1], num_buckets // 2)
    turned = jnp.einsum("...d,rdn->r...n", vectors, jax.random.normal(rng, shape))
    return jnp.argmax(jnp.concatenate([turned, -turned], axis=-1), axis=-1).astype(jnp.int32)


def reformer_attention(
    query: Float[Array, "B H L D"],
    value: Float[Array, "B H L Dv"],
    rng: PRNGKeyArray,
    *,
    num_buckets: int,
    chunk: int = 128,
    num_hashes: int = 1,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Float[Array, "B H L Dv"]:
    """Attention of queries to the queries in their own bucket: shared-QK LSH attention.

    Keys are the queries, scaled to length one. In each round of hashing, tokens are sorted by bucket and then
    by position and cut into chunks; a token attends to those of its bucket in its own chunk and the one
    before. The result is the softmax over the union of what the rounds see: what several rounds see counts
    once. A token sees itself only if it sees nothing else.

    Args:
        query: (B, H, L, D), queries and keys in one.
        value: (B, H, L, Dv).
        rng: a random key, for the hashes; the same key hashes the same.
        num_buckets: buckets of a hash, even; about 2 L / chunk.
        chunk: tokens of a chunk, >= 1; best a multiple of 128, the block size.
        num_hashes: rounds of hashing, >= 1.
        causal: whether a token sees only earlier ones.
        scale: factor on the scores; 1 / sqrt(D) by default.
        backend: see `flex_attention`.

    Returns:
        The output (B, H, L, Dv).

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if it is out of its range, or the shapes differ.

    Source: Kitaev et al., "Reformer: The Efficient Transformer", arXiv 2001.04451, section 2.
    """
    where = "reformer_attention()"
    chunk = check_integer(where, "chunk", chunk, at_least=1)
    if query.ndim != 4 or value.ndim != 4 or query.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"{where}: query and value must have shapes (B, H, L, D) and (B, H, L, Dv), but they have "
            f"{query.shape} and {value.shape}. Queries are keys here, so that heads are not grouped."
        )
    length = query.shape[2]
    buckets = lsh_buckets(query, num_buckets, num_hashes, rng)
    # Positions in sorted order, and the place of each position in it.
    order = jnp.argsort(buckets, axis=-1, stable=True).astype(jnp.int32)
    places = jnp.argsort(order, axis=-1).astype(jnp.int32)
    squares = jnp.square(query.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    key = (query * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))).astype(query.dtype)

    def band(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        behind = q_idx // chunk - kv_idx // chunk
        return (behind == 0) | (behind == 1)

    # The blocks follow from places alone: one list for all rounds, batch rows and heads. What hashing decides
    # is left to the score_mod.
    block = min(128, chunk)
    block_mask = create_block_mask(band, None, None, length, length, block)

    def one_round(number: int) -> tuple[Array, Array]:
        position, back = order[number], places[number]

        def sorted_by_bucket(x: Array) -> Array:
            return jnp.take_along_axis(x, position[..., None], axis=2)

        # What every round makes of the tokens that stand in this round's order.
        bucket = [jnp.take_along_axis(x, position, axis=2) for x in buckets]
        place = [jnp.take_along_axis(x, position, axis=2) for x in places]

        def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            allowed = bucket[number][b, h, q_idx] == bucket[number][b, h, kv_idx]
            q, kv = position[b, h, q_idx], position[b, h, kv_idx]
            if causal:
                allowed = allowed & (kv <= q)
            count = jnp.ones_like(score)
            for other in range(num_hashes):
                if other != number:
                    seen = bucket[other][b, h, q_idx] == bucket[other][b, h, kv_idx]
                    near = band(b, h, place[other][b, h, q_idx], place[other][b, h, kv_idx])
                    count = count + (seen & near).astype(score.dtype)
            # A pair that several rounds see has its share in each. Every round sees a token's own pair.
            own = jnp.full_like(score, _OWN_SCORE)
            score = jnp.where(q == kv, own, score)
            if num_hashes > 1:
                score = score - jnp.log(count)
            return jnp.where(allowed, score, -jnp.inf)

        out, lse = flex_attention(
            sorted_by_bucket(query),
            sorted_by_bucket(key),
            sorted_by_bucket(value),
            score_mod,
            block_mask,
            scale=scale,
            return_lse=True,
            backend=backend,
        )
        out = jnp.take_along_axis(out, back[..., None], axis=2)
        return out, jnp.take_along_axis(lse, back, axis=2)

    outs, sums = zip(*map(one_round, range(num_hashes)), strict=True)
    if num_hashes == 1:
        return outs[0]
    weights = jax.nn.softmax(jnp.stack(sums), axis=0)[..., None]
    return (weights * jnp.stack(outs).astype(jnp.float32)).sum(axis=0).astype(query.dtype)
