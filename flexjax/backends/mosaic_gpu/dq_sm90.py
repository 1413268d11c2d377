"""dQ by a kernel of its own, for the deterministic backward pass on Hopper.

A CTA owns a tile of queries, 64 for each consumer warpgroup, and walks over the keys that the forward pass visits:

    for every step of keys:
        S = Q K^T              dP = dO V^T
        dS from S, dP, the logsumexp and D
        dQ += dS K

Nothing is added outside the warpgroup's registers, so that every run gives the same bits. Gradients of captured
elements that depend on the query alone are summed here as well.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu import backward_config as configs
from flexjax.backends.mosaic_gpu import capture_gradients, launch_sm90, registers
from flexjax.backends.mosaic_gpu.capture_gradients import QUERIES
from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS, Config
from flexjax.backends.mosaic_gpu.launch_sm90 import barriers, rows, tiles, unknown_zero
from flexjax.backends.mosaic_gpu.registers import ROW
from flexjax.backends.mosaic_gpu.schedule import Schedule, Steps, TilePosition
from flexjax.backends.mosaic_gpu.tile_gradients import Cotangents, Place, TileGradients
from flexjax.problem import Problem


class Inputs(NamedTuple):
    """References to what the kernel reads; see `backward_kernel_sm90.Inputs`. The lists are the forward's."""

    query: Any
    key: Any
    value: Any
    d_out: Any
    lse: Any
    delta: Any
    lists: tuple[Any, ...]
    score_captures: tuple[Any, ...]
    mask_captures: tuple[Any, ...]


class Outputs(NamedTuple):
    """References to what the kernel writes; `query_sums` is [B, Hq, queries] for every load of kind QUERIES."""

    dq: Any
    query_sums: tuple[Any, ...]


class Buffers(NamedTuple):
    """Shared memory and barriers.

    Attributes:
        query, d_out: [warpgroups, 64, D or Dv].
        key, value: [stages, kv_tile, D or Dv].
        ds: [warpgroups, 64, kv_tile] in the interpreter, or empty.
        query_full: one barrier a warpgroup.
        key_full, key_free, value_full, value_free: one barrier a stage.
    """

    query: Any
    d_out: Any
    key: Any
    value: Any
    ds: tuple[Any, ...]
    query_full: Any
    key_full: Any
    key_free: Any
    value_full: Any
    value_free: Any


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The kernel of a problem under the forward's schedule of tiles."""

    schedule: Schedule

    @property
    def problem(self) -> Problem:
        return self.schedule.problem

    @property
    def config(self) -> Config:
        return self.schedule.config

    @property
    def padded_queries(self) -> int:
        return self.schedule.q_tiles * self.config.q_tile

    @property
    def loads(self) -> tuple[capture_gradients.Load, ...]:
        """The captured elements whose gradients are summed here."""
        return tuple(x for x in capture_gradients.loads_of(self.problem) if x.kind == QUERIES)

    @property
    def has_masked_steps(self) -> bool:
        return self.problem.mask is not None or self.schedule.overhang

    @property
    def tile(self) -> TileGradients:
        return TileGradients(
            problem=self.problem,
            q_size=WARPGROUP_ROWS,
            kv_size=self.config.kv_tile,
            padded_queries=self.padded_queries,
            padded_keys=self.schedule.kv_tiles * self.config.kv_tile,
            transposed=False,
            queries_overhang=self.padded_queries != self.problem.q_len,
            keys_overhang=self.schedule.overhang,
            approx_math=self.config.approx_math,
            interpret=self.config.interpret,
        )

    def buffers(self) -> Buffers:
        config, dtype = self.config, self.problem.q_dtype
        dim, v_dim = (configs.padded_dim(d) for d in (self.problem.qk_dim, self.problem.v_dim))
        n, stages = config.warpgroups, config.stages
        return Buffers(
            query=tiles(dtype, n, WARPGROUP_ROWS, dim),
            d_out=tiles(dtype, n, WARPGROUP_ROWS, v_dim),
            key=tiles(dtype, stages, config.kv_tile, dim),
            value=tiles(dtype, stages, config.kv_tile, v_dim),
            ds=(tiles(dtype, n, WARPGROUP_ROWS, config.kv_tile),) if config.interpret else (),
            query_full=barriers(n, 2),
            key_full=barriers(stages),
            key_free=barriers(stages, n),
            value_full=barriers(stages),
            value_free=barriers(stages, n),
        )

    def stage(self, step: Any) -> Any:
        return lax.rem(step, jnp.int32(self.config.stages))


