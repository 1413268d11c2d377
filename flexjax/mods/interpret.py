"""Interprets a mod's jaxpr into IR nodes.

Three kinds of value meet here:

- JAX values that depend on captured arrays only. Their equations are executed on the spot, in whatever
  trace is active, so they are hoisted out of the kernel and stay ordinary differentiable JAX.
- `View`s: captured arrays under slicing, until one element of them is read.
- NumPy object arrays of nodes: scalars, and small arrays unrolled into scalars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import lax

from flexjax import _compat
from flexjax.mods import views
from flexjax.mods.builder import Builder, Ref
from flexjax.mods.errors import UnsupportedMod
from flexjax.mods.ops import ALIASES, MEANINGFUL_PARAMS, OPS
from flexjax.mods.views import MAX_UNROLL, View

# Loops with a static trip count up to this are unrolled.
MAX_TRIPS = 64

Value = Any  # a JAX value, a View, or an object array of Refs
Rule = Callable[..., list[Value]]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        return function

    return register


def scalar(ref: Ref) -> np.ndarray:
    """A node as a rank-0 object array."""
    out = np.empty((), object)
    out[()] = ref
    return out


def is_symbolic(value: Value) -> bool:
    return isinstance(value, View) or (isinstance(value, np.ndarray) and value.dtype == object)


def nodes_of(builder: Builder, value: Value, dtype: Any) -> np.ndarray:
    """Any value as an object array of nodes."""
    if isinstance(value, View):
        return value.elements(builder)
    if is_symbolic(value):
        return value
    if _compat.is_static_constant(value) and np.size(value) <= 8:
        array = np.asarray(value).astype(dtype)
        out = np.empty(array.shape, object)
        for index in np.ndindex(*array.shape):
            out[index] = builder.const(array[index], array.dtype)
        return out
    return views.view_of(builder, value).elements(builder)


def node_of(builder: Builder, value: Value, dtype: Any) -> Ref:
    """A scalar value as a node."""
    return nodes_of(builder, value, dtype).item()


def _map(function: Callable[..., Ref], shape: Sequence[int], *arrays: np.ndarray) -> np.ndarray:
    if math.prod(shape) > MAX_UNROLL:
        raise UnsupportedMod(
            f"it computes an intermediate array of shape {tuple(shape)}; at most {MAX_UNROLL} elements "
            "are unrolled"
        )
    broadcast = [np.broadcast_to(a, shape) for a in arrays]
    out = np.empty(shape, object)
    for index in np.ndindex(*shape):
        out[index] = function(*(a[index] for a in broadcast))
    return out


def interpret(
    builder: Builder, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value]
) -> list[Value]:
    """Runs `jaxpr` on values; raises `UnsupportedMod` naming the primitive and the user's line."""
    environment: dict[Any, Value] = {}

    def read(atom: Any) -> Value:
        return atom.val if _compat.is_literal(atom) else environment[atom]

    environment.update(zip(jaxpr.constvars, consts, strict=True))
    environment.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        try:
            outs = _interpret_eqn(builder, eqn, [read(v) for v in eqn.invars])
        except UnsupportedMod as error:
            if error.where:
                raise
            raise UnsupportedMod(error.what, _compat.user_line(eqn)) from None
        environment.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _interpret_eqn(builder: Builder, eqn: Any, values: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    if not any(map(is_symbolic, values)) and name not in _RULES_OF_NOTHING:
        if values and all(map(_compat.is_static_constant, values)):
            # Literals only: fold in the IR rather than by running JAX.
            values = [
                nodes_of(builder, v, a.aval.dtype) for v, a in zip(values, eqn.invars, strict=True)
            ]
        else:
            return _compat.bind(eqn, values)
    if name in _CUSTOM_CALLS and builder.keep_custom:
        return _custom_call(builder, eqn, values)
    inner = _compat.inner_jaxpr(eqn)
    if inner is not None:
        return interpret(builder, inner[0], inner[1], values)
    if name in _RULES:
        return _RULES[name](builder, eqn, *values)
    op = ALIASES.get(name, name)
    if op in OPS:
        return [_elementwise(builder, eqn, op, values)]
    raise UnsupportedMod(f"it uses the JAX primitive `{name}`")


def _elementwise(builder: Builder, eqn: Any, op: str, values: list[Value]) -> np.ndarray:
    operands = [nodes_of(builder, v, a.aval.dtype) for v, a in zip(values, eqn.invars, strict=True)]
    params = {k: _plain(eqn.params[k]) for k in MEANINGFUL_PARAMS.get(op, ())}
    aval = eqn.outvars[0].aval
    return _map(lambda *refs: builder.apply(op, refs, params, aval.dtype), aval.shape, *operands)


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, lax.RoundingMethod) else value


