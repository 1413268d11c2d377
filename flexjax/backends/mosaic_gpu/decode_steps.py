"""Where the steps of a decoding kernel lie: from a step's number to its tile and its keys, inside the kernel."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu.decode_kernel_sm90 import Inputs, Kernel
from flexjax.backends.mosaic_gpu.decode_plan import ALL, LISTS, RANGE, Plan


class Place(NamedTuple):
    """Where a step lies: its list row, the first step of that, and the steps of each of its tiles."""

    row: Any
    begin: Any
    count: Any


class Step(NamedTuple):
    """One step.

    Attributes:
        tile: number of the tile.
        b: batch row.
        head: row of tiles of the batch row.
        part: tile in the row of tiles.
        number: of the step in its tile.
        last: whether it is the last one of its tile.
        first_key: first of its keys.
        masked: whether the mask counts.
    """

    tile: Any
    b: Any
    head: Any
    part: Any
    number: Any
    last: Any
    first_key: Any
    masked: Any


@dataclasses.dataclass(frozen=True)
class Steps:
    """All steps of a plan, as one CTA sees them."""

    kernel: Kernel
    inputs: Inputs

    @property
    def plan(self) -> Plan:
        return self.kernel.plan

    def steps_of(self, row: Any) -> Any:
        """Steps of all tiles of a list row."""
        if self.inputs.work.starts:
            (starts,) = self.inputs.work.starts
            return starts[row + 1] - starts[row]
        if not self.inputs.lengths:
            return jnp.int32(self.plan.kv_tiles * self.plan.inner)
        tile = self.plan.config.kv_tile
        tiles = lax.div(jnp.maximum(self.length(row), 0) + (tile - 1), jnp.int32(tile))
        return tiles * self.plan.inner

    @property
    def total(self) -> Any:
        """The number of all steps."""
        rows = self.plan.list_rows
        if self.inputs.work.starts:
            return self.inputs.work.starts[0][rows]
        return sum((self.steps_of(row) for row in range(rows)), jnp.int32(0))

    def located(self, x: Any, place: Place) -> Place:
        """The place of step x, which is `place` or behind it."""
        plan = self.plan
        beyond = x >= place.begin + place.count * plan.inner
        if not self.inputs.work.starts:
            return lax.fori_loop(0, jnp.where(beyond, 1, 0), lambda *_: self._counted(x), place)
        (starts,), count = self.inputs.work.starts, plan.list_rows
        rounds = jnp.where(beyond, math.ceil(math.log2(count + 1)), 0)

        def halve(_: Any, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
            low, high = bounds
            middle = lax.div(low + high, jnp.int32(2))
            before = starts[middle] <= x
            return jnp.where(before, middle, low), jnp.where(before, high, middle)

        row, _ = lax.fori_loop(0, rounds, halve, (place.row, jnp.int32(count)))
        begin = starts[row]
        return Place(row, begin, lax.div(starts[row + 1] - begin, jnp.int32(plan.inner)))

    def _counted(self, x: Any) -> Place:
        """The place of step x, by counting the steps of all rows: few loads, which do not wait for each other."""
        place, before = Place(jnp.int32(0), jnp.int32(0), jnp.int32(0)), jnp.int32(0)
        for row in range(self.plan.list_rows):
            count = self.steps_of(row)
            here = Place(jnp.int32(row), before, lax.div(count, jnp.int32(self.plan.inner)))
            # Rows without steps are passed over; the place of a step behind the last one is the last row.
            reached = (before <= x) & (count > 0)
            place = Place(*(jnp.where(reached, n, o) for n, o in zip(here, place, strict=True)))
            before = before + count
        return place

    def step_at(self, x: Any, place: Place) -> Step:
        """The step, from its place; any step of the plan for a number behind the last one."""
        plan, row = self.plan, self.plan.rows
        count = jnp.maximum(place.count, 1)
        inside = x - place.begin
        number = lax.rem(inside, count)
        tile = place.row * plan.inner + lax.div(inside, count)
        tile = jnp.minimum(
            tile, row.all_tiles - 1
        )  # steps behind the last one are located, not computed
        head, part = lax.div(tile, jnp.int32(row.tiles)), lax.rem(tile, jnp.int32(row.tiles))
        b, head = lax.div(head, jnp.int32(row.heads)), lax.rem(head, jnp.int32(row.heads))
        first_key, masked = self._first_key(place.row, b, head, number)
        return Step(tile, b, head, part, number, number == count - 1, first_key, masked)

    def _first_key(self, list_row: Any, b: Any, head: Any, number: Any) -> tuple[Any, Any]:
        """(first key of a step, whether the mask counts there)."""
        plan, work = self.plan, self.inputs.work
        kv_tile, always = plan.config.kv_tile, jnp.int32(0) == 0
        if plan.kind == ALL:
            return number * kv_tile, always
        if plan.kind == RANGE:
            return (work.first[0][list_row] + number) * kv_tile, always
        assert plan.kind == LISTS
        partial_counts, partial_indices, _, full_indices = work.lists
        lists_batch, lists_heads = partial_counts.shape
        bm = lax.div(b, jnp.int32(plan.problem.batch // lists_batch))
        where = (bm, head if lists_heads > 1 else 0)
        per_block = jnp.int32(plan.steps_per_block)
        i, part = lax.div(number, per_block), lax.rem(number, per_block)
        partial = partial_counts[where]

        def entry(indices: Any, i: Any) -> Any:
            return indices[(*where, jnp.clip(i, 0, indices.shape[-1] - 1))]

        masked = i < partial
        block = lax.select(masked, entry(partial_indices, i), entry(full_indices, i - partial))
        block = jnp.clip(block, 0, plan.kv_blocks - 1)  # no entry is trusted beyond the mask
        return block * plan.kv_block + part * kv_tile, masked

    def inside(self, first_key: Any) -> Any:
        """Moves a step that lies wholly beyond the last key, where nothing counts, back onto keys."""
        plan = self.plan
        if plan.kv_blocks * plan.kv_block == plan.kv_tiles * plan.config.kv_tile:
            return first_key
        return jnp.minimum(first_key, (plan.kv_tiles - 1) * plan.config.kv_tile)

    def length(self, b: Any) -> Any:
        """Where the keys of a batch row end."""
        kv_len = self.plan.problem.kv_len
        return jnp.minimum(self.inputs.lengths[0][b], kv_len) if self.inputs.lengths else kv_len

    def entries(self, step: Step) -> tuple[Any, ...]:
        """Entries of the page table for the copies of a step; none without pages."""
        if not self.inputs.page_table:
            return ()
        (table,) = self.inputs.page_table
        last = table.shape[1] - 1
        return tuple(
            table[step.b, jnp.minimum(lax.div(position, jnp.int32(self._page)), last)]
            for position in self._positions(step)
        )

    def pool_rows(self, step: Step, entries: tuple[Any, ...]) -> tuple[Any, ...]:
        """The rows of the pool at which the copies of a step begin, from their entries."""
        if not entries:
            return ()
        rows, pool = [], self.inputs.key.shape[1] // self._page
        for position, entry in zip(self._positions(step), entries, strict=True):
            # Past the length the table holds anything: some page is read, and masked.
            row = jnp.clip(entry, 0, pool - 1) * self._page
            inside = lax.rem(position, jnp.int32(self._page))
            rows.append(row + (inside if self.kernel.pieces == 1 else 0))
        return tuple(rows)

    @property
    def _page(self) -> int:
        decoding = self.plan.problem.decoding
        assert decoding is not None, "only decoding steps have tables"
        assert decoding.page_size is not None, "tables come with pages"
        return decoding.page_size

    def _positions(self, step: Step) -> list[Any]:
        """First keys of the copies of a step."""
        length = self.plan.config.kv_tile // self.kernel.pieces
        return [self.inside(step.first_key) + i * length for i in range(self.kernel.pieces)]
