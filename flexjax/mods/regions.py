"""Evaluates a graph over regions: what it may yield anywhere in a range of queries times a range of keys.

Interval arithmetic, vectorised over every block of a mask at once, with NumPy on the host or with JAX inside
a program. As in `evaluate`, a node is computed at the shape of what it depends on: the bounds of a row are
computed once a row of blocks, and only what compares queries with keys once a block.

A value is exact (`Exact`, where it depends on neither q nor kv) or lies between two bounds (`Bounds`): integers
of up to 32 bits between int32 bounds, float32, bfloat16 and float16 between float32 bounds, booleans between
booleans, so that (False, True) is "undecided". `bound_rules` says what operations make of them. Where nothing is
known the bounds say so: the ends of the dtype for integers, and NaN for floats, with which no comparison is ever
decided. Integers that may wrap around are unknown. Sums, products and quotients of floats are widened by two units
in the last place, since XLA may contract them differently in every program; of functions such as exp nothing is
known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexjax.mods.bound_rules import (
    FLOAT,
    INTEGER,
    LOGIC,
    MONOTONE,
    UNROUNDED,
    Bounds,
    compare,
    convert,
    select,
    square,
    widened,
    without_nan,
)
from flexjax.mods.evaluate import apply, apply_numpy
from flexjax.mods.graph import Graph, Node
from flexjax.mods.ops import COMPARISONS, is_bool, is_float, is_integer
from flexjax.mods.range_queries import Index, bounded_load


@dataclasses.dataclass(frozen=True)
class Exact:
    """A value that is the same in the whole region, in the node's own dtype."""

    value: Any


Value = Exact | Bounds | None  # None: a dtype that is not tracked


@dataclasses.dataclass(frozen=True)
class Regions:
    """Regions of an (L, S) matrix of positions, as a grid.

    Attributes:
        inputs: for b and h exact indices, for q and kv the bounds of every region; arrays of one rank that
            broadcast to the grid.
        blocks: for q and kv, (tokens, tokens in a block, axis of the grid): how the regions divide the sequence.
            All blocks of the sequence are there, in order.
    """

    inputs: Mapping[str, Value]
    blocks: Mapping[str, tuple[int, int, int]]


def bounds(graph: Graph, captures: Sequence[Any], regions: Regions, xp: Any) -> tuple[Any, Any]:
    """(is certainly true, is possibly true) of a mask in every region, broadcastable to their grid.

    Args:
        graph: a mask without opaque nodes.
        captures: values of `graph.captures`.
        regions: where.
        xp: `numpy` or `jax.numpy`.

    Raises:
        NotImplementedError: under NumPy, an operation on exact values that NumPy does not have.
    """
    value = node_bounds(graph, captures, regions, xp)[graph.outputs[0]]
    result = _as_bounds(value, xp) or _unknown(np.bool_, xp)
    return result.low, result.high


def node_bounds(graph: Graph, captures: Sequence[Any], regions: Regions, xp: Any) -> list[Value]:
    """What is known of every node in every region."""
    values: list[Value] = []
    for node in graph.nodes:
        operands = [values[a] for a in node.args]
        exact = [x.value for x in operands if isinstance(x, Exact)]
        if node.op == "input":
            value = regions.inputs[node["name"]]
        elif node.op == "const":
            value = Exact(xp.asarray(node["value"].value, node.dtype))
        elif node.op == "load":
            names = [dict(graph.nodes[a].params).get("name", "") for a in node.args]
            value = _load(captures[node["capture"]], operands, names, regions.blocks, xp)
        elif len(exact) == len(operands):
            value = _exact(node, apply_numpy(node, exact) if xp is np else apply(node, exact), xp)
        else:
            value = _apply(node, operands, xp)
        values.append(value)
    return values


def _exact(node: Node, result: Any, xp: Any) -> Value:
    """An operation on exact values; its result may differ from a fused program's in the last bits of a float."""
    if not is_float(node.dtype) or node.op in UNROUNDED:
        return Exact(result)
    if node.op == "convert" and np.dtype(node.dtype) == np.float32:
        return Exact(result)
    if node.op in FLOAT and np.dtype(node.dtype) == np.float32:
        return widened(result, result, xp)
    return _unknown(node.dtype, xp)


