"""What the parts of the decoding kernel share: static facts, references, shared memory."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from flexjax.backends.mosaic_gpu import packing
from flexjax.backends.mosaic_gpu.config import WARPGROUP_ROWS
from flexjax.backends.mosaic_gpu.decode_plan import Plan, Work
from flexjax.backends.mosaic_gpu.launch_sm90 import barriers, tiles
from flexjax.backends.mosaic_gpu.simplify import Scores, simplify
from flexjax.backends.mosaic_gpu.softmax import LOG2_E, Softmax
from flexjax.mods.graph import Graph


class Inputs(NamedTuple):
    """References to what the kernel reads; `lengths` and `page_table` are empty or one reference.

    `counts`, int32 [tiles] and 0 at the start, tell how many segments of a tile are written; empty in the
    interpreter.
    """

    query: Any
    key: Any
    value: Any
    work: Work
    lengths: tuple[Any, ...]
    page_table: tuple[Any, ...]
    score_captures: tuple[Any, ...]
    mask_captures: tuple[Any, ...]
    counts: tuple[Any, ...]


class Segments(NamedTuple):
    """What CTAs write: for each segment float32 out [rows, Dv], reference and total [64] of its softmax."""

    out: Any
    reference: Any
    total: Any


class Results(NamedTuple):
    """The results, of rows of tiles: out [n, rows, Dv], statistics [n, rows up to a multiple of 64]."""

    out: Any
    lse: Any
    max_scores: tuple[Any, ...]


class Outputs(NamedTuple):
    """References to what the kernel writes."""

    results: Results
    segments: Segments


class Buffers(NamedTuple):
    """Shared memory and barriers.

    Attributes:
        query: [64, D].
        key, value: [stages, kv_tile, D or Dv].
        probabilities: [64, kv_tile] in the interpreter, or empty.
        key_full, value_full: one barrier a stage.
        key_free, value_free, query_free: all warps have read.
    """

    query: Any
    key: Any
    value: Any
    probabilities: tuple[Any, ...]
    key_full: Any
    value_full: Any
    key_free: Any
    value_free: Any
    query_free: Any


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is static about the kernel of a plan."""

    plan: Plan

    @property
    def softmax(self) -> Softmax:
        return Softmax(
            factor=LOG2_E * self.scores.after,
            dtype=self.plan.problem.q_dtype,
            maxima=self.plan.problem.max_scores,
            trust=False,
            interpret=self.plan.config.interpret,
        )

    @property
    def scores(self) -> Scores:
        """How scores come from the products of queries and keys, on packed rows."""
        score = self.plan.problem.score
        scores = simplify(None if score is None else score.forward, self.plan.problem.scale)
        if scores.graph is None:
            return scores
        return dataclasses.replace(scores, graph=packing.packed(scores.graph, self.plan.rows))

    @property
    def mask(self) -> Graph | None:
        """The mask on packed rows; None where it holds nothing but the lengths, which the kernel knows."""
        problem = self.plan.problem
        if problem.mask is None or (problem.decoding is not None and problem.decoding.bare):
            return None
        return packing.packed(problem.mask, self.plan.rows)

    @property
    def limits(self) -> bool:
        """Whether the kernel itself hides keys past the end."""
        problem = self.plan.problem
        if self.mask is None:
            return problem.decoding is not None or problem.kv_len % self.plan.config.kv_tile != 0
        # A mask of a decoding step knows the lengths, but not that a block may stick out of the cache.
        return problem.kv_len % self.plan.kv_block != 0

    def buffers(self, dim: int, v_dim: int) -> Buffers:
        config, dtype = self.plan.config, self.plan.problem.q_dtype
        pieces = self.pieces
        return Buffers(
            query=tiles(dtype, WARPGROUP_ROWS, dim),
            key=tiles(dtype, config.stages, config.kv_tile, dim),
            value=tiles(dtype, config.stages, config.kv_tile, v_dim),
            probabilities=(tiles(dtype, WARPGROUP_ROWS, config.kv_tile),)
            if config.interpret
            else (),
            key_full=barriers(config.stages, pieces),
            value_full=barriers(config.stages, pieces),
            key_free=barriers(1),
            value_free=barriers(1),
            query_free=barriers(1),
        )

    @property
    def pieces(self) -> int:
        """Copies that a tile of keys takes: one, or one a page."""
        decoding, kv_tile = self.plan.problem.decoding, self.plan.config.kv_tile
        page = None if decoding is None else decoding.page_size
        return 1 if page is None or page >= kv_tile else kv_tile // page
