"""PyTorch's way to paged attention, for ports: masks and mods rewritten for positions in the pool.

`flexjax.decode` and `flexjax.paged.prefill` need none of this: they look pages up where they load them, and mods
see positions in sequences. Here the whole pool is one key sequence that all batch rows share, and each row's block
mask lists the blocks, one a page, that are its own (FlexAttention, arXiv:2412.05496).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from flexjax.block_lists import EMPTY, FULL, PARTIAL, Geometry, lists_from_states
from flexjax.block_mask import BlockMask, assemble
from flexjax.mods.evaluate import evaluate
from flexjax.mods.trace import index_ranges, trace_mask_mod
from flexjax.paged.cache import PagedCache

Mod = Callable[..., Any]


def physical_pools(
    cache: PagedCache,
) -> tuple[Float[Array, "1 Hkv pool D"], Float[Array, "1 Hkv pool Dv"]]:
    """Keys and values of all pages as one sequence, (1, Hkv, pages * page_size, D): views, not copies.

    Raises:
        ValueError: the cache has several layers.
    """
    keys, values = cache.pools()
    return tuple(x.reshape(1, x.shape[0], -1, x.shape[-1]) for x in (keys, values))  # pyrefly: ignore[bad-return]


def physical_to_logical(cache: PagedCache) -> Int32[Array, "B pages"]:
    """For each row, which page of its sequence a page of the pool is; -1 for pages that are not in it."""
    place = jnp.arange(cache.max_pages, dtype=jnp.int32)[None, :]
    used = place < -(-cache.lengths // cache.page_size)[:, None]
    page = jnp.where(used, cache.page_table, cache.pages)
    row = jnp.arange(cache.batch, dtype=jnp.int32)[:, None]
    inverse = jnp.full((cache.batch, cache.pages), -1, jnp.int32)
    return inverse.at[row, page].set(jnp.broadcast_to(place, page.shape), mode="drop")


def get_mask_mod(mask_mod: Mod | None, cache: PagedCache) -> Mod:
    """A mask of positions in the pool, from one of positions in sequences.

    False wherever the position is not below the length of row b's sequence.

    Args:
        mask_mod: `(b, h, q_idx, kv_idx) -> bool`, kv_idx counted from the beginning of row b's sequence; None
            allows everything.
        cache: as it is when the attention is computed.
    """
    logical = _logical(cache)

    def physical_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        position, inside = logical(b, kv_idx)
        return inside if mask_mod is None else inside & mask_mod(b, h, q_idx, position)

    return physical_mask


def get_score_mod(score_mod: Mod | None, cache: PagedCache) -> Mod:
    """A score_mod of positions in the pool, from one of positions in sequences; -inf where there is no token.

    Args:
        score_mod: `(score, b, h, q_idx, kv_idx) -> score`; None leaves scores as they are.
        cache: as it is when the attention is computed.
    """
    logical = _logical(cache)

    def physical_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        position, inside = logical(b, kv_idx)
        modified = score if score_mod is None else score_mod(score, b, h, q_idx, position)
        return jnp.where(inside, modified, -jnp.inf)

    return physical_score


def convert_logical_block_mask(block_mask: BlockMask, cache: PagedCache) -> BlockMask:
    """The block mask of the pool, from one of sequences.

    Blocks past a sequence's length are left out, and the one that holds its end is looked into, whatever the mask
    says of them.

    Args:
        block_mask: of (L, S) with key blocks of the cache's page size, S at most its capacity, and B equal to 1 or
            the cache's.
        cache: as it is when the attention is computed.

    Returns:
        A BlockMask of (L, pages * page_size), inference-only, for
        `flex_attention(query, *physical_pools(cache), get_score_mod(score_mod, cache), converted)`.

    Raises:
        ValueError: the block mask does not fit the cache.
    """
    page, (q_len, kv_len) = cache.page_size, block_mask.seq_lengths
    batch, heads = block_mask.shape[:2]
    if block_mask.block_size[1] != page:
        raise ValueError(
            f"The block mask has key blocks of {block_mask.block_size[1]}, but pages hold {page} tokens. Build it "
            f"with block_size=({block_mask.block_size[0]}, {page})."
        )
    if kv_len > cache.capacity or batch not in (1, cache.batch):
        raise ValueError(
            f"The block mask is of shape {block_mask.shape}, but the cache has {cache.batch} rows of at most "
            f"{cache.capacity} tokens. Build it with B = {cache.batch} (or 1) and KV_LEN up to {cache.capacity}."
        )
    states = jnp.broadcast_to(
        block_mask.block_states(), (cache.batch, *block_mask.block_states().shape[1:])
    )
    column = jnp.arange(states.shape[-1], dtype=jnp.int32)
    tokens = (jnp.minimum(cache.lengths, kv_len)[:, None] - column[None, :] * page)[:, None, None]
    states = jnp.where((states == FULL) & (tokens < page), PARTIAL, states)
    states = jnp.where(tokens <= 0, EMPTY, states)
    lists = lists_from_states(states)
    table = cache.page_table[:, None, None]

    def physical(columns: Array) -> Array:
        return jnp.take_along_axis(table, columns.clip(0, cache.max_pages - 1), axis=-1)

    geometry = Geometry(q_len, cache.pages * page, block_mask.block_size[0], page)
    ranges = index_ranges(cache.batch, heads, q_len, geometry.kv_len)
    if block_mask.q_offset is not None:  # the graph is one of positions in the mask that was sliced
        ranges |= {"q": (0, int(np.iinfo(np.int32).max))}
    graph, captures = trace_mask_mod(get_mask_mod(_whole_mask(block_mask, kv_len), cache), ranges)
    converted = assemble(
        (lists.counts, physical(lists.indices), lists.full_counts, physical(lists.full_indices)),
        None,
        geometry,
        graph,
        captures,
        block_mask.overflow,
    )
    return dataclasses.replace(converted, q_offset=block_mask.q_offset)


def _whole_mask(block_mask: BlockMask, kv_len: int) -> Mod:
    """The mask inside a block mask's partial blocks, in query positions of the mask that it was sliced from."""
    graph, captures = block_mask.mask_graph, block_mask.mask_captures

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        inside = kv_idx < kv_len
        if graph is None:
            return inside
        return inside & evaluate(graph, captures, {"b": b, "h": h, "q": q_idx, "kv": kv_idx})[0]

    return mask


def _logical(cache: PagedCache) -> Callable[[Any, Any], tuple[Any, Any]]:
    inverse, lengths, page = physical_to_logical(cache), cache.lengths, cache.page_size

    def logical(b: Any, kv_idx: Any) -> tuple[Any, Any]:
        """(position in row b's sequence, whether there is one); positions that are not are 0."""
        own = inverse[b, kv_idx // page]
        position = own * page + kv_idx % page
        inside = (own >= 0) & (position < lengths[b])
        return jnp.where(inside, position, 0), inside

    return logical
