"""One case of a suite that measures whole models: peers are compiled, checked and timed in turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.copying import COPY, Copy, add_share
from benchmarks.records import failure
from benchmarks.timing import Plan, add_times

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A peer that is ready to be timed; see `benchmarks.timing.Timed`.

    Attributes:
        run: queues one call and returns its result.
        compile_s: seconds of tracing, lowering and compiling.
        peak_mb: arguments, results and temporaries together, by XLA's own accounting.
        recover: called after the first call failed, which may have taken shared arrays along.
        input_sets: there is one: a step of a model reads more than any cache holds.
    """

    run: Callable[[], Any]
    compile_s: float
    peak_mb: float
    recover: Callable[[], None]
    input_sets: int = 1

    def call(self, index: int) -> Any:
        return self.run()

    def wait(self, result: Any) -> None:
        jax.block_until_ready(result)


def peak_mb(compiled: Any) -> float:
    """Of a compiled program; memory that a result takes over from an argument counts once."""
    memory = compiled.memory_analysis()
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return round((size - memory.alias_size_in_bytes) / 1e6, 3)


def contest(
    case: Mapping[str, Any],
    prepare: Mapping[str, Callable[[], Entry]],
    check: Callable[[Any], tuple[float, str | None]],
    figures: Callable[[float], dict[str, Any]],
    plan: Plan,
    beside: Copy | None = None,
) -> Rows:
    """The rows of one case.

    Args:
        case: what is the same in all of its rows.
        prepare: makes each peer ready, by name.
        check: from a first call's result to (relative error, what is wrong with it or None).
        figures: what follows from the milliseconds of a call.
        plan: how to time.
        beside: a copy of memory to be timed in the same turns.
    """
    rows: dict[str, dict[str, Any]] = {}
    entries: dict[str, Entry] = {}
    for peer, make in prepare.items():
        row = rows[peer] = {"peer": peer, **case}
        entry = None
        try:
            entry = make()
            row |= {"compile_s": round(entry.compile_s, 3), "peak_mb": entry.peak_mb}
            row["error"], wrong = check(jax.block_until_ready(entry.run()))
        except Exception as error:
            row["failure"] = failure(error)
        if "failure" in row:  # outside of the handler, which holds on to the failed call's arrays
            if entry is not None:
                entry.recover()
            continue
        if wrong is None:
            entries[peer] = entry
        else:
            row["failure"] = wrong
    if beside is None:
        add_times(rows, entries, plan, lambda peer, ms: figures(ms))
        return list(rows.values())
    copied = rows[COPY] = {"peer": COPY, "variant": COPY}
    add_times(
        rows,
        {**entries, COPY: beside},
        plan,
        lambda peer, ms: {"tbs": beside.tbs(ms)} if peer == COPY else figures(ms),
    )
    add_share(rows.values(), copied)
    return list(rows.values())


def relative_error(actual: Any, expected: Any) -> float:
    """||actual - expected|| / ||expected|| over all arrays of two trees; NaN where they hold one."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    parts = [(np.asarray(a, np.float64), np.asarray(e, np.float64)) for a, e in pairs]
    wrong = sum(float(((a - e) ** 2).sum()) for a, e in parts)
    return (wrong / sum(float((e**2).sum()) for _, e in parts)) ** 0.5


def judged(error: float, limit: float) -> tuple[float, str | None]:
    """(error, what is wrong with it)."""
    if error <= limit:  # not so for NaN
        return error, None
    return error, f"wrong result: relative error {error:.2e}, at most {limit:.2e} is accepted"
