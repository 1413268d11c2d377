"""The suite `mask`: how long a block mask takes to build, and how much memory it takes, by length and block size.

flexjax builds inside jit, the document ids and the first query index being arguments, so that nothing is folded
into a constant; `flexjax/host` is the time that a mask known while tracing adds to tracing. PyTorch compiles its
create_block_mask, which is given the same mask_mod. A mask that visits other blocks than it should gets no time.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import records
from benchmarks.peers import torch_common
from benchmarks.settings import QUICK_PLAN, add_output, writes
from benchmarks.timing import Plan, add_times
from benchmarks.variants import VARIANTS, Shape, Variant
from flexjax import create_block_mask

NAMES = ("causal", "sliding_window", "document")
LENGTHS = (8192, 32768, 131072, 1048576)
QUICK_LENGTHS = (1024, 8192)
BLOCK_SIZES = (128, 64)
# At block sizes below the first, lists of longer sequences take several GB.
SMALL_BLOCK_LENGTH = 131072
HOST_BYTES = 16 << 20  # larger masks are not made on the host


@dataclasses.dataclass(frozen=True)
class Case:
    """One mask."""

    variant: Variant
    shape: Shape
    block: int

    @property
    def blocks(self) -> int:
        return -(-self.shape.kv_len // self.block)


@dataclasses.dataclass(frozen=True)
class Builder:
    """A peer that is ready to be timed; see `benchmarks.timing.Timed`."""

    run: Callable[[], Any]
    synchronize: Callable[[Any], Any]
    counts: Callable[[Any], np.ndarray]
    compile_s: float | None = None
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    input_sets: int = 1

    def call(self, index: int) -> Any:
        return self.run()

    def wait(self, result: Any) -> None:
        self.synchronize(result)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--variants", type=names, default=NAMES, help=f"of {', '.join(NAMES)}")
    parser.add_argument(
        "--lengths", type=lambda text: list(map(int, names(text))), help=f"{LENGTHS}"
    )
    parser.add_argument(
        "--block-sizes",
        type=lambda text: list(map(int, names(text))),
        help=f"{BLOCK_SIZES}; those after the first up to a length of {SMALL_BLOCK_LENGTH}",
    )
    add_output(parser, "short sequences and few repeats")


def run(arguments: argparse.Namespace) -> int:
    """Runs the suite; 1 if flexjax failed in any case, else 0."""
    log = records.Log("mask", arguments.out, writes(arguments))
    plan = QUICK_PLAN if arguments.quick else Plan(rounds=5, calls=10, warmup=2)
    peers: dict[str, Callable[[Case], Builder | None]] = {
        "flexjax": in_program,
        "flexjax/host": on_host,
    }
    reason = torch_common.missing()
    if reason is None:
        peers["torch_flex"] = in_torch
    else:
        print(f"without torch_flex: {reason}")
    failed = False
    for case in cases(arguments):
        rows = log.add(measure(case, peers, plan))
        for row in rows:
            print(line(row), flush=True)
        failed |= any("failure" in row for row in rows if row["peer"].startswith("flexjax"))
    log.close()
    return int(failed)


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    lengths = arguments.lengths or (QUICK_LENGTHS if arguments.quick else LENGTHS)
    sizes = arguments.block_sizes or BLOCK_SIZES
    for length in lengths:
        shape = Shape(f"S{length}", 1, 1, 1, length, length, 128, tuple(arguments.variants))
        for block in sizes:
            if block == sizes[0] or length <= SMALL_BLOCK_LENGTH:
                for name in arguments.variants:
                    yield Case(VARIANTS[name], shape, block)


def measure(
    case: Case, peers: dict[str, Callable[[Case], Builder | None]], plan: Plan
) -> list[dict[str, Any]]:
    """A row for each peer."""
    expected = visited(case)
    rows: dict[str, dict[str, Any]] = {}
    builders: dict[str, Builder] = {}
    for name, prepare in peers.items():
        sizes = {"B": 1, "L": case.shape.q_len, "S": case.shape.kv_len}
        row = {"peer": name, "variant": case.variant.name, **sizes}
        row |= {"block_size": (case.block, case.block)}
        try:
            builder = prepare(case)
            if builder is None:
                continue
            counts = builder.counts(builder.run())
        except Exception as error:
            row["failure"] = records.failure(error)
            rows[name] = row
            continue
        row |= builder.figures | {"density": round(float(counts.sum()) / case.blocks**2, 6)}
        if builder.compile_s is not None:
            row["compile_s"] = round(builder.compile_s, 3)
        if np.array_equal(counts, expected):
            builders[name] = builder
        else:
            row["failure"] = "wrong result: other numbers of blocks are visited than should be"
        rows[name] = row
    add_times(rows, builders, plan)
    gc.collect()
    return list(rows.values())


def visited(case: Case) -> np.ndarray:
    """How many blocks each row of blocks visits: in all variants here they lie side by side."""
    first, stop = case.variant.visible(case.shape, np.arange(case.shape.q_len))
    starts = np.arange(0, case.shape.q_len, case.block)
    left = np.minimum.reduceat(first // case.block, starts)
    right = np.maximum.reduceat((stop - 1) // case.block, starts)
    return right - left + 1


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    start = (
        f"S {row['S']:>8} block {row['block_size'][0]:>4} {row['variant']:<14} {row['peer']:<12}"
    )
    if "failure" in row:
        return f"{start} {row['failure']}"
    parts = [f"{row['ms']:10.4f} ms"]
    for key, unit in (
        ("compile_s", "s to compile"),
        ("result_mb", "MB"),
        ("peak_mb", "MB at peak"),
    ):
        parts += [f"{row[key]:.5g} {unit}"] if key in row else []
    return f"{start} {', '.join(parts)}"


# -- peers ------------------------------------------------------------------------------------------


def _build(case: Case, captures: dict[str, Any], first_query: Any) -> Any:
    mask_mod = case.variant.mods(jnp, captures, case.shape).mask

    def shifted(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return mask_mod(b, h, q_idx + first_query, kv_idx)

    length = case.shape.q_len
    shown = mask_mod if isinstance(first_query, int) else shifted
    return create_block_mask(shown, None, None, length, length, case.block)


def _counts(mask: Any) -> np.ndarray:
    return np.asarray(mask.kv_num_blocks + mask.full_kv_num_blocks)[0, 0]


def in_program(case: Case) -> Builder:
    captures = {name: jnp.asarray(x) for name, x in case.variant.captures(case.shape).items()}
    start = time.perf_counter()
    build = jax.jit(lambda captures, first: _build(case, captures, first))
    compiled = build.lower(captures, jnp.int32(0)).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    result = memory.output_size_in_bytes
    first = jnp.int32(0)
    return Builder(
        run=lambda: compiled(captures, first),
        synchronize=jax.block_until_ready,
        counts=_counts,
        compile_s=seconds,
        figures={
            "result_mb": round(result / 1e6, 3),
            "peak_mb": round((result + memory.temp_size_in_bytes) / 1e6, 3),
        },
    )


def on_host(case: Case) -> Builder | None:
    """None for a mask that the host does not build: one that captures arrays, or a large one."""
    if case.variant.captures(case.shape) or 16 * case.blocks**2 > HOST_BYTES:
        return None
    return Builder(
        run=lambda: _build(case, {}, 0), synchronize=jax.block_until_ready, counts=_counts
    )


def in_torch(case: Case) -> Builder:
    import torch
    from torch.nn.attention import flex_attention

    torch._dynamo.reset()
    captures = {
        name: torch_common.to_tensor(x) for name, x in case.variant.captures(case.shape).items()
    }
    mask_mod = case.variant.mods(torch, captures, case.shape).mask
    create = torch.compile(flex_attention.create_block_mask, dynamic=False)
    length = case.shape.q_len

    def run() -> Any:
        return create(mask_mod, None, None, length, length, device="cuda", BLOCK_SIZE=case.block)

    def counts(mask: Any) -> np.ndarray:
        return (mask.kv_num_blocks + mask.full_kv_num_blocks)[0, 0].cpu().numpy()

    def synchronize(mask: Any) -> None:
        torch.cuda.synchronize()

    start = time.perf_counter()
    synchronize(run())
    seconds = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mask = run()
    synchronize(mask)
    held = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    figures = {"result_mb": round(held / 1e6, 3), "peak_mb": round(peak / 1e6, 3)}
    return Builder(run, synchronize, counts, seconds, figures)
