"""A run: every case of a suite, each peer through the gate, then all of them timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax

from benchmarks import peers, records, side_by_side, table
from benchmarks.progress import Progress
from benchmarks.reference import HeadReference, gate
from benchmarks.settings import Settings
from benchmarks.timing import add_times, clock_reader
from benchmarks.variants import work

Rows = list[dict[str, Any]]
Check = Callable[[peers.Contender, Any], tuple[float, str | None]]


class Suite(Protocol):
    """What distinguishes one suite from another."""

    @property
    def name(self) -> str: ...

    def count(self, settings: Settings) -> int:
        """How many cases there are."""

    def cases(self, settings: Settings) -> Iterator[peers.Case]:
        """The cases; inputs are made when a shape's first case is reached."""

    def prepare(self, peer: peers.Peer, case: peers.Case) -> peers.Contender:
        """Compiles what this suite measures."""

    def checker(self, case: peers.Case) -> Check:
        """A function from a contender and its result to (relative error, what is wrong with it or None)."""

    def figures(self, case: peers.Case, ms: float) -> dict[str, Any]:
        """Rates that follow from the time of one call."""


def run(
    suite: Suite,
    settings: Settings,
    default_peers: tuple[str, ...] = (),
    able: list[peers.Peer] | None = None,
) -> Rows:
    """Measures all cases, writing each one's rows as soon as it has them.

    Args:
        suite: what is measured.
        settings: the command line.
        default_peers: names of the peers, if the command line has none.
        able: the peers themselves, instead of names.
    """
    reasons: dict[str, str] = {}
    if able is None:
        names = list(settings.peers or default_peers)
        able, reasons = peers.partition(names + peers.base_name(settings.base))
    log = records.Log(suite.name, settings.out, settings.write)
    progress = Progress(suite.count(settings))
    progress.say(f"run {log.run} on {log.origin['device']}, commit {log.origin['commit']}")
    for name, reason in reasons.items():
        progress.say(f"without {name}: {reason}")
    clock = clock_reader()
    for case in suite.cases(settings):
        label = f"{case.shape.name} {case.variant.name}"
        if settings.minutes is not None and progress.seconds > 60 * settings.minutes:
            progress.say(
                f"{progress.total - progress.done} cases left out from {label} on: time is up"
            )
            break
        progress.begin(label)
        new = log.add(measure(suite, case, able, settings, clock))
        progress.end(f"{label}: {table.case_line(new)}")
    progress.close()
    log.close()
    return log.rows


def run_and_report(suite: Suite, settings: Settings) -> int:
    """Runs a suite and prints its table; 1 if flexjax was asked for and failed in any case or had none."""
    on_gpu = jax.default_backend() == "gpu"
    default = peers.DEFAULT_ON_GPU if on_gpu else peers.DEFAULT_ON_CPU
    rows = run(suite, settings, default)
    print(table.summary(rows))
    asked = any(name.startswith("flexjax") for name in settings.peers or default)
    mine = [row for row in rows if table.is_ours(row)]
    return int(asked and (not mine or any("failure" in row for row in mine)))


def gate_check(references: Sequence[HeadReference]) -> Check:
    """The check of a contender's result against references, several in a row for a head that has several."""
    pairs = list(dict.fromkeys((r.batch, r.head) for r in references))

    def check(contender: peers.Contender, result: Any) -> tuple[float, str | None]:
        error, accepted = gate(contender.heads(result, pairs), references)
        limit = max(reference.limit for reference in references)
        wrong = f"wrong result: relative error {error:.2e}, at most {limit:.2e} is accepted"
        return error, None if accepted else wrong

    return check


def measure(
    suite: Suite,
    case: peers.Case,
    able: list[peers.Peer],
    settings: Settings,
    clock: Callable[[], float | None],
) -> Rows:
    """The rows of one case, without those keys that are the same in the whole run."""
    rows: dict[str, dict[str, Any]] = {}
    with side_by_side.preparing(settings.beside):
        contenders = _prepared(suite, case, able, rows)
    with side_by_side.timing(settings.beside):
        add_times(
            rows, contenders, settings.plan, lambda name, ms: suite.figures(case, ms), clock=clock
        )
    for peer in able:
        peer.release()
    return list(rows.values())


def _prepared(
    suite: Suite, case: peers.Case, able: list[peers.Peer], rows: dict[str, dict[str, Any]]
) -> dict[str, peers.Contender]:
    """The contenders that are right, by name; begins the rows of all."""
    check = suite.checker(case)
    contenders: dict[str, peers.Contender] = {}
    for peer in able:
        if not peer.supports(case.shape, case.variant):
            continue
        row = rows[peer.name] = {"peer": peer.name, **_case_keys(case)}
        try:
            contender = suite.prepare(peer, case)
            row.update(_contender_keys(contender))
            row["error"], wrong = check(contender, contender.call(0))
        except Exception as error:
            row["failure"] = records.failure(error)
            continue
        if wrong is None:
            contenders[peer.name] = contender
        else:
            row["failure"] = wrong
    return contenders


def _case_keys(case: peers.Case) -> dict[str, Any]:
    window = case.shape.window if case.variant.name == "sliding_window" else None
    return {
        "variant": case.variant.name,
        **case.shape.sizes,
        "window": window,
        "dtype": case.inputs.dtype.name,
        "density": work(case.variant, case.shape).density,
    }


def _contender_keys(contender: peers.Contender) -> dict[str, Any]:
    keys = {
        "peer": contender.peer,
        "layout": contender.layout,
        "compile_s": None if contender.compile_s is None else round(contender.compile_s, 3),
        "config": contender.config,
    }
    if contender.density is not None:
        keys |= {"block_size": contender.block_size, "density": contender.density}
    return keys
