"""Evaluates a graph with JAX on arrays of indices, or with NumPy on the host.

Inputs broadcast against each other; every node is computed at the broadcast shape of what it depends on,
so that work on a row or a column of a tile is done once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexjax import _compat
from flexjax.mods.graph import Graph, Node, Opaque
from flexjax.mods.ops import OPS


def evaluate(graph: Graph, captures: Sequence[Any], inputs: Mapping[str, Any]) -> list[Any]:
    """Values of the graph's outputs with JAX.

    Args:
        graph: the mod.
        captures: values of `graph.captures`.
        inputs: arrays for `score`, `b`, `h`, `q`, `kv`, of ranks that broadcast without being expanded
            (all of one rank, or scalars).

    Returns:
        One array an output, broadcastable against the inputs but not expanded to their common shape.
    """
    values: list[Any] = []
    for node in graph.nodes:
        args = [values[a] for a in node.args]
        match node.op:
            case "input":
                value = inputs[node["name"]]
            case "const":
                value = jnp.asarray(node["value"].value, node.dtype)
            case "load":
                array = captures[node["capture"]]
                value = array.at[tuple(args)].get(mode="clip") if args else array
            case "opaque":
                value = _call_opaque(node["jaxpr"], captures, inputs).astype(node.dtype)
            case _:
                value = apply(node, args)
        values.append(value)
    return [values[o] for o in graph.outputs]


def evaluate_numpy(graph: Graph, captures: Sequence[Any], inputs: Mapping[str, Any]) -> list[Any]:
    """The same on the host.

    Raises:
        NotImplementedError: an operation has no exact NumPy counterpart.
    """
    values: list[Any] = []
    with np.errstate(all="ignore"):
        for node in graph.nodes:
            args = [values[a] for a in node.args]
            match node.op:
                case "input":
                    value = inputs[node["name"]]
                case "const":
                    value = node["value"].value
                case "load":
                    array = captures[node["capture"]]
                    clipped = [np.clip(i, 0, n - 1) for i, n in zip(args, array.shape, strict=True)]
                    value = array[tuple(clipped)]
                case _:
                    value = apply_numpy(node, args)
            values.append(value)
    return [values[o] for o in graph.outputs]


def apply(node: Node, args: list[Any]) -> Any:
    """One elementwise operation with JAX, of operands that broadcast."""
    return OPS[node.op].jax(dict(node.params), *_broadcast(args))


def apply_numpy(node: Node, args: list[Any]) -> Any:
    """One elementwise operation with NumPy.

    Raises:
        NotImplementedError: it has no exact NumPy counterpart.
    """
    numpy_fn = OPS[node.op].numpy if node.op in OPS else None
    if numpy_fn is None:
        raise NotImplementedError(f"{node.op} has no NumPy counterpart.")
    return np.asarray(numpy_fn(dict(node.params), *args)).astype(node.dtype, copy=False)


def _broadcast(args: list[Any]) -> list[Any]:
    shape = jnp.broadcast_shapes(*(jnp.shape(a) for a in args))
    return [jnp.broadcast_to(a, shape) for a in args]


def _call_opaque(opaque: Opaque, captures: Sequence[Any], inputs: Mapping[str, Any]) -> jax.Array:
    """Runs a whole mod under vmap, over every broadcast position."""
    jaxpr, consts = _compat.open_jaxpr(opaque.jaxpr)

    def scalar_mod(*args: Any) -> Any:
        return _compat.eval_jaxpr(jaxpr, consts, *args, *captures)[0]

    args = _broadcast([jnp.asarray(inputs[name]) for name in opaque.inputs])
    flat = jax.vmap(scalar_mod)(*(a.reshape(-1) for a in args))
    return flat.reshape(args[0].shape)
