"""Adaptive paged attention: a query attends to the pages that may matter to it, found without reading them.

Of every page the cache keeps the least and the greatest of each coordinate of its keys (`bounds=True`). For any
key k of a page and a query q these bound the score from both sides,

    sum_d min(q_d low_d, q_d high_d)  <=  q . k  <=  sum_d max(q_d low_d, q_d high_d),

which costs two vectors a page instead of all its keys. Pages are ranked by the upper bound, as in Quest (Tang et
al. 2024, arXiv:2406.10774); here score_mod and mask_mod have their say too, and `margin` leaves out pages that the
two bounds together prove to be negligible.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from flexjax.attention import AuxRequest, _sinks, _with_sinks
from flexjax.block_arguments import positive
from flexjax.block_lists import EMPTY, Geometry
from flexjax.block_mask import BlockMask
from flexjax.block_selection import selected_blocks
from flexjax.block_states import block_states
from flexjax.decoding import decode
from flexjax.mods.trace import index_ranges, trace_mask_mod
from flexjax.paged.attention import shifted_mods
from flexjax.paged.cache import PagedCache
from flexjax.problem import BHLD

Mod = Callable[..., Any]


class Selection(NamedTuple):
    """Which pages of each sequence every key head attends to.

    Attributes:
        chosen: bool (B, Hkv, max_pages), by logical page.
        importance: float32 (B, Hkv, max_pages), the bound that pages were ranked by: of the largest modified score
            that any query of the group has with any key of the page. -inf where the mask hides the page, inf where
            the bound is NaN.
        pages: int32 (B, Hkv, K), the chosen logical pages by falling importance, the newest last; then others.
        counts: int32 (B, Hkv), how many of them are chosen.
    """

    chosen: Bool[Array, "B Hkv max_pages"]
    importance: Float[Array, "B Hkv max_pages"]
    pages: Int32[Array, "B Hkv K"]
    counts: Int32[Array, "B Hkv"]


def select_pages(
    query: Float[Array, "B Hq L D"],
    cache: PagedCache,
    top_k: int,
    score_mod: Mod | None = None,
    mask_mod: Mod | None = None,
    *,
    first: int = 1,
    recent: int = 1,
    margin: float | None = None,
    scale: float | Array | None = None,
) -> Selection:
    """Chooses the pages that the last L positions of each sequence attend to.

    Args:
        query: (B, Hq, L, D), a few queries at the sequences' ends.
        cache: of one layer, created with `bounds=True`, with these tokens already appended.
        top_k: the most pages chosen by importance for every key head, besides those that are always kept.
        score_mod: as in the attention to follow. The bound is modified at a page's first and last position, and
            the larger one taken: a bound again if the mod grows with the score and has no maximum inside a page,
            as ALiBi and soft caps; otherwise an estimate.
        mask_mod: likewise. Pages in which it allows a query nothing are not chosen for it.
        first: so many pages are always kept at the beginning (attention sinks, arXiv:2309.17453).
        recent: likewise at the end; at least the pages that hold the L positions.
        margin: leave out pages, also among the top_k, whose keys all weigh less than exp(-margin) times the
            heaviest key. None leaves out none.
        scale: as in the attention to follow.

    Raises:
        ValueError: the cache has no bounds or several layers, shapes do not fit, or a count is not sensible.
    """
    keys = cache.pools()[0]
    if cache.key_min is None:
        raise ValueError(
            "Pages are chosen by bounds of their keys, which this cache does not keep. Create it with "
            "PagedCache.create(..., bounds=True)."
        )
    top_k = positive(top_k, "top_k")
    if (
        not all(isinstance(n, (int, np.integer)) for n in (first, recent))
        or first < 0
        or recent < 1
    ):
        raise ValueError(
            f"first must be at least 0 and recent at least 1, both integers, but they are {first!r} and "
            f"{recent!r}: the newest page is always attended to."
        )
    page, count, (kv_heads, key_dim) = cache.page_size, cache.max_pages, keys.shape[::3]
    if (
        query.ndim != 4
        or (query.shape[0], query.shape[3]) != (cache.batch, key_dim)
        or query.shape[1] % kv_heads
        or query.shape[2] == 0
    ):
        raise ValueError(
            f"query must have shape (B, Hq, L, D) with the cache's B = {cache.batch} and D = {key_dim}, Hq a "
            f"multiple of its {kv_heads} key heads and L >= 1, but it has {query.shape}."
        )
    batch, heads, length, dim = query.shape
    mask, score = shifted_mods(mask_mod, score_mod, cache.lengths, length)

    scale = dim**-0.5 if scale is None else scale
    low, high = _score_bounds(query.astype(jnp.float32) * scale, cache)  # (B, Hq, L, max_pages)
    if score is not None:
        ends = jnp.arange(count, dtype=jnp.int32) * page, cache.lengths
        low, high = _modified(score, low, high, ends, page)
    graph, captures = trace_mask_mod(mask, index_ranges(batch, heads, length, cache.capacity))
    geometry = Geometry(length, cache.capacity, 1, page)
    states = block_states(graph, captures, geometry, batch, heads)
    seen = jnp.broadcast_to(states != EMPTY, high.shape)
    # A mod may be NaN where the mask hides it, and so at the end of a page whose other keys are seen.
    high = jnp.where(seen, jnp.where(jnp.isnan(high), jnp.inf, high), -jnp.inf)
    wanted = seen
    if margin is not None:
        best = jnp.where(seen & ~jnp.isnan(low), low, -jnp.inf).max(-1, keepdims=True)
        wanted = seen & (high >= best - margin)

    def by_key_head(x: Array, reduce: Callable[..., Array]) -> Array:
        return reduce(x.reshape(batch, kv_heads, -1, count), axis=2)

    importance = by_key_head(high, jnp.max)
    index = jnp.arange(count, dtype=jnp.int32)[None, :]
    used = -(-cache.lengths // page)[:, None]
    recent = max(recent, (length + page - 2) // page + 1)
    kept = (index < used) & ((index < first) | (index >= used - recent))
    kept = jnp.broadcast_to(kept[:, None], importance.shape)
    eligible = by_key_head(wanted, jnp.any) & ~kept
    chosen = kept | selected_blocks(importance, eligible, top_k, None)

    # Newest last, so that the only page that is not full ends the shortened sequence.
    newest = (index == used - 1)[:, None]
    rank = jnp.where(newest, -2e30, jnp.clip(importance, -1e30, 1e30))
    rank = jnp.where(chosen, rank, -jnp.inf)
    pages = jax.lax.top_k(rank, min(top_k + first + recent, count))[1]
    return Selection(chosen, importance, pages.astype(jnp.int32), chosen.sum(-1, dtype=jnp.int32))


def adaptive_attention(
    query: Float[Array, "B Hq L D"],
    cache: PagedCache,
    top_k: int,
    score_mod: Mod | None = None,
    mask_mod: Mod | None = None,
    *,
    first: int = 1,
    recent: int = 1,
    margin: float | None = None,
    scale: float | Array | None = None,
    return_lse: bool = False,
    sinks: Float[Array, "Hq"] | None = None,
    backend: str | None = None,
) -> Any:
    """Attention of the last L positions of each sequence to the pages that `select_pages` chooses.

    Reads two vectors of every page, and the keys and values of the chosen ones only: `flexjax.decode` reads them
    where they are. Mods see positions in the whole sequence.

    Args:
        query: as for `select_pages`, like all up to scale.
        cache: see query.
        top_k: see query.
        score_mod: see query.
        mask_mod: see query.
        first: see query.
        recent: see query.
        margin: see query.
        scale: see query.
        return_lse: also return the logsumexp over the chosen pages, (B, Hq, L), without sinks.
        sinks: float (Hq,), a logit for every query head, as for `flexjax.flex_attention`.
        backend: of `flexjax.decode`.

    Returns:
        (B, Hq, L, Dv), or a pair of it and the logsumexp.

    Raises:
        ValueError: see `select_pages` and `flexjax.decode`.
    """
    selection = select_pages(
        query,
        cache,
        top_k,
        score_mod,
        mask_mod,
        first=first,
        recent=recent,
        margin=margin,
        scale=scale,
    )
    view, score, mask = selected_view(cache, selection, query.shape[1], score_mod, mask_mod)
    batch, heads, length, dim = query.shape
    folded = query.reshape(view.lengths.shape[0], -1, length, dim)
    wanted = AuxRequest(lse=return_lse or sinks is not None)
    out, aux = decode(folded, view, score, mask, scale=scale, return_aux=wanted, backend=backend)
    out = out.reshape(batch, heads, length, -1)
    lse = None if aux.lse is None else aux.lse.reshape(batch, heads, length)
    if sinks is not None:  # here, since heads of the view in different rows are different heads
        out = _with_sinks(out, lse, _sinks(sinks, heads), BHLD)
    return (out, lse) if return_lse else out


class SelectedPages(NamedTuple):
    """A shortened page table for every key head, with the attributes that attention reads of a cache.

    Attributes:
        key_pages: (1, Hkv * pages, page, D), the pools seen as those of one head.
        value_pages: (1, Hkv * pages, page, Dv).
        page_table: int32 (B * Hkv, K).
        lengths: int32 (B * Hkv,), tokens in the chosen pages.
    """

    key_pages: Float[Array, "1 pages page D"]
    value_pages: Float[Array, "1 pages page Dv"]
    page_table: Int32[Array, "BH K"]
    lengths: Int32[Array, "BH"]


def selected_view(
    cache: PagedCache,
    selection: Selection,
    heads: int,
    score_mod: Mod | None = None,
    mask_mod: Mod | None = None,
) -> tuple[SelectedPages, Mod | None, Mod | None]:
    """The chosen pages as a cache of B * Hkv rows of one key head, and the mods for it.

    Args:
        cache: of one layer.
        selection: from `select_pages`.
        heads: query heads Hq; a row of the view has Hq / Hkv.
        score_mod: of positions in the whole sequences, like mask_mod.
        mask_mod: see score_mod.

    Returns:
        The view, score_mod and mask_mod of positions in it.
    """
    keys, values = cache.pools()
    kv_heads, page, group = keys.shape[0], cache.page_size, heads // keys.shape[0]
    batch, _, width = selection.pages.shape
    table = jnp.take_along_axis(cache.page_table[:, None], selection.pages, axis=2)
    table = table + cache.pages * jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    tail = (cache.lengths[:, None] - 1) % page + 1
    short = jnp.where(selection.counts > 0, (selection.counts - 1) * page + tail, 0).reshape(-1)
    logical = selection.pages.reshape(batch * kv_heads, width)
    growth = jnp.repeat(cache.lengths, kv_heads) - short  # what a query's index was shortened by

    def places(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> tuple[Any, Any, Any, Any]:
        position = logical[b, kv_idx // page] * page + kv_idx % page
        return b // kv_heads, (b % kv_heads) * group + h, q_idx + growth[b], position

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score_mod(s, *places(b, h, q_idx, kv_idx))  # pyrefly: ignore[not-callable]

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return mask_mod(*places(b, h, q_idx, kv_idx))  # pyrefly: ignore[not-callable]

    view = SelectedPages(
        keys.reshape(1, -1, *keys.shape[2:]),
        values.reshape(1, -1, *values.shape[2:]),
        table.reshape(batch * kv_heads, width),
        short,
    )
    return view, None if score_mod is None else score, None if mask_mod is None else mask


def selected_block_mask(
    cache: PagedCache,
    selection: Selection,
    q_heads: int,
    q_len: int,
    mask_mod: Mod | None = None,
) -> BlockMask:
    """The choice as a dynamic BlockMask over the positions of sequences.

    For `flexjax.decode(query, cache, score_mod, block_mask=...)`, or `flexjax.flex_attention` over
    `cache.contiguous()`. Its own mask_mod counts queries from 0, the first of the last q_len positions.

    Args:
        cache: of one layer.
        selection: from `select_pages`.
        q_heads: query heads Hq.
        q_len: queries L.
        mask_mod: of positions in the whole sequence.
    """
    mask, _ = shifted_mods(mask_mod, None, cache.lengths, q_len)
    scores = jnp.where(selection.chosen, 0.0, -jnp.inf)[:, :, None]
    return BlockMask.from_block_scores(
        jnp.repeat(scores, q_heads // scores.shape[1], axis=1),
        threshold=0.0,
        mask_mod=mask,
        seq_lengths=(q_len, cache.capacity),
        block_size=(q_len, cache.page_size),
        compute_q_blocks=False,
    )


def _score_bounds(query: Array, cache: PagedCache) -> tuple[Array, Array]:
    """Bounds of the scores of each query with the keys of each page, float32 (B, Hq, L, max_pages)."""
    batch, heads, length, dim = query.shape
    low, high = (
        x.at[:, cache.page_table].get(mode="clip").astype(jnp.float32)  # (Hkv, B, max_pages, D)
        for x in (cache.key_min, cache.key_max)
    )
    grouped = query.reshape(batch, low.shape[0], -1, length, dim)
    product = functools.partial(
        jnp.einsum, "bhgld,hbpd->bhglp", precision="highest", preferred_element_type=jnp.float32
    )
    up, down = jnp.maximum(grouped, 0.0), jnp.minimum(grouped, 0.0)
    shape = (batch, heads, length, -1)
    least, most = product(up, low) + product(down, high), product(up, high) + product(down, low)
    return least.reshape(shape), most.reshape(shape)


def _modified(
    score: Mod, low: Array, high: Array, ends: tuple[Array, Array], page: int
) -> tuple[Array, Array]:
    """Bounds of modified scores, from the mod at each page's first and last position."""
    starts, lengths = ends

    def at(s: Array, position: Array) -> Array:
        # s (B, Hq, L, P), position (B, P)
        mod = jax.vmap(score, (0, None, None, None, 0))
        mod = jax.vmap(mod, (0, None, None, 0, None))
        mod = jax.vmap(mod, (0, None, 0, None, None))
        mod = jax.vmap(mod, (0, 0, None, None, 0))
        indices = (jnp.arange(n, dtype=jnp.int32) for n in s.shape[:3])
        return mod(s, *indices, position)

    begin = jnp.broadcast_to(starts[None, :], (low.shape[0], starts.shape[0]))
    end = jnp.clip(begin + page - 1, 0, jnp.maximum(lengths - 1, 0)[:, None])
    least = jnp.minimum(at(low, begin), at(low, end))
    most = jnp.maximum(at(high, begin), at(high, end))
    return least.astype(jnp.float32), most.astype(jnp.float32)
