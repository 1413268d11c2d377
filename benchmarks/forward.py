"""The suite `forward`: the output alone, without the logsumexp, of every variant at every shape."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from benchmarks import peers, session
from benchmarks import settings as command_line
from benchmarks.inputs import Inputs
from benchmarks.reference import reference_heads
from benchmarks.settings import Settings
from benchmarks.variants import VARIANTS, work

add_arguments = command_line.add_arguments


class Forward:
    """See `benchmarks.session.Suite`."""

    name = "forward"

    def count(self, settings: Settings) -> int:
        return sum(len(shape.variants) for shape in settings.shapes)

    def cases(self, settings: Settings) -> Iterator[peers.Case]:
        for shape in settings.shapes:
            inputs = Inputs(shape, settings.dtype, settings.seed)
            for name in shape.variants:
                yield peers.Case(shape, VARIANTS[name], inputs, settings.options)

    def prepare(self, peer: peers.Peer, case: peers.Case) -> peers.Contender:
        return peer.prepare(case)

    def checker(self, case: peers.Case) -> session.Check:
        references = reference_heads(case.variant, case.shape, case.inputs.sets[0])
        return session.gate_check(references)

    def figures(self, case: peers.Case, ms: float) -> dict[str, Any]:
        return {"tflops": round(work(case.variant, case.shape).forward_flops / ms / 1e9, 3)}


def run(arguments: argparse.Namespace) -> int:
    """Runs the suite; 1 if flexjax was asked for and failed in any case or had none, else 0."""
    return session.run_and_report(Forward(), command_line.from_arguments(arguments))
