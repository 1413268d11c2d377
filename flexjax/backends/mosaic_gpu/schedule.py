"""Which tiles a CTA computes, and which keys a tile visits: the block lists as the kernel walks them.

A *tile* is `q_tile` queries of one head, a *step* of it `kv_tile` keys. The masked steps of a tile come first:
those of its partial blocks, in which the mask decides, or, without block lists, the step that reaches over
the last key. The very first step is computed as a masked one in any case.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS, Config
from flexjax.block_lists import cdiv
from flexjax.problem import Problem

# Of keys and values that are in use at a time. An H100's second-level cache has 50 MB, but in two halves, which
# both hold what multiprocessors on both sides read.
_CACHED_BYTES = 16 * 2**20


def moved_inside(first: Any, length: int, size: int, padded: int) -> Any:
    """The first index of a tile, moved so that the tile begins within the length.

    Args:
        first: the index, a multiple of `size`.
        length: how many indices there are.
        size: of a tile.
        padded: how many indices all tiles together reach over.
    """
    last = (cdiv(length, size) - 1) * size
    return first if last + size >= padded else jnp.minimum(first, last)


class TilePosition(NamedTuple):
    """Batch row, query head and number of the query tile."""

    b: Any
    h: Any
    q: Any


class Steps(NamedTuple):
    """The steps of a tile.

    Attributes:
        masked: how many of them, from the first, are masked.
        count: how many there are.
        first_key: from the number of a step to the first of its keys; always inside the tensor's tiles.
    """

    masked: Any
    count: Any
    first_key: Callable[[Any], Any]

    @property
    def computed(self) -> Any:
        """Steps that are computed: a tile without any computes one and drops it."""
        return jnp.maximum(self.count, 1)


class Work(NamedTuple):
    """A tile to be computed.

    Attributes:
        position: where it lies.
        steps: what it visits.
        begin: steps of the tiles before it, of the same CTA or consumer.
    """

    position: TilePosition
    steps: Steps
    begin: Any

    @property
    def end(self) -> Any:
        """Where the next tile begins."""
        return self.begin + self.steps.computed


class Walk(NamedTuple):
    """Tiles that are computed one after the other.

    Attributes:
        count: how many there are; perhaps none.
        tile: from a number below that to a tile.
    """

    count: Any
    tile: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The tiles and steps of a problem under a configuration."""

    problem: Problem
    config: Config

    @property
    def q_tiles(self) -> int:
        return cdiv(self.problem.q_len, self.config.q_tile)

    @property
    def kv_tiles(self) -> int:
        return cdiv(self.problem.kv_len, self.config.kv_tile)

    @property
    def listed_tiles(self) -> int:
        """Tiles of keys that the block lists can name; some may lie beyond the last key."""
        blocks = self.problem.blocks
        if blocks is None:
            return self.kv_tiles
        return blocks.geometry.cols * (blocks.geometry.kv_block // self.config.kv_tile)

    @property
    def walkers(self) -> int:
        """CTAs, or consumers with tiles of their own."""
        return self.ctas * self.config.workers

    @property
    def counted(self) -> bool:
        """Whether there is anything left for a counter, when everybody has a first tile."""
        return self.config.counted and self.config.persistent and self.tiles > self.walkers

    @property
    def tiles(self) -> int:
        return self.problem.batch * self.problem.q_heads * self.q_tiles

    @property
    def section(self) -> int:
        """How many query heads are computed side by side: a divisor of all, of all batch rows.

        All of them, if tiles that may differ in length are dealt out in advance: a round of such tiles is to be
        of the same queries.
        """
        p = self.problem
        heads = p.batch * p.q_heads
        if p.blocks is not None and self.config.persistent and not self.config.counted:
            return heads
        keys_and_values = p.kv_len * (p.qk_dim + p.v_dim) * p.q_dtype.itemsize
        most = max(_CACHED_BYTES // keys_and_values, 1) * p.group
        return max(n for n in range(1, min(most, heads) + 1) if heads % n == 0)

    @property
    def ctas(self) -> int:
        """As many as there are tiles, or multiprocessors: consumers stay idle before multiprocessors do."""
        return min(self.tiles, self.config.cores) if self.config.persistent else self.tiles

    @property
    def overhang(self) -> bool:
        """Whether some masked step reaches over the last key."""
        blocks = self.problem.blocks
        unit = self.config.kv_tile if blocks is None else blocks.geometry.kv_block
        return self.problem.kv_len % unit != 0

    def inside(self, first_key: Any) -> Any:
        """Moves a step that lies wholly beyond the last key, where nothing counts, back onto keys."""
        kv_tile = self.config.kv_tile
        return moved_inside(first_key, self.problem.kv_len, kv_tile, self.listed_tiles * kv_tile)

    def on_queries(self, first_query: Any) -> Any:
        """Moves a warpgroup's queries that lie wholly beyond the last one back, for what the mods read."""
        return moved_inside(
            first_query, self.problem.q_len, WARPGROUP_ROWS, self.q_tiles * self.config.q_tile
        )

    # -- tiles ----------------------------------------------------------------------------------

    def for_each_tile(self, cta: Any, visit: Callable[[Any, Any], Any]) -> Any:
        """Folds `carry = visit(tile, carry)` over the CTA's tiles; the carry starts from 0."""
        if not self.config.persistent:
            return visit(cta, jnp.int32(0))
        walk = self.walk(cta)
        return lax.fori_loop(
            0, walk.count, lambda i, carry: visit(walk.tile(i), carry), jnp.int32(0)
        )

    def walk(self, number: Any) -> Walk:
        """The tiles of one CTA, or of one of the consumers that have tiles of their own, by its number.

        A persistent grid is walked to and fro: who got the longest tile of a round gets the shortest of the next.
        """
        walkers = self.walkers
        rounds = cdiv(self.tiles, walkers)

        def tile(i: Any) -> Any:
            forth = lax.rem(i, jnp.int32(2)) == 0
            return i * walkers + jnp.where(forth, number, walkers - 1 - number)

        count = rounds - (tile(jnp.int32(rounds - 1)) >= self.tiles).astype(jnp.int32)
        return Walk(count, tile)

    def position(self, tile: Any) -> TilePosition:
        """Where a tile lies.

        A section of heads, whose keys and values the second-level cache holds, comes after the other. Within it
        heads vary fastest, so that a wave shares its keys; the last queries, with causal masks the most work, come
        first.
        """
        p, heads = self.problem, self.section
        of_section = heads * self.q_tiles
        first_head = lax.div(tile, jnp.int32(of_section)) * heads
        tile = lax.rem(tile, jnp.int32(of_section))
        bh, row = first_head + lax.rem(tile, jnp.int32(heads)), lax.div(tile, jnp.int32(heads))
        b, h = lax.div(bh, jnp.int32(p.q_heads)), lax.rem(bh, jnp.int32(p.q_heads))
        return TilePosition(b, h, self.q_tiles - 1 - row)

    def work(self, lists: Any, tile: Any, begin: Any) -> Work:
        """What is to be done for a tile; `lists` as for `steps`."""
        position = self.position(tile)
        return Work(position, self.steps(lists, position), begin)

    def kv_row(self, position: TilePosition) -> tuple[Any, Any]:
        """Batch row and head of the keys."""
        p = self.problem
        b = lax.div(position.b, jnp.int32(p.batch // p.kv_batch))
        return b, lax.div(position.h, jnp.int32(p.group))

    # -- steps ----------------------------------------------------------------------------------

    def steps(self, lists: Any, position: TilePosition) -> Steps:
        """The steps of a tile.

        Args:
            lists: references to kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices; empty
                without a block mask.
            position: the tile.
        """
        kv_tile = self.config.kv_tile
        if not lists:
            count = jnp.int32(self.kv_tiles)
            if not self.overhang:
                last = self.kv_tiles - 1

                def first(i: Any) -> Any:
                    # Nothing loads what is behind the last, but Pallas looks at static numbers.
                    return (min(i, last) if isinstance(i, int) else i) * kv_tile

                return Steps(jnp.int32(0), count, first)
            # The step that reaches over the last key is the first one.
            last = jnp.int32(self.kv_tiles - 1)
            return Steps(jnp.int32(1), count, lambda i: jnp.where(i == 0, last, i - 1) * kv_tile)
        blocks = self.problem.blocks
        assert blocks is not None, "lists come with their static part"
        geometry = blocks.geometry
        per_block = geometry.kv_block // kv_tile
        row = lax.div(position.q, jnp.int32(geometry.q_block // self.config.q_tile))
        b = lax.div(position.b, jnp.int32(self.problem.batch // blocks.batch))
        where = (b, position.h if blocks.heads > 1 else 0, row)
        partial_counts, partial_indices, full_counts, full_indices = lists

        def count(counts: Any, indices: Any) -> Any:
            # No count is trusted beyond the list, and no entry beyond the mask.
            return jnp.clip(counts[where], 0, indices.shape[-1])

        def entry(indices: Any, i: Any) -> Any:
            return indices[(*where, jnp.clip(i, 0, indices.shape[-1] - 1))]

        partial = count(partial_counts, partial_indices)
        full = count(full_counts, full_indices)

        def first_key(i: Any) -> Any:
            i, part = lax.div(i, jnp.int32(per_block)), lax.rem(i, jnp.int32(per_block))
            block = lax.select(
                i < partial, entry(partial_indices, i), entry(full_indices, i - partial)
            )
            block = jnp.clip(block, 0, geometry.cols - 1)
            return block * geometry.kv_block + part * kv_tile

        return Steps(partial * per_block, (partial + full) * per_block, first_key)
