"""The backward pass on Hopper: one warp-specialised kernel with the mods and their derivatives inlined.

With the notation of the derivation in backends/xla.py, a CTA owns a tile of 128 keys, 64 for each of two
*consumer* warpgroups, and walks over the queries that see them (backward_schedule.py). Everything is computed
transposed, keys by queries, so that P^T and dS^T are in registers as the matrix instructions want their first
operand:

    for every step of queries:
        S^T = K Q^T            dP^T = V dO^T          both issued at once
        P^T from S^T and the logsumexp                while dP^T is computed
        dV += P^T dO           issued
        dS^T from P^T, dP^T and D, to shared memory
        dK += dS^T Q           issued
        meet the other warpgroup; then its dS^T is there too
        dQ tile = dS K         each warpgroup its share (backward_config.Part)
        dQ += dQ tile          added in global memory, in float32, by TMA

With wide tiles of queries the dQ of a step is left to the next one (backward_deferred_sm90.py). The sums of dQ in
global memory are in an order of their own (dq_tiles.py).

dK and dV stay in registers (FlashAttention-3, arXiv:2407.08608, is built like this). Several query heads, or batch
rows, that share keys are walked over one after another, so that their sum costs nothing; where that leaves part of
the machine without a column, by several CTAs, whose sums, rounded to the keys' dtype, are added up by XLA. With
heads of at most 64, CTAs are persistent and take one column after the other, and most of them round dQ as well
(dq_rounder_sm90.py). Heads wider than 128 need more registers: see backward_wide_sm90.py. The warpgroup behind the
consumers, the *producer*, copies Q, dO, the logsumexp and D into a ring of shared-memory stages. Where a column is
64 keys of narrow heads, its only consumer does that itself, and two CTAs share a multiprocessor.

dQ is thus added up in an order that changes from run to run. For the deterministic variant a warp beside the
producer adds the shares in the order of the columns (dq_adder_sm90.py) or, where there is a block mask, dQ is left
to a kernel of its own (dq_sm90.py). Both serve wide heads without an order, too (`backward_config._choose_dq_by`).

Every barrier completion is awaited by everyone who uses the barrier, the last ones in `Producer.run`. A column
without steps stores zeros.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu import backward_config as configs
from flexjax.backends.mosaic_gpu import capture_gradients, dq_sm90, dq_tiles
from flexjax.backends.mosaic_gpu.backward_config import BackwardConfig
from flexjax.backends.mosaic_gpu.backward_consumer_sm90 import Consumer
from flexjax.backends.mosaic_gpu.backward_copies_sm90 import Copies
from flexjax.backends.mosaic_gpu.backward_deferred_sm90 import DeferredConsumer
from flexjax.backends.mosaic_gpu.backward_kernel_sm90 import Buffers, Inputs, Kernel, Outputs
from flexjax.backends.mosaic_gpu.backward_schedule import Column, ColumnSchedule
from flexjax.backends.mosaic_gpu.backward_wide_sm90 import WideConsumer
from flexjax.backends.mosaic_gpu.capture_gradients import ELEMENTS, KEYS, QUERIES
from flexjax.backends.mosaic_gpu.counter import take_next, uniform
from flexjax.backends.mosaic_gpu.dq_adder_sm90 import DqAdder
from flexjax.backends.mosaic_gpu.dq_rounder_sm90 import DqRounder
from flexjax.backends.mosaic_gpu.launch_sm90 import addressable, capture, launch
from flexjax.backends.mosaic_gpu.schedule import Schedule
from flexjax.backends.mosaic_gpu.softmax import LOG2_E
from flexjax.problem import BLHD, Gradients, Operands, Problem, Result, heads_first


def backward(
    problem: Problem,
    operands: Operands,
    result: Result,
    d_out: Any,
    d_lse: Any,
    config: BackwardConfig,
) -> Gradients:
    """Runs the kernel, and the one for dQ where the configuration wants it apart."""
    schedule = ColumnSchedule(problem, config)
    kernel = Kernel(schedule)
    q_axis = 1 if problem.layout == BLHD else 2
    lse, delta = _statistics(problem, result, d_out, d_lse, schedule.padded_queries)
    # The interpreter wants whole tiles; on the GPU TMA fills up what is missing.
    q_rows, kv_rows = (
        (schedule.padded_queries, schedule.padded_keys) if config.interpret else (8, 8)
    )
    query, d_out, key, value = (
        addressable(x, q_axis, multiple, configs.padded_dim(x.shape[3]))
        for x, multiple in (
            (operands.query, q_rows),
            (d_out, q_rows),
            (operands.key, kv_rows),
            (operands.value, kv_rows),
        )
    )
    mask_captures = tuple(map(capture, operands.mask_captures))
    score_captures = ()
    if problem.score is not None:
        score_captures = tuple(map(capture, operands.score_captures))
    lists = operands.lists
    inputs = Inputs(
        query,
        key,
        value,
        d_out,
        lse,
        delta,
        ()
        if lists is None
        else (lists.q_num_blocks, lists.q_indices, lists.full_q_num_blocks, lists.full_q_indices),
        score_captures,
        mask_captures,
        tuple(map(jax.new_ref, _zero_dq(kernel))),
        tuple(jax.new_ref(_zero_sum(kernel, load)) for load in kernel.loads if load.kind != KEYS),
        (jax.new_ref(jnp.zeros((kernel.turns,), jnp.int32)),) if config.ordered else (),
    )
    key_sums = jax.ShapeDtypeStruct((*problem.stats_shape()[:2], schedule.padded_keys), jnp.float32)
    outputs = Outputs(
        jax.ShapeDtypeStruct(_shared_out(key.shape, q_axis, schedule.shares), problem.k_dtype),
        jax.ShapeDtypeStruct(_shared_out(value.shape, q_axis, schedule.shares), problem.v_dtype),
        tuple(key_sums for load in kernel.loads if load.kind == KEYS),
        _rounded_dq(kernel),
    )
    outputs = launch(
        "flexjax_backward",
        functools.partial(_run, kernel),
        inputs,
        outputs,
        kernel.buffers(),
        ctas=schedule.ctas,
        warpgroups=config.warpgroups + (not config.self_loading) + config.rounding,
        approx_math=config.approx_math,
        interpret=config.interpret,
    )
    loads, query_sums = kernel.loads, []
    if config.separate_dq:
        dq, loads, query_sums = _separate_dq(kernel, operands, inputs)
    elif config.rounding:
        (dq,) = outputs.dq
    else:
        dq = _finished_dq(kernel, inputs.dq[0][...])
    dq = lax.slice_in_dim(dq, 0, problem.q_len, axis=q_axis)[..., : problem.qk_dim]
    dk, dv = (
        lax.slice_in_dim(x, 0, problem.kv_len, axis=q_axis)[..., :dim]
        for x, dim in (
            (_summed_shares(outputs.dk, q_axis, schedule.shares), problem.qk_dim),
            (_summed_shares(outputs.dv, q_axis, schedule.shares), problem.v_dim),
        )
    )
    added = [ref[...] for ref in inputs.sums]
    kept = list(outputs.key_sums)
    sums = [(kept if load.kind == KEYS else added).pop(0) for load in kernel.loads]
    dense = config.interpret and not config.separate_dq
    captures = capture_gradients.finish(
        problem, operands, loads, [*sums, *query_sums], dense, config.deterministic
    )
    return Gradients(dq, dk, dv, captures)


def _separate_dq(
    kernel: Kernel, operands: Operands, inputs: Inputs
) -> tuple[Any, tuple[capture_gradients.Load, ...], list[Any]]:
    """(dQ, all loads, the sums of those that this kernel sums) by the kernel for dQ."""
    problem, lists, config = kernel.problem, operands.lists, kernel.config.dq
    assert config is not None, "a kernel for dQ has a configuration"
    apart = dq_sm90.Kernel(Schedule(problem, config))
    axis = 1 if problem.layout == BLHD else 2
    interpret, queries = config.interpret, apart.padded_queries

    def fitted(x: Any, axis: int, length: int, fill: float = 0.0) -> Any:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, max(length - x.shape[axis], 0))
        return jnp.pad(x, padding, constant_values=fill)

    keys = apart.schedule.kv_tiles * config.kv_tile
    outputs = dq_sm90.launch(
        apart,
        dq_sm90.Inputs(
            fitted(inputs.query, axis, queries if interpret else 0),
            fitted(inputs.key, axis, keys if interpret else 0),
            fitted(inputs.value, axis, keys if interpret else 0),
            fitted(inputs.d_out, axis, queries if interpret else 0),
            fitted(inputs.lse, 2, queries, jnp.inf),
            fitted(inputs.delta, 2, queries),
            ()
            if lists is None
            else (
                lists.kv_num_blocks,
                lists.kv_indices,
                lists.full_kv_num_blocks,
                lists.full_kv_indices,
            ),
            inputs.score_captures,
            inputs.mask_captures,
        ),
    )
    return outputs.dq, (*kernel.loads, *apart.loads), list(outputs.query_sums)


# -- operands ---------------------------------------------------------------------------------------


def _statistics(
    problem: Problem, result: Result, d_out: Any, d_lse: Any, length: int
) -> tuple[Any, Any]:
    """(logsumexp in units of log2, D) of every query, padded to `length`.

    2^(s - inf) = 0: rows that are only padding, and rows without any key, contribute nothing.
    """
    out, d_out = (heads_first(x, problem.layout) for x in (result.out, d_out))
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1) - d_lse
    dead = result.lse == -jnp.inf
    lse = jnp.where(dead, jnp.inf, result.lse * LOG2_E)
    padding = ((0, 0), (0, 0), (0, length - problem.q_len))
    return (
        jnp.pad(lse, padding, constant_values=jnp.inf),
        jnp.pad(jnp.where(dead, 0.0, delta), padding),
    )


def _shared_out(shape: tuple[int, ...], q_axis: int, shares: int) -> tuple[int, ...]:
    """The shape of dK or dV with every head of keys as often as its queries are shared out."""
    heads = 3 - q_axis
    return (*shape[:heads], shape[heads] * shares, *shape[heads + 1 :])


def _summed_shares(x: Any, q_axis: int, shares: int) -> Any:
    """Sums of a head's shares, which are in the dtype of the keys; added in float32."""
    if shares == 1:
        return x
    heads = 3 - q_axis
    apart = x.reshape(*x.shape[:heads], -1, shares, *x.shape[heads + 1 :])
    return apart.sum(heads + 1, dtype=jnp.float32).astype(x.dtype)


