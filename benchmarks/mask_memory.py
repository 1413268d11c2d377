"""The suite `mask_memory`: bytes that a BlockMask holds, by length, mask, block size and width of its lists.

    python benchmarks/run.py mask_memory

Masks are built and the bytes of their arrays added up; nothing is timed. `padded` is what `create_block_mask`
makes by default, `compact` what compact=True makes, `inference` a compact one without the lists of the backward
pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import records
from benchmarks.variants import VARIANTS, Shape
from flexjax import BlockMask, create_block_mask

NAMES = ("causal", "sliding_window", "document")
LENGTHS = (8192, 32768, 131072, 1048576)
BLOCK_SIZES = (64, 128, 256)
# Smaller blocks of longer sequences take several GB while they are listed.
MOST_BLOCKS = 8192
KINDS: dict[str, dict[str, Any]] = {
    "padded": {},
    "compact": {"compact": True},
    "inference": {"compact": True, "compute_q_blocks": False},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths", type=lambda text: list(map(int, text.split(","))), default=list(LENGTHS)
    )
    parser.add_argument("--out", type=Path, help="folder for the rows; benchmarks/results/<device>")


def run(arguments: argparse.Namespace) -> int:
    """Runs the suite; always 0."""
    log = records.Log("mask_memory", arguments.out)
    for row in measure(arguments.lengths):
        log.add([row])
    print(table(log.rows))
    log.close()
    return 0


def measure(lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for every length, mask, block size and kind."""
    for length in lengths:
        shape = Shape(f"S{length}", 1, 1, 1, length, length, 128, NAMES)
        for name in NAMES:
            variant = VARIANTS[name]
            captures = {n: jnp.asarray(x) for n, x in variant.captures(shape).items()}
            mask_mod = variant.mods(jnp, captures, shape).mask
            for block in BLOCK_SIZES:
                if length // block > MOST_BLOCKS:
                    continue
                for kind, options in KINDS.items():
                    mask = create_block_mask(mask_mod, None, None, length, length, block, **options)
                    yield {
                        "peer": kind,
                        "variant": name,
                        "B": 1,
                        "L": length,
                        "S": length,
                        "block_size": mask.block_size,
                        "result_mb": round(list_bytes(mask) / 1e6, 4),
                        "density": round(1.0 - mask.sparsity() / 100.0, 6),
                    }


def list_bytes(mask: BlockMask) -> int:
    """Bytes of a mask's arrays, without those that mask_mod captured, which the caller holds anyway."""
    own = jax.tree.leaves(mask)
    captured = {id(x) for x in jax.tree.leaves(mask.mask_captures)}
    return sum(x.nbytes for x in own if id(x) not in captured)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, in MB."""
    lines = [
        "| S | block | mask | visited | padded | compact | inference |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = dict.fromkeys((row["S"], row["block_size"][0], row["variant"]) for row in rows)
    for case in cases:
        found = {
            row["peer"]: row
            for row in rows
            if (row["S"], row["block_size"][0], row["variant"]) == case
        }
        density = found["padded"]["density"]
        sizes = (f"{found[kind]['result_mb']:.4g}" for kind in KINDS)
        lines.append(f"| {case[0]} | {case[1]} | {case[2]} | {density:.2%} | {' | '.join(sizes)} |")
    return "\n".join(lines)
