"""The shipped configurations of the kernels, compiled for an H100 on the CPU.

Needs an environment with JAX's CUDA plugin, whose Python FLEXJAX_CUDA_PYTHON names (this one is used if it has the
plugin): beside jax==<this version>, jaxlib and jaxtyping, the packages of `aot.REQUIREMENTS`, installed with
--no-deps. Nothing of it needs a GPU or a driver.
"""

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mosaic_gpu.aot import (
    BACKWARD_VARIANTS,
    BATCH,
    DECODE_VARIANTS,
    HEADS,
    LENGTH,
    MASKS,
    REQUIREMENTS,
    VARIANTS,
)

ROOT = Path(__file__).parents[2]

# Bytes of spill stores in all copies of the loops together, of which there are up to four; where it is 0 they are
# left out. Two float32 accumulators of 64 numbers a thread leave little room for derivatives.
SPILL_BUDGETS = {
    "backward_alibi_d128": 256,
    "backward_vectors_d128": 2200,
    "backward_soft_cap_d64": 192,
    "backward_noop_d256": 288,
    "backward_causal_d256": 800,
    "backward_soft_cap_d256": 700,
    "backward_deterministic_causal_d256": 800,
    # An accumulator of 128 numbers a thread; the step waits for memory much longer than for these.
    "decode_window_d256": 96,
}

# The groups are compiled side by side, each in a process of its own; those first that take long.
GROUPS = {
    "backward": BACKWARD_VARIANTS,
    "forward": VARIANTS,
    "decode": DECODE_VARIANTS,
    "masks": MASKS,
}


# Numbers of the size (B, H, L) that passes may hold for a while: logsumexp, D, sums of captured gradients.
STATISTICS = 6


def _temporary_bytes_allowed(group: str, options: dict) -> float:
    """No pass holds anything of the size of its inputs but dQ in float32; odd lengths and decoding aside."""
    if group == "decode" or "q_len" in options:
        return float("inf")
    rows, dim = BATCH * HEADS * LENGTH, options["dim"]
    return 4 * rows * (STATISTICS + (dim if group == "backward" else 0))


def _python() -> str | None:
    named = os.environ.get("FLEXJAX_CUDA_PYTHON")
    if named:
        return named
    return sys.executable if importlib.util.find_spec("jax_cuda13_plugin") else None


pytestmark = pytest.mark.skipif(
    _python() is None,
    reason=f"needs {', '.join(REQUIREMENTS)}: name a Python that has them in FLEXJAX_CUDA_PYTHON",
)


@pytest.fixture(scope="module")
def compiled(request):
    """From a group to its compiled variants; starts with all groups of which there are tests to run."""
    groups = {
        item.callspec.params["group"] for item in request.session.items if item.path == request.path
    }
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = {group: pool.submit(_compile, *GROUPS[group]) for group in GROUPS if group in groups}
        yield lambda group: jobs[group].result()


def _compile(*variants: str) -> dict[str, dict]:
    """Variants, compiled in one process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [_python(), "-m", "tests.mosaic_gpu.aot", *variants]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    found = {row["name"]: row for row in rows}
    assert len(found) == len(variants), done.stderr[-3000:]
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("group", "name"),
    [
        pytest.param(group, name, id=name)
        for group, variants in GROUPS.items()
        if group != "masks"
        for name in variants
    ],
)
def test_machine_code(compiled, group, name):
    """Matrix instructions that nothing serializes, spilled registers and memory within their budgets."""
    result = compiled(group)[name]
    assert result["registers"], "no kernel was compiled"
    assert result["matrix_instructions"] > 0
    assert result["serialized"] == []
    assert result["added_halves"] == 0, "ptxas 13.0 takes such sums for one another"
    options = GROUPS[group][name][1]
    assert result["temporary_bytes"] <= _temporary_bytes_allowed(group, options)
    assert result["spilled"] <= SPILL_BUDGETS.get(name, 0)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("group", ["masks"])
def test_block_masks(compiled, group):
    """Little memory beside the lists, also where extremes come from a sparse table."""
    for result in compiled(group).values():
        assert result["temporary_bytes"] < 0.15 * result["output_bytes"]
