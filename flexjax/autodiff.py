"""How JAX's transformations act on an attention.

Three primitives stand between `flex_attention` and the backends:

- `Attention` computes a problem with the chosen backend.
- `AttentionBackward` computes the gradients of its operands, with the same backend.
- `AttentionTangent` maps tangents of the operands to tangents of the result. It is linear in the tangents,
  and its transpose is `AttentionBackward`.

Reverse mode of `Attention` is a `jax.custom_vjp` function's: keep the output and the logsumexp, run the
backend's backward pass on them. Forward mode is `AttentionTangent`, computed by the xla backend, whose loops
JAX pushes tangents through. `jax.checkpoint` differentiates forwards and transposes the result, and so ends up
in the backend's backward pass too. Differentiating `AttentionBackward` or `AttentionTangent` themselves gives
second derivatives; both do it through the xla backend with loops of fixed length.

Under `jax.vmap` the mapped axis is folded into the batch (`folding.py`).

The output and the logsumexp are named "flexjax_out" and "flexjax_lse" for `jax.checkpoint` policies.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from flexjax import _compat
from flexjax.backends import xla
from flexjax.backends.registry import Choice, load, needs_cuda, warn_about_fallback
from flexjax.folding import fold_axis, fold_operands, front, unfold
from flexjax.mods.ops import is_float
from flexjax.problem import Gradients, Operands, Problem, Result, without_gradients


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of an attention.

    Attributes:
        problem: what is computed.
        choice: which backend computes it.
        tree: structure of the flattened operands.
        constants: positions of float captures that are not differentiated: nothing is computed for them.
    """

    problem: Problem
    choice: Choice
    tree: Any
    constants: frozenset[int] = frozenset()

    def operands(self, leaves: Sequence[Any]) -> Operands:
        return jax.tree.unflatten(self.tree, leaves)

    @functools.cached_property
    def n_leaves(self) -> int:
        return self.tree.num_leaves

    @functools.cached_property
    def floats(self) -> tuple[int, ...]:
        """Positions of the operands that have gradients: query, key, value, wanted score captures."""
        marked = self.operands(range(self.n_leaves))
        captures = (
            i for i, wanted in zip(marked.score_captures, self.wanted, strict=True) if wanted
        )
        return (marked.query, marked.key, marked.value, *captures)

    @functools.cached_property
    def all_floats(self) -> tuple[int, ...]:
        """Positions of the operands that gradients and tangents depend on smoothly."""
        return dataclasses.replace(self, constants=frozenset()).floats

    @functools.cached_property
    def wanted(self) -> tuple[bool, ...]:
        """For every capture of the score_mod, whether it has a gradient."""
        marked = self.operands(range(self.n_leaves))
        score = self.problem.score
        types = () if score is None else score.forward.captures
        captures = zip(marked.score_captures, types, strict=True)
        return tuple(is_float(t.dtype) and i not in self.constants for i, t in captures)

    @functools.cached_property
    def backward_problem(self) -> Problem:
        """The problem with the derivatives of the score_mod that are wanted."""
        return without_gradients(self.problem, [not wanted for wanted in self.wanted])

    def differentiated(self, moving: Sequence[bool]) -> Call:
        """The same attention, with gradients of those captured arrays only whose operand moves."""
        fixed = frozenset(i for i in self.captures if not moving[i])
        return dataclasses.replace(self, constants=fixed)

    @functools.cached_property
    def captures(self) -> frozenset[int]:
        """Positions of captured arrays."""
        marked = self.operands(range(self.n_leaves))
        return frozenset({*marked.score_captures, *marked.mask_captures})


def attend(problem: Problem, choice: Choice, operands: Operands) -> Result:
    """Computes a problem, differentiably and under every transformation."""
    leaves, tree = jax.tree.flatten(operands)
    # Inside shard_map an array that all shards share gets the sum of their cotangents: JAX adds it up where the
    # array is made varying.
    leaves = [_compat.like_varying(x, *leaves) for x in leaves]
    call = Call(problem, choice, tree)
    return Result(*Attention(call, [jax.typeof(x) for x in leaves])(*leaves))


# -- running backends -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Forward:
    """The forward pass by platform; traced for a platform only when lowered for it."""

    call: Call

    def on(self, platform: str) -> Any:
        return functools.partial(_forward_with, _backend_on(platform, self.call).forward, self.call)


