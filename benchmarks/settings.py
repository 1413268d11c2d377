"""The command-line options that all suites with peers share."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.timing import Plan
from benchmarks.variants import SHAPES, VARIANTS, Shape

QUICK_PLAN = Plan(rounds=3, calls=3, warmup=1)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A parsed command line; see `add_arguments`.

    Attributes:
        shapes: what to measure, with the variants of each.
        peers: names; None for the default ones.
        plan: how to time.
        options: for flexjax itself.
        dtype: of the inputs.
        seed: of the inputs.
        out: folder of the rows; None for the committed results.
        write: whether rows are written at all.
        minutes: after these no further case is begun; None for no bound.
        base: another version of flexjax to measure beside this one; see `benchmarks.peers.flexjax_base`.
        beside: a file that other runs on this device name too; see `benchmarks.side_by_side`.
    """

    shapes: tuple[Shape, ...]
    peers: tuple[str, ...] | None
    plan: Plan
    options: peers.Options
    dtype: str
    seed: int
    out: Path | None
    write: bool
    minutes: float | None
    base: str | None = None
    beside: Path | None = None


QUICK = "sizes that a CPU computes at once and few repeats"


def add_output(parser: argparse.ArgumentParser, quick: str) -> None:
    """The options of where rows go; `quick` says what is smaller then."""
    parser.add_argument("--out", type=Path, help="folder for the rows; benchmarks/results/<device>")
    parser.add_argument(
        "--quick", action="store_true", help=f"{quick}; no rows are written without --out"
    )


def writes(arguments: argparse.Namespace) -> bool:
    """Whether rows are written: those of --quick only where --out says so."""
    return not arguments.quick or arguments.out is not None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", type=_names(SHAPES), help=f"of {', '.join(SHAPES)}; all")
    parser.add_argument(
        "--variants",
        type=_names(VARIANTS),
        help=f"of {', '.join(VARIANTS)}. With --shapes, these on each of the shapes; without, those of them "
        "that a shape has by itself",
    )
    parser.add_argument(
        "--peers",
        type=_peers,
        help=f"of {', '.join(peers.NAMES)}; by default {', '.join(peers.DEFAULT_ON_GPU)}, on a CPU "
        f"{', '.join(peers.DEFAULT_ON_CPU)}",
    )
    parser.add_argument(
        "--lengths",
        type=lambda text: [int(part) for part in _list(text)],
        help="run the shapes at these lengths instead, with the same number of tokens",
    )
    add_output(parser, QUICK)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, help=f"turns of each peer; {Plan.rounds}")
    parser.add_argument("--calls", type=int, help=f"queued calls a turn; {Plan.calls}")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--minutes", type=float, help="begin no case after these")
    parser.add_argument(
        "--base",
        help="another version of flexjax to measure beside this one: a commit, or a folder that holds the package",
    )
    parser.add_argument(
        "--beside",
        type=Path,
        help="a file that other runs on this device name too: they compile side by side and time one by one",
    )
    parser.add_argument(
        "--block-size", type=_block_size, default=(128, 128), help="flexjax's blocks: 128 or 64x128"
    )
    parser.add_argument(
        "--kernel-options", type=json.loads, default={}, help="flexjax's kernel_options, as JSON"
    )


def from_arguments(arguments: argparse.Namespace) -> Settings:
    """The settings of a command line."""
    plan = QUICK_PLAN if arguments.quick else Plan()
    given = {"rounds": arguments.rounds, "calls": arguments.calls}
    plan = dataclasses.replace(plan, **{name: n for name, n in given.items() if n is not None})
    return Settings(
        shapes=tuple(_shapes(arguments)),
        peers=None if arguments.peers is None else tuple(arguments.peers),
        plan=plan,
        options=peers.Options(arguments.block_size, arguments.kernel_options),
        dtype=arguments.dtype,
        seed=arguments.seed,
        out=arguments.out,
        write=writes(arguments),
        minutes=arguments.minutes,
        base=arguments.base,
        beside=arguments.beside,
    )


def _shapes(arguments: argparse.Namespace) -> list[Shape]:
    shapes = [SHAPES[name] for name in arguments.shapes or SHAPES]
    if arguments.variants:
        chosen = []
        for shape in shapes:
            own = [name for name in arguments.variants if name in shape.variants]
            variants = tuple(arguments.variants if arguments.shapes else own)
            chosen.append(dataclasses.replace(shape, variants=variants))
        shapes = [shape for shape in chosen if shape.variants]
    if arguments.quick:
        shapes = [shape.shrunk() for shape in shapes]
    if arguments.lengths:
        shapes = [shape.with_length(length) for shape in shapes for length in arguments.lengths]
    return shapes


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _names(known: dict[str, Any]) -> Any:
    def parse(text: str) -> list[str]:
        names = _list(text)
        for name in names or [text]:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse


def _peers(text: str) -> list[str]:
    names = _list(text)
    try:
        for name in names:
            peers.make_peer(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return names


def _block_size(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    return int(rows), int(cols or rows)
