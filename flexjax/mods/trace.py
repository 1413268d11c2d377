"""From a user's score_mod or mask_mod to the IR."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexjax import _compat
from flexjax.mods.builder import Builder, Ref
from flexjax.mods.errors import UnsupportedMod
from flexjax.mods.gradient import Gradient, LoadGradient, clone, differentiate
from flexjax.mods.graph import CaptureType, Graph, Opaque, opaque_graph
from flexjax.mods.interpret import interpret, node_of, scalar
from flexjax.mods.ops import is_float

MASK_INPUTS = ("b", "h", "q", "kv")
SCORE_INPUTS = ("score", *MASK_INPUTS)
_SIGNATURES = {
    "mask_mod": "mask_mod(b, h, q_idx, kv_idx) -> bool",
    "score_mod": "score_mod(score, b, h, q_idx, kv_idx) -> score",
}

Ranges = dict[str, tuple[int, int] | None]


@dataclasses.dataclass(frozen=True)
class ScoreMod:
    """A traced score_mod: what it computes and how it is differentiated.

    Attributes:
        forward: one float32 output, the modified score.
        gradient: derivatives by the score and by every element read from a float capture; both graphs
            read the same list of captures. None for an opaque mod, which JAX differentiates as a whole.
    """

    forward: Graph
    gradient: Gradient | None


def index_ranges(batch: int, heads: int, q_len: int, kv_len: int) -> Ranges:
    """Ranges of the four index inputs; a batch or head count of 1 is left open.

    A mask of one batch row or head is broadcast, so that it must remember whether it depends on b or h at
    all; with the range [0, 0] that dependence would be folded away.
    """

    def upto(n: int) -> tuple[int, int]:
        return (0, n - 1) if n > 1 else (0, int(np.iinfo(np.int32).max))

    return {"b": upto(batch), "h": upto(heads), "q": (0, q_len - 1), "kv": (0, kv_len - 1)}


def trace_mask_mod(mask_mod: Callable[..., Any], ranges: Ranges) -> tuple[Graph, list[Any]]:
    """Traces a mask_mod into (graph with one bool output, captured arrays).

    Raises:
        TypeError: the mod is not callable with four indices, cannot be traced, or is not boolean.
    """
    jaxpr = _trace(mask_mod, "mask_mod", MASK_INPUTS)
    (out,) = jaxpr.out_avals
    if out.dtype != np.bool_:
        raise TypeError(
            f"The mask_mod {_name(mask_mod)} must return a bool (True where the query may attend), but it "
            f"returned {out.dtype}. Return a comparison, such as `q_idx >= kv_idx`; to change a score "
            "instead, pass the function as score_mod."
        )
    try:
        builder = Builder(ranges)
        graph, kept = builder.finish([_run(builder, jaxpr, MASK_INPUTS)])
        return graph, [jnp.asarray(builder.captures[i]) for i in kept]
    except UnsupportedMod as error:
        return _opaque(jaxpr, MASK_INPUTS, error.reason)


def trace_score_mod(score_mod: Callable[..., Any], ranges: Ranges) -> tuple[ScoreMod, list[Any]]:
    """Traces a score_mod into (its graphs, captured arrays).

    Raises:
        TypeError: the mod is not callable with a score and four indices, cannot be traced, or does not
            return a float.
    """
    jaxpr = _trace(score_mod, "score_mod", SCORE_INPUTS)
    (out,) = jaxpr.out_avals
    if not is_float(out.dtype):
        raise TypeError(
            f"The score_mod {_name(score_mod)} must return a floating-point score, but it returned "
            f"{out.dtype}. To allow or forbid a position, pass the function as mask_mod instead."
        )
    try:
        return _score_graphs(jaxpr, ranges)
    except UnsupportedMod as error:
        graph, captures = _opaque(jaxpr, SCORE_INPUTS, error.reason)
        return ScoreMod(graph, None), captures


def _score_graphs(jaxpr: Any, ranges: Ranges) -> tuple[ScoreMod, list[Any]]:
    # First with custom derivative rules kept whole, for differentiation; then a copy with them inlined.
    raw_builder = Builder(ranges, keep_custom=True)
    raw = _run(raw_builder, jaxpr, SCORE_INPUTS)
    builder = Builder(ranges)
    made = clone(builder, [raw], [builder.capture(c) for c in raw_builder.captures])
    score = builder.convert(made[raw.position], np.float32)
    by_score, by_loads = differentiate(raw, builder, made)
    by_loads = [(load, derivative) for load, derivative in by_loads if not derivative.equals(0)]
    outputs = [score, by_score]
    loads = []
    for load, derivative in by_loads:
        first = len(outputs)
        outputs += [derivative, *load.args]
        indices = tuple(range(first + 1, len(outputs)))
        loads.append(LoadGradient(load.node["capture"], first, indices))
    graph, kept = builder.finish(outputs)
    # A custom derivative rule may give a derivative by an element that nothing else reads.
    unread = [load for load, _ in by_loads if load.node["capture"] not in kept]
    if unread:
        graph, kept = builder.finish([*outputs, *unread])
    gradient = Gradient(
        graph,
        tuple(dataclasses.replace(load, capture=kept.index(load.capture)) for load in loads),
    )
    captures = [jnp.asarray(builder.captures[i]) for i in kept]
    return ScoreMod(graph.with_outputs(0), gradient), captures


def _run(builder: Builder, jaxpr: Any, inputs: tuple[str, ...]) -> Ref:
    args = [scalar(builder.input(name)) for name in inputs]
    opened, consts = _compat.open_jaxpr(jaxpr)
    (out,) = interpret(builder, opened, consts, args)
    return node_of(builder, out, opened.outvars[0].aval.dtype)


def _opaque(jaxpr: Any, inputs: tuple[str, ...], reason: str) -> tuple[Graph, list[Any]]:
    captures = [jnp.asarray(c) for c in jaxpr.consts]
    types = [CaptureType(tuple(c.shape), np.dtype(c.dtype)) for c in captures]
    opened, _ = _compat.open_jaxpr(jaxpr)

    def with_captures(*args: Any) -> Any:
        return _compat.eval_jaxpr(opened, args[len(inputs) :], *args[: len(inputs)])[0]

    avals = [*(v.aval for v in opened.invars), *captures]
    with _compat.x64_disabled():
        closed = jax.make_jaxpr(with_captures)(*avals)
        rules = _printed_derivative(with_captures, avals) if "custom_" in str(closed) else ""
    return opaque_graph(Opaque(closed, inputs, reason, rules), types), captures


def _printed_derivative(function: Callable[..., Any], avals: Sequence[Any]) -> str:
    """The jaxpr of a function's gradient, as text; empty where there is none."""

    def derivative(*args: Any) -> Any:
        floats = [i for i, a in enumerate(args) if is_float(a.dtype)]

        def y(*values: Any) -> Any:
            moved = list(args)
            for i, value in zip(floats, values, strict=True):
                moved[i] = value
            return function(*moved)

        value, pullback = jax.vjp(y, *(args[i] for i in floats))
        return pullback(jnp.ones_like(value))

    try:
        return str(jax.make_jaxpr(derivative)(*avals))
    except (ValueError, TypeError):  # a loop, or an integer result, has no reverse mode
        return ""


