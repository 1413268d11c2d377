"""Which block size a mask should have, and masks of blocks of several sizes.

A coarser block is empty, partial or full by what the finer ones in it are, so that one pass over the finest blocks
tells the states of all sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int8

from flexjax.block_lists import EMPTY, FULL, PARTIAL, Geometry

AUTO = "auto"

# Time of a score in blocks of these sizes, relative to the first: the forward kernel at 64 numbers a head on an
# H100 (128 x 64: benchmarks/results/h100, suite tune, variant rel_bias; 64 queries: benchmarks/NOTES.md, short
# rows). Smaller blocks cost more a score, for what is done once a block, and because fewer queries share keys that
# were loaded.
COSTS = {(128, 128): 1.0, (128, 64): 1.21, (64, 128): 1.17, (64, 64): 1.17}
FINEST = (64, 64)


def cheapest_size(states: Int8[Any, "B H R C"]) -> tuple[int, int]:
    """The block size that makes attention cheapest, from the states of all blocks of `FINEST` size.

    The cost of a size is the number of scores in its blocks that are not empty times `COSTS`; of equal costs
    the larger blocks win.
    """
    return min(COSTS, key=lambda size: estimated_cost(states, size))


def estimated_cost(states: Int8[Any, "B H R C"], size: tuple[int, int]) -> float:
    """The cost of a mask in blocks of `size`, in scores of blocks of 128 x 128; see `cheapest_size`."""
    rows, cols = (n // fine for n, fine in zip(size, FINEST, strict=True))
    visited = int((coarsened(states, rows, cols) != EMPTY).sum())
    return visited * size[0] * size[1] * COSTS[size]


def coarsened(states: Int8[Any, "B H R C"], rows: int, cols: int) -> Int8[Any, "B H r c"]:
    """The states of blocks that consist of `rows` x `cols` of the given ones.

    Where they reach over the last query, what is missing does not count, as in `block_states`; over the last
    key, they are not full.
    """
    xp = np if isinstance(states, np.ndarray) else jnp
    n_rows, n_cols = states.shape[2:]
    over_rows, over_cols = -n_rows % rows, -n_cols % cols
    padding = ((0, 0), (0, 0), (0, over_rows), (0, 0))
    # The last row once more changes neither whether all are full nor whether any is not empty.
    states = xp.pad(states, padding, mode="edge")
    states = xp.pad(states, ((0, 0), (0, 0), (0, 0), (0, over_cols)))
    grouped = states.reshape(
        *states.shape[:2], (n_rows + over_rows) // rows, rows, (n_cols + over_cols) // cols, cols
    )
    full, some = (grouped == FULL).all(axis=(3, 5)), (grouped != EMPTY).any(axis=(3, 5))
    return xp.where(full, FULL, xp.where(some, PARTIAL, EMPTY)).astype(np.int8)


def union_of_levels(
    levels: Sequence[tuple[tuple[int, int], Any]], geometry: Geometry
) -> Bool[Array, "B H R C"]:
    """Which of the finest blocks some level names.

    Args:
        levels: (block size, bool [B, H, R, C]) each; the finest size is the geometry's.
        geometry: the tiling by the finest size.

    Raises:
        TypeError: a level's blocks are not boolean.
        ValueError: there is no level, a size is no whole multiple of the finest, or a shape does not fit.
    """
    named = jnp.zeros((1, 1, geometry.rows, geometry.cols), bool)
    for size, wanted in levels:
        blocks = jnp.asarray(wanted)
        level = Geometry(geometry.q_len, geometry.kv_len, *size)
        if blocks.dtype != jnp.bool_:
            raise TypeError(
                f"Levels say by booleans which blocks are visited, but those of size {size} are {blocks.dtype}. "
                "Pass a comparison, such as scores > threshold."
            )
        if size[0] % geometry.q_block or size[1] % geometry.kv_block:
            raise ValueError(
                f"Every block size must be a whole multiple of the finest, "
                f"({geometry.q_block}, {geometry.kv_block}), but one is {size}."
            )
        if blocks.ndim != 4 or blocks.shape[2:] != (level.rows, level.cols):
            raise ValueError(
                f"The level of block size {size} must have shape [B, H, {level.rows}, {level.cols}] for lengths "
                f"({geometry.q_len}, {geometry.kv_len}), but it has {blocks.shape}."
            )
        rows, cols = size[0] // geometry.q_block, size[1] // geometry.kv_block
        fine = jnp.repeat(jnp.repeat(blocks, rows, axis=2), cols, axis=3)
        named = named | fine[:, :, : geometry.rows, : geometry.cols]
    return named
