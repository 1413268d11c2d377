"""The suite `backward`: gradients of query, key and value from kept residuals, of every variant at every shape.

What the mods captured is not differentiated, for no peer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from benchmarks import peers, session
from benchmarks import settings as command_line
from benchmarks.inputs import Inputs
from benchmarks.reference import reference_gradients
from benchmarks.settings import Settings
from benchmarks.variants import VARIANTS, Shape, work

add_arguments = command_line.add_arguments


class Backward:
    """See `benchmarks.session.Suite`."""

    name = "backward"

    def count(self, settings: Settings) -> int:
        return sum(len(shape.variants) for shape in _shapes(settings))

    def cases(self, settings: Settings) -> Iterator[peers.Case]:
        for shape in _shapes(settings):
            inputs = Inputs(shape, settings.dtype, settings.seed)
            for name in shape.variants:
                yield peers.Case(shape, VARIANTS[name], inputs, settings.options, backward=True)

    def prepare(self, peer: peers.Peer, case: peers.Case) -> peers.Contender:
        return peer.prepare(case)

    def checker(self, case: peers.Case) -> session.Check:
        cotangent = case.inputs.cotangents("BHLD")[0]
        references = reference_gradients(case.variant, case.shape, case.inputs.sets[0], cotangent)
        return session.gate_check(references)

    def figures(self, case: peers.Case, ms: float) -> dict[str, Any]:
        # Five matrix products where the forward pass has two.
        flops = 2.5 * work(case.variant, case.shape).forward_flops
        return {"tflops": round(flops / ms / 1e9, 3)}


def _shapes(settings: Settings) -> list[Shape]:
    """Those whose heads are not grouped: the reference takes one head at a time."""
    return [shape for shape in settings.shapes if shape.q_heads == shape.kv_heads]


def run(arguments: argparse.Namespace) -> int:
    """Runs the suite; 1 if flexjax was asked for and failed in any case or had none, else 0."""
    return session.run_and_report(Backward(), command_line.from_arguments(arguments))
