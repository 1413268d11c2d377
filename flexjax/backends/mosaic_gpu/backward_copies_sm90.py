"""Copies of the backward kernel: keys and values of a column, queries and cotangents of a step, by TMA."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu.backward_kernel_sm90 import Buffers, Inputs, Kernel
from flexjax.backends.mosaic_gpu.backward_schedule import Column
from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS
from flexjax.backends.mosaic_gpu.launch_sm90 import rows


@dataclasses.dataclass(frozen=True)
class Copies:
    """Issues copies; whoever does so has seen to it that nobody reads the target any more."""

    kernel: Kernel
    inputs: Inputs
    buffers: Buffers

    def keys_and_values(self, column: Column) -> None:
        kernel, buffers = self.kernel, self.buffers
        for w in range(kernel.config.key_slots):
            first = column.tile * kernel.config.kv_tile + w * WARPGROUP_ROWS
            for source, target in (
                (self.inputs.key, buffers.key),
                (self.inputs.value, buffers.value),
            ):
                where = rows(kernel.problem, source, column.b, column.h, first, WARPGROUP_ROWS)
                plgpu.copy_gmem_to_smem(where, target.at[w], buffers.key_value_full)

    def queries(self, b: Any, h: Any, first_query: Any, stage: Any) -> None:
        """The queries of a step, their logsumexp, and which they are."""
        buffers = self.buffers
        first = self._aligned(first_query)
        buffers.q_number[stage] = lax.div(first_query, jnp.int32(self.kernel.config.q_tile))
        self._with_statistic(
            b, h, first, stage,
            (self.inputs.query, buffers.query), (self.inputs.lse, buffers.lse), buffers.query_full,
        )  # fmt: skip

    def cotangents(self, b: Any, h: Any, first_query: Any, stage: Any) -> None:
        """The output's cotangents of a step, and D."""
        buffers = self.buffers
        first = self._aligned(first_query)
        self._with_statistic(
            b, h, first, stage,
            (self.inputs.d_out, buffers.d_out), (self.inputs.delta, buffers.delta), buffers.d_out_full,
        )  # fmt: skip

    def _aligned(self, first_query: Any) -> Any:
        config = self.kernel.config
        # Mosaic does not know the operation in code for single warps.
        return first_query if config.handed_over else pl.multiple_of(first_query, config.q_tile)

    def _with_statistic(
        self,
        b: Any,
        h: Any,
        first: Any,
        stage: Any,
        tile: tuple[Any, Any],
        statistic: tuple[Any, Any],
        full: Any,
    ) -> None:
        q_tile = self.kernel.config.q_tile
        (source, target), (values, own) = tile, statistic
        where = rows(self.kernel.problem, source, b, h, first, q_tile)
        plgpu.copy_gmem_to_smem(where, target.at[stage], full.at[stage])
        plgpu.copy_gmem_to_smem(
            values.at[b, h, pl.ds(first, q_tile)], own.at[stage], full.at[stage]
        )
