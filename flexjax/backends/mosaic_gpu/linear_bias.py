"""Biases that are linear in the indices, such as ALiBi's: they move into the exponent of the softmax.

Of a score x + slope * n with n = a q + b kv + c, where a, b, c are integers and the slope is one number a tile,
the kernel computes 2^(factor x + factor slope n - m), with m the row's reference (see softmax.py). n is an integer
that float32 holds exactly. Its value at the first key that a thread holds joins m, and the way from there to
another key is one multiply-add beside the one that is there anyway, or half of one where two rows share it
(trusting.py). Exponents near a row's maximum are off by 2^-25 of the bias's change over a tile.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from flexjax.backends.mosaic_gpu.simplify import Scores
from flexjax.mods.graph import SCALAR, Graph, Literal, Node

_F32, _I32 = np.dtype("float32"), np.dtype("int32")

# Integers of at most this magnitude are exact in float32.
_EXACT = 2**24
# Biases of a greater size are taken for this one, so that there are no differences of infinities.
_MOST_BIAS = 2.0**125


class Index(NamedTuple):
    """The integer q * of_q + kv * of_kv + constant."""

    of_q: int
    of_kv: int
    constant: int

    def at(self, q: Any, kv: Any) -> Any:
        return q * self.of_q + kv * self.of_kv + self.constant


@dataclasses.dataclass(frozen=True)
class LinearBias:
    """A score as before * x + slope * index.

    Attributes:
        slope: a graph of one float32 scalar output, with the captures of the score_mod.
        index: what it multiplies.
        most: a bound of the index's size.
    """

    slope: Graph
    index: Index
    most: int

    @property
    def most_slope(self) -> float:
        """The greatest slope, in units of log2, with which every bias is finite."""
        return _MOST_BIAS / max(self.most, 1)


def linear_bias(scores: Scores, q_len: int, kv_len: int) -> LinearBias | None:
    """The bias that a score_mod adds, if it does nothing else and the bias is linear.

    Args:
        scores: the score_mod.
        q_len: indices of queries are below this, as a tile may reach over the last one.
        kv_len: the same for keys.
    """
    graph = scores.graph
    if graph is None or scores.before <= 0:
        return None
    root = graph.nodes[graph.outputs[0]]
    names = [dict(graph.nodes[a].params).get("name") for a in root.args]
    if root.op not in ("add", "sub") or root.dtype != _F32 or "score" not in names:
        return None
    place = names.index("score")
    if root.op == "sub" and place == 1:
        return None
    builder = _Slope(graph)
    index = builder.term(root.args[1 - place], -1 if root.op == "sub" else 1)
    if index is None:
        return None
    most = abs(index.of_q) * q_len + abs(index.of_kv) * kv_len + abs(index.constant)
    return LinearBias(builder.finished(), index, most) if most <= _EXACT else None


class _Slope:
    """Collects the factors of a product."""

    def __init__(self, graph: Graph):
        self.nodes, self.captures = list(graph.nodes), graph.captures
        self.slope: int | None = None

    def term(self, position: int, sign: int) -> Index | None:
        """The index of +-slope * index, if the node is such a product."""
        node = self.nodes[position]
        if node.dtype != _F32:
            return None
        if node.op == "neg":
            return self.term(node.args[0], -sign)
        if node.op in ("mul", "div"):
            scalars = [i for i, a in enumerate(node.args) if self.nodes[a].rank == SCALAR]
            if not scalars or (node.op == "div" and scalars[0] != 1):
                return None
            self._times(node.op, node.args[scalars[0]])
            return self.term(node.args[1 - scalars[0]], sign)
        index = self._index(position)
        return index and Index(*(sign * n for n in index))

    def _times(self, op: str, factor: int) -> None:
        one = self._constant(1.0) if self.slope is None else self.slope
        depends = self.nodes[one].depends | self.nodes[factor].depends
        self.nodes.append(Node(op, (one, factor), (), _F32, depends))
        self.slope = len(self.nodes) - 1

    def _constant(self, value: float) -> int:
        params = (("value", Literal.of(value, _F32)),)
        self.nodes.append(Node("const", (), params, _F32, frozenset()))
        return len(self.nodes) - 1

    def _index(self, position: int) -> Index | None:
        """A node as an index: an int32, or a float32 that holds it."""
        node = self.nodes[position]
        if node.dtype not in (_I32, _F32):
            return None
        if node.op == "const":
            value = float(node["value"].value)
            return Index(0, 0, int(value)) if value.is_integer() else None
        if node.op == "convert":
            return self._index(node.args[0])
        if node.op == "input":
            return {"q": Index(1, 0, 0), "kv": Index(0, 1, 0)}.get(node["name"])
        if node.op not in ("add", "sub", "mul", "neg"):
            return None
        parts = [part for a in node.args if (part := self._index(a)) is not None]
        if len(parts) != len(node.args):
            return None
        if node.op == "neg":
            return Index(*(-n for n in parts[0]))
        x, y = parts
        if node.op == "mul":
            x, y = (x, y) if x[:2] == (0, 0) else (y, x)
            return Index(*(x.constant * n for n in y)) if x[:2] == (0, 0) else None
        sign = 1 if node.op == "add" else -1
        return Index(*(i + sign * j for i, j in zip(x, y, strict=True)))

    def finished(self) -> Graph:
        output = self._constant(1.0) if self.slope is None else self.slope
        return Graph(tuple(self.nodes), (output,), self.captures).with_outputs(0)