_COUNTERS = 1024  # places for counters are a multiple of this


def _zero_dq(kernel: Kernel) -> tuple[Any, ...]:
    schedule = kernel.schedule
    if not kernel.parts:
        return ()
    dim = configs.padded_dim(kernel.problem.qk_dim)
    if kernel.config.interpret:
        return (jnp.zeros((schedule.kv_tiles, kernel.rows, dim), jnp.float32),)
    counters = 1 + schedule.heads if kernel.config.persistent else 0
    # An odd number of zeros would be written one by one.
    counters = -(-counters // _COUNTERS) * _COUNTERS
    return (jnp.zeros((kernel.rows * dim + counters,), jnp.float32),)


def _rounded_dq(kernel: Kernel) -> tuple[Any, ...]:
    """The padded dQ in the queries' dtype and layout, where the kernel rounds it."""
    problem = kernel.problem
    if not kernel.config.rounding:
        return ()
    shape = [problem.batch, problem.q_heads, problem.q_len, configs.padded_dim(problem.qk_dim)]
    if problem.layout == BLHD:
        shape[1], shape[2] = shape[2], shape[1]
    return (jax.ShapeDtypeStruct(tuple(shape), problem.q_dtype),)


def _finished_dq(kernel: Kernel, sums: Any) -> Any:
    """The padded dQ in the queries' dtype and layout, from what the kernel added up."""
    problem, dim = kernel.problem, configs.padded_dim(kernel.problem.qk_dim)
    # Counters may lie behind them.
    sums = sums.sum(0) if kernel.config.interpret else sums[: kernel.rows * dim]
    dq = sums if kernel.config.interpret else dq_tiles.in_order(sums, dim)
    dq = dq.reshape(problem.batch, problem.q_heads, -1, dim)
    return (heads_first(dq, problem.layout) * problem.scale).astype(problem.q_dtype)


def _zero_sum(kernel: Kernel, load: capture_gradients.Load) -> Any:
    problem, schedule = kernel.problem, kernel.schedule
    heads = problem.batch * problem.q_heads
    if kernel.config.interpret:
        shape: Sequence[int] = (
            problem.batch,
            problem.q_heads,
            schedule.padded_keys,
            schedule.padded_queries,
        )
    elif load.kind == QUERIES:
        shape = (heads * schedule.padded_queries,)
    elif load.kind == ELEMENTS:
        shape = (functools.reduce(lambda x, y: x * y, load.shape, 1),)
    else:
        shape = (heads * capture_gradients.diagonal_count(problem.q_len, problem.kv_len),)
    return jnp.zeros(shape, jnp.float32)


# -- the kernel -------------------------------------------------------------------------------------


def _run(kernel: Kernel, inputs: Inputs, outputs: Outputs, buffers: Buffers) -> None:
    """The kernel's body, as every warpgroup executes it."""
    cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
    consumers = kernel.config.warpgroups
    limits = kernel.config.registers

    def consume(number: int) -> None:
        if limits is not None:
            plgpu.set_max_registers(limits[0], action="increase")
        consumer = WideConsumer if kernel.config.wide else Consumer
        consumer = DeferredConsumer if kernel.config.deferred else consumer
        consumer(kernel, inputs, outputs, buffers, number).run(cta)

    if kernel.config.self_loading:
        consume(0)
        return
    for number in range(consumers):
        pl.when(warpgroup == number)(functools.partial(consume, number))

    @pl.when(warpgroup == consumers)
    def _() -> None:
        if limits is not None:
            plgpu.set_max_registers(limits[1], action="decrease")
        producer = Producer(kernel, inputs, buffers)
        if not kernel.config.handed_over:
            producer.run(cta)
            return

        @plgpu.warp_map
        def _(warp: Any) -> None:
            pl.when(warp == 0)(lambda: producer.run(cta))
            for number in range(consumers):
                adder = DqAdder(kernel, inputs, buffers, number)
                pl.when(warp == 1 + number)(functools.partial(adder.run, cta))

    if kernel.config.rounding:

        @pl.when(warpgroup == consumers + 1)
        def _() -> None:
            assert limits is not None
            plgpu.set_max_registers(limits[2], action="decrease")
            DqRounder(kernel, inputs, outputs).run(cta)


@dataclasses.dataclass(frozen=True)
class Producer:
    """The warpgroup, or warp, that copies everything into shared memory."""

    kernel: Kernel
    inputs: Inputs
    buffers: Buffers

    def run(self, cta: Any) -> None:
        schedule, buffers = self.kernel.schedule, self.buffers
        if not self.kernel.config.persistent:
            column = schedule.column(cta)
            self._copies.keys_and_values(column)
            self._drain(self._column(column, jnp.int32(0)))
            return
        (number,), (free,) = buffers.column, buffers.key_value_free

        def take(state: Any) -> Any:
            """A column: its number, how many steps and how many columns came before."""
            mine, begin, turn = map(uniform, state)
            column = schedule.column(mine)

            def keys_and_values() -> None:
                pl.when(turn > 0)(lambda: plgpu.barrier_wait(free))
                number[0] = mine
                self._copies.keys_and_values(column)

            end = self._column(column, begin, keys_and_values)
            # Asked for while the consumers are still at work.
            return following(), end, turn + 1

        following = functools.partial(take_next, self.inputs.dq[0], self.kernel.taken, number)
        start = following(), jnp.int32(0), jnp.int32(0)
        _, end, turn = lax.while_loop(lambda state: state[0] < schedule.columns, take, start)
        pl.when(turn > 0)(lambda: plgpu.barrier_wait(free))
        number[0] = jnp.int32(-1)
        for _ in range(2 * self.kernel.config.key_slots):  # in place of copies
            plgpu.barrier_arrive(buffers.key_value_full)
        self._drain(end)

    def _column(
        self, column: Column, begin: Any, keys_and_values: Callable[[], None] | None = None
    ) -> Any:
        """Loads the steps of a column; returns the number behind the last one.

        Args:
            column: the column.
            begin: number of its first step.
            keys_and_values: loads these, as soon as those of the column before are not needed any more. Until then
                the stages take what they can of the first steps.
        """
        schedule, stages = self.kernel.schedule, self.kernel.config.stages

        def row(number: Any, first: Any) -> Any:
            b, h = schedule.row(column, number)
            steps = schedule.steps(self.inputs.lists, column, b, h)

            def load(i: Any, _: Any) -> None:
                self._load(first + i, b, h, steps.first_query(i))
                if keys_and_values is not None:
                    pl.when(first + i == begin + stages - 1)(keys_and_values)

            lax.fori_loop(0, steps.count, load, None)
            return first + steps.count

        rows = schedule.rows
        end = row(jnp.int32(0), begin) if rows == 1 else lax.fori_loop(0, rows, row, begin)
        if keys_and_values is not None:
            pl.when(end < begin + stages)(keys_and_values)
        return end

    @property
    def _copies(self) -> Copies:
        return Copies(self.kernel, self.inputs, self.buffers)

    def _load(self, step: Any, b: Any, h: Any, first: Any) -> None:
        buffers, copies = self.buffers, self._copies
        stage = self.kernel.stage(step)
        for copy, free in (
            (copies.queries, buffers.query_free),
            (copies.cotangents, buffers.d_out_free),
        ):
            free_stage = free.at[stage]
            pl.when(step >= self.kernel.config.stages)(lambda f=free_stage: plgpu.barrier_wait(f))
            if free is buffers.query_free:
                self._keep_row_of_dq(step, b, h, first)
            copy(b, h, first, stage)

    def _keep_row_of_dq(self, step: Any, b: Any, h: Any, first: Any) -> None:
        for last_rows in self.buffers.dq_row:
            last_rows[lax.rem(step, jnp.int32(self.kernel.dq_rows))] = self.kernel.row_of(
                b, h, first
            )

    def _drain(self, end: Any) -> None:
        def wait(step: Any, _: Any) -> None:
            stage = self.kernel.stage(step)
            plgpu.barrier_wait(self.buffers.query_free.at[stage])
            plgpu.barrier_wait(self.buffers.d_out_free.at[stage])

        lax.fori_loop(jnp.maximum(end - self.kernel.config.stages, 0), end, wait, None)
