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
    """One attention to be measured by every peer."""

    shape: Shape
    variant: Variant
    inputs: Inputs
    options: Options = Options()


@dataclasses.dataclass(frozen=True)
class Contender:
    """A peer that is ready to run a case; see `benchmarks.timing.Timed`.

    Attributes:
        peer: name for the records, with the backend if the peer has several.
        run: `(input set) -> result`, queued but not waited for.
        synchronize: waits for a result and for everything queued before it.
        heads: `(result, [(batch, head), ...]) -> [[L, D] float32, ...]`.
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

    def forward(self, case: Case) -> Contender:
        """Compiles the forward pass and returns it ready to run."""

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
    sets: Sequence[tuple[Any, ...]],
    extra: tuple[Any, ...] = (),
    *,
    layout: str,
    **details: Any,
) -> Contender:
    """A contender from a JAX function of (query, key, value, *extra).

    Args:
        peer: its name, or a function that derives the name from the compiled program's text.
        function: what is compiled; mods and masks come in through `extra`, as in a user's own jit.
        sets: (query, key, value) triples in `layout`.
        extra: further arguments.
        layout: of query, key, value and result.
        details: further attributes of the contender.
    """
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*sets[0], *extra).compile()
    compile_s = time.perf_counter() - start
    name = peer if isinstance(peer, str) else peer(compiled.as_text() or "")

    def heads(result: Any, pairs: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        picked = [result[b, :, h] if layout == "BLHD" else result[b, h] for b, h in pairs]
        return [np.asarray(x).astype(np.float32) for x in picked]

    def synchronize(result: Any) -> None:
        jax.block_until_ready(result)

    return Contender(
        peer=name,
        run=lambda index: compiled(*sets[index], *extra),
        synchronize=synchronize,
        heads=heads,
        input_sets=len(sets),
        compile_s=compile_s,
        layout=layout,
        **details,
    )
