"""Which tiles of keys the backward kernel computes, and which queries a tile visits.

A *column* is one tile of keys of one key head, and the work of one CTA. It visits every batch row and query head
that reads these keys, and in each of them the *steps*, tiles of queries, that the transposed block lists name:
masked ones first, in which the mask decides or which reach over the last key, then the others. Where few key
heads would leave much of the machine without a column, it visits a *share* of those rows and heads: dK and dV of
the shares are added up afterwards.

The grid takes a few heads at a time, about as many as fill the machine, and in them the first keys of every
head, then the second ones, and so on. CTAs that run at the same time then add to the dQ of few heads, which stays
in the second-level cache; and for causal masks, whose first keys have the most queries, the longest columns come
first and the last ones that run are short ones of all these heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu.backward_config import BackwardConfig, padded_dim
from flexjax.backends.mosaic_gpu.schedule import moved_inside
from flexjax.block_lists import cdiv
from flexjax.problem import Problem

# Bytes of dQ that the heads whose columns run at once may have together, where columns wait for each other: a
# third of the second-level cache.
SUMS_TOGETHER = 16 << 20


class Column(NamedTuple):
    """A column.

    Attributes:
        b, h: batch row and head of the keys.
        share: of the queries' rows.
        tile: number of the tile of keys.
        turn: how many columns the CTA had before.
        begin: number of the first step.
    """

    b: Any
    h: Any
    share: Any
    tile: Any
    turn: Any
    begin: Any


class Steps(NamedTuple):
    """The steps of a column in one batch row and query head.

    Attributes:
        masked: how many of them, from the first, are masked.
        count: how many there are.
        first_query: from the number of a step to the first of its queries.
    """

    masked: Any
    count: Any
    first_query: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class ColumnSchedule:
    """The columns and steps of a problem under a configuration."""

    problem: Problem
    config: BackwardConfig

    @property
    def kv_tiles(self) -> int:
        return cdiv(self.problem.kv_len, self.config.kv_tile)

    @property
    def padded_keys(self) -> int:
        return self.kv_tiles * self.config.kv_tile

    @property
    def padded_queries(self) -> int:
        """Queries that steps may visit: the last block of queries to its end."""
        blocks = self.problem.blocks
        unit = self.config.q_tile if blocks is None else blocks.geometry.q_block
        return cdiv(self.problem.q_len, unit) * unit

    @property
    def columns(self) -> int:
        return self.heads * self.kv_tiles

    @property
    def heads(self) -> int:
        """Heads of keys, each as often as its queries are shared out."""
        return self.problem.kv_batch * self.problem.kv_heads * self.shares

    @property
    def shares(self) -> int:
        """Parts into which the batch rows and query heads of a column are divided, each for a CTA of its own."""
        return self.config.shares

    @property
    def keys_overhang(self) -> bool:
        """Whether the last tile of keys reaches over the last key. Its steps are then all masked ones."""
        return self.problem.kv_len % self.config.kv_tile != 0

    @property
    def queries_overhang(self) -> bool:
        """Whether some step reaches over, or lies beyond, the last query."""
        return self.padded_queries != self.problem.q_len

    @property
    def has_masked_steps(self) -> bool:
        return self.problem.mask is not None or self.keys_overhang

    @property
    def rows(self) -> int:
        """Batch rows and query heads that a column visits."""
        return self.problem.batch // self.problem.kv_batch * self.problem.group // self.shares

    @property
    def heads_together(self) -> int:
        """Heads whose columns alternate: the power of two that comes closest to filling the machine.

        Where the columns of a head come in no order of length, as those of packed documents, four times as many:
        the last columns to run are then the last ones of many heads, and nobody waits for a long one.
        Columns that wait for each other should be few of any head: then more heads, as far as the cache allows.
        """
        filling = 1 << max(0, round(math.log2(self.config.cores / self.kv_tiles)))
        if not self.config.ordered:
            return filling * (4 if self.problem.mask_loads else 1)
        sums = 4 * self.rows * self.padded_queries * padded_dim(self.problem.qk_dim)
        return max(filling, 1 << int(math.log2(max(1, SUMS_TOGETHER // sums))))

    @property
    def ctas(self) -> int:
        return min(self.columns, self.config.cores) if self.config.persistent else self.columns

    def column(self, number: Any, turn: Any = 0, begin: Any = 0) -> Column:
        together = self.heads_together
        group = lax.div(number, jnp.int32(together * self.kv_tiles))
        first = group * together
        # The last group may be smaller.
        size = jnp.minimum(self.heads - first, together)
        inside = number - first * self.kv_tiles
        head, tile = first + lax.rem(inside, size), lax.div(inside, size)
        return Column(*self._split(head), tile, turn, begin)

    def _split(self, head: Any) -> tuple[Any, Any, Any]:
        """(batch row, head, share) of one of the `heads`."""
        heads, shares = jnp.int32(self.problem.kv_heads), jnp.int32(self.shares)
        share, head = lax.rem(head, shares), lax.div(head, shares)
        return lax.div(head, heads), lax.rem(head, heads), share

    def head_of(self, column: Column) -> Any:
        """Which of the `heads` a column is of."""
        head = column.b * self.problem.kv_heads + column.h
        return head * self.shares + column.share

    def row(self, column: Column, number: Any) -> tuple[Any, Any]:
        """Batch row and query head of one of the `rows` that a column visits."""
        return self._row(column.b, column.h, column.share, number)

    def row_of_head(self, head: Any, number: Any) -> tuple[Any, Any]:
        """Batch row and query head of one of the `rows` that the columns of a head visit."""
        return self._row(*self._split(head), number)

    def _row(self, b: Any, h: Any, share: Any, number: Any) -> tuple[Any, Any]:
        p = self.problem
        group, number = jnp.int32(p.group), share * self.rows + number
        return b * (p.batch // p.kv_batch) + lax.div(number, group), h * p.group + lax.rem(
            number, group
        )

    def inside(self, first_query: Any) -> Any:
        """Moves a step that lies wholly beyond the last query back onto queries, for the mods' indices."""
        q_tile = self.config.q_tile
        return moved_inside(first_query, self.problem.q_len, q_tile, self.padded_queries)

    def steps(self, lists: Any, column: Column, b: Any, h: Any) -> Steps:
        """The steps of a column in batch row b and query head h.

        Args:
            lists: references to q_num_blocks, q_indices, full_q_num_blocks, full_q_indices; empty without a
                block mask.
            column: the column.
            b: the queries' batch row.
            h: the queries' head.
        """
        q_tile = self.config.q_tile
        if not lists:
            count = jnp.int32(self.padded_queries // q_tile)
            masked = jnp.int32(0)
            if self.keys_overhang:
                masked = jnp.where(column.tile == self.kv_tiles - 1, count, 0)
            return Steps(masked, count, lambda i: i * q_tile)
        blocks = self.problem.blocks
        assert blocks is not None, "lists come with their static part"
        geometry = blocks.geometry
        per_block = geometry.q_block // q_tile
        block_column = lax.div(column.tile, jnp.int32(geometry.kv_block // self.config.kv_tile))
        list_row = lax.div(b, jnp.int32(self.problem.batch // blocks.batch))
        where = (list_row, h if blocks.heads > 1 else 0, block_column)
        partial_counts, partial_indices, full_counts, full_indices = lists

        def count_of(counts: Any, indices: Any) -> Any:
            # No count is trusted beyond the list, and no entry beyond the mask.
            return jnp.clip(counts[where], 0, indices.shape[-1])

        def entry(indices: Any, i: Any) -> Any:
            return indices[(*where, jnp.clip(i, 0, indices.shape[-1] - 1))]

        partial = count_of(partial_counts, partial_indices)
        full = count_of(full_counts, full_indices)

        def first_query(i: Any) -> Any:
            i, part = lax.div(i, jnp.int32(per_block)), lax.rem(i, jnp.int32(per_block))
            block = lax.select(
                i < partial,
                entry(partial_indices, i),
                entry(full_indices, i - partial),
            )
            block = jnp.clip(block, 0, geometry.rows - 1)
            return block * geometry.q_block + part * q_tile

        return Steps(partial * per_block, (partial + full) * per_block, first_query)
