"""Builds a `Graph`: hash-consing, constant folding, and exact rewrites justified by intervals.

Every rewrite is exact: integer identities, comparisons and clamps that the operands' ranges settle, and
conversions pushed towards lower rank where no rounding can occur. Floating-point operations are never
re-associated, so a graph computes bit for bit what the user's function does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from flexjax.mods import intervals
from flexjax.mods.errors import UnsupportedMod
from flexjax.mods.graph import INPUTS, TILE, CaptureType, Graph, Literal, Node
from flexjax.mods.ops import COMPARISONS, OPS, is_bool, is_integer

INT32 = np.dtype("int32")
BOOL = np.dtype("bool")

# A mod larger than this would make kernels that take minutes to compile and spill every register.
NODE_BUDGET = 2000

# Integers of at most this magnitude are exact in float32.
_FLOAT32_EXACT = 1 << 24


@dataclasses.dataclass(eq=False)
class Ref:
    """A node under construction."""

    node: Node
    args: tuple[Ref, ...]
    position: int
    interval: intervals.Interval | None = None

    @property
    def dtype(self) -> np.dtype:
        return self.node.dtype

    @property
    def is_const(self) -> bool:
        return self.node.op == "const"

    @property
    def value(self) -> Any:
        return self.node["value"].value

    def equals(self, value: Any) -> bool:
        return self.is_const and bool(self.value == value)


class Builder:
    """A graph under construction.

    Args:
        ranges: inclusive ranges of the integer inputs `b`, `h`, `q`, `kv`; None where unknown.
        keep_custom: keep `custom_jvp`/`custom_vjp` calls and `stop_gradient` as nodes, as differentiation
            needs them, instead of inlining what they compute.
    """

    def __init__(self, ranges: dict[str, intervals.Interval | None], keep_custom: bool = False):
        self.ranges = ranges
        self.keep_custom = keep_custom
        self._memo: dict[Any, Ref] = {}
        self.captures: list[Any] = []
        self._capture_positions: dict[int, int] = {}

    # -- leaves ---------------------------------------------------------------------------------

    def input(self, name: str) -> Ref:
        dtype = np.dtype("float32") if name == "score" else INT32
        depends = frozenset({name}) if name in INPUTS else frozenset()
        return self.make(
            "input", (), {"name": name}, dtype, depends=depends, interval=self.ranges.get(name)
        )

    def const(self, value: Any, dtype: Any) -> Ref:
        literal = Literal.of(value, dtype)
        interval = (int(literal.value),) * 2 if is_integer(dtype) else None
        return self.make("const", (), {"value": literal}, np.dtype(dtype), interval=interval)

    def capture(self, array: Any) -> int:
        """Registers a captured array and returns its position."""
        if id(array) not in self._capture_positions:
            self._capture_positions[id(array)] = len(self.captures)
            self.captures.append(array)  # also keeps the array, and so its id, alive
        return self._capture_positions[id(array)]

    def load(
        self,
        capture: int,
        indices: Sequence[Ref],
        dtype: Any,
        interval: intervals.Interval | None = None,
    ) -> Ref:
        """Element of a captured array; every index is already inside the array.

        `interval` is a promise about the array's values.
        """
        params = {"capture": capture}
        return self.make("load", tuple(indices), params, np.dtype(dtype), interval=interval)

    # -- operations -----------------------------------------------------------------------------

    def apply(
        self, op: str, args: Sequence[Ref], params: dict[str, Any] | None = None, dtype: Any = None
    ) -> Ref:
        """The elementwise operation `op` on scalars, simplified."""
        args, params = tuple(args), params or {}
        if op == "stop_gradient" and not self.keep_custom:
            return args[0]
        dtype = np.dtype(dtype) if dtype is not None else _result_dtype(op, args, params)
        simpler = self._simplify(op, args, params, dtype)
        if simpler is not None:
            return simpler
        numpy_fn = OPS[op].numpy
        if numpy_fn is not None and args and all(a.is_const for a in args):
            with np.errstate(all="ignore"):
                return self.const(numpy_fn(params, *(a.value for a in args)), dtype)
        interval = None
        if is_integer(dtype):
            interval = intervals.result_interval(op, [_range_of(a) for a in args])
            if interval is not None:
                limits = np.iinfo(dtype)
                if interval[0] < limits.min or interval[1] > limits.max:
                    interval = None  # the operation may wrap
                elif interval[0] == interval[1]:
                    return self.const(interval[0], dtype)
        return self.make(op, args, params, dtype, interval=interval)

    def convert(self, x: Ref, dtype: Any) -> Ref:
        dtype = np.dtype(dtype)
        return self.apply("convert", (x,), {"dtype": dtype.name}, dtype)

    def clamp(self, x: Ref, low: int, high: int) -> Ref:
        return self.apply("clamp", (self.const(low, x.dtype), x, self.const(high, x.dtype)))

    def make(
        self,
        op: str,
        args: tuple[Ref, ...],
        params: dict[str, Any],
        dtype: np.dtype,
        *,
        depends: frozenset[str] | None = None,
        interval: intervals.Interval | None = None,
    ) -> Ref:
        """A node exactly as given, shared with an equal one made before."""
        items = tuple(sorted(params.items()))
        key = (op, tuple(a.position for a in args), items, dtype)
        if key in self._memo:
            return self._memo[key]
        if len(self._memo) >= 8 * NODE_BUDGET:
            raise UnsupportedMod(f"it unrolls to more than {8 * NODE_BUDGET} scalar operations")
        if depends is None:
            depends = frozenset().union(*(a.node.depends for a in args))
        node = Node(op, tuple(a.position for a in args), items, dtype, depends)
        ref = Ref(node, args, len(self._memo), interval)
        self._memo[key] = ref
        return ref

    # -- rewrites -------------------------------------------------------------------------------

    def _simplify(
        self, op: str, args: tuple[Ref, ...], params: dict[str, Any], dtype: np.dtype
    ) -> Ref | None:
        if op in COMPARISONS:
            x, y = args
            if x.interval is not None and y.interval is not None:
                truth = intervals.decide_comparison(op, x.interval, y.interval)
                if truth is not None:
                    return self.const(truth, BOOL)
            if op == "ne" and x.node.op == "sign" and y.equals(1) and _is_nonnegative(x.args[0]):
                zero = self.const(0, x.args[0].dtype)
                return self.apply("eq", (x.args[0], zero))
            return None
        if op == "select_n":
            which, *cases = args
            if which.is_const:
                return cases[int(which.value)]
            return cases[0] if all(c is cases[0] for c in cases) else None
        if op == "convert":
            return self._simplify_convert(args[0], dtype)
        if is_bool(dtype):
            return self._simplify_bool(op, args)
        if is_integer(dtype):
            return self._simplify_integer(op, args)
        if op == "mul":  # exact in floating point, and everywhere in derivatives
            for x, y in (args, args[::-1]):
                if x.equals(1):
                    return y
        return None

    def _simplify_bool(self, op: str, args: tuple[Ref, ...]) -> Ref | None:
        if op not in ("and", "or"):
            return None
        absorbing = op == "or"
        for x, y in (args, args[::-1]):
            if x.is_const:
                return x if bool(x.value) == absorbing else y
            # Floor division of x >= 0 asks whether x is 0 while x rem c is not: never.
            if op == "and" and _asks_if_zero(x) and _asks_if_remainder(y, of=x.args[0]):
                return self.const(False, BOOL)
        return args[0] if args[0] is args[1] else None

    def _simplify_integer(self, op: str, args: tuple[Ref, ...]) -> Ref | None:
        known = [a.interval for a in args if a.interval is not None]
        if op == "clamp" and len(known) == 3:
            low, x, high = known
            if low[1] <= x[0] and x[1] <= high[0]:
                return args[1]
        if op in ("max", "min") and len(known) == 2:
            x, y = known
            if x[0] >= y[1]:
                return args[0 if op == "max" else 1]
            if y[0] >= x[1]:
                return args[1 if op == "max" else 0]
        if op == "add":
            if args[0].equals(0):
                return args[1]
            if args[1].equals(0):
                return args[0]
        if op == "sub" and args[1].equals(0):
            return args[0]
        if op in ("mul", "div") and args[1].equals(1):
            return args[0]
        if op == "mul" and args[0].equals(1):
            return args[1]
        if op == "rem" and args[0].interval is not None and args[1].is_const:
            low, high = args[0].interval
            if low >= 0 and high < int(args[1].value):
                return args[0]
        return None

    def _simplify_convert(self, x: Ref, dtype: np.dtype) -> Ref | None:
        if x.dtype == dtype:
            return x
        if dtype != np.dtype("float32") or not is_integer(x.dtype):
            return None
        # convert(kv - q) = convert(kv) - convert(q) while every value is exact in float32: a column and
        # a row are converted instead of a tile.
        if x.node.op in ("add", "sub") and x.node.rank == TILE:
            exact = all(
                r.interval is not None and max(map(abs, r.interval)) <= _FLOAT32_EXACT
                for r in (x, *x.args)
            )
            if exact and all(a.node.rank != TILE or a.node.op in ("add", "sub") for a in x.args):
                return self.apply(x.node.op, [self.convert(a, dtype) for a in x.args])
        return None

    # -- result ---------------------------------------------------------------------------------

    def finish(self, outputs: Sequence[Ref]) -> tuple[Graph, list[int]]:
        """The graph that computes `outputs`, in a canonical order.

        Returns:
            The graph, and for each of its captures the position in `self.captures`.
        """
        order: list[Ref] = []
        seen: set[int] = set()
        for output in outputs:
            stack = [(output, False)]
            while stack:
                ref, expanded = stack.pop()
                if expanded:
                    order.append(ref)
                elif ref.position not in seen:
                    seen.add(ref.position)
                    stack.append((ref, True))
                    stack.extend((a, False) for a in reversed(ref.args))
        if len(order) > NODE_BUDGET:
            raise UnsupportedMod(
                f"it unrolls to {len(order)} scalar operations, more than the {NODE_BUDGET} that a "
                "kernel can hold"
            )
        positions = {ref.position: i for i, ref in enumerate(order)}
        kept: dict[int, int] = {}
        nodes = []
        for ref in order:
            node = dataclasses.replace(ref.node, args=tuple(positions[a] for a in ref.node.args))
            if node.op == "load":
                renamed = kept.setdefault(node["capture"], len(kept))
                node = dataclasses.replace(node, params=(("capture", renamed),))
            nodes.append(node)
        captures = [self.captures[i] for i in kept]
        types = tuple(CaptureType(tuple(np.shape(c)), np.dtype(c.dtype)) for c in captures)
        graph = Graph(tuple(nodes), tuple(positions[o.position] for o in outputs), types)
        return graph, list(kept)


def _is_nonnegative(x: Ref) -> bool:
    return x.interval is not None and x.interval[0] >= 0


def _asks_if_zero(x: Ref) -> bool:
    # Not of floats: 0.0 rem 0.0 is NaN.
    return x.node.op == "eq" and is_integer(x.args[0].dtype) and x.args[1].equals(0)


def _asks_if_remainder(x: Ref, of: Ref) -> bool:
    rest = x.args[0] if x.node.op == "ne" and x.args[1].equals(0) else None
    return rest is not None and rest.node.op == "rem" and rest.args[0] is of


def _range_of(ref: Ref) -> intervals.Interval | None:
    if ref.interval is None and is_bool(ref.dtype):
        return (0, 1)
    return ref.interval


def _result_dtype(op: str, args: tuple[Ref, ...], params: dict[str, Any]) -> np.dtype:
    if op in COMPARISONS or op == "is_finite":
        return BOOL
    return args[1].dtype if op in ("select_n", "clamp") else args[0].dtype