# -- calls and control flow -------------------------------------------------------------------------

_CUSTOM_CALLS = ("custom_jvp_call", "custom_vjp_call")
# Primitives that make values out of nothing: never hoisted, always nodes.
_RULES_OF_NOTHING = ("iota", "empty2")


def _custom_call(builder: Builder, eqn: Any, values: list[Value]) -> list[np.ndarray]:
    """Keeps a custom derivative rule as nodes: one node an output element, all sharing the call."""
    operands = [nodes_of(builder, v, a.aval.dtype) for v, a in zip(values, eqn.invars, strict=True)]
    flat = tuple(ref for operand in operands for ref in operand.reshape(-1))
    call = _compat.Call(eqn)
    results = []
    for number, var in enumerate(eqn.outvars):
        if math.prod(var.aval.shape) > MAX_UNROLL:
            raise UnsupportedMod(f"a custom derivative rule returns shape {var.aval.shape}")
        out = np.empty(var.aval.shape, object)
        for position, index in enumerate(np.ndindex(*var.aval.shape)):
            params = {"call": call, "output": number, "element": position}
            out[index] = builder.make("custom_call", flat, params, np.dtype(var.aval.dtype))
        results.append(out)
    return results


@_rule("cond")
def _cond(builder: Builder, eqn: Any, index: Value, *operands: Value) -> list[Value]:
    branches = eqn.params["branches"]
    which = node_of(builder, index, eqn.invars[0].aval.dtype)

    def run(branch: Any) -> list[np.ndarray]:
        jaxpr, consts = _compat.open_jaxpr(branch)
        outs = interpret(builder, jaxpr, consts, operands)
        return [nodes_of(builder, o, v.aval.dtype) for o, v in zip(outs, eqn.outvars, strict=True)]

    if which.is_const:
        return list(run(branches[int(np.clip(int(which.value), 0, len(branches) - 1))]))
    results = run(branches[0])
    for number, branch in enumerate(branches[1:], start=1):
        # lax.switch clamps its index, so that the last branch also serves everything above.
        taken = (
            which
            if which.dtype == np.bool_
            else builder.apply("ge", (which, builder.const(number, which.dtype)))
        )
        results = [
            _map(lambda a, b, t=taken: builder.apply("select_n", (t, a, b)), old.shape, old, new)
            for old, new in zip(results, run(branch), strict=True)
        ]
    return list(results)


def _leading(builder: Builder, value: Value, i: int) -> Value:
    if isinstance(value, View):
        start = [i] + [0] * (len(value.shape) - 1)
        part = value.shifted(builder, start, (1, *value.shape[1:]))
        return part.keeping(range(1, len(value.shape)))
    if is_symbolic(value):
        return value[i] if value.ndim > 1 else scalar(value[i])
    return lax.index_in_dim(value, i, keepdims=False)


@_rule("scan")
def _scan(builder: Builder, eqn: Any, *values: Value) -> list[Value]:
    length = eqn.params["length"]
    if length > MAX_TRIPS:
        raise UnsupportedMod(f"it loops {length} times; loops of at most {MAX_TRIPS} are unrolled")
    jaxpr, closed = _compat.open_jaxpr(eqn.params["jaxpr"])
    n_consts, n_carry = _compat.scan_split(eqn, values)
    consts, carry = list(values[:n_consts]), list(values[n_consts : n_consts + n_carry])
    xs = values[n_consts + n_carry :]
    ys: list[list[Value]] = []
    steps = range(length)
    for i in reversed(steps) if eqn.params["reverse"] else steps:
        step = [_leading(builder, x, i) for x in xs]
        outs = interpret(builder, jaxpr, closed, [*consts, *carry, *step])
        carry, y = list(outs[:n_carry]), outs[n_carry:]
        ys.append(y)
    if eqn.params["reverse"]:
        ys.reverse()
    out_vars = eqn.outvars[n_carry:]
    stacked = []
    for number, var in enumerate(out_vars):
        if length == 0:
            stacked.append(np.empty(var.aval.shape, object))
            continue
        stacked.append(np.stack([nodes_of(builder, y[number], var.aval.dtype) for y in ys]))
    return [*carry, *stacked]


@_rule("while")
def _while(builder: Builder, eqn: Any, *values: Value) -> list[Value]:
    raise UnsupportedMod("it contains a loop whose trip count is not known when it is traced")


# -- reading captured arrays ------------------------------------------------------------------------


