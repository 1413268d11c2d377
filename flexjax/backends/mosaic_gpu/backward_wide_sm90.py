"""The consumers of the backward kernel where heads are wider than 128: both compute the same 64 keys.

One warpgroup's registers hold dK or dV, not both. So the first one computes dV and the second one dK:

    first:   S^T = K Q^T;  P^T;                     dV += P^T dO;   its columns of dQ += dS K
    second:  S^T = K Q^T;  dP^T = V dO^T;  dS^T;    dK += dS^T Q;   its columns of dQ += dS K

S is computed twice, which makes six products of five but keeps both equally busy. What the score_mod reads is
summed by the second one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from flexjax.backends.mosaic_gpu.backward_consumer_sm90 import Consumer, InRow, Sums
from flexjax.backends.mosaic_gpu.backward_schedule import Column
from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS
from flexjax.backends.mosaic_gpu.launch_sm90 import unknown_zero
from flexjax.backends.mosaic_gpu.tile_gradients import Place


@dataclasses.dataclass(frozen=True)
class WideConsumer(Consumer):
    """A warpgroup that computes dV (the first) or dK (the second) of a column's 64 keys."""

    @property
    def _of_values(self) -> bool:
        return self.warpgroup == 0

    @property
    def _slot(self) -> int:
        return 0

    @property
    def _key_sums(self) -> tuple[Any, ...]:
        return () if self._of_values else self.outputs.key_sums

    def run(self, cta: Any) -> None:
        kernel, buffers = self.kernel, self.buffers
        column = kernel.schedule.column(cta)
        plgpu.barrier_wait(buffers.key_value_full)

        def accumulate(accumulator: Any) -> Any:
            self._column(column, accumulator, jnp.int32(0))
            return accumulator[...]

        buffer = buffers.value if self._of_values else buffers.key
        total = pl.run_scoped(
            accumulate, plgpu.ACC((WARPGROUP_ROWS, buffer.shape[-1]), jnp.float32)
        )
        # The other warpgroup may still read the keys and values, in whose place the results are put.
        plgpu.barrier_arrive(buffers.ds_full)
        plgpu.barrier_wait(buffers.ds_full)
        if self._of_values:
            self._store_tile(column, total, buffer, self.outputs.dv)
        else:
            self._store_tile(column, total * kernel.problem.scale, buffer, self.outputs.dk)
        plgpu.wait_smem_to_gmem(0)

    def _step(
        self,
        number: Any,
        row: InRow,
        column: Column,
        accumulators: Any,
        sums: Sums,
        masked: bool,
    ) -> Sums:
        kernel, buffers = self.kernel, self.buffers
        stage = kernel.stage(number)
        plgpu.barrier_wait(buffers.query_full.at[stage])
        first_query, place = self._place(stage, row.b, row.h, column)
        if self._of_values:
            p = self._probabilities(number, place, masked)
            plgpu.barrier_wait(buffers.d_out_full.at[stage])
            self._add_product(accumulators, p, buffers.p, buffers.d_out.at[stage])
            if kernel.parts:
                plgpu.barrier_arrive(buffers.ds_full)
        else:
            _, cotangents = self._cotangents(number, place, masked)
            operand = cotangents.ds.astype(kernel.problem.q_dtype)
            own_ds = buffers.ds.at[self._ds_stage(number, column), 0]
            if kernel.parts or kernel.config.interpret:
                own_ds[...] = operand
                plgpu.commit_smem()
            if kernel.parts:
                plgpu.barrier_arrive(buffers.ds_full)
            operand = own_ds if kernel.config.interpret else operand
            plgpu.wgmma(accumulators, operand, buffers.query.at[stage])
            sums = self._sum_loads(sums, cotangents, first_query, place)
        if kernel.parts:
            plgpu.barrier_wait(buffers.ds_full)
        self._finish_step(number, column, place, first_query, self._following(row))
        return sums

    def _probabilities(self, number: Any, place: Place, masked: bool) -> Any:
        """Probabilities of a step, as operand."""
        kernel, buffers, tile = self.kernel, self.buffers, self.kernel.tile
        stage, slot = kernel.stage(number), unknown_zero(number)

        def compute(scores: Any) -> Any:
            plgpu.wgmma(scores, buffers.key.at[slot], buffers.query.at[stage].transpose((1, 0)))
            allowed = tile.allowed(place, self.inputs.mask_captures) if masked else None
            raw = scores[...]
            lse = plgpu.load(buffers.lse.at[stage], layout=tile.query_layout)
            known = tile.probabilities(raw, lse, place, self.inputs.score_captures, allowed, masked)
            return known.p.astype(kernel.problem.q_dtype)

        return pl.run_scoped(compute, plgpu.ACC(tile.shape, jnp.float32))
