"""What a peer is: something that prepares a case for timing, or says why it cannot."""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from benchmarks.inputs import Inputs
from benchmarks.variants import Shape, Variant


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks of flexjax itself; the other peers run with their defaults."""

    block_size: tuple[int, int] = (128, 128)
    kernel_options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention to be measured by every peer: its forward pass, or its backward pass alone."""

    shape: Shape
    variant: Variant
    inputs: Inputs
    options: Options = Options()
    backward: bool = False


@dataclasses.dataclass(frozen=True)
class Contender:
    """A peer that is ready to run a case; see `benchmarks.timing.Timed`.

    Attributes:
        peer: name for the records, with the backend if the peer has several.
        run: `(input set) -> result`, queued but not waited for.
        synchronize: waits for a result and for everything queued before it.
        heads: `(result, [(batch, head), ...]) -> [[L, D] float32, ...]`: the output's, or, of a backward pass,
            for each pair those of the gradients of query, key and value.
        input_sets: inputs to rotate over.
        compile_s: seconds that the first call took beyond running; None if a cache may have served it.
        layout: "BHLD" or "BLHD".
        config: what distinguishes this way of running the peer.
        block_size: (q_block, kv_block) of the peer's block mask, None if it has none.
        density: fraction of those blocks that it visits.
    """

    peer: str
    run: Callable[[int], Any]
    synchronize: Callable[[Any], None]
    heads: Callable[[Any, Sequence[tuple[int, int]]], list[np.ndarray]]
    input_sets: int
    compile_s: float | None
    layout: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    block_size: tuple[int, int] | None = None
    density: float | None = None

    def call(self, index: int) -> Any:
        return self.run(index)

    def wait(self, result: Any) -> None:
        self.synchronize(result)


class Peer(Protocol):
    """An implementation of attention."""

    @property
    def name(self) -> str: ...

    def missing(self) -> str | None:
        """Why this peer cannot run here; None if it can."""

    def supports(self, shape: Shape, variant: Variant) -> bool:
        """Whether this peer can express the variant."""

    def prepare(self, case: Case) -> Contender:
        """Compiles the pass that the case asks for and returns it ready to run."""

    def release(self) -> None:
        """Forgets what was compiled for the last case."""


def no_gpu() -> str | None:
    """The reason for a peer that needs a GPU; None where there is one."""
    backend = jax.default_backend()
    return None if backend == "gpu" else f"needs a CUDA GPU, and JAX's default backend is {backend}"


def no_import(module: str, hint: str = "") -> str | None:
    """The reason why `module` cannot be imported; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # also a library that fails to load
        return f"cannot import {module} ({error}){hint}"
    return None


def compiled_jax(
    peer: str | Callable[[str], str],
    function: Callable[..., Any],
    case: Case,
    extra: tuple[Any, ...] = (),
    *,
    layout: str,
    differentiated: int = 3,
    **details: Any,
) -> Contender:
    """A contender from a JAX function of (query, key, value, *extra).

    Args:
        peer: its name, or a function that derives the name from the compiled program's text.
        function: what is compiled; mods and masks come in through `extra`, as in a user's own jit.
        case: what is measured.
        extra: further arguments.
        layout: of query, key, value and result.
        differentiated: how many of the function's arguments a backward pass gives gradients of, from the first.
        details: further attributes of the contender.
    """
    sets = case.inputs.in_layout(layout)
    timed, arguments = jax.jit(function), [(*triple, *extra) for triple in sets]
    if case.backward:

        def pullback(*arguments: Any) -> Any:
            variables, others = arguments[:differentiated], arguments[differentiated:]
            return jax.vjp(lambda *x: function(*x, *others), *variables)[1]

        forward = jax.jit(pullback)
        pullbacks = [forward(*x) for x in arguments]
        timed = jax.jit(lambda pull, cotangent: pull(cotangent))
        arguments = list(zip(pullbacks, case.inputs.cotangents(layout), strict=True))
    start = time.perf_counter()
    compiled = timed.lower(*arguments[0]).compile()
    compile_s = time.perf_counter() - start
    name = peer if isinstance(peer, str) else peer(compiled.as_text() or "")

    def heads(result: Any, pairs: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        results = result[:3] if case.backward else (result,)
        picked = [x[b, :, h] if layout == "BLHD" else x[b, h] for b, h in pairs for x in results]
        return [np.asarray(x).astype(np.float32) for x in picked]

    def synchronize(result: Any) -> None:
        jax.block_until_ready(result)

    return Contender(
        peer=name,
        run=lambda index: compiled(*arguments[index]),
        synchronize=synchronize,
        heads=heads,
        input_sets=len(sets),
        compile_s=compile_s,
        layout=layout,
        **details,
    )
