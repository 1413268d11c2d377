"""Checks of the arguments that block masks are made from, each failure a full sentence."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flexjax import _compat
from flexjax.block_lists import FULL, PARTIAL, Geometry, lists_from_states, states_from_lists


def positive(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(
            f"{name} must be a positive integer known when tracing, but it is {value!r}."
        )
    return int(value)


def lengths(q_len: Any, kv_len: Any) -> tuple[int, int]:
    return positive(q_len, "The number of queries Q_LEN"), positive(
        kv_len, "The number of keys KV_LEN"
    )


def block_pair(block_size: Any, alias: Any) -> tuple[int, int]:
    if alias is not None:
        block_size = alias
    pair = block_size if isinstance(block_size, (tuple, list)) else (block_size, block_size)
    if len(pair) != 2:
        raise ValueError(
            f"block_size must be one length or (q_block, kv_block), but it is {block_size!r}."
        )
    return positive(pair[0], "The block size"), positive(pair[1], "The block size")


def list_pair(counts: Any, indices: Any, prefix: str) -> tuple[Array, Array]:
    counts, indices = jnp.asarray(counts), jnp.asarray(indices)
    for name, array in ((f"{prefix}_num_blocks", counts), (f"{prefix}_indices", indices)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must hold integers, but it is {array.dtype}.")
    if not 1 <= counts.ndim <= 3 or indices.shape[:-1] != counts.shape or indices.shape[-1] < 1:
        raise ValueError(
            f"{prefix}_num_blocks must have shape [B, H, rows] (or [rows]) and {prefix}_indices one dimension "
            f"more, but they have {counts.shape} and {indices.shape}."
        )
    lead = (1,) * (3 - counts.ndim)
    return (
        counts.reshape(lead + counts.shape).astype(jnp.int32),
        indices.reshape(lead + indices.shape).astype(jnp.int32),
    )


def checked_lists(
    partial: tuple[Any, Any], full: tuple[Any, Any], geometry: Geometry
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The same lists if they are sound; rebuilt without the unsound entries if they are traced.

    They are also rebuilt where a block sticks out over the last key: no list of full blocks names one.
    """
    traced = any(map(_compat.is_tracer, (*partial, *full)))
    if not traced:
        _check_lists(partial, full, geometry.cols)
    sticks_out = np.arange(geometry.cols) >= geometry.kv_len // geometry.kv_block
    if not traced and not sticks_out.any():
        return partial, full
    states = states_from_lists(*partial, *full, geometry.cols)
    states = jnp.where((states == FULL) & sticks_out[None, None, None], PARTIAL, states)
    lists = lists_from_states(states)
    return (lists.counts, lists.indices), (lists.full_counts, lists.full_indices)


def _check_lists(partial: tuple[Any, Any], full: tuple[Any, Any], cols: int) -> None:
    """Raises a ValueError if known lists name a block twice or one outside the mask."""
    listed = np.zeros((*partial[0].shape, cols), np.int32)
    for prefix, (counts, indices) in (("kv", partial), ("full_kv", full)):
        counts, indices = np.asarray(counts), np.asarray(indices)
        width = indices.shape[-1]
        if counts.min() < 0 or counts.max() > min(width, cols):
            raise ValueError(
                f"{prefix}_num_blocks must lie between 0 and {min(width, cols)} (the lists hold {width} "
                f"entries, the mask {cols} columns of blocks), but they span {counts.min()} to {counts.max()}."
            )
        valid = np.arange(width) < counts[..., None]
        used = indices[valid]
        if used.size and (used.min() < 0 or used.max() >= cols):
            raise ValueError(
                f"{prefix}_indices must name columns of blocks from 0 to {cols - 1}, but the listed ones span "
                f"{used.min()} to {used.max()}."
            )
        where = np.nonzero(valid)
        np.add.at(listed, (*where[:3], used), 1)
    if listed.max() > 1:
        b, h, row, col = (int(i[0]) for i in np.nonzero(listed > 1))
        raise ValueError(
            f"Block (row {row}, column {col}) of batch {b}, head {h} is listed more than once, so its keys "
            "would count twice. List every block once, as partial or as full."
        )
