"""A score_mod on arrays of scores, and how a cotangent is pulled back through it.

What a mod's derivative is at positions that do not count, infinite or NaN even, is dropped by selection rather
than multiplied with a cotangent of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flexjax.mods.evaluate import evaluate
from flexjax.mods.gradient import Gradient
from flexjax.mods.graph import Graph
from flexjax.mods.ops import is_float
from flexjax.mods.trace import ScoreMod

# (cotangent of the modified scores, which positions count, totals of the captures' gradients) to (cotangent of
# the scores, new totals). A total is float32, or None for a capture without a gradient.
Pullback = Callable[[Any, Any, tuple[Any, ...]], tuple[Any, tuple[Any, ...]]]


def score_pullback(
    score: ScoreMod | None, captures: Sequence[Any], inputs: Mapping[str, Any]
) -> tuple[Any, Pullback]:
    """The modified scores, not yet expanded to the shape of the scores, and their pullback.

    Args:
        score: the score_mod; None for the identity.
        captures: what it reads.
        inputs: as for `evaluate`.
    """
    if score is None:
        return inputs["score"], lambda dy, counts, totals: (dy, totals)
    if score.gradient is None:
        return _opaque(score.forward, captures, inputs)
    return _by_loads(score.gradient, captures, inputs)


def zero_totals(captures: Sequence[Any]) -> tuple[Any, ...]:
    """Totals to start from."""
    return tuple(jnp.zeros(c.shape, jnp.float32) if is_float(c.dtype) else None for c in captures)


def _by_loads(
    gradient: Gradient, captures: Sequence[Any], inputs: Mapping[str, Any]
) -> tuple[Any, Pullback]:
    """From the derivatives by every element that is read (see gradient.py)."""
    outputs = evaluate(gradient.graph, captures, inputs)

    def pull(dy: Any, counts: Any, totals: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        new = list(totals)
        for load in gradient.loads:
            contribution = jnp.where(counts, dy * outputs[load.derivative], 0.0)
            where = tuple(outputs[i] for i in load.indices)
            new[load.capture] = _accumulate(new[load.capture], where, contribution)
        return jnp.where(counts, dy * outputs[1], 0.0), tuple(new)

    return outputs[0], pull


def _accumulate(total: Any, where: tuple[Any, ...], contribution: Any) -> Any:
    """Adds contributions at their indices, summed first over the axes that no index varies along."""
    shape = jnp.broadcast_shapes(*(jnp.shape(i) for i in where))
    padded = (1,) * (contribution.ndim - len(shape)) + shape
    axes = tuple(axis for axis, n in enumerate(padded) if n == 1)
    summed = contribution.sum(axes).reshape(shape)
    return total.at[where].add(summed) if where else total + summed


def _opaque(
    graph: Graph, captures: Sequence[Any], inputs: Mapping[str, Any]
) -> tuple[Any, Pullback]:
    """Of a mod that the IR cannot express: JAX differentiates it as a whole."""
    diff = [i for i, c in enumerate(captures) if is_float(c.dtype)]

    def y(score: Any, *floats: Any) -> Any:
        merged = list(captures)
        for i, c in zip(diff, floats, strict=True):
            merged[i] = c.astype(captures[i].dtype)
        return evaluate(graph, merged, {**inputs, "score": score})[0]

    value, vjp = jax.vjp(y, inputs["score"], *(captures[i].astype(jnp.float32) for i in diff))

    def pull(dy: Any, counts: Any, totals: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        ds, *d_captures = vjp(jnp.where(counts, dy, 0.0))
        new = list(totals)
        for i, d in zip(diff, d_captures, strict=True):
            new[i] = new[i] + d
        return jnp.where(counts, ds, 0.0), tuple(new)

    return value, pull
