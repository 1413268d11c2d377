"""Copies of the forward kernel: queries, keys and values from global to shared memory, by TMA."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS
from flexjax.backends.mosaic_gpu.kernel_sm90 import Buffers, Inputs, Kernel
from flexjax.backends.mosaic_gpu.launch_sm90 import rows
from flexjax.backends.mosaic_gpu.schedule import Steps, TilePosition


@dataclasses.dataclass(frozen=True)
class Copies:
    """Issues copies; whoever does so has seen to it that nobody reads the target any more."""

    kernel: Kernel
    inputs: Inputs
    buffers: Buffers

    def query(self, position: TilePosition, warpgroup: Any) -> None:
        """The queries of one consumer."""
        buffers = self.buffers
        first = self.kernel.first_query(position, warpgroup)
        where = rows(
            self.kernel.problem, self.inputs.query, position.b, position.h, first, WARPGROUP_ROWS
        )
        plgpu.copy_gmem_to_smem(
            where, buffers.query.at[warpgroup], buffers.query_full.at[warpgroup]
        )

    def key(self, position: TilePosition, first_key: Any, stage: Any) -> None:
        """The keys of a step, and which they are."""
        for ref in self.buffers.kv_number:
            ref[stage] = lax.div(first_key, jnp.int32(self.kernel.config.kv_tile))
        self._kv(
            position, first_key, stage, self.inputs.key, self.buffers.key, self.buffers.key_full
        )

    def first_key(self, steps: Steps, number: Any, stage: Any) -> Any:
        """The first key of a step whose keys have arrived, without asking the lists."""
        if not self.buffers.kv_number:
            return steps.first_key(number)
        # The bounds, and the multiple, are for the compiler: masks get simpler by them.
        tiles = self.kernel.schedule.listed_tiles
        return jnp.clip(self.buffers.kv_number[0][stage], 0, tiles - 1) * self.kernel.config.kv_tile

    def value(self, position: TilePosition, first_key: Any, stage: Any) -> None:
        """The values of a step."""
        buffers = self.buffers
        self._kv(position, first_key, stage, self.inputs.value, buffers.value, buffers.value_full)

    def _kv(
        self,
        position: TilePosition,
        first_key: Any,
        stage: Any,
        source: Any,
        target: Any,
        full: Any,
    ) -> None:
        schedule, kv_tile = self.kernel.schedule, self.kernel.config.kv_tile
        b, h = schedule.kv_row(position)
        first = schedule.inside(first_key)
        if not isinstance(first, int):
            first = pl.multiple_of(first, kv_tile)
        where = rows(self.kernel.problem, source, b, h, first, kv_tile)
        plgpu.copy_gmem_to_smem(where, target.at[stage], full.at[stage])
