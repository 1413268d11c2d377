"""Graph to graph: mods under shifted queries, selected batch rows, and vmap.

The backends know nothing of these: a mask that was sliced, or an attention under `jax.vmap`, reaches them as
an ordinary problem whose mods have been rewritten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from flexjax import _compat
from flexjax.mods.builder import INT32, Builder, Ref
from flexjax.mods.gradient import Gradient, LoadGradient
from flexjax.mods.graph import CaptureType, Graph, Opaque, opaque_graph
from flexjax.mods.trace import Ranges, ScoreMod

_INT32_MAX = int(np.iinfo(np.int32).max)


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """How a mod's inputs and loads change; one description serves graphs and opaque mods.

    Attributes:
        extra: types of captured arrays appended to the mod's own.
        inputs: for an input's name, its replacement: `(builder, new input, extra capture positions) -> Ref`.
        inputs_jax: the same on JAX scalars: `(new input, extra arrays) -> scalar`.
        leading: for each capture, whether it gains a leading axis, indexed by `leading_index`.
        leading_index: of the new input `b`, in both forms.
        leading_size: length of that axis.
    """

    ranges: Ranges
    extra: tuple[CaptureType, ...] = ()
    inputs: dict[str, Callable[[Builder, Ref, Sequence[int]], Ref]] = dataclasses.field(
        default_factory=dict
    )
    inputs_jax: dict[str, Callable[[Any, Sequence[Any]], Any]] = dataclasses.field(
        default_factory=dict
    )
    leading: tuple[bool, ...] = ()
    leading_index: Callable[[Builder, Ref], Ref] = lambda builder, b: b
    leading_index_jax: Callable[[Any], Any] = lambda b: b
    leading_size: int = 0


def shift_queries(ranges: Ranges) -> Rewrite:
    """Makes q become q + offset, where the offset is one more capture: a non-negative int32 scalar."""

    def shifted(builder: Builder, q: Ref, extra: Sequence[int]) -> Ref:
        # The offset stays inside the masks it was sliced from, so the sum cannot wrap.
        room = (0, _INT32_MAX - q.interval[1]) if q.interval is not None else None
        return builder.apply("add", (q, builder.load(extra[0], (), INT32, interval=room)))

    return Rewrite(
        ranges,
        extra=(CaptureType((), INT32),),
        inputs={"q": shifted},
        inputs_jax={"q": lambda q, extra: q + extra[0]},
    )


def select(ranges: Ranges, name: str, count: int, limit: int) -> Rewrite:
    """Input `name` (b or h) becomes table[name]; the table is one more capture, int32 of length `count`."""

    def selected(builder: Builder, index: Ref, extra: Sequence[int]) -> Ref:
        inside = builder.clamp(index, 0, count - 1)
        return builder.load(extra[0], (inside,), INT32, interval=(0, max(limit - 1, 0)))

    return Rewrite(
        ranges,
        extra=(CaptureType((count,), INT32),),
        inputs={name: selected},
        inputs_jax={name: lambda index, extra: extra[0][index]},
    )


def fold_batch(ranges: Ranges, batch: int, size: int, leading: Sequence[bool]) -> Rewrite:
    """The batch row becomes n * batch + b, for a vmapped axis n of length `size`.

    `leading` says which captures carry that axis in front.
    """

    def row(builder: Builder, b: Ref, extra: Sequence[int]) -> Ref:
        return builder.apply("rem", (b, builder.const(batch, INT32)))

    def lane(builder: Builder, b: Ref) -> Ref:
        return builder.apply("div", (b, builder.const(batch, INT32)))

    return Rewrite(
        ranges,
        inputs={"b": row},
        inputs_jax={"b": lambda b, extra: b % batch},
        leading=tuple(leading),
        leading_index=lane,
        leading_index_jax=lambda b: b // batch,
        leading_size=size,
    )


def rewrite_graph(graph: Graph, rewrite: Rewrite) -> Graph:
    """Applies a rewrite to a mod; the new captures are the old ones followed by `rewrite.extra`."""
    return _rewrite(graph, (), rewrite)[0]


def rewrite_score_mod(mod: ScoreMod, rewrite: Rewrite) -> ScoreMod:
    """Applies a rewrite to a score_mod and its derivatives."""
    forward = rewrite_graph(mod.forward, rewrite)
    if mod.gradient is None:
        return ScoreMod(forward, None)
    graph, loads = _rewrite(mod.gradient.graph, mod.gradient.loads, rewrite)
    return ScoreMod(forward, Gradient(graph, loads))


def _new_captures(graph: Graph, rewrite: Rewrite) -> tuple[CaptureType, ...]:
    leading = rewrite.leading or (False,) * len(graph.captures)
    own = tuple(
        dataclasses.replace(c, shape=(rewrite.leading_size, *c.shape)) if lead else c
        for c, lead in zip(graph.captures, leading, strict=True)
    )
    return own + rewrite.extra


def _rewrite(
    graph: Graph, loads: Sequence[LoadGradient], rewrite: Rewrite
) -> tuple[Graph, tuple[LoadGradient, ...]]:
    if graph.opaque is not None:
        return _rewrite_opaque(graph, graph.opaque, rewrite), ()
    builder = Builder(rewrite.ranges)
    captures = _new_captures(graph, rewrite)
    # Captures are named by position here; the arrays themselves stay with the caller.
    positions = [builder.capture(_Slot(c)) for c in captures]
    extra = positions[len(graph.captures) :]
    leading = rewrite.leading or (False,) * len(graph.captures)
    refs: list[Ref] = []
    for node in graph.nodes:
        args = tuple(refs[a] for a in node.args)
        match node.op:
            case "input":
                new = builder.input(node["name"])
                change = rewrite.inputs.get(node["name"])
                refs.append(new if change is None else change(builder, new, extra))
            case "const":
                refs.append(builder.const(node["value"].value, node.dtype))
            case "load":
                capture = node["capture"]
                if leading[capture]:
                    args = (_lane(builder, rewrite), *args)
                refs.append(builder.load(positions[capture], args, node.dtype))
            case _:
                refs.append(builder.apply(node.op, args, dict(node.params), node.dtype))
    outputs = [refs[o] for o in graph.outputs]
    renamed = []
    for load in loads:
        indices = load.indices
        if leading[load.capture]:
            outputs.append(_lane(builder, rewrite))
            indices = (len(outputs) - 1, *indices)
        renamed.append(dataclasses.replace(load, indices=indices))
    built, kept = builder.finish(outputs)
    return _keep_all_captures(built, kept, captures), tuple(renamed)


def _lane(builder: Builder, rewrite: Rewrite) -> Ref:
    index = rewrite.leading_index(builder, builder.input("b"))
    return builder.clamp(index, 0, rewrite.leading_size - 1)


@dataclasses.dataclass(eq=False)
class _Slot:
    """Stands for a captured array whose value is not at hand."""

    type: CaptureType

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape

    @property
    def dtype(self) -> np.dtype:
        return self.type.dtype


def _keep_all_captures(graph: Graph, kept: Sequence[int], captures: Sequence[CaptureType]) -> Graph:
    """Names captures as the caller does: a rewrite drops none, so that operands keep their places."""
    nodes = tuple(
        dataclasses.replace(node, params=(("capture", kept[node["capture"]]),))
        if node.op == "load"
        else node
        for node in graph.nodes
    )
    return Graph(nodes, graph.outputs, tuple(captures))


def _rewrite_opaque(graph: Graph, opaque: Opaque, rewrite: Rewrite) -> Graph:
    captures = _new_captures(graph, rewrite)
    n_inputs, n_own = len(opaque.inputs), len(graph.captures)
    leading = rewrite.leading or (False,) * n_own
    jaxpr, consts = _compat.open_jaxpr(opaque.jaxpr)

    def rewritten(*args: Any) -> Any:
        inputs = dict(zip(opaque.inputs, args[:n_inputs], strict=True))
        own, extra = list(args[n_inputs : n_inputs + n_own]), args[n_inputs + n_own :]
        if any(leading):
            lane = rewrite.leading_index_jax(inputs["b"])
            own = [a[lane] if lead else a for a, lead in zip(own, leading, strict=True)]
        for name, change in rewrite.inputs_jax.items():
            inputs[name] = change(inputs[name], extra)
        return _compat.eval_jaxpr(jaxpr, consts, *inputs.values(), *own)[0]

    avals = [v.aval for v in jaxpr.invars[:n_inputs]]
    avals += [jax.ShapeDtypeStruct(c.shape, c.dtype) for c in captures]
    with _compat.x64_disabled():
        closed = jax.make_jaxpr(rewritten)(*avals)
    return opaque_graph(dataclasses.replace(opaque, jaxpr=closed), captures)
