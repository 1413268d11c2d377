"""What a score_mod reads for each key, split off so that a step can read it before it has its scores.

A read from global memory takes longer than a product of the scores. `score + bias[b, h, kv]` depends on the scores
only in the end: `bias[b, h, kv]` is read before, and waits in registers, one for each key that a thread holds.
When, consumer_sm90.py says.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from flexjax.backends.mosaic_gpu.simplify import live
from flexjax.mods.graph import COLUMN, TILE, Graph, Node

F32 = np.dtype("float32")


@dataclasses.dataclass(frozen=True)
class Split:
    """A graph in two parts.

    Attributes:
        ahead: outputs are values by key, float32; None if there are none.
        rest: the graph, with `given` nodes in place of these.
    """

    ahead: Graph | None
    rest: Graph


@functools.cache
def split(graph: Graph, most: int) -> Split:
    """Splits off up to `most` values by key that are read from captured arrays."""
    reading = _reading_keys(graph)
    used = {a for i in live(graph) for a in graph.nodes[i].args if graph.nodes[i].rank == TILE}
    used.update(graph.outputs)
    chosen = [
        i
        for i in sorted(used & reading)
        if graph.nodes[i].rank == COLUMN and graph.nodes[i].dtype == F32
    ][:most]
    if not chosen:
        return Split(None, graph)
    nodes = list(graph.nodes)
    for number, i in enumerate(chosen):
        nodes[i] = Node("given", (), (("number", number),), F32, nodes[i].depends)
    rest = dataclasses.replace(graph, nodes=tuple(nodes))
    return Split(dataclasses.replace(graph, outputs=tuple(chosen)), rest)


def _reading_keys(graph: Graph) -> set[int]:
    """The nodes for which something is read at every key."""
    found: set[int] = set()
    for i, node in enumerate(graph.nodes):
        if (node.op == "load" and "kv" in node.depends) or not found.isdisjoint(node.args):
            found.add(i)
    return found
