"""Writes docs/support.md from the test suite: backend by feature, and backend by transformation.

    python scripts/support_matrix.py           # writes the page; about a minute
    python scripts/support_matrix.py --check   # fails if the page is not what it would write

Features are the cases of tests/behaviour, which every backend is held to: each case is traced up to the choice of
a backend, and every backend is asked whether it computes that problem, and its gradients. Transformations are
those of tests/transforms: each is lowered for a GPU, and the program is looked through for the kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import AxisType, PartitionSpec  # noqa: E402

import flexjax.attention  # noqa: E402
from flexjax import create_block_mask, flex_attention, masks  # noqa: E402
from flexjax.backends import registry  # noqa: E402
from tests.behaviour import harness  # noqa: E402

PAGE = ROOT / "docs" / "support.md"
STALE = "docs/support.md is out of date. Run: python scripts/support_matrix.py"
BACKENDS = ("mosaic_gpu", "xla", "reference")

INTRODUCTION = """# Support matrix

Written by `scripts/support_matrix.py` from the test suite.

## Features

Cases of `tests/behaviour`, which every backend passes against the dense float64 reference: forward pass and
gradients. A number says how many of a group a backend computes; the rest it refuses with the reason below, and a
portable backend computes them. `mosaic_gpu` is asked for bfloat16 where a case is in float32, and for blocks of
128 where a case has smaller ones.
"""

TRANSFORMATIONS = """## Transformations

