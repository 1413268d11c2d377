"""The `reference` backend: the dense specification applied to a problem, and differentiated by JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flexjax.backends.reference import dense_attention
from flexjax.block_lists import blocks_from_lists
from flexjax.mods.evaluate import evaluate
from flexjax.mods.ops import is_float
from flexjax.problem import Blocks, Gradients, Operands, Problem, Result, heads_first

NAME = "reference"
OPTIONS: dict[str, type] = {}


def check(problem: Problem) -> None:
    """The reference computes every problem that fits in memory."""


def forward(problem: Problem, operands: Operands) -> Result:
    """Output, logsumexp and row maxima, from the whole score matrix."""
    query, key, value = (
        heads_first(x, problem.layout) for x in (operands.query, operands.key, operands.value)
    )
    repeats = problem.batch // problem.kv_batch
    key, value = (jnp.repeat(x, repeats, axis=0) for x in (key, value))
    indices = _indices(problem)
    score = None
    if problem.score is not None:

        def score(s: Any) -> Any:
            inputs = indices | {"score": s.astype(jnp.float32)}
            (y,) = evaluate(problem.score.forward, operands.score_captures, inputs)
            return jnp.broadcast_to(y, s.shape)

    mask = _mask(problem, operands, indices)
    out, lse, m = dense_attention(query, key, value, problem.scale, score, mask)
    return Result(heads_first(out, problem.layout), lse, m if problem.max_scores else None)


def backward(
    problem: Problem, operands: Operands, result: Result, d_out: Any, d_lse: Any
) -> Gradients:
    """Gradients by JAX's own differentiation of the dense computation."""
    captures = operands.score_captures
    diff = [i for i, c in enumerate(captures) if is_float(c.dtype)]

    def run(query: Any, key: Any, value: Any, floats: list[Any]) -> tuple[Any, Any]:
        merged = list(captures)
        for i, c in zip(diff, floats, strict=True):
            merged[i] = c
        parts = (query, key, value, operands.lists, tuple(merged), operands.mask_captures)
        result = forward(problem, Operands(*parts))
        return result.out, result.lse

    primals = (operands.query, operands.key, operands.value, [captures[i] for i in diff])
    _, vjp = jax.vjp(run, *primals)
    dq, dk, dv, d_floats = vjp((d_out, d_lse))
    d_captures: list[Any] = [None] * len(captures)
    for i, d in zip(diff, d_floats, strict=True):
        d_captures[i] = d
    return Gradients(dq, dk, dv, tuple(d_captures))


def _indices(problem: Problem) -> dict[str, Any]:
    sizes = {
        "b": problem.batch,
        "h": problem.q_heads,
        "q": problem.q_len,
        "kv": problem.kv_len,
    }
    return {
        name: jnp.arange(n, dtype=jnp.int32).reshape([n if i == axis else 1 for i in range(4)])
        for axis, (name, n) in enumerate(sizes.items())
    }


def _mask(problem: Problem, operands: Operands, indices: dict[str, Any]) -> Any:
    """Positions in full blocks, and those that the mask allows in partial ones."""
    blocks, lists = problem.blocks, operands.lists
    if blocks is None or lists is None:
        return None
    cols = blocks.geometry.cols
    partial = blocks_from_lists(lists.kv_num_blocks, lists.kv_indices, cols)
    full = blocks_from_lists(lists.full_kv_num_blocks, lists.full_kv_indices, cols)
    partial, full = (_by_element(problem, blocks, x) for x in (partial, full))
    if problem.mask is None:
        return partial | full
    (allowed,) = evaluate(problem.mask, operands.mask_captures, indices)
    return full | (partial & allowed)


def _by_element(problem: Problem, blocks: Blocks, block_map: Any) -> Any:
    geometry = blocks.geometry
    x = jnp.repeat(block_map, problem.batch // blocks.batch, axis=0)
    x = jnp.repeat(x, geometry.q_block, axis=2)[:, :, : geometry.q_len]
    return jnp.repeat(x, geometry.kv_block, axis=3)[:, :, :, : geometry.kv_len]
