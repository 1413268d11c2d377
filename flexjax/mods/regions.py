"""Evaluates a graph over regions: what it may yield anywhere in a range of queries times a range of keys.

Interval arithmetic, vectorised over every block of a mask at once, with NumPy on the host or with JAX inside
a program. As in `evaluate`, a node is computed at the shape of what it depends on: the bounds of a row are
computed once a row of blocks, and only what compares queries with keys once a block.

A value is exact (`Exact`, where it depends on neither q nor kv) or lies between two bounds (`Bounds`): integers
of up to 32 bits between int32 bounds, float32, bfloat16 and float16 between float32 bounds, booleans between
booleans, so that (False, True) is "undecided". Each rule is sound: the bounds contain every value that operands
within their bounds can yield. Where nothing is known the bounds say so: the ends of the dtype for integers, and
NaN for floats, with which no comparison is ever decided. Integers that may wrap around are unknown. Sums,
products and quotients of floats are widened by two units in the last place, since XLA may contract them
differently in every program; of functions such as exp nothing is known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flexjax.mods.evaluate import apply, apply_numpy
from flexjax.mods.graph import Graph, Node
from flexjax.mods.ops import COMPARISONS, is_bool, is_float, is_integer
from flexjax.mods.range_queries import Index, bounded_load

_INT32 = np.iinfo(np.int32)


@dataclasses.dataclass(frozen=True)
class Exact:
    """A value that is the same in the whole region, in the node's own dtype."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The smallest and the largest value that a node may have in the region."""

    low: Any
    high: Any


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
    if not is_float(node.dtype) or node.op in _UNROUNDED:
        return Exact(result)
    if node.op == "convert" and np.dtype(node.dtype) == np.float32:
        return Exact(result)
    if node.op in _FLOAT and np.dtype(node.dtype) == np.float32:
        return _widened(result, result, xp)
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
        return _select(*pairs, xp=xp)
    if node.op == "convert":
        return _convert(pairs[0], node.dtype, unknown, xp)
    if node.op == "stop_gradient":
        return pairs[0]
    if node.op in COMPARISONS:
        return _compare(node.op, *pairs, same=same and not is_float(kind))
    if is_bool(node.dtype):
        rule = _LOGIC.get(node.op)
        return unknown if rule is None else rule(*pairs)
    if node.op in _MONOTONE:
        low, high = _MONOTONE[node.op](xp, *pairs)
        return _without_nan(low, high, xp) if is_float(node.dtype) else Bounds(low, high)
    if is_float(node.dtype):
        rule = _FLOAT.get(node.op) if np.dtype(node.dtype) == np.float32 else None
        return unknown if rule is None else _widened(*rule(xp, *pairs), xp=xp)
    rule = _INTEGER.get(node.op)
    if rule is None or (node.op == "shift_right_arithmetic" and node.dtype.kind == "u"):
        return unknown
    if node.op == "mul" and same:
        rule, pairs = _square, pairs[:1]
    low, high, wraps = rule(xp, *pairs)
    wraps = wraps | (low < unknown.low) | (high > unknown.high)
    return Bounds(xp.where(wraps, unknown.low, low), xp.where(wraps, unknown.high, high))


# -- booleans ---------------------------------------------------------------------------------------


def _xor(x: Bounds, y: Bounds) -> Bounds:
    different = (x.low & ~y.high) | (~x.high & y.low)
    equal = (x.low & y.low) | ~(x.high | y.high)
    return Bounds(different, ~equal)


_LOGIC: dict[str, Callable[..., Bounds]] = {
    "and": lambda x, y: Bounds(x.low & y.low, x.high & y.high),
    "or": lambda x, y: Bounds(x.low | y.low, x.high | y.high),
    "not": lambda x: Bounds(~x.high, ~x.low),
    "xor": _xor,
}


