"""Which steps a decoding kernel computes: the live tiles of keys, found on the device by a little XLA.

A *list row* is a batch row or, where the live keys depend on the head, a row of tiles. Its tiles all visit the
same steps; the steps of all tiles of all list rows, one after another, are dealt out to the CTAs in equal parts,
so that neither a long sequence nor a short one leaves a part of the machine idle (stream-K, arXiv:2301.03598).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from flexjax.backends.mosaic_gpu.convexity import in_one_piece
from flexjax.backends.mosaic_gpu.decode_config import DecodeConfig, Rows
from flexjax.block_lists import PARTIAL, cdiv, lists_from_states
from flexjax.mods.bound_rules import Bounds
from flexjax.mods.graph import Graph
from flexjax.mods.regions import Exact, Regions, bounds
from flexjax.problem import Operands, Problem

_FEW = 512  # list rows
# So many lengths the kernel looks through by itself, which spares a small kernel before it.
_IN_KERNEL = 32
# CTAs get whole tiles, or parts of one, if that makes their shares longer by at most this part of them.
_WHOLE_TILES = 16
ALL, RANGE, LISTS = "all", "range", "lists"


class Deal(NamedTuple):
    """How steps are dealt out.

    Attributes:
        each: steps of a CTA, one after another; the last CTAs may have fewer.
        by_tile: whether each tile has CTAs of its own, `Plan.cuts` of them.
    """

    each: Any
    by_tile: Any


class Work(NamedTuple):
    """The arrays of a plan.

    Attributes:
        starts: int32 [rows + 1], steps before those of each list row; the last is the number of all steps. Empty
            if the kernel counts the steps.
        first: the first live tile of each list row, int32 [rows]; empty if it is 0.
        lists: numbers of partial blocks [Bm, Hm], their indices [Bm, Hm, W], and the same of full blocks; empty
            without lists.
    """

    starts: tuple[Any, ...]
    first: tuple[Any, ...]
    lists: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a plan."""

    problem: Problem
    config: DecodeConfig

    @property
    def rows(self) -> Rows:
        return Rows(self.problem, self.config.packed)

    @property
    def kind(self) -> str:
        """How live tiles are written down: all up to the length, a range, or lists."""
        if self.problem.blocks is not None:
            return LISTS
        if self._own_mask is None:
            return ALL
        return RANGE if in_one_piece(self._own_mask) else LISTS

    @property
    def _own_mask(self) -> Any:
        """The mask, where it tells which tiles live, and neither given lists nor the lengths alone do."""
        decoding = self.problem.decoding
        mask = self.problem.mask
        if decoding is None or decoding.bare or mask is None or _sees_all(self, mask):
            return None
        return mask

    @property
    def by_head(self) -> bool:
        """Whether every row of tiles is a list row of its own."""
        if self.problem.blocks is not None:
            return self.problem.blocks.heads > 1
        return self._own_mask is not None and "h" in self._own_mask.depends

    @property
    def list_rows(self) -> int:
        return self.problem.batch * (self.rows.heads if self.by_head else 1)

    @property
    def inner(self) -> int:
        """Tiles of a list row."""
        return self.rows.all_tiles // self.list_rows

    @property
    def counts_in_kernel(self) -> bool:
        """Whether the kernel counts the steps of the list rows, from the lengths."""
        return self.kind == ALL and self.list_rows <= _IN_KERNEL

    @property
    def kv_tiles(self) -> int:
        return cdiv(self.problem.kv_len, self.config.kv_tile)

    @property
    def kv_block(self) -> int:
        """Keys of a listed block."""
        blocks = self.problem.blocks
        return self.config.kv_tile if blocks is None else blocks.geometry.kv_block

    @property
    def kv_blocks(self) -> int:
        return cdiv(self.problem.kv_len, self.kv_block)

    @property
    def steps_per_block(self) -> int:
        return self.kv_block // self.config.kv_tile

    # -- how steps are dealt out ----------------------------------------------------------------

    @property
    def cuts(self) -> int:
        """CTAs that a tile has where none has parts of two; 0 where there are more tiles than CTAs."""
        return self.config.ctas // self.rows.all_tiles

    def deal(self, total: Any, first: Any) -> Deal:
        """How steps are dealt out, from the numbers of all steps and of those of the first list row.

        In equal parts; or, where all tiles have equally many steps and little is lost by it, so that no CTA has
        parts of two tiles: it has to wait for the queries of the second, behind all the keys that
        are on their way, and results of one CTA need not be added up.
        """
        ctas, count = self.config.ctas, jnp.maximum(lax.div(first, jnp.int32(self.inner)), 1)
        equal = jnp.maximum(_cdiv(total, jnp.int32(ctas)), 1)
        own = _cdiv(count, jnp.int32(self.cuts)) if self.cuts else _cdiv(equal, count) * count
        even = total == count * self.rows.all_tiles
        fits = even & ((own - equal) * _WHOLE_TILES <= equal)
        return Deal(jnp.where(fits, own, equal), fits & (self.cuts > 0))

    def share(self, cta: Any, total: Any, first: Any, deal: Deal) -> tuple[Any, Any]:
        """The first step of a CTA, and the one behind its last, from the same numbers."""
        begin = jnp.minimum(cta * deal.each, total)
        end = jnp.minimum(begin + deal.each, total)
        if not self.cuts:
            return begin, end
        count, cuts = lax.div(first, jnp.int32(self.inner)), jnp.int32(self.cuts)
        tile, part = lax.div(cta, cuts) * count, lax.rem(cta, cuts) * deal.each

        def inside(steps: Any) -> Any:
            return jnp.minimum(tile + jnp.minimum(steps, count), total)

        own_begin, own_end = inside(part), inside(part + deal.each)
        return (
            jnp.where(deal.by_tile, own_begin, begin),
            jnp.where(deal.by_tile, own_end, end),
        )

    def segments(self, tile: Any, first_step: Any, count: Any, deal: Deal) -> tuple[Any, Any]:
        """(number of the first one, how many) of the segments of a tile, from its first step and their count."""
        first = lax.div(first_step, deal.each)
        last = lax.div(first_step + (count - 1), deal.each)
        first = jnp.where(deal.by_tile, tile * self.cuts, first)
        number = jnp.where(deal.by_tile, _cdiv(count, deal.each), last - first + 1)
        return first + tile, jnp.where(count > 0, number, 0)

    # -- on the device --------------------------------------------------------------------------

    def starts(self, operands: Operands, work: Work) -> Any:
        """`Work.starts`, also where the kernel counts."""
        return work.starts[0] if work.starts else _starts(self._counts(operands) * self.inner)

    def _counts(self, operands: Operands) -> Any:
        """Tiles of keys up to the lengths."""
        lengths = operands.lengths
        if lengths is None:
            lengths = jnp.full(self.problem.batch, self.problem.kv_len, jnp.int32)
        tile = self.config.kv_tile
        return (jnp.clip(lengths, 0, self.problem.kv_len) + (tile - 1)) // tile

    def work(self, operands: Operands) -> Work:
        """Finds the live tiles."""
        first, lists = (), ()
        if self.counts_in_kernel:
            return Work((), first, lists)
        if self.kind == ALL:
            counts = self._counts(operands)
        elif self.problem.blocks is not None:
            counts, lists = self._given(operands)
        else:
            live = self.live(self._own_mask, operands.mask_captures, jnp)
            if self.kind == RANGE:
                begin, end = _ends(live)
                counts = jnp.maximum(end - begin, 0)
                first = (jnp.broadcast_to(begin, self._counted).reshape(-1),)
            else:
                found = lists_from_states(live.astype(jnp.int8) * PARTIAL, (live.shape[-1], 1))
                counts, lists = found.counts, found.arrays
        counts = jnp.broadcast_to(counts, self._counted) if counts.ndim == 2 else counts
        return Work((_starts(counts.reshape(-1) * self.inner),), first, lists)

    @property
    def _counted(self) -> tuple[int, int]:
        return self.problem.batch, self.list_rows // self.problem.batch

    def _given(self, operands: Operands) -> tuple[Any, tuple[Any, ...]]:
        """(steps of every list row, lists of the single row of blocks) of a block mask."""
        x, blocks = operands.lists, self.problem.blocks
        assert x is not None, "the static part comes with lists"
        assert blocks is not None, "lists come with their static part"
        counts = [c[..., 0] for c in (x.kv_num_blocks, x.full_kv_num_blocks)]
        indices = [i[:, :, 0] for i in (x.kv_indices, x.full_kv_indices)]
        # No count is trusted beyond the list.
        counts = [jnp.clip(c, 0, i.shape[-1]) for c, i in zip(counts, indices, strict=True)]
        steps = (counts[0] + counts[1]) * self.steps_per_block
        steps = jnp.repeat(steps, self.problem.batch // blocks.batch, axis=0)
        return steps, (counts[0], indices[0], counts[1], indices[1])

    def live(self, mask: Any, captures: Any, xp: Any) -> Any:
        """Where the mask is possibly true: bool [B or 1, heads or 1, tiles of keys]; for `xp` see `bounds`."""
        problem, tile = self.problem, self.config.kv_tile
        batch = problem.batch if "b" in mask.depends else 1
        heads = problem.q_heads if "h" in mask.depends else 1

        def along(axis: int, n: int) -> Any:
            return xp.arange(n, dtype=np.int32).reshape([n if i == axis else 1 for i in range(4)])

        kv = along(3, self.kv_tiles) * tile
        q = along(2, 1)
        inputs = {
            "b": Exact(along(0, batch)),
            "h": Exact(along(1, heads)),
            "q": Bounds(q, q + (problem.q_len - 1)),
            "kv": Bounds(kv, xp.minimum(kv + (tile - 1), problem.kv_len - 1)),
        }
        blocks = {"q": (problem.q_len, problem.q_len, 2), "kv": (problem.kv_len, tile, 3)}
        _, possible = bounds(mask, captures, Regions(inputs, blocks), xp)
        possible = xp.broadcast_to(possible, (batch, heads, 1, self.kv_tiles))
        live = possible.reshape(
            batch, heads // self.rows.group if heads > 1 else 1, -1, self.kv_tiles
        )
        return live.any(2)


@functools.cache
def _sees_all(plan: Plan, mask: Graph) -> bool:
    """Whether the mask leaves all tiles alive, as a causal one does: then the lengths tell, without an XLA kernel.

    A guess from sequences as long as the cache. Where it is wrong, steps visit tiles in vain.
    """
    problem = plan.problem
    lengths = np.full(problem.batch, problem.kv_len, np.int32)
    known = [(c.shape, c.dtype) == (lengths.shape, lengths.dtype) for c in mask.captures]
    if known != [True]:
        return False  # other arrays than the lengths decide
    try:
        return bool(plan.live(mask, (lengths,), np).all())
    except NotImplementedError:
        return False


def _ends(live: Any) -> tuple[Any, Any]:
    """First live tile and the one behind the last, along the last axis, in one reduction: one small kernel."""
    tiles = live.shape[-1]
    tile = jnp.broadcast_to(jnp.arange(tiles, dtype=jnp.int32), live.shape)
    begin, end = lax.reduce(
        (jnp.where(live, tile, tiles), jnp.where(live, tile + 1, 0)),
        (jnp.int32(tiles), jnp.int32(0)),
        lambda x, y: (jnp.minimum(x[0], y[0]), jnp.maximum(x[1], y[1])),
        (live.ndim - 1,),
    )
    return begin, end


def _cdiv(n: Any, d: Any) -> Any:
    return lax.div(n + (d - 1), d)


def _starts(counts: Any) -> Any:
    """0 and the running sums of counts."""
    n = counts.shape[0]
    if n > _FEW:
        return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    # One small kernel, where a cumulative sum would be several.
    before = jnp.arange(n)[None] < jnp.arange(n + 1)[:, None]
    return jnp.where(before, counts[None], 0).sum(1, dtype=jnp.int32)