def launch(kernel: Kernel, inputs: Inputs) -> Outputs:
    """Runs the kernel; dQ is scaled, and has the shape of the query that the kernel got."""
    problem, config = kernel.problem, kernel.config
    sums = jax.ShapeDtypeStruct((*problem.stats_shape()[:2], kernel.padded_queries), jnp.float32)
    outputs = Outputs(
        jax.ShapeDtypeStruct(inputs.query.shape, problem.q_dtype), tuple(sums for _ in kernel.loads)
    )
    return launch_sm90.launch(
        "flexjax_backward_dq",
        functools.partial(_run, kernel),
        inputs,
        outputs,
        kernel.buffers(),
        ctas=kernel.schedule.ctas,
        warpgroups=config.warpgroups + 1,
        approx_math=config.approx_math,
        interpret=config.interpret,
    )


def _run(kernel: Kernel, inputs: Inputs, outputs: Outputs, buffers: Buffers) -> None:
    """The kernel's body, as every warpgroup executes it."""
    cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
    consumers = kernel.config.warpgroups
    limits = configs.REGISTERS[consumers]

    def consume(number: int) -> None:
        if limits is not None:
            plgpu.set_max_registers(limits[0], action="increase")
        _Consumer(kernel, inputs, outputs, buffers, number).run(cta)

    for number in range(consumers):
        pl.when(warpgroup == number)(lambda number=number: consume(number))

    @pl.when(warpgroup == consumers)
    def _() -> None:
        if limits is not None:
            plgpu.set_max_registers(limits[1], action="decrease")
        _produce(kernel, inputs, buffers, cta)