def _compare(op: str, x: Bounds, y: Bounds, same: bool) -> Bounds:
    if same:  # a value against itself
        true = (x.low == x.low) if op in ("eq", "le", "ge") else (x.low != x.low)
        return Bounds(true, true)
    if is_bool(x.low.dtype):
        if op not in ("eq", "ne"):  # False < True
            x, y = (Bounds(v.low.astype(np.int32), v.high.astype(np.int32)) for v in (x, y))
            return _compare(op, x, y, same)
        different = _xor(x, y)
        return different if op == "ne" else _LOGIC["not"](different)
    match op:
        # Bounds of NaN decide nothing: comparisons with them are false, so they are asked for proofs only.
        case "lt":
            return Bounds(x.high < y.low, ~(x.low >= y.high))
        case "le":
            return Bounds(x.high <= y.low, ~(x.low > y.high))
        case "gt" | "ge":
            return _compare({"gt": "lt", "ge": "le"}[op], y, x, same)
        case "eq":
            settled = (x.low == x.high) & (y.low == y.high) & (x.low == y.low)
            return Bounds(settled, ~((x.high < y.low) | (y.high < x.low)))
    return _LOGIC["not"](_compare("eq", x, y, same))


# -- any type ---------------------------------------------------------------------------------------


def _select(which: Bounds, *cases: Bounds, xp: Any) -> Bounds:
    if is_bool(which.low.dtype) and len(cases) == 2:
        no, yes = cases
        # Where the choice is open the result lies in either case.
        low = xp.where(which.low, yes.low, xp.where(which.high, _lower(no, yes, xp), no.low))
        high = xp.where(which.low, yes.high, xp.where(which.high, _upper(no, yes, xp), no.high))
        return Bounds(low, high)
    low, high = cases[0].low, cases[0].high
    for case in cases[1:]:
        low, high = _lower(Bounds(low, high), case, xp), _upper(Bounds(low, high), case, xp)
    return Bounds(low, high)


def _lower(x: Bounds, y: Bounds, xp: Any) -> Any:
    return x.low & y.low if is_bool(x.low.dtype) else xp.minimum(x.low, y.low)


def _upper(x: Bounds, y: Bounds, xp: Any) -> Any:
    return x.high | y.high if is_bool(x.low.dtype) else xp.maximum(x.high, y.high)


def _convert(x: Bounds, dtype: Any, unknown: Bounds, xp: Any) -> Bounds:
    source, target = np.dtype(x.low.dtype), np.dtype(dtype)
    if is_bool(target):
        if is_float(source):
            return unknown
        if is_bool(source):
            return x
        return Bounds((x.low > 0) | (x.high < 0), (x.low != 0) | (x.high != 0))
    if is_float(target):
        # Conversion to float32 rounds, which keeps the order; narrower types would lose the bounds' tie
        # to the value's own dtype.
        if target != np.float32:
            return unknown
        return Bounds(x.low.astype(target), x.high.astype(target))
    if not is_float(source):
        low, high = x.low.astype(np.int32), x.high.astype(np.int32)
        bad = (low < unknown.low) | (high > unknown.high)
    else:
        # Truncation keeps the order; values outside the integers' range are left to the platform.
        bad = ~((x.low > _FLOAT_MIN) & (x.high < _FLOAT_MAX))
        low = xp.where(bad, 0, x.low).astype(np.int32)
        high = xp.where(bad, 0, x.high).astype(np.int32)
        bad = bad | (low < unknown.low) | (high > unknown.high)
    return Bounds(xp.where(bad, unknown.low, low), xp.where(bad, unknown.high, high))


_FLOAT_MIN, _FLOAT_MAX = -2147483000.0, 2147483000.0

# Operations that keep or reverse the order in every operand, and that neither round nor wrap.
_MONOTONE: dict[str, Callable[..., tuple[Any, Any]]] = {
    "max": lambda xp, x, y: (xp.maximum(x.low, y.low), xp.maximum(x.high, y.high)),
    "min": lambda xp, x, y: (xp.minimum(x.low, y.low), xp.minimum(x.high, y.high)),
    "clamp": lambda xp, low, x, high: (
        xp.minimum(xp.maximum(x.low, low.low), high.low),
        xp.minimum(xp.maximum(x.high, low.high), high.high),
    ),
    "floor": lambda xp, x: (xp.floor(x.low), xp.floor(x.high)),
    "ceil": lambda xp, x: (xp.ceil(x.low), xp.ceil(x.high)),
}


