"""The one way in which everything is timed: queued calls, one wait, peers in turns of shuffled order.

A turn queues calls over rotating inputs and waits once, so the time of a call is what the device needs, not
what the host does. In each round every contender has one turn, and the order is drawn anew: a card at its
power limit runs a kernel faster after a cool one than after a hot one, and a fixed order would give that
gain to the same contender each time. The untimed calls at the start of each turn serve the same end.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from benchmarks.records import failure


class Timed(Protocol):
    """What can be timed.

    Attributes:
        input_sets: how many inputs there are to rotate over.
    """

    @property
    def input_sets(self) -> int: ...

    def call(self, index: int) -> Any:
        """Queues one call on input set `index` and returns its result without waiting for it."""

    def wait(self, result: Any) -> None:
        """Waits until `result`, and everything queued before it, has been computed."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: turns of each contender; the reported time is their median.
        calls: timed calls in a turn.
        warmup: untimed calls at the start of a turn.
        turn_seconds: a contender so slow that its calls would take longer than this has fewer of them.
        seed: of the order of the turns.
    """

    rounds: int = 9
    calls: int = 20
    warmup: int = 4
    turn_seconds: float = 2.0
    seed: int = 0

    def calls_of(self, seconds: float) -> int:
        """Timed calls in a turn of a contender whose call takes `seconds`."""
        return max(1, min(self.calls, int(self.turn_seconds / max(seconds, 1e-9))))


@dataclasses.dataclass(frozen=True)
class Timing:
    """The time of one call.

    Attributes:
        ms: median over the rounds, in milliseconds.
        spread: (slowest - fastest) / median of the rounds.
        sm_clock: median of the device's clock during the turns in MHz; None if it cannot be read.
        rounds: milliseconds of each round, in order.
    """

    ms: float
    spread: float
    sm_clock: float | None
    rounds: tuple[float, ...]


@dataclasses.dataclass
class _Turns:
    """One contender's turns so far."""

    contender: Timed
    calls: int
    warmup: int
    queued: int = 0
    times: list[float] = dataclasses.field(default_factory=list)
    clocks: list[float] = dataclasses.field(default_factory=list)

    def queue(self, calls: int) -> Any:
        result = None
        for _ in range(calls):
            result = self.contender.call(self.queued % self.contender.input_sets)
            self.queued += 1
        return result

    def take(self, now: Callable[[], float], clock: Callable[[], float | None]) -> None:
        result = self.queue(self.warmup)
        megahertz = clock()  # read while the device works
        self.contender.wait(result)
        start = now()
        self.contender.wait(self.queue(self.calls))
        self.times.append(1e3 * (now() - start) / self.calls)
        if megahertz is not None:
            self.clocks.append(megahertz)

    def timing(self) -> Timing:
        middle = statistics.median(self.times)
        spread = (max(self.times) - min(self.times)) / middle if middle else 0.0
        clock = statistics.median(self.clocks) if self.clocks else None
        return Timing(middle, spread, clock, tuple(self.times))


def interleaved(
    contenders: Mapping[str, Timed],
    plan: Plan,
    *,
    now: Callable[[], float] = time.perf_counter,
    clock: Callable[[], float | None] = lambda: None,
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Times the contenders in turns.

    Args:
        contenders: by name; each has been called before, so that nothing is compiled here.
        plan: how much is measured.
        now: seconds.
        clock: the device's clock in MHz, or None.

    Returns:
        The timing of each contender, and the error of each that raised one: it has no timing, the others
        went on without it.
    """
    turns: dict[str, _Turns] = {}
    failures: dict[str, Exception] = {}
    for name, contender in contenders.items():
        try:
            contender.wait(contender.call(0))
            start = now()
            contender.wait(contender.call(0))
            calls = plan.calls_of(now() - start)
        except Exception as error:
            failures[name] = error
        else:
            turns[name] = _Turns(contender, calls, max(1, min(plan.warmup, calls)))
    order = np.random.default_rng(plan.seed)
    for _ in range(plan.rounds):
        for name in order.permutation(sorted(turns.keys() - failures.keys())):
            try:
                turns[name].take(now, clock)
            except Exception as error:
                failures[str(name)] = error
    timings = {name: turns[name].timing() for name in contenders if name not in failures}
    return timings, failures


def add_times(
    rows: Mapping[str, dict[str, Any]],
    contenders: Mapping[str, Timed],
    plan: Plan,
    figures: Callable[[str, float], dict[str, Any]] = lambda name, ms: {},
    clock: Callable[[], float | None] | None = None,
) -> None:
    """Times the contenders in turns and adds the result, or why there is none, to their rows.

    Args:
        rows: by the contenders' names, perhaps among others.
        contenders: see `interleaved`.
        plan: how much is measured.
        figures: further keys, from a contender's name and the milliseconds of a call.
        clock: the device's clock; a new reader if there is none.
    """
    timings, failures = interleaved(contenders, plan, clock=clock or clock_reader())
    for name, timing in timings.items():
        rows[name]["ms"], rows[name]["spread"] = round(timing.ms, 5), round(timing.spread, 4)
        rows[name]["sm_clock"] = timing.sm_clock
        rows[name].update(figures(name, timing.ms))
    for name, error in failures.items():
        rows[name]["failure"] = failure(error)


def clock_reader() -> Callable[[], float | None]:
    """A function that reads the first GPU's SM clock in MHz; one that returns None where that is impossible."""
    try:
        import pynvml

        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM)
    except Exception:  # no such package, no driver or no GPU
        return lambda: None
    return lambda: float(pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM))
