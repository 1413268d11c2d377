"""The consumers of the forward kernel: matrix products and softmax of 64 queries. See forward_sm90.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu import emit, products_sm90, registers, wgmma_sm90
from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS
from flexjax.backends.mosaic_gpu.copies_sm90 import Copies
from flexjax.backends.mosaic_gpu.counter import uniform
from flexjax.backends.mosaic_gpu.kernel_sm90 import Buffers, Inputs, Kernel, Outputs
from flexjax.backends.mosaic_gpu.launch_sm90 import rows
from flexjax.backends.mosaic_gpu.registers import TILE
from flexjax.backends.mosaic_gpu.schedule import TilePosition, Work
from flexjax.backends.mosaic_gpu.self_loading_sm90 import Following, SelfLoading, Start
from flexjax.backends.mosaic_gpu.softmax import State
from flexjax.backends.mosaic_gpu.trusting import Bias
from flexjax.backends.mosaic_gpu.wgmma_sm90 import Tiles


class Accumulation(NamedTuple):
    """What a consumer carries from step to step.

    Attributes:
        out: float32 [64, Dv], without the last step's product.
        p: probabilities of the last step, as operand.
        state: of the softmax.
        ahead: what the score_mod reads for the keys of the next step, if `_reads_a_step_ahead`.
    """

    out: Any
    p: Any
    state: State
    ahead: tuple[Any, ...] = ()


class _Allowed(NamedTuple):
    """What a mask allows in a tile; see `emit.mask_on_tile`."""

    elements: Any
    words: Any

    def everything_if(self, condition: Any) -> _Allowed:
        """The same, or everything."""
        elements = self.elements | jnp.broadcast_to(condition, self.elements.shape)
        if self.words is None:
            return _Allowed(elements, None)
        everything = jnp.where(condition, jnp.uint32(2**32 - 1), jnp.uint32(0))
        return _Allowed(elements, self.words | jnp.broadcast_to(everything, self.words.shape))

    def of(self, scores: Any) -> Any:
        """Scores with -inf elsewhere."""
        if self.words is None:
            return jnp.where(self.elements, scores, -jnp.inf)
        return registers.hidden(scores, self.elements, self.words)


@dataclasses.dataclass(frozen=True)
class Consumer:
    """A warpgroup that computes 64 queries of every tile of the CTA, or all queries of tiles of its own.

    Attributes:
        kernel, inputs, outputs, buffers: what it works with.
        warpgroup: its number.
        matrices: its queries, and keys and values of the first stage; None in the interpreter.
    """

    kernel: Kernel
    inputs: Inputs
    outputs: Outputs
    buffers: Buffers
    warpgroup: Any
    matrices: tuple[Tiles, Tiles, Tiles] | None = None

    @classmethod
    def of(
        cls, kernel: Kernel, inputs: Inputs, outputs: Outputs, buffers: Buffers, warpgroup: Any
    ) -> Consumer:
        """The consumer, which knows where its matrices are."""
        matrices = None
        if not kernel.config.interpret:
            query, key, value = map(
                wgmma_sm90.matrices, (buffers.query, buffers.key, buffers.value)
            )
            matrices = query.at(warpgroup), key, value
        return cls(kernel, inputs, outputs, buffers, warpgroup, matrices)

    @property
    def _query(self) -> Any:
        return self.buffers.query.at[self.warpgroup]

    @property
    def _copies(self) -> Copies:
        return Copies(self.kernel, self.inputs, self.buffers)

    @property
    def _takes_turns(self) -> bool:
        return self.kernel.config.ping_pong and self.kernel.config.warpgroups > 1

    @property
    def _reads_a_step_ahead(self) -> bool:
        """Whether what the score_mod reads for the keys (see keys_ahead.py) is read in the step before.

        Who waits for turns reads before that. Who does not would have to wait for what it reads: it reads for the
        next step, once its scores have left their registers.
        """
        split = self.kernel.split_scores
        return split is not None and split.ahead is not None and not self._takes_turns

    def run(self, cta: Any) -> None:
        if self._takes_turns:  # the first turn is the first warpgroup's
            last = self.kernel.config.warpgroups - 1
            pl.when(self.warpgroup == last)(lambda: registers.give_turn_to(jnp.int32(0)))
        if self.kernel.config.self_loading:
            self._load_and_walk(cta)
        elif self.kernel.schedule.counted:
            self._follow()
        else:
            self.kernel.schedule.for_each_tile(
                cta, lambda tile, begin: self._tile(self._work(tile, begin))
            )
        plgpu.wait_smem_to_gmem(0)

    def _follow(self) -> None:
        """Computes the tiles that the producer names, with the arrival of their queries."""
        (tiles,) = self.buffers.tile

        def following() -> Any:
            plgpu.barrier_wait(self.buffers.query_full.at[self.warpgroup])
            return uniform(tiles[0])

        def visit(state: Any) -> Any:
            tile, begin = map(uniform, state)
            end = self._tile(self._work(tile, begin))
            return following(), end

        lax.while_loop(lambda state: state[0] >= 0, visit, (following(), jnp.int32(0)))

    def _load_and_walk(self, cta: Any) -> None:
        """Computes tiles, and loads each one's first steps when the one before it has no more of its own."""
        schedule, loading = self.kernel.schedule, self._loading
        if not self.kernel.config.persistent:
            work = self._work(cta, jnp.int32(0))
            loading.load(loading.start_of(work))
            self._tile(work)
            return
        walk = schedule.walk(self.warpgroup * schedule.ctas + cta)

        def start(i: Any, begin: Any) -> Start:
            # Behind the last tile stands any other, which is not wanted.
            tile = jnp.minimum(walk.tile(i), schedule.tiles - 1)
            return loading.start_of(self._work(tile, begin), i < walk.count)

        def visit(i: Any, begin: Any) -> Any:
            return self._tile(self._work(walk.tile(i), begin), lambda end: start(i + 1, end))

        loading.load(start(jnp.int32(0), jnp.int32(0)))
        lax.fori_loop(0, walk.count, visit, jnp.int32(0))

    def _work(self, tile: Any, begin: Any) -> Work:
        return self.kernel.schedule.work(self.inputs.lists, tile, begin)

    def _tile(self, work: Work, start_next: Callable[[Any], Start] | None = None) -> Any:
        """Computes a tile; `start_next` tells, from the steps so far, what a consumer then has to load."""
        kernel, buffers = self.kernel, self.buffers
        position, steps, begin = work
        v_dim = buffers.value.shape[-1]

        first_key = steps.first_key(0)
        slope = self._slope(position)
        ahead, second_key = self._ahead(position, first_key), self._key_after(work, jnp.int32(0))
        allowed = self._allowed(position, first_key)
        if allowed is not None:  # the mask does not count in full blocks
            allowed = allowed.everything_if(steps.masked == 0)
        if not kernel.schedule.counted:  # else the number of the tile came with the queries
            plgpu.barrier_wait(buffers.query_full.at[self.warpgroup])
        stage = self._stage(begin)
        plgpu.barrier_wait(buffers.key_full.at[stage])
        scores = self._raw_scores(stage)
        if kernel.config.self_loading:
            self._loading.replace_first_keys(work, self._loading.following(work, 0))
        else:
            plgpu.barrier_arrive(buffers.key_free.at[stage])
        if slope is None:
            scores = self._scores(scores, position, first_key, ahead, masked=True)
        scores = self._hide(scores, allowed, first_key)
        state = kernel.softmax.start(WARPGROUP_ROWS)
        if slope is None:
            p, state, _ = kernel.softmax.searching(scores, state)
        else:
            bias = self._bias(slope, position, first_key)
            p, state, _ = kernel.softmax.trusting(
                scores, state, None, bias, kernel.scores.before, first=True
            )
        zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, v_dim), jnp.float32), TILE)
        ahead = self._ahead(position, second_key) if self._reads_a_step_ahead else ()
        carry = Accumulation(zeros, p.astype(kernel.problem.q_dtype), state, ahead)

        def step(masked: bool) -> Any:
            return lambda i, carry: self._step(work, slope, i, carry, masked)

        if kernel.has_masked_steps:
            carry = lax.fori_loop(1, steps.masked, step(True), carry)
            done = jnp.maximum(steps.masked, 1)
        else:
            done = 1
        carry = lax.fori_loop(done, steps.computed, step(False), carry)
        if kernel.config.persistent and not kernel.config.self_loading:
            plgpu.barrier_arrive(buffers.query_free.at[self.warpgroup])
        stage = self._stage(work.end - 1)
        start = None if start_next is None else start_next(work.end)
        plgpu.barrier_wait(buffers.value_full.at[stage])
        out = self._add_product(carry.out, carry.p, stage)
        if start is not None:
            self._loading.wait_for_warps()
            self._loading.load(start)
        elif not kernel.config.self_loading:
            plgpu.barrier_arrive(buffers.value_free.at[stage])
        self._store(out, carry.state, position, steps.count > 0)
        return work.end

    # -- one step -------------------------------------------------------------------------------

    def _step(
        self, work: Work, slope: Any, number: Any, carry: Accumulation, masked: bool
    ) -> Accumulation:
        """Scores and softmax of step `number` of a tile; the product with the values of the one before."""
        kernel, buffers, softmax = self.kernel, self.buffers, self.kernel.softmax
        position = work.position
        stage = self._stage(work.begin + number)
        previous = self._stage(work.begin + number - 1)
        loads = kernel.config.self_loading
        following = self._loading.following(work, number) if loads else None
        next_key = self._key_after(work, number)
        plgpu.barrier_wait(buffers.key_full.at[stage])
        first_key = self._copies.first_key(work.steps, number, stage)
        if kernel.config.interpret:
            scores = self._raw_scores(stage)
            plgpu.barrier_wait(buffers.value_full.at[previous])
            out = self._add_product(carry.out, carry.p, previous)
            scores = self._scores(scores, position, first_key, (), masked)
            if masked:
                scores = self._hide(scores, self._allowed(position, first_key), first_key)
            p, state, alpha = softmax.searching(scores, carry.state)
            if not loads:
                plgpu.barrier_arrive(buffers.key_free.at[stage])
            self._values_read(work, number, following)
            return Accumulation(
                softmax.rescaled(out, alpha), p.astype(kernel.problem.q_dtype), state
            )

        early = masked and kernel.problem.mask_loads  # while the products are under way
        # Which rows see a key is not known in words then: rows without a reference would start over every time.
        bias = None if early else self._bias(slope, position, first_key)
        ahead = carry.ahead if self._reads_a_step_ahead else self._ahead(position, first_key)
        if self._takes_turns:
            registers.wait_for_turn(self.warpgroup)
        scores, out = self._issue_products(carry, stage, previous)
        if self._takes_turns:
            neighbour = lax.rem(self.warpgroup + 1, jnp.int32(kernel.config.warpgroups))
            registers.give_turn_to(neighbour)
        allowed = self._allowed(position, first_key) if early else None
        scores = wgmma_sm90.awaited(scores, later=1)
        if not loads:
            plgpu.barrier_arrive(buffers.key_free.at[stage])
        if bias is None:
            scores = self._scores(scores, position, first_key, ahead, masked)
        if masked:
            allowed = allowed if early else self._allowed(position, first_key)
            scores = self._hide(scores, allowed, first_key)
        if early:
            new = softmax.searching(scores, carry.state)
        else:
            words = None if allowed is None else allowed.words
            before = 1.0 if bias is None else kernel.scores.before
            new = softmax.trusting(scores, carry.state, words, bias, before)
        # Ties them to what follows, which they do not depend on otherwise.
        p, state, alpha = lax.optimization_barrier(new)
        registers.keep_above_next_wait(state.total)
        ahead = self._ahead(position, next_key) if self._reads_a_step_ahead else ()
        out = wgmma_sm90.awaited(out)
        self._values_read(work, number, following)
        return Accumulation(softmax.rescaled(out, alpha), softmax.as_operand(p), state, ahead)

    # -- stages ---------------------------------------------------------------------------------

    def _stage(self, step: Any) -> Any:
        return self.kernel.stage(step, self.warpgroup)

    @property
    def _loading(self) -> SelfLoading:
        return SelfLoading(self.kernel, self._copies, self.warpgroup)

    def _values_read(self, work: Work, number: Any, following: Following | None) -> None:
        """Gives away the values of the step before step `number`; without a producer, its keys as well."""
        if following is None:
            previous = self._stage(work.begin + number - 1)
            plgpu.barrier_arrive(self.buffers.value_free.at[previous])
        else:
            self._loading.replace(work, number, following)

    def _raw_scores(self, stage: Any) -> Any:
        """Q K^T of one stage."""
        if self.matrices is None:
            return products_sm90.scores(self._query, self.buffers.key.at[stage])
        query, key, _ = self.matrices
        return wgmma_sm90.awaited(wgmma_sm90.product(query, key.at(stage), transpose_b=True))

    def _issue_products(self, carry: Accumulation, stage: Any, previous: Any) -> tuple[Any, Any]:
        """Issues Q K^T of one stage and adds P V of the previous one; awaits neither."""
        assert self.matrices is not None, "the interpreter awaits every product"
        query, key, value = self.matrices
        scores = wgmma_sm90.product(query, key.at(stage), transpose_b=True)
        plgpu.barrier_wait(self.buffers.value_full.at[previous])
        return scores, wgmma_sm90.product(carry.p, value.at(previous), carry.out)

    def _add_product(self, out: Any, p: Any, stage: Any) -> Any:
        """Adds P V to the output."""
        if self.matrices is None:
            staged = self.buffers.probabilities[0].at[self.warpgroup]
            return products_sm90.add_weighted(out, p, self.buffers.value.at[stage], staged)
        _, _, value = self.matrices
        return wgmma_sm90.awaited(wgmma_sm90.product(p, value.at(stage), out))

    # -- scores ---------------------------------------------------------------------------------

    def _tile_inputs(
        self, scores: Any, position: TilePosition, first_key: Any, masked: bool
    ) -> emit.TileInputs:
        kernel, problem = self.kernel, self.kernel.problem
        kv_tile = kernel.config.kv_tile
        return emit.TileInputs(
            score=scores,
            b=position.b,
            h=position.h,
            q_start=kernel.schedule.on_queries(self._first_query(position)),
            kv_start=kernel.schedule.inside(first_key),
            q_size=WARPGROUP_ROWS,
            kv_size=kv_tile,
            q_limit=problem.q_len,
            # Only masked steps reach over the last key; the others need no clamping.
            kv_limit=problem.kv_len if masked else kv_tile,
            approx_math=kernel.config.approx_math,
            interpret=kernel.config.interpret,
        )

    def _key_after(self, work: Work, number: Any) -> Any:
        """The first key of the step after a step, or of the last. Asked early, the lists have answered in time."""
        if not self._reads_a_step_ahead:
            return None
        return work.steps.first_key(jnp.minimum(number + 1, work.steps.computed - 1))

    def _ahead(self, position: TilePosition, first_key: Any) -> tuple[Any, ...]:
        """What the score_mod reads for the keys of a tile."""
        split = self.kernel.split_scores
        if split is None or split.ahead is None:
            return ()
        tile = self._tile_inputs(None, position, first_key, self.kernel.has_masked_steps)
        values = emit.evaluate_on_tile(split.ahead, self.inputs.score_captures, tile)
        return tuple(x.value for x in values)

    def _scores(
        self, raw: Any, position: TilePosition, first_key: Any, ahead: Any, masked: bool
    ) -> Any:
        """Modified scores of a tile, up to a factor, from the products Q K^T and what `_ahead` read."""
        split, before = self.kernel.split_scores, self.kernel.scores.before
        scores = raw if before == 1.0 else raw * before
        if split is None:
            return scores
        tile = self._tile_inputs(scores, position, first_key, masked)
        tile = dataclasses.replace(tile, given=ahead)
        return emit.on_tile(split.rest, self.inputs.score_captures, tile)[0]

    def _first_query(self, position: TilePosition) -> Any:
        return self.kernel.first_query(position, self.warpgroup)

    def _slope(self, position: TilePosition) -> Any:
        """The slope of a linear bias, in units of log2; None without one."""
        bias = self.kernel.bias
        if bias is None:
            return None
        tile = self._tile_inputs(None, position, jnp.int32(0), masked=False)
        (slope,) = emit.evaluate_on_tile(bias.slope, self.inputs.score_captures, tile)
        return jnp.clip(slope.value * self.kernel.softmax.factor, -bias.most_slope, bias.most_slope)

    def _bias(self, slope: Any, position: TilePosition, first_key: Any) -> Bias | None:
        """The linear bias of a tile."""
        if slope is None:
            return None
        assert self.kernel.bias is not None, "only biases have slopes"
        index = self.kernel.bias.index
        first_key = self.kernel.schedule.inside(first_key)
        corner = index.at(self._first_query(position), first_key)
        return Bias(slope, corner, index.of_q, index.of_kv)

    def _allowed(self, position: TilePosition, first_key: Any) -> _Allowed | None:
        """What the mask allows in a tile; None without a mask."""
        mask = self.kernel.problem.mask
        if mask is None:
            return None
        tile = self._tile_inputs(None, position, first_key, masked=True)
        return _Allowed(*emit.mask_on_tile(mask, self.inputs.mask_captures, tile))

    def _hide(self, scores: Any, allowed: _Allowed | None, first_key: Any) -> Any:
        """Scores with -inf where the mask, or the end of the keys, hides them."""
        if allowed is not None:
            scores = allowed.of(scores)
        if self.kernel.schedule.overhang:
            offset = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=TILE)
            end = self.kernel.problem.kv_len - first_key
            scores = jnp.where(offset < end, scores, -jnp.inf)
        return scores

    # -- results --------------------------------------------------------------------------------

    def _store(self, out: Any, state: State, position: TilePosition, has_keys: Any) -> None:
        """Writes output and statistics of a tile; what lies beyond the last query TMA drops."""
        kernel, config = self.kernel, self.kernel.config
        inverse, lse, maxima = kernel.softmax.finish(state)
        out = out * lax.broadcast_in_dim(inverse, out.shape, [0])
        out = out.astype(kernel.problem.q_dtype)
        if kernel.problem.blocks is not None:
            if config.interpret:
                out = jnp.where(jnp.broadcast_to(has_keys, out.shape), out, jnp.zeros_like(out))
            else:
                out = registers.zero_unless(has_keys, out)
            lse, maxima = (
                jnp.where(jnp.broadcast_to(has_keys, x.shape), x, -jnp.inf) for x in (lse, maxima)
            )
        first = self._first_query(position)
        if self.buffers.out:
            buffer = self.buffers.out[0].at[self.warpgroup]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        else:
            buffer = self._query
        buffer[...] = out
        plgpu.commit_smem()
        where = rows(
            kernel.problem, self.outputs.out, position.b, position.h, first, WARPGROUP_ROWS
        )
        plgpu.copy_smem_to_gmem(buffer, where)
        stats = (position.b, position.h, pl.ds(first, WARPGROUP_ROWS))
        self.outputs.lse[stats] = lse
        for ref in self.outputs.max_scores:
            ref[stats] = maxima