@_rule("dynamic_slice")
def _dynamic_slice(builder: Builder, eqn: Any, operand: Value, *starts: Value) -> list[Value]:
    sizes = eqn.params["slice_sizes"]
    refs = [node_of(builder, s, a.aval.dtype) for s, a in zip(starts, eqn.invars[1:], strict=True)]
    if isinstance(operand, View) or not is_symbolic(operand):
        view = operand if isinstance(operand, View) else views.view_of(builder, operand)
        return [views.dynamic_slice(builder, view, refs, sizes)]
    # A slice of a small computed vector: a chain of selects.
    out = operand
    for axis, (start, size) in enumerate(zip(refs, sizes, strict=True)):
        extent = out.shape[axis]
        start = builder.clamp(start, 0, extent - size)
        result = np.take(out, range(size), axis=axis)
        for first in range(1, extent - size + 1):
            reached = builder.apply("ge", (start, builder.const(first, start.dtype)))
            moved = np.take(out, range(first, first + size), axis=axis)
            result = _map(
                lambda a, b, r=reached: builder.apply("select_n", (r, a, b)),
                result.shape,
                result,
                moved,
            )
        out = result
    return [out]


@_rule("gather")
def _gather(builder: Builder, eqn: Any, operand: Value, indices: Value) -> list[Value]:
    if is_symbolic(operand) and not isinstance(operand, View):
        raise UnsupportedMod("it gathers from an array that the mod itself computes")
    view = operand if isinstance(operand, View) else views.view_of(builder, operand)
    refs = nodes_of(builder, indices, eqn.invars[1].aval.dtype)
    return [views.gather(builder, view, refs, eqn.params, eqn.outvars[0].aval.shape)]


# -- shapes of small arrays -------------------------------------------------------------------------


@_rule("squeeze")
def _squeeze(builder: Builder, eqn: Any, x: Value) -> list[Value]:
    dimensions = eqn.params["dimensions"]
    if isinstance(x, View):
        return [views.squeeze(x, dimensions)]
    return [np.squeeze(x, tuple(dimensions))]


@_rule("slice")
def _slice(builder: Builder, eqn: Any, x: Value) -> list[Value]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    if isinstance(x, View) and set(strides) == {1}:
        sizes = [b - a for a, b in zip(starts, limits, strict=True)]
        return [x.shifted(builder, list(starts), sizes)]
    x = nodes_of(builder, x, eqn.invars[0].aval.dtype)
    return [x[tuple(slice(a, b, s) for a, b, s in zip(starts, limits, strides, strict=True))]]


@_rule("transpose")
def _transpose(builder: Builder, eqn: Any, x: Value) -> list[Value]:
    permutation = eqn.params["permutation"]
    return [x.keeping(permutation) if isinstance(x, View) else x.transpose(permutation)]


def _structural(function: Callable[[np.ndarray, Any], np.ndarray]) -> Rule:
    def rule(builder: Builder, eqn: Any, x: Value, *_: Value) -> list[Value]:
        return [np.asarray(function(nodes_of(builder, x, eqn.invars[0].aval.dtype), eqn.params))]

    return rule


def _broadcast(x: np.ndarray, params: Any) -> np.ndarray:
    shape = params["shape"]
    if math.prod(shape) > MAX_UNROLL:
        raise UnsupportedMod(f"it broadcasts to shape {tuple(shape)}")
    expanded = [1] * len(shape)
    for axis, dim in enumerate(params["broadcast_dimensions"]):
        expanded[dim] = x.shape[axis]
    return np.broadcast_to(x.reshape(expanded), shape)


_RULES["broadcast_in_dim"] = _structural(_broadcast)
_RULES["reshape"] = _structural(lambda x, params: x.reshape(params["new_sizes"]))
_RULES["expand_dims"] = _structural(lambda x, p: np.expand_dims(x, tuple(p["dimensions"])))
_RULES["rev"] = _structural(lambda x, params: np.flip(x, params["dimensions"]))
# Of a scalar, these are the value itself: where it is placed and over which mesh axes it varies does not matter.
for _name in ("copy", "copy_p", "reshard", "sharding_constraint", "pvary", "pcast", "mesh_cast"):
    _RULES[_name] = _structural(lambda x, params: x)


@_rule("iota")
def _iota(builder: Builder, eqn: Any, *_: Value) -> list[Value]:
    shape, dimension = eqn.params["shape"], eqn.params["dimension"]
    if math.prod(shape) > MAX_UNROLL:
        raise UnsupportedMod(f"it makes an iota of shape {tuple(shape)}")
    out = np.empty(shape, object)
    for index in np.ndindex(*shape):
        out[index] = builder.const(index[dimension], eqn.params["dtype"])
    return [out]


