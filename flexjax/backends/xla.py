"""Blockwise attention in plain JAX: runs wherever XLA does, visits only the listed blocks.

Rows of query blocks are taken in groups of `lanes`; within a group the listed key blocks are visited one
after another with an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; FlashAttention,
arXiv:2205.14135). Heads whose masks are the same share one visit. Memory beyond inputs and outputs is one
tile of scores for every head and lane.

Trip counts of the inner loop come from the block lists, so it is a while loop, which JAX differentiates
forwards only. With `differentiable=True` it becomes a scan of fixed length that skips what is not listed:
the form that second derivatives and linearisation use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flexjax import _compat
from flexjax.backends.contiguous import contiguous, with_decoding
from flexjax.backends.xla_tiles import Block, Plan, Tile
from flexjax.mods.pullback import zero_totals
from flexjax.problem import Gradients, Operands, Problem, Result, heads_first

NAME = "xla"
OPTIONS = {"lanes": int}


def check(problem: Problem) -> None:
    """The xla backend computes every problem."""


def forward(problem: Problem, operands: Operands, *, differentiable: bool = False) -> Result:
    """Attention output, logsumexp and, if wanted, row maxima."""
    problem, operands = contiguous(problem, operands)
    return _forward(problem, operands, _lanes(problem), differentiable)


@with_decoding
def backward(
    problem: Problem,
    operands: Operands,
    result: Result,
    d_out: Any,
    d_lse: Any,
    *,
    differentiable: bool = False,
) -> Gradients:
    """Gradients of query, key, value and the float arrays that score_mod captured."""
    return _backward(problem, operands, result, d_out, d_lse, _lanes(problem), differentiable)


def _lanes(problem: Problem) -> int:
    """A CPU does best with one row of blocks at a time, an accelerator with many."""
    return problem.option("lanes", 1 if jax.default_backend() == "cpu" else 16)


def _varying_like(arrays: Any) -> Callable[[Any], Any]:
    """Marks loop carries as varying over the manual mesh axes that any of the arrays varies over."""
    references = jax.tree.leaves(arrays)
    return lambda carry: jax.tree.map(lambda x: _compat.like_varying(x, *references), carry)


def _forward(problem: Problem, operands: Operands, lanes: int, differentiable: bool) -> Result:
    plan = Plan.of(problem, lanes)
    query, key, value = plan.padded(operands)
    vary = _varying_like(operands)

    def row(_: None, items: Any) -> tuple[None, Any]:
        tile = Tile(problem, plan, operands, items)
        q = tile.query_tiles(query)
        carry = (
            jnp.zeros((*q.shape[:-1], problem.v_dim), jnp.float32),
            jnp.full((*q.shape[:-1], 1), -jnp.inf, jnp.float32),
            jnp.zeros((*q.shape[:-1], 1), jnp.float32),
        )

        def visit(carry: Any, block: Block) -> Any:
            acc, m, total = carry
            k, v = tile.key_tiles(key, block), tile.key_tiles(value, block)
            s, _ = tile.scores(q, k, block)
            m_new = jnp.maximum(m, s.max(-1, keepdims=True))
            shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
            p, decay = jnp.exp(s - shift), jnp.exp(m - shift)
            acc = acc * decay + tile.dot("gkrs,gksd->gkrd", p.astype(v.dtype), v)
            return acc, m_new, total * decay + p.sum(-1, keepdims=True)

        carry = vary(carry)
        acc, m, total = tile.for_each_block(visit, carry, differentiable)
        dead = total == 0.0
        safe = jnp.where(dead, 1.0, total)
        lse = jnp.where(dead, -jnp.inf, jnp.where(dead, 0.0, m) + jnp.log(safe))
        return None, ((acc / safe).astype(problem.q_dtype), lse[..., 0], m[..., 0])

    _, (out, lse, m) = lax.scan(row, None, plan.items())
    out = heads_first(plan.gather_rows(out), problem.layout)
    return Result(
        out,
        plan.gather_rows(lse[..., None])[..., 0],
        lax.stop_gradient(plan.gather_rows(m[..., None])[..., 0]) if problem.max_scores else None,
    )


# The backward pass. With s the raw scores times the scale, y = score_mod(s), P = softmax(y) over the allowed
# keys and O = P V, let D_i = sum_d dO_id O_id - dlse_i. Then
#
#   dV = P^T dO          dP = dO V^T           dy = P * (dP - D)
#   ds = dy * (dy/ds)    dQ = scale * ds K     dK = scale * ds^T Q
#
# since dO reaches y through P alone, with the softmax's Jacobian diag(P_i) - P_i P_i^T, and lse_i through
# dlse_i / dy_ij = P_ij. A captured element a that score_mod reads receives the sum of dy * (dy/da) over the
# positions that read it. P is recomputed from the logsumexp. What a mod yields at masked positions is
# dropped by selection, never by multiplying with zero, so that it may be infinite or NaN there.


def _backward(
    problem: Problem,
    operands: Operands,
    result: Result,
    d_out: Any,
    d_lse: Any,
    lanes: int,
    differentiable: bool,
) -> Gradients:
    plan = Plan.of(problem, lanes)
    query, key, value = plan.padded(operands)
    out, d_out = (heads_first(x, problem.layout) for x in (result.out, d_out))
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1) - d_lse
    d_out, delta = plan.pad_queries(d_out), plan.pad_queries(delta[..., None])
    # exp(s - inf) = 0: rows that are only padding, and rows without any key, contribute nothing.
    lse = jnp.where(result.lse == -jnp.inf, jnp.inf, result.lse)
    lse = plan.pad_queries(lse[..., None], fill=jnp.inf)
    captures = operands.score_captures if problem.score is not None else ()
    vary = _varying_like((operands, d_out, delta))
    totals = vary(
        (
            jnp.zeros(key.shape, jnp.float32),
            jnp.zeros(value.shape, jnp.float32),
            zero_totals(captures),
        )
    )

    def row(totals: Any, items: Any) -> tuple[Any, Any]:
        tile = Tile(problem, plan, operands, items)
        q, do, d, row_lse = (tile.query_tiles(x) for x in (query, d_out, delta, lse))

        def visit(carry: Any, block: Block) -> Any:
            dq, (dk, dv, d_captures) = carry
            k, v = tile.key_tiles(key, block), tile.key_tiles(value, block)
            y, pullback = tile.scores(q, k, block, derivatives=True)
            p = jnp.exp(y - row_lse)
            dy = p * (tile.dot("gkrd,gksd->gkrs", do, v) - d)
            ds, d_captures = pullback(dy, d_captures)
            ds, p = ds.astype(q.dtype), p.astype(do.dtype)
            dq = dq + tile.dot("gkrs,gksd->gkrd", ds, k)
            dk = tile.add_key_tiles(dk, block, tile.dot("gkrs,gkrd->gksd", ds, q))
            dv = tile.add_key_tiles(dv, block, tile.dot("gkrs,gkrd->gksd", p, do))
            return dq, (dk, dv, d_captures)

        dq, totals = tile.for_each_block(
            visit, (vary(jnp.zeros(q.shape, jnp.float32)), totals), differentiable
        )
        return totals, (dq * problem.scale).astype(problem.q_dtype)

    (dk, dv, d_captures), dq = lax.scan(row, totals, plan.items())
    dk = (dk * problem.scale)[:, :, : problem.kv_len].astype(problem.k_dtype)
    dv = dv[:, :, : problem.kv_len].astype(problem.v_dtype)
    return Gradients(
        heads_first(plan.gather_rows(dq), problem.layout),
        heads_first(dk, problem.layout),
        heads_first(dv, problem.layout),
        tuple(
            None if d is None else d.astype(c.dtype)
            for d, c in zip(d_captures, captures, strict=True)
        ),
    )
