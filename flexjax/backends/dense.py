"""The `reference` backend: the dense specification applied to a problem, and differentiated by JAX."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flexjax.backends.contiguous import contiguous, with_decoding
from flexjax.backends.reference import ScoreFn, dense_attention
from flexjax.block_lists import blocks_from_lists
from flexjax.mods.evaluate import evaluate
from flexjax.mods.pullback import score_pullback, zero_totals
from flexjax.problem import Blocks, Gradients, Operands, Problem, Result, heads_first

NAME = "reference"
OPTIONS: dict[str, type] = {}


def check(problem: Problem) -> None:
    """The reference computes every problem that fits in memory."""


def forward(problem: Problem, operands: Operands) -> Result:
    """Output, logsumexp and row maxima, from the whole score matrix."""
    problem, operands = contiguous(problem, operands)

    def score(s: Any) -> Any:
        assert problem.score is not None, "only called with a score_mod"
        (y,) = evaluate(problem.score.forward, operands.score_captures, _inputs(problem, s))
        return jnp.broadcast_to(y, s.shape)

    return _attend(problem, operands, None if problem.score is None else score)


@with_decoding
def backward(
    problem: Problem, operands: Operands, result: Result, d_out: Any, d_lse: Any
) -> Gradients:
    """Gradients by JAX's own differentiation of the dense computation; the mod's derivative is the IR's."""
    captures, blocks = operands.score_captures, problem.blocks
    allowed = None if blocks is None else _mask(problem, operands)

    @jax.custom_vjp
    def score(s: Any, totals: tuple[Any, ...]) -> Any:
        return score_fwd(s, totals)[0]

    def score_fwd(s: Any, totals: tuple[Any, ...]) -> tuple[Any, Any]:
        y, _ = score_pullback(problem.score, captures, _inputs(problem, s))
        return jnp.broadcast_to(y, s.shape).astype(s.dtype), (s, totals)

    def score_bwd(residuals: Any, dy: Any) -> tuple[Any, Any]:
        s, totals = residuals
        y, pull = score_pullback(problem.score, captures, _inputs(problem, s))
        counts = jnp.broadcast_to(y > -jnp.inf, s.shape)
        return pull(dy, counts if allowed is None else counts & allowed, totals)

    score.defvjp(score_fwd, score_bwd)

    def run(query: Any, key: Any, value: Any, totals: tuple[Any, ...]) -> tuple[Any, Any]:
        given = dataclasses.replace(operands, query=query, key=key, value=value)
        result = _attend(problem, given, lambda s: score(s, totals))
        return result.out, result.lse

    # The cotangent of these zeros is what the captures' gradients are summed up in.
    totals = zero_totals(captures)
    _, vjp = jax.vjp(run, operands.query, operands.key, operands.value, totals)
    dq, dk, dv, d_captures = vjp((d_out, d_lse))
    d_captures = tuple(
        None if d is None else d.astype(c.dtype) for d, c in zip(d_captures, captures, strict=True)
    )
    return Gradients(dq, dk, dv, d_captures)


def _attend(problem: Problem, operands: Operands, score: ScoreFn | None) -> Result:
    query, key, value = (
        heads_first(x, problem.layout) for x in (operands.query, operands.key, operands.value)
    )
    repeats = problem.batch // problem.kv_batch
    key, value = (jnp.repeat(x, repeats, axis=0) for x in (key, value))
    mask = _mask(problem, operands)
    out, lse, m = dense_attention(query, key, value, problem.scale, score, mask)
    return Result(heads_first(out, problem.layout), lse, m if problem.max_scores else None)


def _inputs(problem: Problem, scores: Any) -> dict[str, Any]:
    return _indices(problem) | {"score": scores.astype(jnp.float32)}


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


def _mask(problem: Problem, operands: Operands) -> Any:
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
    (allowed,) = evaluate(problem.mask, operands.mask_captures, _indices(problem))
    return full | (partial & allowed)


def _by_element(problem: Problem, blocks: Blocks, block_map: Any) -> Any:
    geometry = blocks.geometry
    x = jnp.repeat(block_map, problem.batch // blocks.batch, axis=0)
    x = jnp.repeat(x, geometry.q_block, axis=2)[:, :, : geometry.q_len]
    return jnp.repeat(x, geometry.kv_block, axis=3)[:, :, :, : geometry.kv_len]
