"""Derivatives of a score_mod, by cutting it at its loads.

A score_mod reads single elements of captured arrays: y = f(s, a_1, ..., a_n), where a_i = A_i[indices] is
what its i-th load read. Differentiating with respect to whole arrays would produce scatters of full size.
Instead the loads become scalar operands, `jax.vjp` of the straight-line scalar function f gives dy/ds and
every dy/da_i, and these are traced back into the IR. A backend then multiplies dy/da_i by the cotangent of
the score and adds it up at the load's indices, in whatever way suits their rank. Reading one array twice,
or at two different indices, needs nothing special.

A bfloat16 or float16 element is differentiated as the float32 value it is converted to, so that its
cotangent is not rounded before it is summed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexjax import _compat
from flexjax.mods.builder import Builder, Ref
from flexjax.mods.graph import Graph
from flexjax.mods.interpret import interpret, node_of, nodes_of, scalar
from flexjax.mods.ops import OPS, is_float

_FLOAT32 = np.dtype("float32")


@dataclasses.dataclass(frozen=True)
class LoadGradient:
    """The derivative of the modified score by one element that the mod reads.

    Attributes:
        capture: position of the captured array.
        derivative: position among the graph's outputs of dy/da, a float32 value.
        indices: positions among the graph's outputs of the element's indices, one a dimension.
    """

    capture: int
    derivative: int
    indices: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Gradient:
    """A score_mod with its derivatives, as one graph that shares their common work.

    Attributes:
        graph: its outputs are the modified score y, dy/ds, and then what `loads` names.
        loads: derivatives by the elements read from float captures.
    """

    graph: Graph
    loads: tuple[LoadGradient, ...]


def clone(builder: Builder, outputs: Sequence[Ref], captures: Sequence[int]) -> dict[int, Ref]:
    """Re-builds nodes of another builder in `builder`, inlining custom derivative rules.

    Args:
        builder: the builder to fill.
        outputs: nodes of the other builder.
        captures: for each capture of the other builder, its position in `builder`.

    Returns:
        The new node for the position of every old node that `outputs` need.
    """
    made: dict[int, Ref] = {}
    inlined: dict[Any, list[np.ndarray]] = {}
    for ref in _ordered(outputs):
        node, args = ref.node, [made[a.position] for a in ref.args]
        match node.op:
            case "input":
                new = builder.input(node["name"])
            case "const":
                new = builder.const(node["value"].value, node.dtype)
            case "load":
                new = builder.load(captures[node["capture"]], args, node.dtype)
            case "custom_call":
                key = (node["call"], tuple(a.position for a in args))
                if key not in inlined:
                    inlined[key] = _inline(builder, node["call"].eqn, args)
                new = inlined[key][node["output"]].reshape(-1)[node["element"]]
            case _:
                new = builder.apply(node.op, args, dict(node.params), node.dtype)
        made[ref.position] = new
    return made


def differentiate(
    raw: Ref, builder: Builder, made: dict[int, Ref]
) -> tuple[Ref, list[tuple[Ref, Ref]]]:
    """Derivatives of `raw`, a node of a builder that kept custom rules, as nodes of `builder`.

    Args:
        raw: the modified score.
        builder: where `made` lives and the derivatives go.
        made: what `clone` returned for `raw`.

    Returns:
        dy/ds, and a pair (load, dy/d load) for every element read from a float capture.
    """
    order = _ordered([raw])
    loads = [ref for ref in order if ref.node.op == "load"]
    wanted = [i for i, ref in enumerate(loads) if is_float(ref.dtype)]
    names = ("score", "b", "h", "q", "kv")

    def derivatives(*args: Any) -> tuple[Any, ...]:
        inputs, values = dict(zip(names, args[:5], strict=True)), list(args[5:])

        def y(score: Any, *elements: Any) -> Any:
            read = list(values)
            for i, element in zip(wanted, elements, strict=True):
                read[i] = element
            return _evaluate_scalar(order, raw, inputs | {"score": score}, loads, read)

        value, pullback = jax.vjp(y, inputs["score"], *(values[i] for i in wanted))
        return pullback(jnp.ones_like(value))

    avals = [jax.ShapeDtypeStruct((), _FLOAT32 if n == "score" else np.int32) for n in names]
    avals += [
        jax.ShapeDtypeStruct((), _FLOAT32 if is_float(ref.dtype) else ref.dtype) for ref in loads
    ]
    with _compat.x64_disabled():
        jaxpr = jax.make_jaxpr(derivatives)(*avals)
    elements = [made[ref.position] for ref in loads]
    args = [builder.input(name) for name in names]
    args += [builder.convert(e, _FLOAT32) if is_float(e.dtype) else e for e in elements]
    opened, consts = _compat.open_jaxpr(jaxpr)
    outs = interpret(builder, opened, consts, [scalar(a) for a in args])
    by_score, *by_load = (
        builder.convert(node_of(builder, out, _FLOAT32), _FLOAT32) for out in outs
    )
    return by_score, list(zip((elements[i] for i in wanted), by_load, strict=True))


def _evaluate_scalar(
    order: Sequence[Ref],
    output: Ref,
    inputs: dict[str, Any],
    loads: Sequence[Ref],
    values: list[Any],
) -> Any:
    """The straight-line scalar function of the nodes in `order`; float loads arrive as float32."""
    read = {ref.position: value for ref, value in zip(loads, values, strict=True)}
    env: dict[int, Any] = {}
    called: dict[Any, list[Any]] = {}
    for ref in order:
        node, args = ref.node, [env[a.position] for a in ref.args]
        match node.op:
            case "input":
                value = inputs[node["name"]]
            case "const":
                value = jnp.asarray(node["value"].value, node.dtype)
            case "load":
                value = read[ref.position].astype(node.dtype)
            case "convert" if ref.args[0].node.op == "load" and node.dtype == _FLOAT32:
                value = read[ref.args[0].position].astype(_FLOAT32)
            case "custom_call":
                key = (node["call"], tuple(a.position for a in ref.args))
                if key not in called:
                    called[key] = node["call"](*_reassemble(node["call"].eqn, args))
                value = called[key][node["output"]].reshape(-1)[node["element"]]
            case _:
                value = OPS[node.op].jax(dict(node.params), *args)
        env[ref.position] = value
    return env[output.position].astype(_FLOAT32)


def _reassemble(eqn: Any, flat: Sequence[Any]) -> list[Any]:
    operands, position = [], 0
    for var in eqn.invars:
        size = int(np.prod(var.aval.shape))
        part = flat[position : position + size]
        operands.append(
            jnp.stack(part).reshape(var.aval.shape) if var.aval.shape != () else part[0]
        )
        position += size
    return operands


def _inline(builder: Builder, eqn: Any, flat: Sequence[Ref]) -> list[np.ndarray]:
    operands, position = [], 0
    for var in eqn.invars:
        operand = np.empty(var.aval.shape, object)
        for index in np.ndindex(*var.aval.shape):
            operand[index] = flat[position]
            position += 1
        operands.append(operand)
    inner = _compat.inner_jaxpr(eqn)
    assert inner is not None, "every call with a custom rule has a jaxpr"
    outs = interpret(builder, *inner, operands)
    return [nodes_of(builder, o, v.aval.dtype) for o, v in zip(outs, eqn.outvars, strict=True)]


def _ordered(outputs: Sequence[Ref]) -> list[Ref]:
    """Every node that `outputs` need, operands first: positions grow along every edge."""
    found: dict[int, Ref] = {}
    stack = list(outputs)
    while stack:
        ref = stack.pop()
        if ref.position not in found:
            found[ref.position] = ref
            stack.extend(ref.args)
    return [found[p] for p in sorted(found)]
