"""Rewrites a score_mod for the kernel: factors that cost nothing elsewhere leave it.

The kernel computes p = 2^(after * g(before * x) - m) of the products x = Q K^T, with g the score_mod's graph and
`after` in a fused multiply-add that is there anyway. A constant that multiplies the score on its way in joins
`before`, one on its way out joins `after`; and where the score is but added to something,

    scale * x + y = scale * (x + y / scale),

the scale itself moves out. Where the score first meets a factor of a head, a query or a key, it moves into that,
which is computed less often. All of it is exact but for float32 rounding, and keeps infinities and NaN, since only
positive finite factors move.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from flexjax.mods.graph import SCALAR, TILE, Graph, Literal, Node

F32 = np.dtype("float32")
# Factors that move are this far from overflow and underflow at most.
_LEAST, _MOST = 2.0**-60, 2.0**60


@dataclasses.dataclass(frozen=True)
class Scores:
    """A score as after * graph(before * x).

    Attributes:
        graph: of the score_mod; None for the identity.
        before, after: factors; `after` is positive.
    """

    graph: Graph | None
    before: float
    after: float


@functools.cache
def simplify(graph: Graph | None, scale: float) -> Scores:
    """Writes graph(scale * x) as after * g(before * x)."""
    movable = _is_movable(scale)
    if graph is None:
        return Scores(None, 1.0, scale) if movable else Scores(None, scale, 1.0)
    graph, after = _without_factor_on_the_way_out(graph)
    graph, factor = _without_factor_on_the_way_in(graph)
    scores = Scores(graph, scale * factor, after)
    if _is_movable(scores.before):
        moved = _with_scale_outside(scores)
        if moved is not None:
            return moved
        return _with_scale_in_factor(scores)
    return scores


def _is_movable(factor: float) -> bool:
    return _LEAST < factor < _MOST


def _constant(node: Node) -> float | None:
    """The value of a float32 constant that may move."""
    if node.op != "const" or node.dtype != F32:
        return None
    value = float(node["value"].value)
    return value if _is_movable(value) else None


def _factor(graph: Graph, node: Node) -> tuple[int, float] | None:
    """(x, c) if the node is x * c or x / c with a constant c, in float32."""
    if node.op not in ("mul", "div") or node.dtype != F32:
        return None
    left, right = node.args
    c = _constant(graph.nodes[right])
    if c is not None:
        return left, c if node.op == "mul" else 1.0 / c
    c = _constant(graph.nodes[left]) if node.op == "mul" else None
    return None if c is None else (right, c)


def _without_factor_on_the_way_out(graph: Graph) -> tuple[Graph, float]:
    (output,), total = graph.outputs, 1.0
    while (found := _factor(graph, graph.nodes[output])) is not None:
        output, c = found
        if not _is_movable(total * c):
            break
        graph, total = dataclasses.replace(graph, outputs=(output,)), total * c
    return graph, total


def _score(graph: Graph) -> int | None:
    """The position of the score among the nodes."""
    named = (("name", "score"),)
    return next(
        (i for i, n in enumerate(graph.nodes) if n.op == "input" and n.params == named), None
    )


def live(graph: Graph) -> list[int]:
    """Positions of the nodes that the outputs need, in order."""
    live = set(graph.outputs)
    for i in reversed(range(len(graph.nodes))):
        if i in live:
            live.update(graph.nodes[i].args)
    return sorted(live)


def _without_factor_on_the_way_in(graph: Graph) -> tuple[Graph, float]:
    score = _score(graph)
    if score is None or score in graph.outputs:
        return graph, 1.0
    users = [i for i in live(graph) if score in graph.nodes[i].args]
    found = {_factor(graph, graph.nodes[i]) for i in users}
    factor = found.pop() if len(found) == 1 else None
    if factor is None or factor[0] != score:
        return graph, 1.0
    return _redirected(graph, dict.fromkeys(users, score)), factor[1]


def _redirected(graph: Graph, to: dict[int, int]) -> Graph:
    """The graph with uses of some nodes replaced by uses of earlier ones."""
    nodes = tuple(
        dataclasses.replace(n, args=tuple(to.get(a, a) for a in n.args)) for n in graph.nodes
    )
    return Graph(nodes, tuple(to.get(o, o) for o in graph.outputs), graph.captures)


def _with_scale_outside(scores: Scores) -> Scores | None:
    """Applies scale * x + y = scale * (x + y / scale), if the score is used that way alone."""
    graph = scores.graph
    assert graph is not None, "the identity has no factors left"
    score, (output,) = _score(graph), graph.outputs
    if score == output:
        return Scores(None, 1.0, scores.before * scores.after)
    root = graph.nodes[output]
    users = [i for i in live(graph) if score in graph.nodes[i].args]
    if root.op not in ("add", "sub") or root.dtype != F32 or users != [output]:
        return None
    if root.args.count(score) != 1 or (root.op == "sub" and root.args[1] == score):
        return None
    if not _is_movable(scores.before * scores.after):
        return None
    nodes = list(graph.nodes)

    def new(op: str, *args: int, value: float | None = None) -> int:
        depends = frozenset().union(*(nodes[a].depends for a in args))
        params = () if value is None else (("value", Literal.of(value, F32)),)
        nodes.append(Node(op, args, params, F32, depends))
        return len(nodes) - 1

    (term,) = (a for a in root.args if a != score)
    inverse = new("const", value=1.0 / scores.before)
    factors = nodes[term]
    scalars = [a for a in factors.args if nodes[a].rank == SCALAR] if factors.op == "mul" else []
    if scalars and factors.rank == TILE:  # the scalar takes the factor
        (other,) = (a for a in factors.args if a != scalars[0])
        term = new("mul", new("mul", scalars[0], inverse), other)
    else:
        term = new("mul", term, inverse)
    args = tuple(a if a == score else term for a in root.args)
    nodes.append(dataclasses.replace(root, args=args))
    graph = Graph(tuple(nodes), (len(nodes) - 1,), graph.captures)
    return Scores(graph, 1.0, scores.before * scores.after)


def _with_scale_in_factor(scores: Scores) -> Scores:
    """Applies (scale * x) * y = x * (scale * y), if the score is used that way alone and y is not one a score."""
    graph = scores.graph
    assert graph is not None, "the identity has no factors left"
    score = _score(graph)
    users = [i for i in live(graph) if score in graph.nodes[i].args]
    if scores.before == 1.0 or len(users) != 1:
        return scores
    (user,) = users
    node = graph.nodes[user]
    others = [a for a in node.args if a != score]
    if node.op != "mul" or node.dtype != F32 or len(others) != 1:
        return scores
    other = graph.nodes[others[0]]
    if other.rank == TILE:
        return scores
    scale = Node("const", (), (("value", Literal.of(scores.before, F32)),), F32, frozenset())
    scaled = Node("mul", (others[0], user), (), F32, other.depends)
    product = dataclasses.replace(
        node, args=tuple(user + 1 if a == others[0] else a for a in node.args)
    )

    def moved(position: int) -> int:
        return position if position < user else position + 2

    after = [
        dataclasses.replace(n, args=tuple(map(moved, n.args))) for n in graph.nodes[user + 1 :]
    ]
    nodes = (*graph.nodes[:user], scale, scaled, product, *after)
    return Scores(Graph(nodes, tuple(map(moved, graph.outputs)), graph.captures), 1.0, scores.after)
