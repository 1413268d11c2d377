"""The only file that touches names of JAX which differ between releases or are not public.

Tested with jax 0.11.2 and 0.12.0.1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src.hijax import call_hi_primitive_p
from jax._src.interpreters import ad, batching
from jax.experimental import hijax
from jax.extend import core as jex_core
from jax.extend import source_info_util
from jax.interpreters import mlir
from jaxlib.mlir import ir

# -- jaxprs -----------------------------------------------------------------------------------------

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "eval_jaxpr": "call_jaxpr",
}


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """(jaxpr, consts) of a jaxpr that may be closed; 0.11 merged the two classes."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, tuple(getattr(jaxpr, "consts", ()))


def inner_jaxpr(eqn: Any) -> tuple[Any, Sequence[Any]] | None:
    """The jaxpr that a call-like equation computes, to be inlined; None for other equations."""
    key = _CALLS.get(eqn.primitive.name)
    if key is not None:
        return open_jaxpr(eqn.params[key])
    prim = eqn.params.get("_prim", eqn.params.get("prim"))
    if hasattr(prim, "expand"):  # 0.12 expresses searchsorted and others as high-level primitives
        avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
        return open_jaxpr(jax.make_jaxpr(prim.expand)(*avals))
    return None


def is_literal(atom: Any) -> bool:
    return isinstance(atom, jex_core.Literal)


def is_static_constant(value: Any) -> bool:
    """Whether a value is a Python or NumPy number known when the mod is traced."""
    return isinstance(value, (bool, int, float, np.generic)) or (
        isinstance(value, np.ndarray) and value.dtype != object
    )


def scan_split(eqn: Any, operands: Sequence[Any]) -> tuple[int, int]:
    """How many of a scan's operands are constants and carry."""
    params = eqn.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].update(tuple(operands)).unpack()
    return len(list(consts)), len(list(carry))


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Runs one equation on JAX values, with the parameters it was traced with."""
    params = eqn.primitive.get_bind_params(eqn.params)
    if isinstance(params, tuple):  # before 0.11: (subfuns, params)
        subfuns, params = params
        values = [*subfuns, *values]
    outs = eqn.primitive.bind(*values, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def user_line(eqn: Any) -> str:
    """`file:line (function)` of the user's code that made an equation, or an empty string."""
    return source_info_util.summarize(eqn.source_info)


@dataclasses.dataclass(eq=False)
class Call:
    """A call with its own derivative rule, kept whole while a mod is differentiated."""

    eqn: Any

    def __call__(self, *values: Any) -> list[Any]:
        return bind(self.eqn, values)


# -- tracing ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def x64_disabled() -> Iterator[None]:
    """Mods are traced with 32-bit types whatever the session's default is."""
    if not jax.config.jax_enable_x64:
        yield
        return
    with jax.enable_x64(False), warnings.catch_warnings():
        # JAX tells of every 64-bit array that a mod captured. The truncation is ours, not the user's.
        warnings.filterwarnings("ignore", "Explicitly requested dtype", UserWarning)
        yield