# -- floats -----------------------------------------------------------------------------------------


def _without_nan(low: Any, high: Any, xp: Any) -> Bounds:
    """The bounds, both NaN where either is: then the value may be NaN itself."""
    nan = low + high != low + high
    nan = nan | (low != low) | (high != high)
    return Bounds(xp.where(nan, np.float32(np.nan), low), xp.where(nan, np.float32(np.nan), high))


def _widened(low: Any, high: Any, xp: Any) -> Bounds:
    down, up = np.float32(-np.inf), np.float32(np.inf)
    for _ in range(2):
        low, high = xp.nextafter(low, down), xp.nextafter(high, up)
    return _without_nan(low, high, xp)


def _float_corners(f: Callable[[Any, Any], Any], x: Bounds, y: Bounds, xp: Any) -> tuple[Any, Any]:
    values = [f(i, j) for i in (x.low, x.high) for j in (y.low, y.high)]
    low, high = values[0], values[0]
    for value in values[1:]:  # NaN in any corner stays
        low, high = xp.minimum(low, value), xp.maximum(high, value)
    return low, high


def _float_abs(xp: Any, x: Bounds) -> tuple[Any, Any]:
    low = xp.where((x.low <= 0) & (x.high >= 0), 0, xp.minimum(abs(x.low), abs(x.high)))
    return low, xp.maximum(abs(x.low), abs(x.high))


def _float_square(xp: Any, x: Bounds) -> tuple[Any, Any]:
    low, high = _float_abs(xp, x)
    return low * low, high * high


def _float_div(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any]:
    low, high = _float_corners(lambda i, j: i / j, x, y, xp)
    zero = (y.low <= 0) & (y.high >= 0)
    nan = np.float32(np.nan)
    return xp.where(zero, nan, low), xp.where(zero, nan, high)


_FLOAT: dict[str, Callable[..., tuple[Any, Any]]] = {
    "add": lambda xp, x, y: (x.low + y.low, x.high + y.high),
    "sub": lambda xp, x, y: (x.low - y.high, x.high - y.low),
    "mul": lambda xp, x, y: _float_corners(lambda i, j: i * j, x, y, xp),
    "div": _float_div,
    "neg": lambda xp, x: (-x.high, -x.low),
    "abs": _float_abs,
    "square": _float_square,
}


# Operations on floats whose results are exact.
_UNROUNDED = frozenset(
    {
        "neg",
        "abs",
        "max",
        "min",
        "clamp",
        "floor",
        "ceil",
        "round",
        "sign",
        "select_n",
        "stop_gradient",
    }
)


# -- integers: (low, high, whether they may be wrong because of wrap-around) ------------------------


