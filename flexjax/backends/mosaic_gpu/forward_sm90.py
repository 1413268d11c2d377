"""The forward pass on Hopper: one warp-specialised kernel with the mods inlined.

A CTA computes tiles of `q_tile` queries of one head. Its last warpgroup, the *producer*, walks the steps of every
tile and copies keys and values into a ring of shared-memory stages by TMA. Each of the others, the *consumers*,
owns 64 queries:

    S_0 = Q K_0^T;  P_0 = softmax of S_0
    for step i = 1, 2, ...:
        issue S_i = Q K_i^T, then O += P_{i-1} V_{i-1}, wait for S_i only
        P_i = softmax of S_i                  while the second product runs
        wait for O; rescale it
    O += P_last V_last;  O / l

so that the matrix products of a warpgroup run under its own softmax, and the warpgroups take turns at issuing them
(FlashAttention-3, arXiv:2407.08608). Masked steps come before the others; schedule.py says which steps
there are, softmax.py how P is computed.

Blocks of 64 queries leave work for one consumer only. It then issues the copies itself (self_loading_sm90.py), and
needs so few registers and so little shared memory that several share a multiprocessor: one computes while
another starts, waits for keys or stores, which is what rows of few blocks are made of. With narrow heads that is
faster whatever the blocks.

A persistent producer takes tiles from a counter, and tells the consumers which they are when their queries have
come: it stands in shared memory once all consumers have done with the queries before, and -1 after the last one.

Every barrier completion is awaited by everyone who uses the barrier, the last ones in `_drain`. A tile without
steps computes one step on some block and drops the result by selection.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu import config as configs
from flexjax.backends.mosaic_gpu.config import Config
from flexjax.backends.mosaic_gpu.consumer_sm90 import Consumer
from flexjax.backends.mosaic_gpu.copies_sm90 import Copies
from flexjax.backends.mosaic_gpu.counter import take_next, uniform
from flexjax.backends.mosaic_gpu.kernel_sm90 import Buffers, Inputs, Kernel, Outputs
from flexjax.backends.mosaic_gpu.launch_sm90 import addressable, capture, launch
from flexjax.backends.mosaic_gpu.schedule import Schedule
from flexjax.problem import BLHD, Operands, Problem, Result


def forward(problem: Problem, operands: Operands, config: Config) -> Result:
    """Runs the kernel.

    Copies an operand only if TMA cannot address it: see `launch_sm90.addressable`.
    """
    schedule = Schedule(problem, config)
    kernel = Kernel(schedule)
    axis = 1 if problem.layout == BLHD else 2
    query, key, value = (
        addressable(x, axis, tile if config.interpret else 8, configs.padded_dim(x.shape[3]))
        for x, tile in (
            (operands.query, config.q_tile),
            (operands.key, config.kv_tile),
            (operands.value, config.kv_tile),
        )
    )
    lists = operands.lists
    counts_and_indices = (
        ()
        if lists is None
        else (
            lists.kv_num_blocks,
            lists.kv_indices,
            lists.full_kv_num_blocks,
            lists.full_kv_indices,
        )
    )
    score_captures = operands.score_captures if problem.score is not None else ()
    inputs = Inputs(
        query,
        key,
        value,
        counts_and_indices,
        tuple(map(capture, score_captures)),
        tuple(map(capture, operands.mask_captures)),
        (jax.new_ref(jnp.zeros((_COUNTERS,), jnp.int32)),) if schedule.counted else (),
    )
    stats = jax.ShapeDtypeStruct(
        (*problem.stats_shape()[:2], schedule.q_tiles * config.q_tile), jnp.float32
    )
    out_shape = (*query.shape[:-1], value.shape[-1])
    outputs = Outputs(
        jax.ShapeDtypeStruct(out_shape, problem.q_dtype),
        stats,
        (stats,) if problem.max_scores else (),
    )
    result = launch(
        "flexjax_forward",
        functools.partial(_run, kernel),
        inputs,
        outputs,
        kernel.buffers(query.shape[-1], value.shape[-1]),
        ctas=schedule.ctas,
        warpgroups=config.workers if config.self_loading else config.warpgroups + 1,
        approx_math=config.approx_math,
        interpret=config.interpret,
    )
    out = lax.slice_in_dim(result.out, 0, problem.q_len, axis=axis)[..., : problem.v_dim]
    lse, *max_scores = (x[..., : problem.q_len] for x in (result.lse, *result.max_scores))
    return Result(out, lse, max_scores[0] if max_scores else None)


_COUNTERS = 128  # one counts; an odd number of zeros would be written one by one


def _run(kernel: Kernel, inputs: Inputs, outputs: Outputs, buffers: Buffers) -> None:
    """The kernel's body, as every warpgroup executes it."""
    cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
    consumers = kernel.config.warpgroups
    if kernel.config.self_loading:
        number = warpgroup if kernel.config.workers > 1 else 0
        Consumer.of(kernel, inputs, outputs, buffers, number).run(cta)
        return
    limits = configs.REGISTERS[consumers]

    @pl.when(warpgroup < consumers)
    def _() -> None:
        if limits is not None:
            plgpu.set_max_registers(limits[0], action="increase")
        Consumer.of(kernel, inputs, outputs, buffers, warpgroup).run(cta)

    @pl.when(warpgroup == consumers)
    def _() -> None:
        if limits is not None:
            plgpu.set_max_registers(limits[1], action="decrease")
        Producer(kernel, inputs, buffers).run(cta)


