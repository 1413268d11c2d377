"""What the producer and the consumers of the backward kernel share: static facts, references, shared memory."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu import backward_config as configs
from flexjax.backends.mosaic_gpu import capture_gradients
from flexjax.backends.mosaic_gpu.backward_config import BackwardConfig
from flexjax.backends.mosaic_gpu.backward_schedule import ColumnSchedule
from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS
from flexjax.backends.mosaic_gpu.launch_sm90 import barriers, tiles
from flexjax.backends.mosaic_gpu.tile_gradients import TileGradients
from flexjax.problem import Problem


class Inputs(NamedTuple):
    """References to what the kernel reads, and to the float32 sums that it adds to.

    Attributes:
        query, key, value, d_out: in the problem's layout.
        lse, delta: [B, Hq, padded queries]; the logsumexp in units of log2, +inf in rows that do not count, and
            D of the derivation.
        lists: the transposed block lists.
        score_captures, mask_captures: what the mods read.
        dq: dQ without the scale, of the rows of `Kernel.row_of`, as dq_tiles.py has it; empty where another kernel
            computes it. In the interpreter [tiles of keys, rows, D]. Persistent CTAs have counters behind it, see
            dq_rounder_sm90.py.
        sums: one flat array for every load whose gradient is added in global memory.
        turns: int32, how many columns have added to a warpgroup's share of a tile of dQ, flat: see
            dq_adder_sm90.py; empty where columns do not wait for each other.
    """

    query: Any
    key: Any
    value: Any
    d_out: Any
    lse: Any
    delta: Any
    lists: tuple[Any, ...]
    score_captures: tuple[Any, ...]
    mask_captures: tuple[Any, ...]
    dq: tuple[Any, ...]
    sums: tuple[Any, ...]
    turns: tuple[Any, ...]


class Outputs(NamedTuple):
    """References to what the kernel writes.

    Attributes:
        dk, dv: in the problem's layout.
        key_sums: [B, Hq, padded keys] for every load of kind KEYS.
        dq: in the problem's layout, where CTAs round it; or empty.
    """

    dk: Any
    dv: Any
    key_sums: tuple[Any, ...]
    dq: tuple[Any, ...] = ()


class Buffers(NamedTuple):
    """Shared memory and barriers.

    Attributes:
        key, value: [slots, 64, D or Dv].
        query, d_out: [stages, q_tile, D or Dv].
        lse, delta: [stages, q_tile].
        q_number: int32 [stages], which tile of queries a stage holds.
        dq_row: first row of dQ of the last steps, [`Kernel.dq_rows`]; int32, or empty.
        ds: [2, slots, 64, q_tile].
        dq: every warpgroup's share of a tile of dQ, flat; float32.
        p: [slots, 64, q_tile] in the interpreter, or empty.
        results: dK or dV, [slots, 64, D], or empty: they then take the place of K and V.
        column: int32 [2] or empty: the column's number, or -1 behind the last; and a cell of the producer's.
        key_value_full: one barrier.
        key_value_free: one barrier, or empty.
        query_full, d_out_full: one barrier a stage.
        query_free, d_out_free: one barrier a stage; a single one where the consumer itself loads.
        ds_full: one barrier at which the consumers meet.
    """

    key: Any
    value: Any
    query: Any
    d_out: Any
    lse: Any
    delta: Any
    q_number: Any
    dq_row: tuple[Any, ...]
    ds: Any
    dq: tuple[Any, ...]
    p: tuple[Any, ...]
    results: tuple[Any, ...]
    column: tuple[Any, ...]
    key_value_full: Any
    key_value_free: tuple[Any, ...]
    query_full: Any
    query_free: Any
    d_out_full: Any
    d_out_free: Any
    ds_full: Any


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The kernel of a problem under a schedule."""

    schedule: ColumnSchedule

    @property
    def problem(self) -> Problem:
        return self.schedule.problem

    @property
    def config(self) -> BackwardConfig:
        return self.schedule.config

    @property
    def parts(self) -> tuple[configs.Part, ...]:
        """The warpgroups' shares of dQ; empty where another kernel computes it."""
        if self.config.separate_dq:
            return ()
        return configs.parts(self.config, configs.padded_dim(self.problem.qk_dim))

    @functools.cached_property
    def loads(self) -> tuple[capture_gradients.Load, ...]:
        """The captured elements whose gradients are summed here."""
        loads = capture_gradients.loads_of(self.problem)
        if not self.config.separate_dq:
            return loads
        return tuple(load for load in loads if load.kind == capture_gradients.KEYS)

    @property
    def tile(self) -> TileGradients:
        config, schedule = self.config, self.schedule
        return TileGradients(
            problem=self.problem,
            q_size=config.q_tile,
            kv_size=WARPGROUP_ROWS,
            padded_queries=schedule.padded_queries,
            padded_keys=schedule.padded_keys,
            transposed=True,
            queries_overhang=schedule.queries_overhang,
            keys_overhang=schedule.keys_overhang,
            approx_math=config.approx_math,
            interpret=config.interpret,
        )

    def buffers(self) -> Buffers:
        config, dtype = self.config, self.problem.q_dtype
        dim, v_dim = (configs.padded_dim(d) for d in (self.problem.qk_dim, self.problem.v_dim))
        n, stages, q_tile = config.warpgroups, config.stages, config.q_tile
        slots, freed = config.key_slots, 1 if config.self_loading else stages
        stats = plgpu.SMEM((stages, q_tile), jnp.float32)
        # Both operands of a matrix product must be swizzled alike: K and Q, dS and K.
        swizzle = configs.key_swizzle(config, dim)
        return Buffers(
            key=tiles(dtype, slots, WARPGROUP_ROWS, dim, swizzle=swizzle),
            value=tiles(dtype, slots, WARPGROUP_ROWS, v_dim),
            query=tiles(dtype, stages, q_tile, dim, swizzle=swizzle),
            d_out=tiles(dtype, stages, q_tile, v_dim),
            lse=stats,
            delta=stats,
            q_number=plgpu.SMEM((stages,), jnp.int32),
            dq_row=(plgpu.SMEM((self.dq_rows,), jnp.int32),) if config.deferred else (),
            ds=tiles(dtype, configs.DS_STAGES, slots, WARPGROUP_ROWS, q_tile, swizzle=swizzle),
            dq=tuple(self._dq_buffer(p) for p in self.parts if p.columns),
            p=(tiles(dtype, slots, WARPGROUP_ROWS, q_tile),) if config.interpret else (),
            results=self._results(dtype),
            column=(plgpu.SMEM((2,), jnp.int32),) if config.persistent else (),
            key_value_full=barriers(1, 2 * slots),
            key_value_free=(barriers(1, n),) if config.persistent else (),
            query_full=barriers(stages, 2),
            query_free=barriers(freed, n),
            d_out_full=barriers(stages, 2),
            d_out_free=barriers(freed, n),
            ds_full=barriers(1, n),
        )

    def _results(self, dtype: Any) -> tuple[Any, ...]:
        if not self.config.persistent:
            return ()
        dim = configs.padded_dim(self.problem.qk_dim)
        return (tiles(dtype, self.config.key_slots, WARPGROUP_ROWS, dim),)

    def _dq_buffer(self, part: configs.Part) -> Any:
        if self.config.interpret:
            return tiles(jnp.float32, part.rows, part.columns)
        return plgpu.SMEM((part.rows * part.columns,), jnp.float32)

    def row_of(self, b: Any, h: Any, query: Any) -> Any:
        """Row of dQ: those of all heads and batch rows lie one after another."""
        return (b * self.problem.q_heads + h) * self.schedule.padded_queries + query

    @property
    def rows(self) -> int:
        """Rows of dQ, see `row_of`."""
        return self.problem.batch * self.problem.q_heads * self.schedule.padded_queries

    @property
    def taken(self) -> int:
        """Where, behind the sums of dQ, it is counted how many columns persistent CTAs have taken."""
        return self.rows * configs.padded_dim(self.problem.qk_dim)

    @property
    def finished(self) -> int:
        """Where it is counted which columns of `schedule.heads` heads have added all that they have to dQ."""
        return self.taken + 1

    @property
    def turns(self) -> int:
        """How many shares of tiles of dQ there are."""
        return self.rows // self.config.q_tile * len(self.parts)

    @property
    def dq_rows(self) -> int:
        """How many steps' rows of dQ are kept: also that of the step before those in flight."""
        return self.config.stages + 2

    def stage(self, step: Any) -> Any:
        """The stage of a step, counted over all steps of the CTA."""
        return lax.rem(step, jnp.int32(self.config.stages))