@_rule("concatenate")
def _concatenate(builder: Builder, eqn: Any, *xs: Value) -> list[Value]:
    parts = [nodes_of(builder, x, v.aval.dtype) for x, v in zip(xs, eqn.invars, strict=True)]
    return [np.concatenate(parts, eqn.params["dimension"])]


@_rule("stack")
def _stack(builder: Builder, eqn: Any, *xs: Value) -> list[Value]:
    parts = [nodes_of(builder, x, v.aval.dtype) for x, v in zip(xs, eqn.invars, strict=True)]
    return [np.stack(parts, eqn.params["axis"])]


@_rule("unstack")
def _unstack(builder: Builder, eqn: Any, x: Value) -> list[Value]:
    moved = np.moveaxis(nodes_of(builder, x, eqn.invars[0].aval.dtype), eqn.params["axis"], 0)
    return [_leading(builder, moved, i) for i in range(moved.shape[0])]


_REDUCTIONS = {
    "reduce_sum": "add",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_prod": "mul",
    "reduce_and": "and",
    "reduce_or": "or",
    "reduce_xor": "xor",
}


@_rule(*_REDUCTIONS)
def _reduce(builder: Builder, eqn: Any, x: Value) -> list[Value]:
    op, axes = _REDUCTIONS[eqn.primitive.name], tuple(eqn.params["axes"])
    shape = eqn.outvars[0].aval.shape
    x = nodes_of(builder, x, eqn.invars[0].aval.dtype)
    rows = np.moveaxis(x, axes, range(len(axes))).reshape((-1, *shape))
    if rows.shape[0] == 0:
        raise UnsupportedMod("it reduces an empty array")
    out = rows[0:1].reshape(shape)
    for row in rows[1:]:
        out = _map(lambda a, b: builder.apply(op, (a, b)), shape, out, np.asarray(row))
    return [out]


@_rule("dot_general")
def _dot_general(builder: Builder, eqn: Any, a: Value, b: Value) -> list[Value]:
    contracted, batch = eqn.params["dimension_numbers"]
    a = nodes_of(builder, a, eqn.invars[0].aval.dtype)
    b = nodes_of(builder, b, eqn.invars[1].aval.dtype)
    if any(map(len, batch)) or a.ndim != 1 or b.ndim != 1 or not len(contracted[0]):
        raise UnsupportedMod(
            "it multiplies matrices; only dot products of small vectors are unrolled"
        )
    dtype = eqn.outvars[0].aval.dtype
    products = [
        builder.apply("mul", (builder.convert(x, dtype), builder.convert(y, dtype)))
        for x, y in zip(a, b, strict=True)
    ]
    total = products[0]
    for product in products[1:]:
        total = builder.apply("add", (total, product))
    return [scalar(total)]


@_rule("convert_element_type")
def _convert(builder: Builder, eqn: Any, x: Value) -> list[Value]:
    x = nodes_of(builder, x, eqn.invars[0].aval.dtype)
    return [_map(lambda r: builder.convert(r, eqn.params["new_dtype"]), x.shape, x)]


@_rule("bitcast_convert_type")
def _bitcast(builder: Builder, eqn: Any, x: Value) -> list[Value]:
    dtype = np.dtype(eqn.params["new_dtype"])
    x = nodes_of(builder, x, eqn.invars[0].aval.dtype)
    if eqn.outvars[0].aval.shape != x.shape:
        raise UnsupportedMod("it reinterprets bits as a type of another width")
    return [
        _map(lambda r: builder.apply("bitcast", (r,), {"dtype": dtype.name}, dtype), x.shape, x)
    ]


@_rule("one_minus_square")
def _one_minus_square(builder: Builder, eqn: Any, x: Value) -> list[Value]:
    x = nodes_of(builder, x, eqn.invars[0].aval.dtype)

    def compute(r: Ref) -> Ref:
        return builder.apply("sub", (builder.const(1, r.dtype), builder.apply("mul", (r, r))))

    return [_map(compute, x.shape, x)]


@_rule("log2")
def _log2(builder: Builder, eqn: Any, x: Value) -> list[Value]:
    x = nodes_of(builder, x, eqn.invars[0].aval.dtype)

    def compute(r: Ref) -> Ref:
        return builder.apply(
            "mul", (builder.apply("log", (r,)), builder.const(1 / np.log(2.0), r.dtype))
        )

    return [_map(compute, x.shape, x)]