Those of `tests/transforms`, all of which pass on every platform. On an NVIDIA Hopper GPU they are computed by:
"""


class _Traced(Exception):
    """Ends a trace at the choice of a backend."""

    def __init__(self, problem: Any) -> None:
        self.problem = problem


def problem_of(case: harness.Case, backend: str) -> Any:
    """The problem that a case states."""

    def stop(problem: Any, requested: str | None) -> Any:
        raise _Traced(problem)

    select, flexjax.attention.select = flexjax.attention.select, stop
    try:
        # The problem of a gradient is that of the forward pass.
        harness.attend(dataclasses.replace(case, grads=False), backend)
    except _Traced as traced:
        return traced.problem
    finally:
        flexjax.attention.select = select
    raise AssertionError(f"The case {case.id} chooses no backend.")


def with_large_blocks(problem: Any) -> Any:
    """The problem with blocks of 128 where it has such as no kernel takes."""
    blocks = problem.blocks
    if blocks is None or blocks.geometry.q_block % 64 == blocks.geometry.kv_block % 64 == 0:
        return problem
    large = dataclasses.replace(blocks.geometry, q_block=128, kv_block=128)
    return dataclasses.replace(problem, blocks=dataclasses.replace(blocks, geometry=large))


def refusal(problem: Any, backend: str, gradients: bool) -> str | None:
    """Why a backend cannot compute a problem or its gradients; None if it can."""
    module = registry.load(backend)
    try:
        module.check(problem)
        if gradients and hasattr(module, "check_backward"):
            module.check_backward(problem)
    except NotImplementedError as error:
        # Where in the tests a mod is written is of no interest.
        return re.sub(r",? at \S+:\d+(:\d+)? \(\S+\)", "", str(error))
    return None


def groups() -> dict[str, dict[str, list[harness.Case]]]:
    """Cases by what a test module is about, and by group."""
    found: dict[str, dict[str, list[harness.Case]]] = {}
    for file in sorted((ROOT / "tests" / "behaviour").glob("test_*.py")):
        module = importlib.import_module(f"tests.behaviour.{file.stem}")
        title = (module.__doc__ or file.stem).strip().split("\n")[0].rstrip(".")
        for name, value in vars(module).items():
            if isinstance(value, list) and value and isinstance(value[0], harness.Case):
                found.setdefault(title, {})[name.lower().replace("_", " ")] = value
    return found


def features() -> str:
    """The table of features, and why cases are refused."""
    head = ["", "cases", *BACKENDS, "mosaic_gpu, deterministic"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    reasons: dict[str, list[str]] = {}
    for title, cases_of in groups().items():
        lines.append(f"| **{title}** |" + " |" * (len(head) - 1))
        for name, cases in cases_of.items():
            counts = dict.fromkeys(head[2:], 0)
            for case in cases:
                problems = {
                    "mosaic_gpu": with_large_blocks(problem_of(case, "mosaic_gpu")),
                    **dict.fromkeys(("xla", "reference"), problem_of(case, "xla")),
                }
                for backend, problem in problems.items():
                    reason = refusal(problem, backend, case.grads)
                    counts[backend] += reason is None
                    if reason is not None:
                        reasons.setdefault(f"`{backend}`: {reason}", []).append(case.id)
                    if backend == "mosaic_gpu":
                        fixed = dataclasses.replace(problem, options=(("deterministic", True),))
                        reason = refusal(fixed, backend, case.grads)
                        counts[head[-1]] += reason is None
            cells = ["all" if n == len(cases) else str(n or "none") for n in counts.values()]
            lines.append(f"| {name} | {len(cases)} | {' | '.join(cells)} |")
    lines += ["", "Refused, and why:", ""]
    for reason, ids in sorted(reasons.items()):
        shown = ", ".join(ids[:4]) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")
        lines.append(f"- {reason.rstrip('.')} ({shown})")
    return "\n".join(lines) + "\n"


# -- transformations --------------------------------------------------------------------------------

X = jax.ShapeDtypeStruct((2, 2, 256, 64), jnp.bfloat16)
IDS = jax.ShapeDtypeStruct((256,), jnp.int32)


def attend(x: Any, ids: Any) -> Any:
    """An attention that the kernels compute, with a mask that captures an array."""
    mask = create_block_mask(masks.document(ids, causal=True), None, None, 256, 256)
    return flex_attention(x, x, x, lambda s, b, h, q, k: s - 0.1 * (q - k), mask)


def loss(x: Any, ids: Any) -> Any:
    return attend(x, ids).astype(jnp.float32).sum()


def _second_order(x: Any, ids: Any) -> Any:
    return jax.jvp(jax.grad(lambda x: loss(x, ids)), (x,), (x,))[1]


def _scan(x: Any, ids: Any) -> Any:
    return jax.lax.scan(lambda c, _: (attend(c, ids), None), x, length=2)[0]


def _over(mapped: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, ids: jax.vmap(mapped, (0, None))(jnp.stack([x, x]), ids)


def _shard_map(x: Any, ids: Any) -> Any:
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,))
    specs = PartitionSpec("batch"), PartitionSpec()
    return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(
        x, ids
    )


def _explicit(x: Any, ids: Any) -> Any:
    return attend(x, ids)


def _closure(x: Any, ids: Any) -> Any:
    return jax.grad(lambda y: loss(y * ids.sum().astype(y.dtype), ids))(x)


# Test module -> (what it is called, the function that is lowered).
LOWERED: dict[str, tuple[str, Callable[..., Any]]] = {
    "test_jit": ("`jax.jit`", attend),
    "test_grad": ("`jax.grad`", jax.grad(loss)),
    "test_vmap": ("`jax.vmap`", _over(attend)),
    "test_vmap_grad": ("`jax.vmap` of `jax.grad`", _over(jax.grad(loss))),
    "test_remat": ("`jax.checkpoint`", jax.grad(jax.checkpoint(loss))),
    "test_scan": ("`jax.lax.scan`", _scan),
    "test_closure": ("closures over traced arrays", _closure),
    "test_shard_map": ("`jax.shard_map`", _shard_map),
    "test_explicit_sharding": ("meshes with explicit axes", _explicit),
    "test_export": ("`jax.export`", attend),
    "test_jvp": ("`jax.jvp`", lambda x, ids: jax.jvp(lambda x: attend(x, ids), (x,), (x,))[1]),
    "test_second_order": ("second derivatives", _second_order),
}


def program(name: str) -> str:
    """The program for a GPU that a transformation becomes."""
    function, arguments = LOWERED[name][1], (X, IDS)
    if name == "test_export":
        return jax.export.export(jax.jit(function), platforms=["cuda"])(*arguments).mlir_module()
    if name == "test_explicit_sharding":
        mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Explicit,))
        with jax.set_mesh(mesh):
            sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("batch"))
            x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=sharding)
            return jax.jit(function).trace(x, IDS).lower(lowering_platforms=("cuda",)).as_text()
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def transformations() -> str:
    """The table of transformations."""
    tested = {file.stem for file in (ROOT / "tests" / "transforms").glob("test_*.py")}
    if tested != LOWERED.keys():
        raise SystemExit(
            "scripts/support_matrix.py and tests/transforms differ in "
            f"{', '.join(sorted(tested ^ LOWERED.keys()))}: add what is missing to LOWERED."
        )
    lines = ["| | computed by |", "|---|---|"]
    for name, (title, _) in LOWERED.items():
        text = program(name)
        # Outside of the kernels only the xla backend multiplies matrices.
        marks = {"the kernels": "custom_call @mosaic_gpu", "`xla`": "stablehlo.dot_general"}
        found = [backend for backend, mark in marks.items() if mark in text]
        if not found:
            raise SystemExit(f"Nothing in the program of {name} says which backend computes it.")
        lines.append(f"| {title} | {' and '.join(found)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if the page differs"
    )
    text = f"{INTRODUCTION}\n{features()}\n{TRANSFORMATIONS}\n{transformations()}"
    if not parser.parse_args().check:
        PAGE.write_text(text)
        return 0
    if PAGE.read_text() == text:
        return 0
    print(STALE)
    return 1


if __name__ == "__main__":
    sys.exit(main())