@dataclasses.dataclass(frozen=True)
class Producer:
    """The warpgroup that copies queries, keys and values into shared memory."""

    kernel: Kernel
    inputs: Inputs
    buffers: Buffers

    def run(self, cta: Any) -> None:
        config, schedule = self.kernel.config, self.kernel.schedule
        if schedule.counted:
            self._drain(self._take_tiles(cta))
            return
        self._drain(schedule.for_each_tile(cta, self._load_tile))
        if config.persistent:
            for w in range(config.warpgroups):
                plgpu.barrier_wait(self.buffers.query_free.at[w])

    def _take_tiles(self, cta: Any) -> Any:
        """Loads tiles as the counter gives them, and tells the consumers which they are."""
        schedule, buffers = self.kernel.schedule, self.buffers
        (tiles,), (taken,) = buffers.tile, self.inputs.taken
        consumers = range(self.kernel.config.warpgroups)

        def tell(tile: Any, begin: Any) -> None:
            """Once the consumers have done with the queries before."""

            @pl.when(begin > 0)
            def _() -> None:
                for w in consumers:
                    plgpu.barrier_wait(buffers.query_free.at[w])

            tiles[0] = tile

        def take(state: Any) -> Any:
            tile, begin = map(uniform, state)
            tell(tile, begin)
            end = self._load_tile(tile, begin)
            # Asked for while the consumers are still at work.
            return schedule.ctas + take_next(taken, 0, tiles), end

        start = jnp.asarray(cta, jnp.int32), jnp.int32(0)
        _, end = lax.while_loop(lambda state: state[0] < schedule.tiles, take, start)
        tell(jnp.int32(-1), end)
        for w in consumers:  # in place of copies
            plgpu.barrier_arrive(buffers.query_full.at[w])
        return end

    def _load_tile(self, tile: Any, begin: Any) -> Any:
        kernel, buffers, config = self.kernel, self.buffers, self.kernel.config
        copies = Copies(kernel, self.inputs, buffers)
        position = kernel.schedule.position(tile)
        steps = kernel.schedule.steps(self.inputs.lists, position)
        for w in range(config.warpgroups):
            if config.persistent and not kernel.schedule.counted:
                pl.when(begin > 0)(lambda w=w: plgpu.barrier_wait(buffers.query_free.at[w]))
            copies.query(position, w)

        def load(i: Any, _: Any) -> None:
            step = begin + i
            stage = kernel.stage(step)
            first_key = steps.first_key(i)
            for copy, free in ((copies.key, buffers.key_free), (copies.value, buffers.value_free)):
                free_stage = free.at[stage]
                pl.when(step >= config.stages)(lambda f=free_stage: plgpu.barrier_wait(f))
                copy(position, first_key, stage)

        lax.fori_loop(0, steps.computed, load, None)
        return begin + steps.computed

    def _drain(self, end: Any) -> None:
        def wait(step: Any, _: Any) -> None:
            stage = self.kernel.stage(step)
            plgpu.barrier_wait(self.buffers.key_free.at[stage])
            plgpu.barrier_wait(self.buffers.value_free.at[stage])

        lax.fori_loop(jnp.maximum(end - self.kernel.config.stages, 0), end, wait, None)
