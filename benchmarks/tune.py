"""The suite `tune`: configurations of flexjax's own kernels beside each other, case by case.

What `flexjax/backends/mosaic_gpu/config.py` chooses by itself runs along as "flexjax/mosaic_gpu"; the committed
rows are why it chooses so. A configuration that does not fit a case is left out there.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from typing import Any

from benchmarks import peers, session, table
from benchmarks import settings as command_line
from benchmarks.backward import Backward
from benchmarks.forward import Forward
from benchmarks.peers.flexjax_peer import Flexjax
from benchmarks.settings import Settings

# Values that are tried of every option of the forward kernel, and of the backward one.
FORWARD = {
    "warpgroups": (1, 2, 3),
    "kv_tile": (64, 128),
    "stages": (2, 3, 4),
    "persistent": (True, False),
}
BACKWARD = {
    "backward_order": ("dk_first", "dq_first"),
    "backward_q_tile": (64, 128),
    "backward_stages": (1, 2, 3),
}
OPTIONS = FORWARD | BACKWARD


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command_line.add_arguments(parser)
    parser.add_argument(
        "--options",
        type=lambda text: [part.strip() for part in text.split(",")],
        help=f"options whose values are combined, of {', '.join(OPTIONS)}; all of the pass that is tuned",
    )
    parser.add_argument("--backward", action="store_true", help="tune the backward pass")


@dataclasses.dataclass(frozen=True)
class Tuned:
    """flexjax under one configuration; see `benchmarks.peers.Peer`."""

    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return "flexjax/mosaic_gpu " + " ".join(f"{name}={value}" for name, value in self.options)

    def missing(self) -> str | None:
        return Flexjax("mosaic_gpu").missing()

    def supports(self, shape: Any, variant: Any) -> bool:
        return True

    def prepare(self, case: peers.Case) -> peers.Contender:
        given = case.options.kernel_options | dict(self.options)
        options = dataclasses.replace(case.options, kernel_options=given)
        contender = Flexjax("mosaic_gpu").prepare(dataclasses.replace(case, options=options))
        return dataclasses.replace(contender, peer=self.name)

    def release(self) -> None:
        pass


class TuneForward(Forward):
    """See `benchmarks.session.Suite`."""

    name = "tune"


class TuneBackward(Backward):
    """See `benchmarks.session.Suite`."""

    name = "tune"


def candidates(names: list[str]) -> list[peers.Peer]:
    """Every combination of the named options' values, and the kernel's own choice."""
    combined = itertools.product(*([(name, value) for value in OPTIONS[name]] for name in names))
    return [Flexjax("mosaic_gpu"), *map(Tuned, combined)]


def run(arguments: argparse.Namespace) -> int:
    """Runs the suite and prints each case's configurations, the fastest first; 1 if nothing ran."""
    settings: Settings = command_line.from_arguments(arguments)
    suite = TuneBackward() if arguments.backward else TuneForward()
    names = arguments.options or list(BACKWARD if arguments.backward else FORWARD)
    rows = session.run(suite, settings, able=candidates(names))
    for case in table.by_case(rows):
        timed = sorted((row for row in case if "ms" in row), key=lambda row: row["ms"])
        print(f"{table.shape_name(case[0])} {case[0]['variant']}")
        print("\n".join(f"  {row['ms']:.4f} ms  {row['peer']}" for row in timed))
    return int(not any("ms" in row for row in rows))
