"""The suite `forward`: the output alone, without the logsumexp, of every variant at every shape."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks import peers, session, table
from benchmarks import settings as command_line
from benchmarks.inputs import Inputs
from benchmarks.reference import gate, reference_heads
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
        return peer.forward(case)

    def checker(self, case: peers.Case) -> session.Check:
        references = reference_heads(case.variant, case.shape, case.inputs.sets[0])
        pairs = [(reference.batch, reference.head) for reference in references]

        def check(contender: peers.Contender, result: Any) -> tuple[float, str | None]:
            error, accepted = gate(contender.heads(result, pairs), references)
            limit = max(reference.limit for reference in references)
            wrong = f"wrong result: relative error {error:.2e}, at most {limit:.2e} is accepted"
            return error, None if accepted else wrong

        return check

    def figures(self, case: peers.Case, ms: float) -> dict[str, Any]:
        return {"tflops": round(work(case.variant, case.shape).forward_flops / ms / 1e9, 3)}


def run(arguments: argparse.Namespace) -> int:
    """Runs the suite; 1 if flexjax was asked for and failed in any case or had none, else 0."""
    settings = command_line.from_arguments(arguments)
    on_gpu = jax.default_backend() == "gpu"
    default = peers.DEFAULT_ON_GPU if on_gpu else peers.DEFAULT_ON_CPU
    rows = session.run(Forward(), settings, default)
    print(table.summary(rows))
    asked = any(name.startswith("flexjax") for name in settings.peers or default)
    mine = [row for row in rows if table.is_ours(row)]
    return int(asked and (not mine or any("failure" in row for row in mine)))
