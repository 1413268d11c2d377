"""Gradients of the arrays that a score_mod captured: how they are summed in the kernel, and finished outside.

For every element a that the mod reads (a *load*), the kernel knows dy (dy/da) on a tile. How that is summed
depends on what the load's indices depend on:

- KEYS: neither q nor kv, or kv alone. Sums over the queries are kept in registers, one a key, and written once.
- QUERIES: q alone. Sums over the keys of a tile are added to a float32 buffer, one number a query. The
  deterministic variant keeps them in the registers of the kernel for dQ instead.
- DIAGONALS: q - kv alone, as in `table[h, q - kv + n]`. Sums along the tile's diagonals are added to a buffer, one
  number a diagonal.
- ELEMENTS: anything else, as `bias[h, q, kv]` or true gathers. Every number is added to a float32 copy of the
  array where it belongs.

The first three leave numbers for every batch row and head, which XLA then adds at the load's indices. Nothing
is as large as the matrix of scores, unless a captured array is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from flexjax.mods.evaluate import evaluate
from flexjax.mods.gradient import Gradient
from flexjax.mods.graph import Graph
from flexjax.mods.ops import is_float
from flexjax.problem import Operands, Problem

KEYS, QUERIES, DIAGONALS, ELEMENTS = "keys", "queries", "diagonals", "elements"

# Numbers that a buffer of diagonals has on either side of those that are used: tiles stick out.
MARGIN = 256


@dataclasses.dataclass(frozen=True)
class Load:
    """A load whose gradient is wanted.

    Attributes:
        number: its position in `Gradient.loads`.
        kind: KEYS, QUERIES, DIAGONALS or ELEMENTS.
        capture: position of the captured array.
        shape: of the captured array.
    """

    number: int
    kind: str
    capture: int
    shape: tuple[int, ...]

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the captured array, in elements."""
        return tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))


def loads_of(problem: Problem) -> tuple[Load, ...]:
    """The loads of a problem's score_mod that have gradients."""
    if problem.score is None or problem.score.gradient is None:
        return ()
    gradient = problem.score.gradient
    return tuple(
        Load(i, _kind(gradient, i), load.capture, gradient.graph.captures[load.capture].shape)
        for i, load in enumerate(gradient.loads)
    )


def check_deterministic(problem: Problem) -> None:
    """Raises NotImplementedError where a gradient can only be summed in an order that changes.

    The deterministic variant keeps sums by key and by query in registers; the other kinds are added by atomics.
    """
    for load in loads_of(problem):
        if load.kind in (DIAGONALS, ELEMENTS):
            raise NotImplementedError(
                f"score_mod reads a captured array of shape {load.shape} at indices of both the query and the "
                "key. Its gradient is summed by atomics, in an order that changes, so that it cannot be computed "
                "with deterministic=True. Detach the array with jax.lax.stop_gradient, or leave the option out."
            )


def _kind(gradient: Gradient, number: int) -> str:
    indices = _indices(gradient, number)
    depends = indices.depends
    if "score" in depends:
        return ELEMENTS
    if "q" not in depends:
        return KEYS
    if "kv" not in depends:
        return QUERIES
    return DIAGONALS if _on_diagonals(indices) else ELEMENTS


def _indices(gradient: Gradient, number: int) -> Graph:
    return gradient.graph.with_outputs(*gradient.loads[number].indices)


# Integers as a q + c kv + (something that depends on neither); a function of q - kv; anything.
_Linear = tuple[int, int]
_OF_DIFFERENCE = "of the difference"


def _on_diagonals(graph: Graph) -> bool:
    """Whether the outputs depend on q and kv through q - kv alone."""
    found: list[_Linear | str | None] = []
    for node in graph.nodes:
        args = [found[a] for a in node.args]
        found.append(_dependence(graph, node, args))
    return all(_through_difference(found[o]) for o in graph.outputs)


def _through_difference(what: _Linear | str | None) -> bool:
    return what == _OF_DIFFERENCE or (isinstance(what, tuple) and what[0] == -what[1])


def _dependence(graph: Graph, node: Any, args: list[Any]) -> _Linear | str | None:
    if not node.depends & {"q", "kv", "score"}:
        return 0, 0
    if node.op == "input":
        return {"q": (1, 0), "kv": (0, 1)}.get(node["name"])
    if node.dtype == np.int32 and all(isinstance(a, tuple) for a in args):
        match node.op:
            case "add":
                return args[0][0] + args[1][0], args[0][1] + args[1][1]
            case "sub":
                return args[0][0] - args[1][0], args[0][1] - args[1][1]
            case "neg":
                return -args[0][0], -args[0][1]
            case "mul":
                for x, y in ((0, 1), (1, 0)):
                    factor = graph.nodes[node.args[y]]
                    if factor.op == "const":
                        c = int(factor["value"].value)
                        return c * args[x][0], c * args[x][1]
    return _OF_DIFFERENCE if all(map(_through_difference, args)) else None


# -- outside the kernel -----------------------------------------------------------------------------