def _load(
    array: Any,
    indices: list[Value],
    names: list[str],
    blocks: Mapping[str, tuple[int, int, int]],
    xp: Any,
) -> Value:
    if all(isinstance(i, Exact) for i in indices):
        exact = [
            xp.clip(i.value, 0, n - 1)  # pyrefly: ignore[missing-attribute]
            for i, n in zip(indices, array.shape, strict=True)
        ]
        return Exact(array[tuple(exact)] if exact else array)
    if _tracked(array.dtype) is None:
        return None
    found = []
    for index, name in zip(indices, names, strict=True):
        pair = _as_bounds(index, xp) or _unknown(np.int32, xp)
        found.append(Index(pair.low, pair.high, isinstance(index, Exact), blocks.get(name)))
    low, high = bounded_load(array.astype(_tracked(array.dtype)), found, xp)
    return Bounds(low, high)


def _tracked(dtype: Any) -> np.dtype | None:
    """The dtype of the bounds of values of `dtype`; None if they are not tracked."""
    dtype = np.dtype(dtype)
    if is_bool(dtype):
        return dtype
    if is_integer(dtype):
        return np.dtype("int32") if np.can_cast(dtype, np.int32) else None
    return np.dtype("float32") if is_float(dtype) and dtype.itemsize in (2, 4) else None


def _unknown(dtype: Any, xp: Any) -> Any:
    """Bounds that claim nothing; None for a dtype that is not tracked."""
    dtype, tracked = np.dtype(dtype), _tracked(dtype)
    if tracked is None:
        return None
    if is_bool(dtype):
        return Bounds(xp.asarray(False), xp.asarray(True))
    if is_integer(dtype):
        limits = np.iinfo(dtype)
        return Bounds(xp.asarray(limits.min, tracked), xp.asarray(limits.max, tracked))
    nan = xp.asarray(np.nan, tracked)
    return Bounds(nan, nan)


def _as_bounds(value: Value, xp: Any) -> Any:
    """Bounds of a value; None if it is of a dtype that is not tracked."""
    if not isinstance(value, Exact):
        return value
    tracked = _tracked(value.value.dtype)
    if tracked is None:
        return None
    exact = value.value.astype(tracked)
    return Bounds(exact, exact)


def _apply(node: Node, operands: list[Value], xp: Any) -> Value:
    pairs = [_as_bounds(x, xp) for x in operands]
    unknown = _unknown(node.dtype, xp)
    if unknown is None or any(x is None for x in pairs):
        return unknown
    same = len(node.args) == 2 and node.args[0] == node.args[1]
    kind = pairs[-1].low.dtype
    if node.op == "select_n":
        return select(*pairs, xp=xp)
    if node.op == "convert":
        return convert(pairs[0], node.dtype, unknown, xp)
    if node.op == "stop_gradient":
        return pairs[0]
    if node.op in COMPARISONS:
        return compare(node.op, *pairs, same=same and not is_float(kind))
    if is_bool(node.dtype):
        rule = LOGIC.get(node.op)
        return unknown if rule is None else rule(*pairs)
    if node.op in MONOTONE:
        low, high = MONOTONE[node.op](xp, *pairs)
        return without_nan(low, high, xp) if is_float(node.dtype) else Bounds(low, high)
    if is_float(node.dtype):
        rule = FLOAT.get(node.op) if np.dtype(node.dtype) == np.float32 else None
        return unknown if rule is None else widened(*rule(xp, *pairs), xp=xp)
    rule = INTEGER.get(node.op)
    if rule is None or (node.op == "shift_right_arithmetic" and node.dtype.kind == "u"):
        return unknown
    if node.op == "mul" and same:
        rule, pairs = square, pairs[:1]
    low, high, wraps = rule(xp, *pairs)
    wraps = wraps | (low < unknown.low) | (high > unknown.high)
    return Bounds(xp.where(wraps, unknown.low, low), xp.where(wraps, unknown.high, high))
