"""What flexjax's xla backend is worth on a CPU, against `jax.nn.dot_product_attention` with a dense mask.

    uv run python benchmarks/cpu.py            # prints a table and appends rows to benchmarks/results/cpu/
    uv run python benchmarks/cpu.py --dry-run  # prints only

Both paths get the same inputs in one process; a path whose result or gradient is wrong gets no time. Times are
medians of repeats taken in turns, forward and backward together, float32. Memory is what XLA reserves for
temporaries, from `compiled.memory_analysis()`, so it is exact and needs no run.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from flexjax import create_block_mask, flex_attention, masks

BATCH, HEADS, DIM = 1, 8, 64
TIMED_LENGTH, MEMORY_LENGTH, MASK_LENGTH = 4096, 16384, 32768
DOCUMENTS = 16
RESULTS = Path(__file__).parent / "results" / "cpu"


def document_ids(length: int, count: int) -> jax.Array:
    """Ids of `count` documents with the cuts that all of flexjax's benchmarks use."""
    cuts = np.sort(np.random.RandomState(1).permutation(length - 1)[: count - 1] + 1)
    return jnp.asarray(np.searchsorted(cuts, np.arange(length), side="right"), jnp.int32)


def variants(length: int) -> dict[str, Any]:
    return {
        "causal": masks.causal(),
        "document": masks.document(document_ids(length, DOCUMENTS)),
    }


def flexjax_path(mask_mod: Any, length: int) -> Callable[..., Any]:
    block_mask = create_block_mask(mask_mod, 1, 1, length, length)

    def run(query: Any, key: Any, value: Any) -> Any:
        return flex_attention(
            query, key, value, block_mask=block_mask, layout="BLHD", backend="xla"
        )

    return run


def dense_path(mask_mod: Any, length: int) -> Callable[..., Any]:
    indices = jnp.arange(length, dtype=jnp.int32)
    by_key = jax.vmap(mask_mod, (None, None, None, 0))
    mask = jax.vmap(by_key, (None, None, 0, None))(0, 0, indices, indices)[None, None]

    def run(query: Any, key: Any, value: Any) -> Any:
        return jax.nn.dot_product_attention(query, key, value, mask=mask)

    return run


def step(path: Callable[..., Any]) -> Callable[..., Any]:
    """Forward and backward: (output, gradients of query, key and value) for a given output cotangent."""

    def forward_backward(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
        out, pullback = jax.vjp(path, query, key, value)
        return out, pullback(cotangent)

    return jax.jit(forward_backward)


def shapes(length: int) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((BATCH, length, HEADS, DIM), jnp.float32)] * 4


def relative_error(actual: Any, expected: Any) -> float:
    return max(
        float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    )


def timed(run: Callable[..., Any], inputs: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*inputs))
    return 1e3 * (time.perf_counter() - start)


def measure_time(name: str, mask_mod: Any, repeats: int) -> list[dict[str, Any]]:
    keys = jax.random.split(jax.random.key(0), 4)
    inputs = [
        jax.random.normal(k, s.shape) for k, s in zip(keys, shapes(TIMED_LENGTH), strict=True)
    ]
    paths = {
        "flexjax/xla": step(flexjax_path(mask_mod, TIMED_LENGTH)),
        "jax_nn_dense": step(dense_path(mask_mod, TIMED_LENGTH)),
    }
    outputs = {peer: run(*inputs) for peer, run in paths.items()}
    error = relative_error(outputs["flexjax/xla"], outputs["jax_nn_dense"])
    if error > 1e-4:
        raise SystemExit(f"{name}: the two paths differ by {error:.1e}; nothing was timed.")
    times: dict[str, list[float]] = {peer: [] for peer in paths}
    for _ in range(repeats):
        for peer, run in paths.items():
            times[peer].append(timed(run, inputs))
    return [
        {
            "peer": peer,
            "variant": name,
            "L": TIMED_LENGTH,
            "ms": statistics.median(ms),
            "error": error,
        }
        for peer, ms in times.items()
    ]


def measure_memory(name: str, mask_mod: Any) -> list[dict[str, Any]]:
    rows = []
    for peer, path in (("flexjax/xla", flexjax_path), ("jax_nn_dense", dense_path)):
        compiled = step(path(mask_mod, MEMORY_LENGTH)).lower(*shapes(MEMORY_LENGTH)).compile()
        memory = compiled.memory_analysis()
        total = memory.temp_size_in_bytes + memory.output_size_in_bytes
        rows.append({"peer": peer, "variant": name, "L": MEMORY_LENGTH, "peak_mb": total / 1e6})
    return rows


def measure_mask(name: str, make: Callable[[Any], Any], repeats: int) -> dict[str, Any]:
    """Building a BlockMask inside jit, document ids being an argument."""
    ids = document_ids(MASK_LENGTH, DOCUMENTS)

    def build(ids: Any) -> Any:
        return create_block_mask(make(ids), 1, 1, MASK_LENGTH, MASK_LENGTH)

    compiled = jax.jit(build).lower(ids).compile()
    memory = compiled.memory_analysis()
    ms = statistics.median([timed(compiled, [ids]) for _ in range(repeats)])
    row = {"peer": "flexjax", "variant": name, "L": MASK_LENGTH, "ms": ms}
    return row | {"peak_mb": memory.temp_size_in_bytes / 1e6}


def provenance() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": f"cpu ({platform.machine()}, {jax.devices()[0].device_kind})",
        "jax": jax.__version__,
        "commit": commit,
        "B": BATCH,
        "Hq": HEADS,
        "Hkv": HEADS,
        "D": DIM,
        "dtype": "float32",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="do not write results")
    arguments = parser.parse_args()
    run_id = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S")
    rows = []
    for name, mask_mod in variants(TIMED_LENGTH).items():
        rows += [{"suite": "train", **r} for r in measure_time(name, mask_mod, arguments.repeats)]
    for name, mask_mod in variants(MEMORY_LENGTH).items():
        rows += [{"suite": "memory", **r} for r in measure_memory(name, mask_mod)]
    # The causal mask is built from the argument too, so that it is not folded into a constant.
    makers = {
        "causal": lambda ids: masks.causal(ids[0]),
        "document": lambda ids: masks.document(ids),
        "document, causal": lambda ids: masks.document(ids, causal=True),
    }
    for name, make in makers.items():
        rows.append({"suite": "mask", **measure_mask(name, make, arguments.repeats)})
    rows = [{**row, "run": run_id, **provenance()} for row in rows]

    table = Table("suite", "variant", "L", "path", "ms", "memory, MB", "dense / flexjax")
    dense = {(r["suite"], r["variant"]): r for r in rows if r["peer"] == "jax_nn_dense"}
    for row in rows:
        other = dense.get((row["suite"], row["variant"]))
        figure = "peak_mb" if row["suite"] == "memory" else "ms"
        ratio = f"{other[figure] / row[figure]:.1f}x" if other and other is not row else ""
        cells = [f"{row[k]:.0f}" if k in row else "" for k in ("ms", "peak_mb")]
        table.add_row(row["suite"], row["variant"], str(row["L"]), row["peer"], *cells, ratio)
    Console().print(table)
    if not arguments.dry_run:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"cpu-{run_id[:8]}.jsonl"
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