def _add(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    low, high = x.low + y.low, x.high + y.high
    # A sum wraps if its sign differs from that of both operands.
    wraps = (((x.low ^ low) & (y.low ^ low)) | ((x.high ^ high) & (y.high ^ high))) < 0
    return low, high, wraps


def _sub(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    low, high = x.low - y.high, x.high - y.low
    wraps = (((x.low ^ y.high) & (x.low ^ low)) | ((x.high ^ y.low) & (x.high ^ high))) < 0
    return low, high, wraps


def _magnitude(x: Bounds, xp: Any) -> Any:
    return xp.maximum(abs(x.low.astype(np.float32)), abs(x.high.astype(np.float32)))


def _corners(values: list[Any], xp: Any) -> tuple[Any, Any]:
    low, high = values[0], values[0]
    for value in values[1:]:
        low, high = xp.minimum(low, value), xp.maximum(high, value)
    return low, high


def _mul(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    low, high = _corners([i * j for i in (x.low, x.high) for j in (y.low, y.high)], xp)
    # float32 may be off by two parts in 2^23, so stay clear of the limit.
    return low, high, _magnitude(x, xp) * _magnitude(y, xp) > 2147480000.0


def _abs(xp: Any, x: Bounds) -> tuple[Any, Any, Any]:
    low = xp.where((x.low <= 0) & (x.high >= 0), 0, xp.minimum(abs(x.low), abs(x.high)))
    return low, xp.maximum(abs(x.low), abs(x.high)), x.low == _INT32.min


def _square(xp: Any, x: Bounds) -> tuple[Any, Any, Any]:
    low, high, wraps = _abs(xp, x)
    return low * low, high * high, wraps | (high > 46340)  # 46340^2 < 2^31


def _quotient(x: Any, y: Any, xp: Any) -> Any:
    """The quotient x / y rounded towards zero; y is not 0."""
    down = x // y
    return xp.where((down < 0) & (down * y != x), down + 1, down)


def _divisor(y: Bounds, xp: Any) -> tuple[Bounds, Any]:
    """A divisor that is safe to compute with, and where it is not the one that was asked for."""
    bad = ((y.low <= 0) & (y.high >= 0)) | (y.low == _INT32.min)
    return Bounds(xp.where(bad, 1, y.low), xp.where(bad, 1, y.high)), bad


def _div(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    y, bad = _divisor(y, xp)
    bad = bad | (x.low == _INT32.min)  # -2^31 / -1 wraps
    low = xp.where(bad, 0, x.low)
    quotients = [_quotient(i, j, xp) for i in (low, x.high) for j in (y.low, y.high)]
    return *_corners(quotients, xp), bad


def _rem(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    y, bad = _divisor(y, xp)
    bad = bad | (x.low == _INT32.min)
    low = xp.where(bad, 0, x.low)
    # With one quotient for all of them, x rem y = x - y * quotient grows with x.
    first, last = _quotient(low, y.low, xp), _quotient(x.high, y.low, xp)
    together = (y.low == y.high) & (first == last)
    # Otherwise it has the dividend's sign and is no larger than dividend and divisor - 1 in magnitude.
    bound = xp.maximum(abs(y.low), abs(y.high)) - 1
    below = xp.where(low >= 0, 0, xp.maximum(-bound, low))
    above = xp.where(x.high <= 0, 0, xp.minimum(bound, x.high))
    return (
        xp.where(together, low - y.low * first, below),
        xp.where(together, x.high - y.low * first, above),
        bad,
    )


def _filled(x: Any) -> Any:
    """All bits below the highest set bit are set too."""
    for shift in (1, 2, 4, 8, 16):
        x = x | (x >> shift)
    return x


def _bit_and(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    return xp.zeros_like(x.low & y.low), xp.minimum(x.high, y.high), (x.low < 0) | (y.low < 0)


def _bit_or(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    return xp.maximum(x.low, y.low), _filled(x.high | y.high), (x.low < 0) | (y.low < 0)


def _bit_xor(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    return xp.zeros_like(x.low | y.low), _filled(x.high | y.high), (x.low < 0) | (y.low < 0)


def _shift_right(xp: Any, x: Bounds, y: Bounds) -> tuple[Any, Any, Any]:
    bad = (y.low != y.high) | (y.low < 0) | (y.low > 31)
    by = xp.where(bad, 0, y.low)
    return x.low >> by, x.high >> by, bad


_INTEGER: dict[str, Callable[..., tuple[Any, Any, Any]]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "rem": _rem,
    "neg": lambda xp, x: (-x.high, -x.low, x.low == _INT32.min),
    "abs": _abs,
    "square": _square,
    "sign": lambda xp, x: (xp.sign(x.low), xp.sign(x.high), False),
    "and": _bit_and,
    "or": _bit_or,
    "xor": _bit_xor,
    "not": lambda xp, x: (~x.high, ~x.low, False),
    "shift_right_arithmetic": _shift_right,
}
