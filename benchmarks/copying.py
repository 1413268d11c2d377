"""A copy of memory, timed beside what should be as fast: reads and writes of an array that no cache holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

COPY = "copy"
_BYTES = 1 << 29
_QUICK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Copy:
    """See `benchmarks.timing.Timed`."""

    array: Any
    negate: Any
    input_sets: int = 1

    def call(self, index: int) -> Any:
        return self.negate(self.array)

    def wait(self, result: Any) -> None:
        jax.block_until_ready(result)

    def tbs(self, ms: float) -> float:
        """TB/s read and written."""
        return round(2 * self.array.nbytes / ms / 1e9, 6)


def copy(quick: bool) -> Copy:
    size = _QUICK_BYTES if quick else _BYTES
    return Copy(jnp.ones(size // 2, jnp.bfloat16), jax.jit(lambda x: -x))


def add_share(rows: Iterable[dict[str, Any]], copied: dict[str, Any]) -> None:
    """Adds `of_copy`, the share of the copy's bandwidth, to the rows of what was timed beside it."""
    if "tbs" not in copied:
        return
    for row in rows:
        if row is not copied and "tbs" in row:
            row["of_copy"] = round(row["tbs"] / copied["tbs"], 4)