@dataclasses.dataclass(frozen=True)
class _Backward:
    """The backward pass by platform."""

    call: Call

    def on(self, platform: str) -> Any:
        choice = self.call.choice
        module = _backend_on(platform, self.call)
        reason = _no_backward(module, self.call.backward_problem)
        if reason is not None:
            if choice.explicit:
                raise NotImplementedError(
                    f"{reason} Leave backend out, so that another backend can compute the gradients."
                )
            warn_about_fallback(reason)
            module = load(choice.portable)
        return lambda *args: _local(
            jax.tree.leaves(_backward_with(module.backward, self.call, args)), args
        )


def _no_backward(module: Any, problem: Problem) -> str | None:
    """Why a backend cannot compute a problem's gradients; None if it can."""
    if not hasattr(module, "backward"):
        return f"The {module.NAME} backend has no backward pass."
    try:
        if hasattr(module, "check_backward"):
            module.check_backward(problem)
    except NotImplementedError as error:
        return f"The {module.NAME} backend cannot compute the gradients of this attention: {error}"
    return None


def _backend_on(platform: str, call: Call) -> Any:
    """The backend's module for "cuda", for "other" platforms, or, to tell "types" only, for no matter which.

    Raises:
        NotImplementedError: the user asked for a backend that does not run on the platform.
    """
    name = call.choice.cuda if platform == "cuda" else call.choice.portable
    if platform == "other" and needs_cuda(name) and not call.problem.option("interpret", False):
        raise NotImplementedError(
            f"backend={name!r} runs on NVIDIA GPUs, but this program is compiled for another platform. Leave "
            "backend out to have the best one chosen for each platform."
        )
    return load(name)


def _forward_with(forward: Any, call: Call, *leaves: Any) -> tuple[Any, ...]:
    return _local(jax.tree.leaves(forward(call.problem, call.operands(leaves))), leaves)


def _local(results: Sequence[Any], args: Sequence[Any]) -> tuple[Any, ...]:
    """Results of a shard's own, inside shard_map, if any argument is: kernels do not tell that of theirs."""
    return tuple(_compat.like_varying(x, *args) for x in results)


@functools.partial(jax.jit, static_argnums=0)
def _run_forward(call: Call, *leaves: Any) -> tuple[Any, ...]:
    return _by_platform(_Forward(call), leaves)


@functools.partial(jax.jit, static_argnums=0)
def _run_backward(call: Call, *args: Any) -> tuple[Any, ...]:
    return _by_platform(_Backward(call), args)


