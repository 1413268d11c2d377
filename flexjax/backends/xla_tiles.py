"""Tiles of the xla backend: how rows of blocks are cut out of arrays, and what is computed on one tile.

A *lane* is one row of query blocks for the heads that share a mask. Arrays of a tile have the axes
g (lanes), k (key heads), r (query rows: query heads of the group times the block's queries) and s (keys).
Mods see them as (g, query head, query, key).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flexjax.block_lists import Geometry, cdiv
from flexjax.mods.evaluate import evaluate
from flexjax.mods.graph import Graph
from flexjax.mods.pullback import score_pullback
from flexjax.problem import Operands, Problem, heads_first

# Tile length where no block mask prescribes one.
_DEFAULT_BLOCK = 128

Carry = Any
TilePullback = Callable[[Any, tuple[Any, ...]], tuple[Any, tuple[Any, ...]]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a problem is cut into rows of blocks.

    Attributes:
        problem: the problem.
        geometry: lengths and block sizes.
        mask_heads: heads that the lists distinguish: 1 or all.
        heads: query heads of one lane.
        kv_heads: key heads of one lane.
        lanes: rows of blocks taken together.
    """

    problem: Problem
    geometry: Geometry
    mask_heads: int
    heads: int
    kv_heads: int
    lanes: int

    @classmethod
    def of(cls, problem: Problem, lanes: int) -> Plan:
        blocks = problem.blocks
        if blocks is None:
            sizes = (min(_DEFAULT_BLOCK, n) for n in (problem.q_len, problem.kv_len))
            geometry = Geometry(problem.q_len, problem.kv_len, *sizes)
            mask_heads = 1
        else:
            geometry, mask_heads = blocks.geometry, blocks.heads
        shared = mask_heads == 1
        return cls(
            problem,
            geometry,
            mask_heads,
            heads=problem.q_heads if shared else 1,
            kv_heads=problem.kv_heads if shared else 1,
            lanes=min(lanes, problem.batch * mask_heads * geometry.rows),
        )

    @property
    def row_count(self) -> int:
        return self.problem.batch * self.mask_heads * self.geometry.rows

    @property
    def tile_rows(self) -> int:
        return self.heads // self.kv_heads * self.geometry.q_block

    def items(self) -> tuple[Any, Any, Any, Any]:
        """(batch row, mask head, row of blocks, whether real) of every lane, [steps, lanes] each."""
        steps = cdiv(self.row_count, self.lanes)
        flat = jnp.arange(steps * self.lanes, dtype=jnp.int32).reshape(steps, self.lanes)
        real = flat < self.row_count
        flat = jnp.minimum(flat, self.row_count - 1)
        head_row, rows = flat // self.geometry.rows, self.geometry.rows
        return head_row // self.mask_heads, head_row % self.mask_heads, flat % rows, real

    def pad_queries(self, x: Any, fill: float = 0.0) -> Any:
        extra = self.geometry.rows * self.geometry.q_block - self.geometry.q_len
        return jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0)), constant_values=fill)

    def padded(self, operands: Operands) -> tuple[Any, Any, Any]:
        """Query, key and value with heads first, filled up with zeros to whole blocks."""
        extra = self.geometry.cols * self.geometry.kv_block - self.geometry.kv_len
        layout = self.problem.layout

        def keys(x: Any) -> Any:
            x = heads_first(x, layout).astype(self.problem.q_dtype)
            return jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0)))

        query = self.pad_queries(heads_first(operands.query, layout))
        return query, keys(operands.key), keys(operands.value)

    def gather_rows(self, x: Any) -> Any:
        """[steps, lanes, kv_heads, tile rows, D] of all lanes as (B, Hq, L, D)."""
        problem, geometry = self.problem, self.geometry
        x = x.reshape(-1, *x.shape[2:])[: self.row_count]
        x = x.reshape(
            problem.batch,
            self.mask_heads,
            geometry.rows,
            self.heads,
            geometry.q_block,
            x.shape[-1],
        )
        x = jnp.moveaxis(x, 2, 3)
        x = x.reshape(problem.batch, problem.q_heads, -1, x.shape[-1])
        return x[:, :, : geometry.q_len]


class Block(NamedTuple):
    """The key blocks that the lanes visit in one step, [lanes] each.

    Attributes:
        column: which block of keys.
        busy: whether the lane has a block left; idle lanes are masked.
        masked: whether the mask decides inside the block.
    """

    column: Any
    busy: Any
    masked: Any


