"""Consumers of the backward kernel that compute the dQ of a step in the next one.

Both warpgroups' dS are needed for dQ. If it is computed at once they meet in every step, and then both have their
exponentials at one time and their matrix products at another. Here

    step i:   S^T, dP^T, P^T, dS^T of step i;   dV += P^T dO
              meet, if the other one is more than about half a step behind
              dS^T of step i to shared memory;   dK += dS^T Q
              dQ tile of step i - 1 = dS K, added in global memory
              tell the other one

so that one warpgroup's exponentials may run beside the other one's products. A barrier says "my dS of step i is
there, and I am done with those of step i - 1", so two stages of dS are enough. Before the first step comes one
whose dS is zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu import backward_config as configs
from flexjax.backends.mosaic_gpu import registers
from flexjax.backends.mosaic_gpu.backward_consumer_sm90 import Accumulators, Consumer, InRow, Sums
from flexjax.backends.mosaic_gpu.backward_schedule import Column
from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS


@dataclasses.dataclass(frozen=True)
class DeferredConsumer(Consumer):
    """A warpgroup that computes 64 keys of a column, and its share of dQ a step later."""

    def _walk(self, column: Column, accumulators: Accumulators, begin: Any) -> Any:
        kernel, buffers = self.kernel, self.buffers
        zeros = jnp.zeros((WARPGROUP_ROWS, kernel.config.q_tile), kernel.problem.q_dtype)
        if not kernel.config.interpret:
            zeros = plgpu.layout_cast(zeros, registers.TILE)
        buffers.ds[self._ds_stage(begin - 1, column), self._slot] = zeros
        plgpu.commit_smem()
        plgpu.barrier_arrive(buffers.ds_full)
        end = self._column(column, accumulators, begin)
        plgpu.barrier_wait(buffers.ds_full)

        @pl.when(end > begin)
        def _() -> None:
            def product(dq: Any) -> Any:
                self._issue_dq(dq, self._share, end - 1, column)
                return dq[...]

            self._add_dq_of(end - 1, self._with_dq(product), column)

        return end

    @property
    def _share(self) -> configs.Part:
        part = self._part
        assert part is not None, "warpgroups whose dQ is deferred have a share of it"
        return part

    def _with_dq(self, product: Callable[[Any], Any]) -> Any:
        return pl.run_scoped(
            product, plgpu.ACC((self._share.rows, self._share.columns), jnp.float32)
        )

    def _ds_stage(self, step: Any, column: Column) -> Any:
        """Where a step's dS is, that of the zeros before a column's first one too.

        Zeros count as a step, so that they do not go where the last dS of the column before is still read.
        """
        return lax.rem(step + 1 + column.turn, jnp.int32(configs.DS_STAGES))

    def _add_dq_of(self, step: Any, dq: Any, column: Column) -> None:
        """Adds the share of a step's dQ; publishes what is in shared memory."""
        (first_rows,) = self.buffers.dq_row
        row = first_rows[lax.rem(step, jnp.int32(self.kernel.dq_rows))]
        self._add_to_dq(dq, self._share, column.tile, row, publish=True)

    def _step(
        self,
        number: Any,
        row: InRow,
        column: Column,
        accumulators: Accumulators,
        sums: Sums,
        masked: bool,
    ) -> Sums:
        kernel, buffers = self.kernel, self.buffers
        stage = kernel.stage(number)
        plgpu.barrier_wait(buffers.query_full.at[stage])
        first_query, place = self._place(stage, row.b, row.h, column)
        p, cotangents = self._cotangents(number, place, masked)
        ds = cotangents.ds.astype(kernel.problem.q_dtype)
        self._add_product(accumulators.dv, p, buffers.p, buffers.d_out.at[stage])
        plgpu.barrier_wait(buffers.ds_full)  # the other one's dS of the step before
        own_ds = buffers.ds.at[self._ds_stage(number, column), self._slot]
        own_ds[...] = ds
        operand = ds
        if kernel.config.interpret:
            plgpu.commit_smem()
            operand = own_ds
        if self._dk_first:
            plgpu.wgmma(accumulators.dk, operand, buffers.query.at[stage])
        sums = self._sum_loads(sums, cotangents, first_query, place)
        free_queries = buffers.query_free.at[stage]

        def product(dq: Any) -> Any:
            count = self._issue_dq(dq, self._share, number - 1, column)
            if self._dk_first:
                plgpu.wgmma_wait(count)
                plgpu.barrier_arrive(free_queries)
                plgpu.barrier_arrive(buffers.d_out_free.at[stage])
                return dq[...]
            plgpu.wgmma(accumulators.dk, operand, buffers.query.at[stage])
            result = plgpu.wgmma_accumulator_load(dq, wait_n=1)
            plgpu.barrier_arrive(buffers.d_out_free.at[stage])
            return result

        # Before the first step dS is zero, and is added to that step's own queries: keys may not be finite.
        before = jnp.maximum(number - 1, column.begin)
        self._add_dq_of(before, self._with_dq(product), column)
        plgpu.barrier_arrive(buffers.ds_full)
        if not self._dk_first:
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free_queries)
        return sums
