"""Attention of prompts, or chunks of them, to what a paged cache holds; steps are those of `flexjax.decode`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flexjax import _compat
from flexjax.attention import _own_mask, flex_attention
from flexjax.masks.combine import noop_mask
from flexjax.paged.cache import PagedCache
from flexjax.paged.rows import counts_argument

Mod = Callable[..., Any]


def prefill(
    query: Float[Array, "B Hq L D"],
    cache: PagedCache,
    score_mod: Mod | None = None,
    mask_mod: Mod | None = None,
    *,
    counts: Any = None,
    scale: float | Array | None = None,
    return_lse: bool = False,
    sinks: Float[Array, "Hq"] | None = None,
    backend: str | None = None,
) -> Any:
    """Attention of whole prompts, or chunks of them, to the sequences that they were appended to.

    Row b's queries are the last `counts[b]` positions of its sequence: mods see q_idx = lengths[b] - counts[b] + i
    and kv_idx counted from the sequence's beginning, whatever pages it lies in. Keys past lengths[b] are never
    seen. Keys and values are gathered into a contiguous copy, which is what a long chunk is worth; a step of a few
    queries is what `flexjax.decode` is for.

    Args:
        query: (B, Hq, L, D), of which each row's first `counts[b]` are attended for.
        cache: of one layer (`cache.layer(i)`), with these tokens already appended.
        score_mod: as for `flexjax.flex_attention`.
        mask_mod: likewise, for example `masks.causal()`; without it a query sees its whole sequence.
        counts: a number or int (B,), at most L, which is the default; a count beyond a sequence's length is cut
            down to it. Rows of length 0, and queries past the count, see nothing: output 0, logsumexp -inf.
        scale: as for `flexjax.flex_attention`, like the remaining ones.
        return_lse: also return the logsumexp (B, Hq, L).
        sinks: a logit a query head.
        backend: of `flexjax.flex_attention`.

    Returns:
        (B, Hq, L, Dv), or a pair of it and the logsumexp.

    Raises:
        ValueError: shapes do not fit, see `flexjax.flex_attention`; counts that are known are negative or more
            than L. In a traced program these are cut down.
        TypeError: counts are not integers, or a mod cannot be used.
    """
    if query.ndim != 4 or query.shape[0] != cache.batch or query.shape[2] == 0:
        raise ValueError(
            f"query must have shape (B, Hq, L, D) with B = {cache.batch}, the rows of the cache, and L >= 1, but "
            f"it has {query.shape}."
        )
    key, value = cache.contiguous()
    batch, heads, length = query.shape[:3]
    counts = counts_argument("prefill()", "counts", length if counts is None else counts, batch)
    if not _compat.is_tracer(counts) and not bool(((counts >= 0) & (counts <= length)).all()):
        raise ValueError(
            f"prefill(): counts must lie between 0 and the {length} queries that were passed, but they are "
            f"{np.asarray(counts).tolist()}."
        )
    counts = jnp.clip(counts, 0, jnp.minimum(length, cache.lengths))
    mask_mod, score_mod = shifted_mods(mask_mod, score_mod, cache.lengths, length, counts)
    block_mask = _own_mask(
        mask_mod,
        batch,
        heads,
        length,
        key.shape[2],
        # Few queries are not filled up to a whole block.
        block_size=(length if length < 64 else 128, 128),
        compute_q_blocks=False,
    )
    return flex_attention(
        query,
        key,
        value,
        score_mod,
        block_mask,
        scale=scale,
        return_lse=return_lse,
        sinks=sinks,
        backend=backend,
    )


def shifted_mods(
    mask_mod: Mod | None,
    score_mod: Mod | None,
    lengths: Array,
    length: int,
    counts: Array | None = None,
) -> tuple[Mod, Mod | None]:
    """Mods of the index i among L queries, from mods of positions in sequences.

    Without counts, i is position lengths[b] - L + i, as in `flexjax.decode`, if the sequence has it. With
    counts it is lengths[b] - counts[b] + i, for i below counts[b].
    """
    offsets = lengths - (length if counts is None else counts)
    inner = noop_mask if mask_mod is None else mask_mod

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        seen = q_idx + offsets[b] >= 0 if counts is None else q_idx < counts[b]
        seen &= kv_idx < lengths[b]
        return seen & inner(b, h, q_idx + offsets[b], kv_idx)

    if score_mod is None:
        return mask, None

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score_mod(s, b, h, q_idx + offsets[b], kv_idx)

    return mask, score