@dataclasses.dataclass(frozen=True)
class Tile:
    """One group of lanes, and the operations on its tiles.

    Attributes:
        problem, plan, operands: what is computed.
        items: (batch row, mask head, row of blocks, whether real), [lanes] each.
    """

    problem: Problem
    plan: Plan
    operands: Operands
    items: tuple[Any, Any, Any, Any]

    # -- walking the lists ----------------------------------------------------------------------

    def for_each_block(
        self, visit: Callable[[Carry, Block], Carry], carry: Carry, differentiable: bool
    ) -> Carry:
        """Calls `visit(carry, block)` for the listed blocks of all lanes, full ones first."""
        lists, cols, real = self.operands.lists, self.plan.geometry.cols, self.items[3]
        if lists is None:
            counts = jnp.where(real, cols, 0)
            width = cols

            def block(j: Any) -> Block:
                return Block(jnp.broadcast_to(j, counts.shape), j < counts, jnp.zeros_like(real))
        else:
            where = self._list_row()
            n_full, full = lists.full_kv_num_blocks[where], lists.full_kv_indices[where]
            n_partial, partial = lists.kv_num_blocks[where], lists.kv_indices[where]
            counts = jnp.where(real, n_full + n_partial, 0)
            width = full.shape[-1] + partial.shape[-1]

            def block(j: Any) -> Block:
                is_full = j < n_full
                in_full = full[:, jnp.minimum(j, full.shape[-1] - 1)]
                lanes = jnp.arange(counts.shape[0], dtype=jnp.int32)
                in_partial = partial[lanes, jnp.clip(j - n_full, 0, partial.shape[-1] - 1)]
                column = jnp.clip(jnp.where(is_full, in_full, in_partial), 0, cols - 1)
                return Block(column, j < counts, ~is_full)

        trips = jnp.minimum(counts.max(), width)
        if not differentiable:
            return lax.fori_loop(0, trips, lambda j, c: visit(c, block(j)), carry)

        def maybe(carry: Carry, j: Any) -> tuple[Carry, None]:
            return lax.cond(j < trips, lambda c: visit(c, block(j)), lambda c: c, carry), None

        return lax.scan(maybe, carry, jnp.arange(min(width, cols), dtype=jnp.int32))[0]

    def _list_row(self) -> tuple[Any, Any, Any]:
        (b, mask_head, row, _), blocks = self.items, self.problem.blocks
        assert blocks is not None, "lists come with their static part"
        return b // (self.problem.batch // blocks.batch), mask_head, row

    # -- cutting and adding tiles ---------------------------------------------------------------

    def query_tiles(self, x: Any) -> Any:
        """[g, k, r, D] of a padded (B, Hq, rows * q_block, D) array."""
        plan = self.plan
        size = (1, plan.heads, plan.geometry.q_block, x.shape[-1])

        def cut(b: Any, mask_head: Any, row: Any) -> Any:
            start = (b, mask_head * plan.heads, row * plan.geometry.q_block, 0)
            return lax.dynamic_slice(x, start, size)

        tiles = jax.vmap(cut)(*self.items[:3])
        return tiles.reshape(plan.lanes, plan.kv_heads, plan.tile_rows, x.shape[-1])

    def _key_start(self, b: Any, mask_head: Any, column: Any) -> tuple[Any, Any, Any, Any]:
        problem, plan = self.problem, self.plan
        head = mask_head * plan.heads // problem.group
        row = b // (problem.batch // problem.kv_batch)
        return row, head, column * plan.geometry.kv_block, 0

    def key_tiles(self, x: Any, block: Block) -> Any:
        """[g, k, s, D] of a padded (Bkv, Hkv, cols * kv_block, D) array."""
        plan = self.plan
        size = (1, plan.kv_heads, plan.geometry.kv_block, x.shape[-1])

        def cut(b: Any, mask_head: Any, column: Any) -> Any:
            return lax.dynamic_slice(x, self._key_start(b, mask_head, column), size)[0]

        return jax.vmap(cut)(*self.items[:2], block.column)

    def add_key_tiles(self, total: Any, block: Block, update: Any) -> Any:
        """Adds [g, k, s, D] tiles into a padded (Bkv, Hkv, cols * kv_block, D) array."""
        if self.plan.lanes == 1:
            start = self._key_start(self.items[0][0], self.items[1][0], block.column[0])
            old = lax.dynamic_slice(total, start, update.shape)
            return lax.dynamic_update_slice(total, old + update, start)
        row, head, first, _ = jax.vmap(self._key_start)(*self.items[:2], block.column)
        heads = head[:, None, None] + jnp.arange(update.shape[1], dtype=jnp.int32)[None, :, None]
        keys = first[:, None, None] + jnp.arange(update.shape[2], dtype=jnp.int32)[None, None, :]
        return total.at[row[:, None, None], heads, keys].add(update)

    # -- computing ------------------------------------------------------------------------------

    def dot(self, spec: str, x: Any, y: Any) -> Any:
        """A product of tiles, summed in float32."""
        precision = self.problem.precision
        if precision is None and x.dtype == jnp.float32:
            precision = "highest"
        return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=jnp.float32)

    def _indices(self, block: Block) -> dict[str, Any]:
        """Indices of a tile's scores, each of rank 4, kept inside the lengths."""
        plan, (b, mask_head, row, _) = self.plan, self.items
        geometry = plan.geometry
        heads = _spans(mask_head, plan.heads)
        q = jnp.minimum(_spans(row, geometry.q_block), geometry.q_len - 1)
        kv = jnp.minimum(_spans(block.column, geometry.kv_block), geometry.kv_len - 1)
        return {
            "b": b[:, None, None, None],
            "h": heads[:, :, None, None],
            "q": q[:, None, :, None],
            "kv": kv[:, None, None, :],
        }

    def _masked_out(self, y: Any, block: Block, indices: dict[str, Any]) -> Any:
        """Scores with -inf where the mask, or the end of the queries or keys, hides them."""
        geometry, mask = self.plan.geometry, self.problem.mask
        idle = self.plan.lanes > 1  # with one lane, every visited block is its own

        def hide(y: Any, mask: Graph) -> Any:
            (allowed,) = evaluate(mask, self.operands.mask_captures, indices)
            return jnp.where(allowed | ~block.masked[:, None, None, None], y, -jnp.inf)

        if mask is not None:
            hidden = functools.partial(hide, mask=mask)
            y = hidden(y) if idle else lax.cond(block.masked[0], hidden, lambda y: y, y)
        if geometry.kv_len % geometry.kv_block:
            kv = _spans(block.column, geometry.kv_block)
            y = jnp.where((kv < geometry.kv_len)[:, None, None, :], y, -jnp.inf)
        if geometry.q_len % geometry.q_block:  # a mod may give anything for a query of zeros
            q = _spans(self.items[2], geometry.q_block)
            y = jnp.where((q < geometry.q_len)[:, None, :, None], y, -jnp.inf)
        return jnp.where(block.busy[:, None, None, None], y, -jnp.inf) if idle else y

    def scores(
        self, q: Any, k: Any, block: Block, derivatives: bool = False
    ) -> tuple[Any, TilePullback]:
        """Modified and masked scores [g, k, r, s] of a tile, and how to pull a cotangent back.

        The pullback maps (cotangent of the modified scores, totals of captures' gradients) to (cotangent of
        the raw scaled scores, new totals). It needs `derivatives`.
        """
        problem, plan = self.problem, self.plan
        s = self.dot("gkrd,gksd->gkrs", q, k) * problem.scale
        tile_shape = s.shape
        s = s.reshape(plan.lanes, plan.heads, plan.geometry.q_block, plan.geometry.kv_block)
        indices = self._indices(block)
        inputs, captures = indices | {"score": s}, self.operands.score_captures
        pull: Any = None
        if derivatives:
            y, pull = score_pullback(problem.score, captures, inputs)
        elif problem.score is None:
            y = s
        else:
            (y,) = evaluate(problem.score.forward, captures, inputs)
        y = self._masked_out(jnp.broadcast_to(y, s.shape), block, indices)

        def pullback(dy: Any, totals: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
            ds, totals = pull(dy.reshape(s.shape), y > -jnp.inf, totals)
            return ds.reshape(tile_shape), totals

        return y.reshape(tile_shape), pullback


def _spans(number: Any, length: int) -> Any:
    """[lanes, length] indices of the pieces of `length` that [lanes] numbers name."""
    return number[:, None] * length + jnp.arange(length, dtype=jnp.int32)[None, :]
