"""The mod IR: a hash-consed graph of scalar operations.

A score_mod or mask_mod becomes a `Graph` over the inputs score, b, h, q and kv. A node knows on which
inputs it depends, and so its *rank* on a tile of scores: a node that depends on neither q nor kv is a
scalar there, on q alone a row vector (one value a query), on kv alone a column vector, on both (or on
the score) a full tile. Backends evaluate every node at its own rank, so row and column work is done once.

Captured arrays are not part of a graph: `load` nodes name them by position, and their values travel
beside it. Two mods with the same body and other captured values therefore share one graph, which is what
compiled kernels are cached by. Nothing in a graph refers to the user's source.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from flexjax import _compat

INPUTS = ("score", "b", "h", "q", "kv")
SCALAR, ROW, COLUMN, TILE = "scalar", "row", "column", "tile"


@dataclasses.dataclass(frozen=True)
class Literal:
    """A constant compared by its bits: NaN equals itself, and 0.0 differs from -0.0."""

    dtype: str
    data: bytes

    @classmethod
    def of(cls, value: Any, dtype: Any) -> Literal:
        dtype = np.dtype(dtype)
        return cls(dtype.name, np.asarray(value, dtype).tobytes())

    @property
    def value(self) -> np.generic:
        return np.frombuffer(self.data, np.dtype(self.dtype))[0]

    def __repr__(self) -> str:
        return repr(self.value.item() if self.dtype != "bfloat16" else float(self.value))


@dataclasses.dataclass(frozen=True)
class Node:
    """One scalar operation.

    Attributes:
        op: an input's role (`"input"`), `"const"`, `"load"`, `"opaque"`, or a name in `ops.OPS`.
        args: positions in `Graph.nodes` of the operands; all smaller than the node's own.
        params: static parameters as sorted (name, value) pairs.
        dtype: the result's dtype.
        depends: the inputs that the value depends on.
    """

    op: str
    args: tuple[int, ...]
    params: tuple[tuple[str, Any], ...]
    dtype: np.dtype
    depends: frozenset[str]

    def __getitem__(self, name: str) -> Any:
        return dict(self.params)[name]

    @property
    def rank(self) -> str:
        """`scalar`, `row` (a value a query), `column` (a value a key) or `tile`."""
        if "score" in self.depends or {"q", "kv"} <= self.depends:
            return TILE
        if "q" in self.depends:
            return ROW
        return COLUMN if "kv" in self.depends else SCALAR


@dataclasses.dataclass(frozen=True)
class CaptureType:
    """Shape and dtype of a captured array."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Graph:
    """A mod as a directed acyclic graph in topological order; hashable, compared by structure."""

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    captures: tuple[CaptureType, ...]

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.nodes, self.outputs, self.captures))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Graph) or self._hash != other._hash:
            return False
        return (self.nodes, self.outputs, self.captures) == (
            other.nodes,
            other.outputs,
            other.captures,
        )

    @property
    def depends(self) -> frozenset[str]:
        """The inputs that any output depends on."""
        return frozenset().union(*(self.nodes[o].depends for o in self.outputs))

    @property
    def opaque(self) -> Opaque | None:
        """The part that the IR cannot express, if there is one: only the xla backend runs it."""
        for node in self.nodes:
            if node.op == "opaque":
                return node["jaxpr"]
        return None

    def with_outputs(self, *outputs: int) -> Graph:
        """The graph of these of its outputs, of what they need alone, reading the same list of captures."""
        roots = tuple(self.outputs[o] for o in outputs)
        needed = set(roots)
        for position in range(len(self.nodes) - 1, -1, -1):
            if position in needed:
                needed.update(self.nodes[position].args)
        order = sorted(needed)
        renumber = {old: new for new, old in enumerate(order)}
        nodes = tuple(
            dataclasses.replace(
                self.nodes[old], args=tuple(renumber[a] for a in self.nodes[old].args)
            )
            for old in order
        )
        return Graph(nodes, tuple(renumber[r] for r in roots), self.captures)

    def is_constant(self, value: Any) -> bool:
        """Whether the single output is the constant `value`."""
        node = self.nodes[self.outputs[0]]
        return len(self.outputs) == 1 and node.op == "const" and bool(node["value"].value == value)

    def __str__(self) -> str:
        names: dict[int, str] = {}
        lines = []
        for position, node in enumerate(self.nodes):
            if node.op == "const":
                names[position] = repr(node["value"])
                continue
            if node.op == "input":
                names[position] = node["name"]
                continue
            names[position] = f"%{len(lines)}"
            shown = "".join(
                f" {k}={v}" for k, v in node.params if not isinstance(v, (Opaque, Literal))
            )
            args = ", ".join(names[a] for a in node.args)
            lines.append(f"{names[position]}: {node.dtype}<{node.rank}> = {node.op}({args}){shown}")
        lines.append("return " + ", ".join(names[o] for o in self.outputs))
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, eq=False)
class Opaque:
    """A whole mod that the IR cannot express, kept as a jaxpr.

    Compared by its printed form, so that a fresh closure with the same body is the same mod.

    Attributes:
        jaxpr: the traced function of (scalar inputs..., captured arrays...).
        inputs: names of the leading scalar inputs, in order.
        reason: what the mod does that the IR cannot express, and on which line of the user's source.
        rules: the printed derivative, where custom rules make it more than the jaxpr shows.
    """

    jaxpr: Any
    inputs: tuple[str, ...]
    reason: str
    rules: str = ""

    @functools.cached_property
    def _key(self) -> tuple[str, str, tuple[str, ...]]:
        return (str(self.jaxpr), self.rules, self.inputs)

    @functools.cached_property
    def reads(self) -> frozenset[str]:
        """The inputs that the jaxpr mentions."""
        jaxpr, _ = _compat.open_jaxpr(self.jaxpr)
        atoms = [*jaxpr.outvars, *(atom for eqn in jaxpr.eqns for atom in eqn.invars)]
        mentioned = {id(atom) for atom in atoms}
        names = zip(self.inputs, jaxpr.invars, strict=False)  # the captures come behind
        return frozenset(name for name, var in names if id(var) in mentioned)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and self._key == other._key


def opaque_graph(opaque: Opaque, captures: Sequence[CaptureType]) -> Graph:
    """The graph of a mod that only the xla backend can run."""
    score = "score" in opaque.inputs
    nodes = [
        Node(
            "input",
            (),
            (("name", name),),
            np.dtype("float32" if name == "score" else "int32"),
            frozenset({name}),
        )
        for name in opaque.inputs
    ]
    nodes.append(
        Node(
            "opaque",
            tuple(range(len(nodes))),
            (("jaxpr", opaque),),
            np.dtype("float32" if score else "bool"),
            opaque.reads,
        )
    )
    return Graph(tuple(nodes), (len(nodes) - 1,), tuple(captures))