def _produce(kernel: Kernel, inputs: Inputs, buffers: Buffers, cta: Any) -> None:
    """Copies everything but the statistics into shared memory."""
    problem, config = kernel.problem, kernel.config
    position = kernel.schedule.position(cta)
    steps = kernel.schedule.steps(inputs.lists, position)
    for w in range(config.warpgroups):
        first = position.q * config.q_tile + w * WARPGROUP_ROWS
        for source, target in ((inputs.query, buffers.query), (inputs.d_out, buffers.d_out)):
            where = rows(problem, source, position.b, position.h, first, WARPGROUP_ROWS)
            plgpu.copy_gmem_to_smem(where, target.at[w], buffers.query_full.at[w])
    b, h = kernel.schedule.kv_row(position)

    def load(i: Any, _: Any) -> None:
        stage = kernel.stage(i)
        first = pl.multiple_of(kernel.schedule.inside(steps.first_key(i)), config.kv_tile)
        for source, target, full, free in (
            (inputs.key, buffers.key, buffers.key_full, buffers.key_free),
            (inputs.value, buffers.value, buffers.value_full, buffers.value_free),
        ):
            free_stage = free.at[stage]
            pl.when(i >= config.stages)(lambda f=free_stage: plgpu.barrier_wait(f))
            where = rows(problem, source, b, h, first, config.kv_tile)
            plgpu.copy_gmem_to_smem(where, target.at[stage], full.at[stage])

    lax.fori_loop(0, steps.count, load, None)

    def drain(i: Any, _: Any) -> None:
        plgpu.barrier_wait(buffers.key_free.at[kernel.stage(i)])
        plgpu.barrier_wait(buffers.value_free.at[kernel.stage(i)])

    lax.fori_loop(jnp.maximum(steps.count - config.stages, 0), steps.count, drain, None)


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """A warpgroup that computes 64 queries; its number is static, as in backward_consumer_sm90.py."""

    kernel: Kernel
    inputs: Inputs
    outputs: Outputs
    buffers: Buffers
    warpgroup: int

    def run(self, cta: Any) -> None:
        kernel, buffers, w = self.kernel, self.buffers, self.warpgroup
        position = kernel.schedule.position(cta)
        steps = kernel.schedule.steps(self.inputs.lists, position)
        first = position.q * kernel.config.q_tile + w * WARPGROUP_ROWS
        where = (position.b, position.h, pl.ds(first, WARPGROUP_ROWS))
        lse, delta = (
            plgpu.load(x.at[where], layout=ROW, optimized=False)
            for x in (self.inputs.lse, self.inputs.delta)
        )
        plgpu.barrier_wait(buffers.query_full.at[w])

        def accumulate(dq: Any) -> Any:
            sums = self._walk(dq, steps, position, first, lse, delta)
            return dq[...], sums

        dim = buffers.query.shape[-1]
        dq, sums = pl.run_scoped(accumulate, plgpu.ACC((WARPGROUP_ROWS, dim), jnp.float32))
        for ref, total in zip(self.outputs.query_sums, sums, strict=True):
            if not kernel.config.interpret:
                total = registers.finish_row_sums(total)
            ref[where] = total
        buffer = buffers.query.at[w]
        buffer[...] = (dq * kernel.problem.scale).astype(kernel.problem.q_dtype)
        plgpu.commit_smem()
        target = rows(
            kernel.problem, self.outputs.dq, position.b, position.h, first, WARPGROUP_ROWS
        )
        plgpu.copy_smem_to_gmem(buffer, target)
        plgpu.wait_smem_to_gmem(0)

    def _walk(
        self, dq: Any, steps: Steps, position: TilePosition, first: Any, lse: Any, delta: Any
    ) -> Any:
        """Adds all steps to dQ; returns the sums by query."""
        kernel = self.kernel

        def step(masked: bool) -> Any:
            def run(i: Any, sums: Any) -> Any:
                key = steps.first_key(i)
                # A step wholly beyond the last key is moved back onto keys for all but its hiding.
                place = Place(position.b, position.h, first, kernel.schedule.inside(key))
                return self._step(i, place, key, dq, sums, lse, delta, masked)

            return run

        zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), ROW)
        sums = tuple(zeros for _ in kernel.loads)
        if not kernel.has_masked_steps:
            return lax.fori_loop(0, steps.count, step(False), sums)
        sums = lax.fori_loop(0, steps.masked, step(True), sums)
        return lax.fori_loop(steps.masked, steps.count, step(False), sums)

    def _step(
        self,
        number: Any,
        place: Place,
        first_key: Any,
        dq: Any,
        sums: Any,
        lse: Any,
        delta: Any,
        masked: bool,
    ) -> Any:
        kernel, buffers, tile = self.kernel, self.buffers, self.kernel.tile
        captures, w = self.inputs.score_captures, self.warpgroup
        stage, own = kernel.stage(number), w + unknown_zero(number)
        plgpu.barrier_wait(buffers.key_full.at[stage])

        def compute(scores: Any, dp: Any) -> Cotangents:
            plgpu.wgmma(scores, buffers.query.at[own], buffers.key.at[stage].transpose((1, 0)))
            plgpu.barrier_wait(buffers.value_full.at[stage])
            plgpu.wgmma(dp, buffers.d_out.at[own], buffers.value.at[stage].transpose((1, 0)))
            raw = plgpu.wgmma_accumulator_load(scores, wait_n=1)
            allowed = tile.allowed(place, self.inputs.mask_captures) if masked else None
            known = tile.probabilities(raw, lse, place, captures, allowed, masked, first_key)
            return tile.cotangents(known, dp[...], delta, place, captures)

        shape = plgpu.ACC(tile.shape, jnp.float32)
        cotangents = pl.run_scoped(compute, shape, shape)
        plgpu.barrier_arrive(buffers.value_free.at[stage])
        ds = cotangents.ds.astype(kernel.problem.q_dtype)
        if buffers.ds:  # the interpreter has no operands in registers
            staged = buffers.ds[0].at[w]
            staged[...] = ds
            plgpu.commit_smem()
            ds = staged
        plgpu.wgmma(dq, ds, buffers.key.at[stage])
        added = []
        for load, total in zip(kernel.loads, sums, strict=True):
            values = cotangents.loads[load.number]
            interpret = kernel.config.interpret
            added.append(
                total + (values.sum(axis=1) if interpret else registers.partial_row_sums(values))
            )
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(buffers.key_free.at[stage])
        return tuple(added)