def _trace(mod: Callable[..., Any], role: str, inputs: tuple[str, ...]) -> Any:
    """The jaxpr of a mod on scalars, or a TypeError that says what is wrong with it."""
    _check_arity(mod, role, len(inputs))
    avals = [
        jax.ShapeDtypeStruct((), jnp.float32 if name == "score" else jnp.int32) for name in inputs
    ]
    try:
        with _compat.x64_disabled():
            jaxpr = jax.make_jaxpr(mod)(*avals)
    except (
        jax.errors.TracerBoolConversionError,
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise TypeError(
            f"The {role} {_name(mod)} cannot be traced: it needs the value of an index or score in Python, "
            "for example in an `if`, a Python `and`/`or`/`not`, or to index a NumPy array. Write "
            "jnp.where(condition, a, b) instead of `if`, `&`, `|` and `~` instead of `and`, `or` and `not`, "
            f"and wrap captured NumPy arrays with jnp.asarray. JAX says: {_first_line(error)}"
        ) from error
    except TypeError as error:
        raise TypeError(
            f"The {role} {_name(mod)} cannot be traced with JAX scalars: {_first_line(error)} It must be a "
            f"function {_SIGNATURES[role]} of JAX operations; captured arrays must be numeric JAX arrays."
        ) from error
    if len(jaxpr.out_avals) != 1 or jaxpr.out_avals[0].shape != ():
        shapes = [str(a.shape) for a in jaxpr.out_avals]
        returned = f"values of shapes {', '.join(shapes)}" if shapes else "None"
        raise TypeError(
            f"The {role} {_name(mod)} must return one scalar, but it returned {returned}. It is called with "
            "scalar indices; index captured arrays down to one element, as in `bias[h, q_idx, kv_idx]`."
        )
    return jaxpr


def _check_arity(mod: Any, role: str, count: int) -> None:
    if not callable(mod):
        raise TypeError(
            f"{role} must be a function {_SIGNATURES[role]}, but it is of type {type(mod).__name__}."
        )
    try:
        signature = inspect.signature(mod)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*range(count))
    except TypeError:
        raise TypeError(
            f"{role} must be a function {_SIGNATURES[role]} of {count} positional arguments, but "
            f"{_name(mod)} has the signature {_name(mod)}{signature}."
        ) from None


def _name(mod: Any) -> str:
    return f"`{getattr(mod, '__name__', type(mod).__name__)}`"


def _first_line(error: BaseException) -> str:
    line = str(error).strip().split("\n", 1)[0]
    return line if line.endswith(".") else line + "."
