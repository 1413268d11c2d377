"""Whether a mask's visible keys lie in one piece: a guess that decides how live blocks are written down.

Where it is wrong, a decoding step visits blocks in vain or pays for a list that a range would have replaced; what
it computes stays the same.
"""

from __future__ import annotations

import functools

from flexjax.mods.graph import Graph, Node

# How a number changes along the keys; an interval's indicator is called ONE_PIECE.
FREE, UP, DOWN, VALLEY, PEAK, ONE_PIECE, OTHER = (
    *("free", "up", "down", "valley", "peak"),
    *("one piece", "other"),
)
_NEGATED = {UP: DOWN, DOWN: UP, VALLEY: PEAK, PEAK: VALLEY}


@functools.cache
def in_one_piece(graph: Graph) -> bool:
    """Whether every query's visible keys are an interval, as far as a glance tells."""
    kinds: list[str] = []
    for node in graph.nodes:
        kinds.append(_kind(graph, node, [kinds[a] for a in node.args]))
    return kinds[graph.outputs[0]] in (FREE, ONE_PIECE)


def _kind(graph: Graph, node: Node, args: list[str]) -> str:
    if "kv" not in node.depends:
        return FREE
    match node.op, args:
        case "input", _:
            return UP
        case (("convert" | "stop_gradient" | "floor"), [x]):
            return x
        case "neg", [x]:
            return _NEGATED.get(x, x)
        case "abs", [x] if x in (UP, DOWN):
            return VALLEY
        case "add", [x, y]:
            return _sum(x, y)
        case "sub", [x, y]:
            return _sum(x, _NEGATED.get(y, y))
        case (("mul" | "div"), [x, y]) if y == FREE:
            factor = graph.nodes[node.args[1]]
            constant = factor["value"].value if factor.op == "const" else 0
            return x if constant > 0 else _NEGATED.get(x, x) if constant < 0 else OTHER
        case (("min" | "max"), [x, y]) if FREE in (x, y) or x == y:
            return x if y == FREE else y
        case "clamp", [_, x, _]:
            return x
        case (("lt" | "le"), [x, y]):
            return _piece(_sum(x, _NEGATED.get(y, y)), (UP, DOWN, VALLEY))
        case (("gt" | "ge"), [x, y]):
            return _piece(_sum(x, _NEGATED.get(y, y)), (UP, DOWN, PEAK))
        case "eq", [x, y]:
            return _piece(_sum(x, _NEGATED.get(y, y)), (UP, DOWN))
        case "and", [x, y] if {x, y} <= {FREE, ONE_PIECE}:
            return ONE_PIECE
    return OTHER


def _sum(x: str, y: str) -> str:
    if FREE in (x, y):
        return x if y == FREE else y
    return x if x == y and x in _NEGATED else OTHER


def _piece(difference: str, good: tuple[str, ...]) -> str:
    return ONE_PIECE if difference in good else OTHER
