"""Which backends exist, and which one computes a problem.

The choice is made for the platform that a program is compiled for, not for the machine that traces it: lowering
for CUDA on a machine without a GPU takes the GPU kernel. A backend is imported when it is first considered.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax

from flexjax.problem import Problem

_MODULES = {
    "mosaic_gpu": "flexjax.backends.mosaic_gpu",
    "xla": "flexjax.backends.xla",
    "reference": "flexjax.backends.dense",
}

# Backends that run on NVIDIA GPUs only, by preference. What they refuse goes to the portable one.
_CUDA: tuple[str, ...] = ("mosaic_gpu",)
_PORTABLE = "xla"


class FallbackWarning(UserWarning):
    """A faster backend could not compute an attention, so that a slower one does."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which backend computes a problem, by platform.

    Attributes:
        portable: the backend on every platform but CUDA.
        cuda: the backend on CUDA.
        explicit: whether the user named the backend, so that nothing may replace it.
    """

    portable: str
    cuda: str
    explicit: bool


@functools.cache
def load(name: str) -> ModuleType:
    """A backend's module: `NAME`, `OPTIONS`, `check(problem)`, `forward`, and `backward` if it has one.

    A backend that cannot compute the gradients of all that it computes also has `check_backward(problem)`, which
    raises NotImplementedError with the reason.
    """
    return importlib.import_module(_MODULES[name])


def select(problem: Problem, requested: str | None) -> Choice:
    """Chooses the backends for `problem`.

    Raises:
        NotImplementedError: the requested backend cannot compute the problem; the message says why.
    """
    if requested is not None:
        reason = _refusal(requested, problem)
        if reason is not None:
            raise NotImplementedError(
                f"backend={requested!r} cannot compute this attention: {reason}"
            )
        return Choice(requested, requested, explicit=True)
    for name in _CUDA:
        reason = _refusal(name, problem)
        if reason is None:
            return Choice(_PORTABLE, name, explicit=False)
        warn_about_fallback(f"The {name} backend cannot compute this attention: {reason}")
    return Choice(_PORTABLE, _PORTABLE, explicit=False)


def needs_cuda(name: str) -> bool:
    """Whether a backend runs on NVIDIA GPUs only; it then names the compute capability that it is for."""
    return hasattr(load(name), "COMPUTE_CAPABILITY")


def _refusal(name: str, problem: Problem) -> str | None:
    try:
        capability, module = _compute_capability(), load(name)
        if needs_cuda(name) and capability not in (None, module.COMPUTE_CAPABILITY):
            return (
                f"it needs a GPU of compute capability {module.COMPUTE_CAPABILITY}, and this one has "
                f"{capability}."
            )
        module.check(problem)
    except NotImplementedError as error:
        return str(error)
    except ImportError as error:  # not every build of jaxlib brings the kernel languages
        return f"it cannot be imported here ({error})."
    return None


@functools.cache
def _compute_capability() -> str | None:
    """Of this process's GPU; None without one, where a program may still be compiled for another."""
    if jax.default_backend() != "gpu":
        return None
    return getattr(jax.local_devices()[0], "compute_capability", None)


@functools.cache
def warn_about_fallback(reason: str) -> None:
    """Tells once for every reason, and only where there is a GPU that could have been used."""
    if jax.default_backend() == "gpu":
        message = f"{reason} The {_PORTABLE} backend computes it instead, which is slower."
        warnings.warn(message, FallbackWarning, stacklevel=3)


def check_request(backend: Any, options: Any) -> tuple[tuple[str, Any], ...]:
    """Validates `backend=` and `kernel_options=`; returns the options as sorted pairs.

    Raises:
        TypeError: the options are not a mapping.
        ValueError: the backend does not exist, or an option is unknown or has the wrong type.
    """
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(
            "kernel_options must be a mapping of names to values, such as {'lanes': 4}, but it is "
            f"{options!r}."
        )
    if backend is not None and (not isinstance(backend, str) or backend not in _MODULES):
        raise ValueError(
            f"backend={backend!r} does not exist. Use one of {sorted(_MODULES)}, or None for the best one "
            "that can compute the problem."
        )
    if not options:
        return ()
    names = [backend] if backend is not None else [*_CUDA, _PORTABLE]
    known = {key: kind for name in names for key, kind in load(name).OPTIONS.items()}
    for key, value in options.items():
        _check_option(key, value, known, backend)
    return tuple(sorted(options.items()))


def _check_option(key: str, value: Any, known: Mapping[str, type], backend: str | None) -> None:
    if key not in known:
        raise ValueError(
            f"kernel_options has no option {key!r} for backend {backend or 'None (automatic)'}. "
            f"Known options: {sorted(known) or 'none'}."
        )
    kind = known[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(
            f"kernel_options[{key!r}] must be of type {kind.__name__}, but it is {value!r}."
        )
    if kind is int and value < 1:
        raise ValueError(f"kernel_options[{key!r}] must be at least 1, but it is {value}.")
