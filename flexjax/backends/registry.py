"""Which backends exist, and which one computes a problem."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from flexjax.backends import dense, xla
from flexjax.problem import Problem

BACKENDS: dict[str, ModuleType] = {xla.NAME: xla, dense.NAME: dense}

# In order of preference. The reference is never chosen by itself: it holds the whole score matrix.
_AUTOMATIC = (xla.NAME,)


def select(problem: Problem, requested: str | None) -> str:
    """The name of the backend that computes `problem`.

    An explicit request is never replaced by another backend.

    Raises:
        NotImplementedError: the requested backend, or every automatic one, cannot compute the problem;
            the message gives each one's reason.
    """
    reasons = []
    for name in (requested,) if requested is not None else _AUTOMATIC:
        try:
            BACKENDS[name].check(problem)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
        else:
            return name
    raise NotImplementedError("No backend can compute this attention. " + " ".join(reasons))


def check_request(backend: Any, options: dict[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    """Validates `backend=` and `kernel_options=`; returns the options as sorted pairs.

    Raises:
        ValueError: the backend does not exist, or an option is unknown or has the wrong type.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r} does not exist. Use one of {sorted(BACKENDS)}, or None for the best one "
            "that can compute the problem."
        )
    names = [backend] if backend is not None else list(_AUTOMATIC)
    known = {key: kind for name in names for key, kind in BACKENDS[name].OPTIONS.items()}
    for key, value in (options or {}).items():
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
    return tuple(sorted((options or {}).items()))
