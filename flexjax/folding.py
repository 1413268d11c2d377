"""vmap of an attention: the mapped axis is folded into the batch, row n * B + b.

Mods see the row b that the user meant (`mods/transform.py`), arrays that they captured per lane gain a leading
axis, and what is shared by all lanes is not copied unless a gradient for every lane is wanted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flexjax.mods.ops import is_float
from flexjax.mods.trace import index_ranges
from flexjax.mods.transform import fold_batch, rewrite_graph, rewrite_score_mod
from flexjax.problem import Operands, Problem


def front(x: Any, dim: int | None, size: int) -> Any:
    """The mapped axis in front; an unmapped array is repeated along it."""
    return jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)


def fold_axis(x: Any, dim: int | None, size: int) -> Any:
    """The mapped axis folded into the first one."""
    x = front(x, dim, size)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def unfold(x: Any, size: int) -> Any:
    """Undoes `fold_axis`, with the mapped axis in front."""
    return x.reshape(size, x.shape[0] // size, *x.shape[1:])


def fold_operands(
    problem: Problem, operands: Operands, axes: Operands, size: int, shared: bool
) -> tuple[Problem, Operands]:
    """Folds a mapped axis of length `size` into the batch.

    Args:
        problem: the attention of one lane.
        operands: of all lanes.
        axes: for each array of `operands` the mapped axis, or -1.
        size: number of lanes.
        shared: leave what no lane has of its own unrepeated; wrong where gradients of every lane are wanted.
    """

    def mapped(*names: Any) -> bool:
        return any(d >= 0 for d in jax.tree.leaves(names))

    def fold(x: Any, d: int) -> Any:
        return fold_axis(x, None if d < 0 else d, size)

    key, value, page_table = operands.key, operands.value, operands.page_table
    paged = page_table is not None
    own_keys = paged or mapped(axes.key, axes.value) or problem.kv_batch > 1 or not shared
    if paged:
        key, value, page_table = _fold_pages(size, operands, axes)
    elif own_keys:
        key, value = fold(key, axes.key), fold(value, axes.value)
    lists, blocks = operands.lists, problem.blocks
    if blocks is not None and (mapped(axes.lists) or blocks.batch > 1):
        lists = jax.tree.map(fold, lists, axes.lists)
        blocks = dataclasses.replace(blocks, batch=blocks.batch * size)
    batch = problem.batch * size
    ranges = index_ranges(batch, problem.q_heads, problem.q_len, problem.kv_len)

    def fold_captures(values: Sequence[Any], dims: Sequence[int]) -> tuple[list[bool], list[Any]]:
        leading = [
            d >= 0 or (not shared and is_float(v.dtype)) for v, d in zip(values, dims, strict=True)
        ]
        arrays = [
            front(v, None if d < 0 else d, size) if lead else v
            for v, d, lead in zip(values, dims, leading, strict=True)
        ]
        return leading, arrays

    score, mask = problem.score, problem.mask
    score_leading, score_captures = fold_captures(operands.score_captures, axes.score_captures)
    mask_leading, mask_captures = fold_captures(operands.mask_captures, axes.mask_captures)
    if score is not None:
        rewrite = fold_batch(ranges, problem.batch, size, score_leading)
        score = rewrite_score_mod(score, rewrite)
    if mask is not None:
        mask = rewrite_graph(mask, fold_batch(ranges, problem.batch, size, mask_leading))
    problem = dataclasses.replace(
        problem,
        batch=batch,
        kv_batch=problem.kv_batch * size if own_keys else problem.kv_batch,
        score=score,
        mask=mask,
        blocks=blocks,
    )
    folded = Operands(
        fold(operands.query, axes.query),
        key,
        value,
        lists,
        tuple(score_captures),
        tuple(mask_captures),
        None if operands.lengths is None else fold(operands.lengths, axes.lengths),
        page_table,
    )
    return problem, folded


def _fold_pages(size: int, operands: Operands, axes: Operands) -> tuple[Any, Any, Any]:
    """Pools and page table of all lanes: pools that lanes have of their own are put behind one another."""
    table = front(operands.page_table, None if axes.page_table < 0 else axes.page_table, size)
    key, value = operands.key, operands.value
    if axes.key >= 0 or axes.value >= 0:
        key, value = (
            jnp.moveaxis(front(x, None if d < 0 else d, size), 0, 1)
            for x, d in ((key, axes.key), (value, axes.value))
        )
        pages = key.shape[2]
        lane = jnp.arange(size, dtype=jnp.int32)[:, None, None]
        table = jnp.clip(table, 0, pages - 1) + lane * pages
        key, value = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (key, value))
    return key, value, table.reshape(-1, table.shape[-1])