def diagonal_count(q_len: int, kv_len: int) -> int:
    """Length of a buffer of diagonals, an even number."""
    return 2 * ((q_len + kv_len + 2 * MARGIN + 1) // 2)


def diagonal_origin(kv_len: int) -> int:
    """Where q - kv = 0 lies in a buffer of diagonals, counted from an odd number: see reductions.py."""
    return MARGIN + kv_len + 1 - kv_len % 2


def finish(
    problem: Problem,
    operands: Operands,
    loads: Sequence[Load],
    sums: Sequence[Any],
    dense: bool,
    deterministic: bool,
) -> tuple[Any, ...]:
    """Gradients of the captured arrays, in their dtypes; None for those that are not floating-point.

    Args:
        problem: the attention.
        operands: its arrays.
        loads: what the kernel summed.
        sums: what it left, one array a load: [B, Hq, keys], [B, Hq, queries], [B, Hq, diagonals], or of the
            captured array's shape, each possibly longer than that.
        dense: loads that are not KEYS left dy (dy/da) for all scores, [B, Hq, keys, queries] (the
            interpreter).
        deterministic: whether the order of additions must be fixed.
    """
    if problem.score is None:
        return ()
    totals = [
        jnp.zeros(c.shape, jnp.float32) if is_float(c.dtype) else None
        for c in operands.score_captures
    ]
    for load, total in zip(loads, sums, strict=True):
        gradient = problem.score.gradient
        assert gradient is not None, "loads come from a gradient"
        if load.kind in (QUERIES, DIAGONALS) and not dense:
            total = total.reshape(problem.batch, problem.q_heads, -1)
        if load.kind == ELEMENTS and not dense:
            totals[load.capture] = totals[load.capture] + total.reshape(load.shape)
            continue
        inputs, values = _by_index(problem, load, total, dense)
        where = evaluate(_indices(gradient, load.number), operands.score_captures, inputs)
        add = _add_in_order if deterministic else _add
        totals[load.capture] = add(totals[load.capture], where, values)
    return tuple(
        None if total is None else total.astype(c.dtype)
        for total, c in zip(totals, operands.score_captures, strict=True)
    )


def _by_index(problem: Problem, load: Load, total: Any, dense: bool) -> tuple[dict[str, Any], Any]:
    """(inputs of the index graph, what is to be added), broadcastable to [B, Hq, n] or [B, Hq, kv, q]."""
    q_len, kv_len = problem.q_len, problem.kv_len

    def span(length: int, axis: int, rank: int) -> Any:
        return lax.broadcasted_iota(
            jnp.int32, (*(1,) * axis, length, *(1,) * (rank - 1 - axis)), axis
        )

    rank = 4 if dense and load.kind != KEYS else 3
    inputs = {"b": span(problem.batch, 0, rank), "h": span(problem.q_heads, 1, rank)}
    match load.kind:
        case _ if rank == 4:
            total = total[:, :, :kv_len, :q_len]
            return inputs | {"q": span(q_len, 3, 4), "kv": span(kv_len, 2, 4)}, total
        case "keys":
            return inputs | {"kv": span(kv_len, 2, 3)}, total[:, :, :kv_len]
        case "queries":
            return inputs | {"q": span(q_len, 2, 3)}, total[:, :, :q_len]
    # Any query and key on the diagonal will do.
    difference = span(q_len + kv_len - 1, 2, 3) - (kv_len - 1)
    first = diagonal_origin(kv_len) - (kv_len - 1)
    pair = {"q": jnp.maximum(difference, 0), "kv": jnp.maximum(-difference, 0)}
    return inputs | pair, total[:, :, first : first + q_len + kv_len - 1]


def _summed(where: Sequence[Any], values: Any) -> tuple[tuple[Any, ...], Any]:
    """(indices, sums over the axes that no index varies along), of one shape."""
    shape = jnp.broadcast_shapes((1,) * values.ndim, *(jnp.shape(i) for i in where))
    axes = tuple(a for a, n in enumerate(shape) if n == 1)
    sums = values.sum(axes, keepdims=True).reshape(shape)
    return tuple(jnp.broadcast_to(i, shape) for i in where), sums


def _add(total: Any, where: Sequence[Any], values: Any) -> Any:
    indices, sums = _summed(where, values)
    return total.at[indices].add(sums, mode="clip") if indices else total + sums.reshape(())


def _add_in_order(total: Any, where: Sequence[Any], values: Any) -> Any:
    """The same with a fixed order of additions: sorted by index, then summed by a segmented scan.

    XLA scatters duplicates on a GPU by atomics.
    """
    indices, sums = _summed(where, values)
    if not indices:
        return total + sums.reshape(())
    clipped = [jnp.clip(i, 0, n - 1) for i, n in zip(indices, total.shape, strict=True)]
    flat = jnp.ravel_multi_index(clipped, total.shape, mode="clip").reshape(-1)
    order = jnp.argsort(flat, stable=True)
    flat, sums = flat[order], sums.reshape(-1)[order]
    first = jnp.concatenate([jnp.ones((1,), bool), flat[1:] != flat[:-1]])

    def combine(x: Any, y: Any) -> Any:
        return x[0] | y[0], jnp.where(y[0], y[1], x[1] + y[1])

    _, running = lax.associative_scan(combine, (first, sums))
    last = jnp.concatenate([first[1:], jnp.ones((1,), bool)])
    place = jnp.where(last, flat, total.size)
    summed = jnp.zeros(total.size, jnp.float32).at[place].set(running, mode="drop")
    return total + summed.reshape(total.shape)
