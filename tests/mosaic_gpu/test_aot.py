"""The shipped configurations of the forward kernel, compiled for an H100 on the CPU.

Needs an environment with JAX's CUDA plugin, whose Python FLEXJAX_CUDA_PYTHON names (this one is used if it has the
plugin): beside jax==<this version>, jaxlib and jaxtyping, the packages of `aot.REQUIREMENTS`, installed with
--no-deps. Nothing of it needs a GPU or a driver.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mosaic_gpu.aot import REQUIREMENTS, VARIANTS

ROOT = Path(__file__).parents[2]


def _python() -> str | None:
    named = os.environ.get("FLEXJAX_CUDA_PYTHON")
    if named:
        return named
    return sys.executable if importlib.util.find_spec("jax_cuda13_plugin") else None


pytestmark = pytest.mark.skipif(
    _python() is None,
    reason=f"needs {', '.join(REQUIREMENTS)}: name a Python that has them in FLEXJAX_CUDA_PYTHON",
)


@functools.cache
def _compiled() -> dict[str, dict]:
    """All variants, compiled in one process; those that failed are missing."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [_python(), "-m", "tests.mosaic_gpu.aot", *VARIANTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    compiled = {row["name"]: row for row in rows}
    assert len(compiled) == len(VARIANTS), done.stderr[-3000:]
    return compiled


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", VARIANTS)
def test_machine_code(name):
    """Matrix instructions that nothing serializes, and no register spilled."""
    result = _compiled()[name]
    assert result["registers"], "nothing was compiled"
    assert result["matrix_instructions"] > 0
    assert result["serialized"] == []
    assert result["spilled"] == 0
