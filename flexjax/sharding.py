"""Attention of arrays whose sharding is part of their type (meshes with explicit axes).

Batch rows and heads are independent, so each device computes its own, inside `jax.shard_map`; block lists that
distinguish rows or heads are split alike, captured arrays are replicated. Mods keep seeing global indices: the
shard's place is added to b and h. A sharded sequence would need communication inside the softmax and is refused.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from flexjax.autodiff import attend
from flexjax.backends.registry import Choice
from flexjax.mods.graph import CaptureType
from flexjax.mods.trace import index_ranges
from flexjax.mods.transform import Rewrite, rewrite_graph, rewrite_score_mod
from flexjax.problem import BLHD, Operands, Problem, Result

Axes = tuple[str, ...]


def attend_sharded(problem: Problem, choice: Choice, operands: Operands) -> Result:
    """`attend`, split over the mesh axes that the query's type names."""
    rows, heads = _split(operands.query, "query", problem.layout)
    if not rows and not heads:
        return attend(problem, choice, operands)
    if operands.page_table is not None:
        raise ValueError(
            f"The query is sharded as {_spec(operands.query)}, but a paged cache is split over a mesh by hand. "
            "Call flexjax.decode inside jax.shard_map, with the pools' heads and the table's rows of the shard."
        )
    for name, x in (("key", operands.key), ("value", operands.value)):
        wanted = (rows if problem.kv_batch > 1 else (), heads)
        if _split(x, name, problem.layout) != wanted:
            raise ValueError(
                f"The query is sharded as {_spec(operands.query)}, but {name} as {_spec(x)}. Batch and heads must "
                f"be sharded alike: use jax.reshard({name}, ...). Heads of grouped queries are split with their "
                "key heads."
            )
    mesh = jax.typeof(operands.query).sharding.mesh
    n_rows, n_heads = (int(np.prod([mesh.shape[a] for a in axes])) for axes in (rows, heads))
    local = _local(problem, n_rows, n_heads)
    specs = _operand_specs(problem, operands, rows, heads)
    placed = jax.tree.map(jax.reshard, operands, specs)

    def run(operands: Operands) -> Result:
        offsets = (
            _shard_index(rows) * jnp.int32(local.batch),
            _shard_index(heads) * jnp.int32(local.q_heads),
        )
        operands = dataclasses.replace(
            operands,
            score_captures=operands.score_captures + (offsets if local.score else ()),
            mask_captures=operands.mask_captures + (offsets if local.mask else ()),
        )
        return attend(local, choice, operands)

    stats = PartitionSpec(rows or None, heads or None)
    out_specs = Result(specs.query, stats, stats if problem.max_scores else None)
    return jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=out_specs)(placed)


def replicated(x: Any) -> Any:
    """The array with all of it on every device, if its type says that it is not so already."""
    return jax.reshard(x, PartitionSpec()) if any(map(_axes, _spec(x))) else x


def _spec(x: Any) -> PartitionSpec:
    return jax.typeof(x).sharding.spec


def _split(x: Any, name: str, layout: str) -> tuple[Axes, Axes]:
    """Mesh axes of (batch, heads); an error if anything else is sharded."""
    parts = [_axes(p) for p in _spec(x)] + [()] * (x.ndim - len(_spec(x)))
    batch, heads, length, dim = (
        (parts[0], parts[2], parts[1], parts[3]) if layout == BLHD else parts
    )
    if length or dim:
        raise ValueError(
            f"{name} of shape {x.shape} is sharded along its sequence or head dimension ({_spec(x)}). Only batch "
            "and heads can be sharded; gather the rest first with jax.reshard."
        )
    return batch, heads


def _axes(part: Any) -> Axes:
    if part is None or part is PartitionSpec.UNCONSTRAINED:
        return ()
    return part if isinstance(part, tuple) else (part,)


def _shard_index(axes: Axes) -> Any:
    return jax.lax.axis_index(axes).astype(jnp.int32) if axes else jnp.int32(0)


def _local(problem: Problem, n_rows: int, n_heads: int) -> Problem:
    """The problem of one shard; its mods read their place in the whole from two more captures."""
    batch, q_heads = problem.batch // n_rows, problem.q_heads // n_heads
    ranges = index_ranges(batch, q_heads, problem.q_len, problem.kv_len)
    rewrite = Rewrite(
        ranges,
        extra=(CaptureType((), np.dtype("int32")),) * 2,
        inputs={
            "b": lambda builder, b, extra: builder.apply(
                "add", (b, builder.load(extra[0], (), np.int32, (0, problem.batch - batch)))
            ),
            "h": lambda builder, h, extra: builder.apply(
                "add", (h, builder.load(extra[1], (), np.int32, (0, problem.q_heads - q_heads)))
            ),
        },
        inputs_jax={
            "b": lambda b, extra: b + extra[0],
            "h": lambda h, extra: h + extra[1],
        },
    )
    blocks = problem.blocks
    if blocks is not None:
        blocks = dataclasses.replace(
            blocks,
            batch=blocks.batch // n_rows if blocks.batch > 1 else 1,
            heads=blocks.heads // n_heads if blocks.heads > 1 else 1,
        )
    return dataclasses.replace(
        problem,
        batch=batch,
        kv_batch=problem.kv_batch // n_rows if problem.kv_batch > 1 else 1,
        q_heads=q_heads,
        kv_heads=problem.kv_heads // n_heads,
        score=None if problem.score is None else rewrite_score_mod(problem.score, rewrite),
        mask=None if problem.mask is None else rewrite_graph(problem.mask, rewrite),
        blocks=blocks,
    )


def _operand_specs(problem: Problem, operands: Operands, rows: Axes, heads: Axes) -> Operands:
    def of(batch: Axes, heads: Axes) -> PartitionSpec:
        parts = (batch or None, heads or None)
        return (
            PartitionSpec(parts[0], None, parts[1])
            if problem.layout == BLHD
            else PartitionSpec(*parts)
        )

    keys = of(rows if problem.kv_batch > 1 else (), heads)
    replicated = jax.tree.map(lambda _: PartitionSpec(), operands)
    lists = replicated.lists
    if problem.blocks is not None:
        by_row = rows if problem.blocks.batch > 1 else ()
        by_head = heads if problem.blocks.heads > 1 else ()
        split = PartitionSpec(by_row or None, by_head or None)
        lists = jax.tree.map(lambda _: split, operands.lists)
    lengths = None if operands.lengths is None else PartitionSpec(rows or None)
    return dataclasses.replace(
        replicated, query=of(rows, heads), key=keys, value=keys, lists=lists, lengths=lengths
    )
