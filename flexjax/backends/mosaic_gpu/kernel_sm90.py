"""What the producer and the consumers of the forward kernel share: static facts, references, shared memory."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu import config as configs
from flexjax.backends.mosaic_gpu import keys_ahead
from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS, Config
from flexjax.backends.mosaic_gpu.keys_ahead import Split
from flexjax.backends.mosaic_gpu.launch_sm90 import barriers, tiles
from flexjax.backends.mosaic_gpu.linear_bias import LinearBias, linear_bias
from flexjax.backends.mosaic_gpu.schedule import Schedule, TilePosition
from flexjax.backends.mosaic_gpu.simplify import Scores, simplify
from flexjax.backends.mosaic_gpu.softmax import LOG2_E, Softmax
from flexjax.problem import Problem


class Inputs(NamedTuple):
    """References to what the kernel reads; `taken` is empty or a counter of tiles, which it writes."""

    query: Any
    key: Any
    value: Any
    lists: tuple[Any, ...]
    score_captures: tuple[Any, ...]
    mask_captures: tuple[Any, ...]
    taken: tuple[Any, ...] = ()


class Outputs(NamedTuple):
    """References to what the kernel writes; `max_scores` is empty or one reference."""

    out: Any
    lse: Any
    max_scores: tuple[Any, ...]


class Buffers(NamedTuple):
    """Shared memory and barriers.

    Attributes:
        query: [consumers, 64, D].
        key, value: [stages, kv_tile, D or Dv]; consumers that load by themselves have stages of their own.
        out: [consumers, 64, Dv], or empty where the output takes the queries' place.
        probabilities: [consumers, 64, kv_tile] in the interpreter, or empty.
        kv_number: int32 [stages], which tile of keys a stage holds; empty without block lists.
        tile: int32 [2], the tile that was taken from the counter, and a place to take it to; empty without one.
        query_full, query_free: one barrier a consumer.
        key_full, value_full, key_free, value_free: one barrier a stage.

    With a producer only, somebody waits for what is free.
    """

    query: Any
    key: Any
    value: Any
    out: tuple[Any, ...]
    probabilities: tuple[Any, ...]
    kv_number: tuple[Any, ...]
    tile: tuple[Any, ...]
    query_full: Any
    query_free: Any
    key_full: Any
    key_free: Any
    value_full: Any
    value_free: Any


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The kernel of a problem under a schedule."""

    schedule: Schedule

    @property
    def problem(self) -> Problem:
        return self.schedule.problem

    @property
    def config(self) -> Config:
        return self.schedule.config

    @property
    def softmax(self) -> Softmax:
        problem, config = self.problem, self.config
        return Softmax(
            factor=LOG2_E * self.scores.after,
            dtype=problem.q_dtype,
            maxima=problem.max_scores,
            trust=config.trust_maximum,
            interpret=config.interpret,
        )

    @property
    def scores(self) -> Scores:
        """How scores come from the products of queries and keys."""
        score = self.problem.score
        return simplify(None if score is None else score.forward, self.problem.scale)

    @property
    def split_scores(self) -> Split | None:
        """The graph of `scores`, split into what is read ahead and the rest; None where there is no need of it."""
        graph, config = self.scores.graph, self.config
        if graph is None:
            return None
        return keys_ahead.split(graph, configs.values_ahead(self.problem, config))

    @property
    def bias(self) -> LinearBias | None:
        """What the score_mod adds, where that happens in the exponents of the softmax."""
        if not self.softmax.trusts:
            return None
        schedule, config = self.schedule, self.config
        q_len, kv_len = schedule.q_tiles * config.q_tile, schedule.kv_tiles * config.kv_tile
        return linear_bias(self.scores, q_len, kv_len)

    @property
    def has_masked_steps(self) -> bool:
        return self.problem.mask is not None or self.schedule.overhang

    def buffers(self, dim: int, v_dim: int) -> tuple[Any, ...]:
        config, dtype = self.config, self.problem.q_dtype
        n, stages = config.warpgroups * config.workers, config.stages * config.workers
        kv_tile = config.kv_tile
        own_out = configs.own_output_buffer(self.problem, config.persistent)
        return Buffers(
            query=tiles(dtype, n, WARPGROUP_ROWS, dim),
            key=tiles(dtype, stages, kv_tile, dim),
            value=tiles(dtype, stages, kv_tile, v_dim),
            out=(tiles(dtype, n, WARPGROUP_ROWS, v_dim),) if own_out else (),
            probabilities=(tiles(dtype, n, WARPGROUP_ROWS, kv_tile),) if config.interpret else (),
            kv_number=(plgpu.SMEM((stages,), jnp.int32),) if self.problem.blocks else (),
            tile=(plgpu.SMEM((2,), jnp.int32),) if self.schedule.counted else (),
            query_full=barriers(n),
            query_free=barriers(n),
            key_full=barriers(stages),
            key_free=barriers(stages, n),
            value_full=barriers(stages),
            value_free=barriers(stages, n),
        )

    def stage(self, step: Any, consumer: Any = 0) -> Any:
        """The stage of a step, counted over all tiles of the CTA, or of a consumer that loads by itself."""
        stages = self.config.stages
        if self.config.self_loading and stages & (stages - 1) == 0:
            # The compiler does not know that steps are not negative, which makes remainders dear.
            stage = step & (stages - 1)
        else:
            stage = lax.rem(step, jnp.int32(stages))
        return stage if self.config.workers == 1 else consumer * stages + stage

    def first_query(self, position: TilePosition, consumer: Any) -> Any:
        """The first of a consumer's 64 queries of a tile."""
        part = 0 if self.config.self_loading else consumer
        return position.q * self.config.q_tile + part * WARPGROUP_ROWS
