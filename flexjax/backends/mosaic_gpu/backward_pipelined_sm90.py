"""The consumers of the backward kernel with the scores computed one step ahead.

The tensor cores are idle while a warpgroup moves its share of dQ to shared memory, and while it turns dP into dS.
Here there is always a product to be done meanwhile:

    S_0 = K Q_0^T
    for every step i:
        issue dP_i = V dO_i^T
        P_i from S_i                              while dP_i is computed
        issue dV += P_i^T dO_i
        dS_i from P_i and dP_i, to shared memory  while dV is
        issue dK += dS_i^T Q_i
        meet the other warpgroup
        dQ tile = dS_i K
        issue S_{i+1} = K Q_{i+1}^T
        dQ += dQ tile                             while S_{i+1} is computed

After the last step of a row there is an idle one, whose scores are dropped.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu import backward_config as configs
from flexjax.backends.mosaic_gpu.backward_consumer_sm90 import Accumulators, Carry, Consumer
from flexjax.backends.mosaic_gpu.tile_gradients import Place


@dataclasses.dataclass(frozen=True)
class PipelinedConsumer(Consumer):
    """A warpgroup that computes 64 keys of a column, with the next step's scores ahead."""

    def _start_row(self, begin: Any) -> Any:
        def product(scores: Any) -> Any:
            self._issue_scores(scores, begin)
            return scores[...]

        return pl.run_scoped(product, plgpu.ACC(self.kernel.tile.shape, jnp.float32))

    def _issue_scores(self, scores: Any, number: Any) -> None:
        stage = self.kernel.stage(number)
        plgpu.barrier_wait(self.buffers.query_full.at[stage])
        queries = self.buffers.query.at[stage].transpose((1, 0))
        plgpu.wgmma(scores, self.buffers.key.at[self._slot], queries)

    def _end_row(self, end: Any) -> None:
        stage = self.kernel.stage(end)
        plgpu.barrier_wait(self.buffers.d_out_full.at[stage])
        plgpu.barrier_arrive(self.buffers.d_out_free.at[stage])
        plgpu.barrier_arrive(self.buffers.query_free.at[stage])

    def _step(
        self,
        number: Any,
        first_query: Any,
        place: Place,
        accumulators: Accumulators,
        carry: Carry,
        masked: bool,
    ) -> Carry:
        kernel, buffers, tile = self.kernel, self.buffers, self.kernel.tile
        stage = kernel.stage(number)
        ds_stage = lax.rem(number, jnp.int32(configs.DS_STAGES))
        captures = self.inputs.score_captures
        d_out, interpret = buffers.d_out.at[stage], kernel.config.interpret
        plgpu.barrier_wait(buffers.d_out_full.at[stage])

        def compute(dp: Any) -> Any:
            plgpu.wgmma(dp, buffers.value.at[self._slot], d_out.transpose((1, 0)))
            allowed = tile.allowed(place, self.inputs.mask_captures) if masked else None
            lse = plgpu.load(buffers.lse.at[stage], layout=tile.query_layout)
            known = tile.probabilities(carry.ahead, lse, place, captures, allowed, masked)
            p = known.p.astype(kernel.problem.q_dtype)
            self._add_product(accumulators.dv, p, buffers.p, d_out)
            products = plgpu.wgmma_accumulator_load(dp, wait_n=1)
            delta = plgpu.load(buffers.delta.at[stage], layout=tile.query_layout)
            return tile.cotangents(known, products, delta, place, captures)

        cotangents = pl.run_scoped(compute, plgpu.ACC(tile.shape, jnp.float32))
        ds = cotangents.ds.astype(kernel.problem.q_dtype)
        own_ds = buffers.ds.at[ds_stage, self._slot]
        own_ds[...] = ds
        plgpu.commit_smem()
        plgpu.barrier_arrive(buffers.ds_full)
        plgpu.wgmma(accumulators.dk, own_ds if interpret else ds, buffers.query.at[stage])
        sums = self._sum_loads(carry.sums, cotangents, first_query, place)
        plgpu.barrier_wait(buffers.ds_full)
        return Carry(sums, self._finish_and_look_ahead(number, ds_stage, place, first_query))

    def _finish_and_look_ahead(
        self, number: Any, ds_stage: Any, place: Place, first_query: Any
    ) -> Any:
        """Hands the step's tiles back and adds the share of dQ; returns the next step's scores."""
        part = self._part
        dq = self._finish_products(self.kernel.stage(number), ds_stage)

        def product(scores: Any) -> Any:
            # Not before dQ is there: ptxas has no registers for both products at a time, and serializes them.
            self._issue_scores(scores, number + 1)
            if part is not None:
                self._add_to_dq(dq, part, place, first_query)
            return scores[...]

        return pl.run_scoped(product, plgpu.ACC(self.kernel.tile.shape, jnp.float32))