def is_tracer(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


def eval_jaxpr(jaxpr: Any, consts: Sequence[Any], *args: Any) -> list[Any]:
    return jax.core.eval_jaxpr(jaxpr, consts, *args)


def is_tracing() -> bool:
    """Whether JAX is staging operations out, so that the result of one would not be a value."""
    return is_tracer(jax.numpy.zeros((), bool))


def takes_positional(function: Any, count: int) -> bool:
    """Whether a function can be called with `count` positional arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True


# -- high-level primitives --------------------------------------------------------------------------


class HiPrim(hijax.HiPrim):
    """A primitive with its own rules for every transformation, of flat tuples of arrays."""

    @property
    def has_effects(self) -> bool:
        """Whether computing it has effects, such as the callbacks of Pallas' interpreters."""
        return False

    def __call__(self, *args: Any) -> Any:
        if self.has_effects:  # which only JAX's own primitive passes on
            return super().__call__(*args)
        return tuple(_rules_p.bind(*args, _prim=self))


def _expanded(ctx: Any, *args: Any, _prim: HiPrim) -> Any:
    return mlir.lower_fun(_prim.expand, multiple_results=True)(ctx, *args)


# JAX 0.11 calls a jitted program that holds one of its own high-level primitives through Python, at some 0.2 ms a
# call. This one has the same rules, but JAX lowers it like any other.
_rules_p = jex_core.Primitive("flexjax")
_rules_p.multiple_results = True
_rules_p.def_abstract_eval(lambda *_, _prim: _prim.out_avals_flat)
_rules_p.def_impl(lambda *args, _prim: _prim.expand(*args))
mlir.register_lowering(_rules_p, _expanded)
for _table in (
    ad.fancy_transposes,
    ad.primitive_jvps,
    ad.primitive_linearizations,
    batching.fancy_primitive_batchers,
):
    _table[_rules_p] = _table[call_hi_primitive_p]


GradAccum = hijax.GradAccum
linearize_from_jvp = hijax.linearize_from_jvp
vjp_from_jvp = hijax.vjp_from_jvp


def instantiate_zeros(tangent: Any) -> Any:
    """A tangent or cotangent as an array, where JAX may pass a symbolic zero."""
    return hijax.instantiate_zeros(tangent)


def is_zero(tangent: Any) -> bool:
    """Whether a tangent is a symbolic zero: what it belongs to is not differentiated."""
    return isinstance(tangent, hijax.Zero)


def output_avals(function: Any, avals: Sequence[Any]) -> tuple[Any, ...]:
    """Types of a function's outputs, with the sharding and manual axes that tracing it gives them."""
    meshes = [a.sharding.mesh for a in avals if not a.sharding.mesh.empty]
    # While JAX transposes a shard_map the context may still be the mesh around it.
    with jax.sharding.use_abstract_mesh(meshes[0]) if meshes else contextlib.nullcontext():
        return tuple(jax.make_jaxpr(function)(*avals).out_avals)


def like_varying(x: Any, *references: Any) -> Any:
    """`x` marked as varying over the manual mesh axes that any reference varies over (`jax.shard_map`)."""
    axes = set().union(*(_varying_axes(r) for r in references)) - set(_varying_axes(x))
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def _varying_axes(x: Any) -> frozenset[Any]:
    return jax.typeof(x).manual_axis_type.varying


# -- kernels ----------------------------------------------------------------------------------------


def name_dumps(name: str) -> None:
    """Puts a name in the place of the number that Mosaic GPU gives the kernel that is being emitted.

    It names what Mosaic writes of the kernel if it is asked to, which keeps the number then. Kernels are numbered
    within the process, and the number is part of the kernel: JAX's caches of compiled kernels, in memory and on
    disk, would know a kernel in the same program only.
    """
    if any(variable.startswith("MOSAIC_GPU_DUMP") for variable in os.environ):
        return
    operation = ir.InsertionPoint.current.block.owner
    while operation.parent is not None:
        operation = operation.parent
    operation.attributes["mosaic_gpu.dump_basename"] = ir.StringAttr.get(name)


# -- choosing by platform ---------------------------------------------------------------------------

_by_platform_p = jex_core.Primitive("flexjax_by_platform")
_by_platform_p.multiple_results = True


def by_platform(switch: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """`switch.on(platform)(*args)` for the platform that the program is lowered for.

    Unlike `lax.platform_dependent`, it traces nothing for the other platforms: a CPU program does not pay for
    tracing a GPU kernel. `on` is asked for "cuda", for "other" platforms, and for "types", to tell those of the
    results.

    Args:
        switch: hashable, with a method `on(platform) -> function`.
        args: JAX values.
    """
    return tuple(_by_platform_p.bind(*args, switch=switch))


@_by_platform_p.def_abstract_eval
def _by_platform_types(*avals: Any, switch: Any) -> tuple[Any, ...]:
    return output_avals(switch.on("types"), avals)


def _lowering_on(platform: str) -> Any:
    def lower(ctx: Any, *args: Any, switch: Any) -> Any:
        return mlir.lower_fun(switch.on(platform), multiple_results=True)(ctx, *args)

    return lower


mlir.register_lowering(_by_platform_p, _lowering_on("other"))
mlir.register_lowering(_by_platform_p, _lowering_on("cuda"), platform="cuda")