def _by_platform(switch: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    choice, problem = switch.call.choice, switch.call.problem
    anywhere = not needs_cuda(choice.cuda) or problem.option("interpret", False)
    if choice.cuda == choice.portable and anywhere:
        return switch.on("other")(*args)
    return _compat.by_platform(switch, args)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_tangent(call: Call, differentiable: bool, *args: Any) -> tuple[Any, ...]:
    leaves, tangents = args[: call.n_leaves], args[call.n_leaves + 2 :]
    problem = _plain(call.problem)

    def run(*floats: Any) -> tuple[Any, ...]:
        operands = call.operands(_replaced(leaves, call.floats, floats))
        return tuple(jax.tree.leaves(xla.forward(problem, operands, differentiable=differentiable)))

    return jax.jvp(run, tuple(leaves[i] for i in call.floats), tuple(tangents))[1]


def _plain(problem: Problem) -> Problem:
    """The problem without the options of whichever backend was chosen for it."""
    return dataclasses.replace(problem, options=())


def _backward_with(backward: Any, call: Call, args: Sequence[Any], **kwargs: Any) -> Gradients:
    leaves, (out, lse, d_out, d_lse) = args[: call.n_leaves], args[call.n_leaves :]
    operands, result = call.operands(leaves), Result(out, lse)
    gradients = backward(call.backward_problem, operands, result, d_out, d_lse, **kwargs)
    captures = zip(gradients.score_captures, call.wanted, strict=True)
    return dataclasses.replace(
        gradients, score_captures=tuple(d if wanted else None for d, wanted in captures)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: Call, *leaves: Any) -> tuple[Any, ...]:
    return _run_forward(call, *leaves)


def _attention_fwd(call: Call, *leaves: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    out, lse, *rest = Attention(call, [jax.typeof(x) for x in leaves])(*leaves)
    out, lse = checkpoint_name(out, "flexjax_out"), checkpoint_name(lse, "flexjax_lse")
    return (out, lse, *rest), (*leaves, out, lse)


def _attention_bwd(call: Call, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    blocks = call.problem.blocks
    if blocks is not None and not blocks.backward:
        raise ValueError(
            "This attention is differentiated, but its block_mask is for inference only: it was built with "
            "compute_q_blocks=False. Build it with compute_q_blocks=True, the default."
        )
    d_out, d_lse = (_compat.instantiate_zeros(c) for c in cotangents[:2])
    args = (*residuals, d_out, d_lse)
    gradients = AttentionBackward(call, [jax.typeof(x) for x in args])(*args)
    return tuple(_replaced([None] * call.n_leaves, call.floats, gradients))


_attention.defvjp(_attention_fwd, _attention_bwd)


def _replaced(leaves: Sequence[Any], which: Sequence[int], values: Sequence[Any]) -> list[Any]:
    out = list(leaves)
    for i, value in zip(which, values, strict=True):
        out[i] = value
    return out


# -- primitives -------------------------------------------------------------------------------------


class _Primitive(_compat.HiPrim):
    call: Call

    @property
    def has_effects(self) -> bool:
        return self.call.problem.option("interpret", False)


class Attention(_Primitive):
    """(operands...) -> (out, lse[, max_scores])."""

    def __init__(self, call: Call, avals: Sequence[Any]):
        self.in_avals = tuple(avals)
        self.out_aval = _compat.output_avals(functools.partial(_run_forward, call), avals)
        self.params = {"call": call}
        super().__init__()

    def expand(self, *leaves: Any) -> tuple[Any, ...]:
        return _attention(self.call, *leaves)

    def vjp_fwd(self, nonzeros: Any, /, *leaves: Any) -> Any:
        result, residuals = _attention_fwd(self.call, *leaves)
        return result, (self.call.differentiated(nonzeros), residuals)

    def vjp_bwd_retval(self, residuals: Any, cotangents: Any, /) -> tuple[Any, ...]:
        call, residuals = residuals
        return _attention_bwd(call, residuals, cotangents)

    def jvp(self, primals: Any, tangents: Any) -> Any:
        result, (*_, out, lse) = _attention_fwd(self.call, *primals)
        call = self.call.differentiated([not _compat.is_zero(t) for t in tangents])
        moving = (_compat.instantiate_zeros(tangents[i]) for i in call.floats)
        args = (*primals, out, lse, *moving)
        return result, AttentionTangent(call, [jax.typeof(x) for x in args])(*args)

    lin, linearized = _compat.linearize_from_jvp

    def batch(self, axis_data: Any, leaves: Any, dims: Any) -> Any:
        if _unmapped(dims):
            return self(*leaves), (None,) * len(self.out_aval)
        call, leaves = _fold(self.call, axis_data.size, leaves, dims, shared=True)
        outs = Attention(call, [jax.typeof(x) for x in leaves])(*leaves)
        return tuple(unfold(o, axis_data.size) for o in outs), (0,) * len(outs)


class AttentionBackward(_Primitive):
    """(operands..., out, lse, d_out, d_lse) -> gradients of the float operands."""

    def __init__(self, call: Call, avals: Sequence[Any]):
        self.in_avals = tuple(avals)
        self.out_aval = _compat.output_avals(functools.partial(_run_backward, call), avals)
        self.params = {"call": call}
        super().__init__()

    def expand(self, *args: Any) -> tuple[Any, ...]:
        return _run_backward(self.call, *args)

    def jvp(self, primals: Any, tangents: Any) -> Any:
        which = [*self.call.all_floats, *range(self.call.n_leaves, len(primals))]
        call = dataclasses.replace(self.call, problem=_plain(self.call.problem))

        def run(*floats: Any) -> tuple[Any, ...]:
            args = _replaced(primals, which, floats)
            gradients = _backward_with(xla.backward, call, args, differentiable=True)
            return tuple(jax.tree.leaves(gradients))

        moving = tuple(_compat.instantiate_zeros(tangents[i]) for i in which)
        _, out = jax.jvp(run, tuple(primals[i] for i in which), moving)
        return self(*primals), out

    lin, linearized = _compat.linearize_from_jvp
    vjp_fwd, vjp_bwd_retval = _compat.vjp_from_jvp

    def batch(self, axis_data: Any, args: Any, dims: Any) -> Any:
        if _unmapped(dims):
            return self(*args), (None,) * len(self.out_aval)
        n = self.call.n_leaves
        call, leaves = _fold(self.call, axis_data.size, args[:n], dims[:n], shared=False)
        rest = [fold_axis(x, d, axis_data.size) for x, d in zip(args[n:], dims[n:], strict=True)]
        args = (*leaves, *rest)
        outs = AttentionBackward(call, [jax.typeof(x) for x in args])(*args)
        outs = tuple(
            o if i in self.call.captures else unfold(o, axis_data.size)
            for i, o in zip(self.call.floats, outs, strict=True)
        )
        return outs, (0,) * len(outs)


class AttentionTangent(_Primitive):
    """(operands..., out, lse, tangents of the float operands...) -> tangents of the result."""

    def __init__(self, call: Call, avals: Sequence[Any]):
        self.in_avals = tuple(avals)
        self.out_aval = _compat.output_avals(functools.partial(_run_tangent, call, False), avals)
        self.params = {"call": call}
        super().__init__()

    def expand(self, *args: Any) -> tuple[Any, ...]:
        return _run_tangent(self.call, False, *args)

    def transpose(self, cotangents: Any, *args: Any) -> None:
        residuals, accumulators = args[: self.call.n_leaves + 2], args[self.call.n_leaves + 2 :]
        gradients = _attention_bwd(self.call, residuals, cotangents)
        for accumulator, i in zip(accumulators, self.call.floats, strict=True):
            if isinstance(accumulator, _compat.GradAccum):
                accumulator.accum(gradients[i])

    def jvp(self, primals: Any, tangents: Any) -> Any:
        # The kept output and logsumexp only serve the transpose: the tangent map does not depend on them.
        which = [*self.call.all_floats, *range(self.call.n_leaves + 2, len(primals))]

        def run(*floats: Any) -> tuple[Any, ...]:
            return _run_tangent(self.call, True, *_replaced(primals, which, floats))

        moving = tuple(_compat.instantiate_zeros(tangents[i]) for i in which)
        _, out = jax.jvp(run, tuple(primals[i] for i in which), moving)
        return self(*primals), out

    lin, linearized = _compat.linearize_from_jvp
    vjp_fwd, vjp_bwd_retval = _compat.vjp_from_jvp

    def batch(self, axis_data: Any, args: Any, dims: Any) -> Any:
        if _unmapped(dims):
            return self(*args), (None,) * len(self.out_aval)
        n, size = self.call.n_leaves, axis_data.size
        call, leaves = _fold(self.call, size, args[:n], dims[:n], shared=False)
        stats = [
            fold_axis(x, d, size) for x, d in zip(args[n : n + 2], dims[n : n + 2], strict=True)
        ]
        tangents = [
            front(x, d, size) if i in self.call.captures else fold_axis(x, d, size)
            for i, x, d in zip(self.call.floats, args[n + 2 :], dims[n + 2 :], strict=True)
        ]
        args = (*leaves, *stats, *tangents)
        outs = AttentionTangent(call, [jax.typeof(x) for x in args])(*args)
        return tuple(unfold(o, size) for o in outs), (0,) * len(outs)


# -- vmap -------------------------------------------------------------------------------------------


def _unmapped(dims: Sequence[int | None]) -> bool:
    """Whether no argument is mapped: JAX asks for a batch rule all the same."""
    return all(d is None for d in dims)


def _fold(
    call: Call, size: int, leaves: Sequence[Any], dims: Sequence[int | None], shared: bool
) -> tuple[Call, list[Any]]:
    """The attention of all lanes, from that of one and its flattened operands' mapped axes (`fold_operands`)."""
    axes = call.operands([-1 if d is None else d for d in dims])
    problem, operands = fold_operands(call.problem, call.operands(leaves), axes, size, shared)
    leaves, tree = jax.tree.flatten(operands)
    return Call(problem, call.choice, tree, call.constants), leaves
