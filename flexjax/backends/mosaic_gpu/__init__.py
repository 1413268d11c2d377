"""Pallas Mosaic GPU kernels for NVIDIA Hopper.

Pallas and its Mosaic GPU extension are imported when a kernel is asked about for the first time.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax

from flexjax.backends.mosaic_gpu import backward_config, capture_gradients, config, decode_config
from flexjax.mods.graph import Graph
from flexjax.problem import Gradients, Operands, Problem, Result

NAME = "mosaic_gpu"
OPTIONS = config.OPTIONS | backward_config.OPTIONS | decode_config.OPTIONS
COMPUTE_CAPABILITY = "9.0"

_DTYPES = ("bfloat16", "float16")


def check(problem: Problem) -> None:
    """Raises NotImplementedError, with the reason, for a problem that the kernels cannot compute."""
    if problem.q_dtype.name not in _DTYPES:
        raise NotImplementedError(
            f"the kernels multiply {' and '.join(_DTYPES)}, but the query is {problem.q_dtype}."
        )
    if not problem.q_dtype == problem.k_dtype == problem.v_dtype:
        raise NotImplementedError(
            f"query, key and value must have one dtype, but they are {problem.q_dtype}, {problem.k_dtype} "
            f"and {problem.v_dtype}."
        )
    if max(problem.qk_dim, problem.v_dim) > 256:
        raise NotImplementedError(
            f"head dimensions go up to 256, but they are {problem.qk_dim} and {problem.v_dim}."
        )
    score = None if problem.score is None else problem.score.forward
    for graph in (score, problem.mask):
        reason = None if graph is None else _unsupported(graph)
        if reason is not None:
            raise NotImplementedError(reason)
    if decode_config.applies(problem):
        decode_config.choose(problem)
    else:
        config.choose(problem)


def check_backward(problem: Problem) -> None:
    """Raises NotImplementedError, with the reason, for a problem whose gradients the kernels cannot compute."""
    if problem.decoding is not None:
        raise NotImplementedError("The kernels compute gradients of flex_attention, not of decode.")
    score = problem.score
    if score is not None:
        assert score.gradient is not None, (
            "`check` has refused mods that only JAX can differentiate"
        )
        reason = _unsupported(score.gradient.graph)
        if reason is not None:
            raise NotImplementedError(f"Its derivative is not supported: {reason}")
    if problem.option("deterministic", False):
        capture_gradients.check_deterministic(problem)
    backward_config.choose(problem)


@functools.cache
def _unsupported(graph: Graph) -> str | None:
    emit = importlib.import_module("flexjax.backends.mosaic_gpu.emit")
    return emit.unsupported(graph)


def forward(problem: Problem, operands: Operands) -> Result:
    """Attention output, logsumexp and, if wanted, row maxima."""
    if decode_config.applies(problem):
        return _decode(problem, decode_config.choose(problem, _cores()), operands)
    return _forward(problem, config.choose(problem, _cores()), operands)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(problem: Problem, choices: decode_config.DecodeConfig, operands: Operands) -> Result:
    kernel: Any = importlib.import_module("flexjax.backends.mosaic_gpu.decode_sm90")
    return kernel.forward(problem, operands, choices)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(problem: Problem, choices: config.Config, operands: Operands) -> Result:
    kernel: Any = importlib.import_module("flexjax.backends.mosaic_gpu.forward_sm90")
    return kernel.forward(problem, operands, choices)


def backward(
    problem: Problem, operands: Operands, result: Result, d_out: Any, d_lse: Any
) -> Gradients:
    """Gradients of query, key, value and the float arrays that score_mod captured."""
    check_backward(problem)
    return _backward(
        problem, backward_config.choose(problem, _cores()), operands, result, d_out, d_lse
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(
    problem: Problem,
    choices: backward_config.BackwardConfig,
    operands: Operands,
    result: Result,
    d_out: Any,
    d_lse: Any,
) -> Gradients:
    kernel: Any = importlib.import_module("flexjax.backends.mosaic_gpu.backward_sm90")
    return kernel.backward(problem, operands, result, d_out, d_lse, choices)


@functools.cache
def _cores() -> int:
    """Multiprocessors of this process's GPU, or those of an H100 where the program is compiled elsewhere."""
    if jax.default_backend() != "gpu":
        return config.CORES
    return getattr(jax.local_devices()[0], "core_count", config.CORES)
