"""Dynamic masks: the blocks that a mask visits are chosen by score, anew in every step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flexjax.block_lists import Geometry
from flexjax.mods.ops import is_float


def selected_blocks(
    scores: Float[Array, "B H R C"],
    eligible: Bool[Any, "B H R C"],
    top_k: int | None,
    threshold: Any,
) -> Bool[Array, "B H R C"]:
    """Which eligible blocks of each row have the highest scores; NaN and -inf are never selected.

    Of equal scores those of the first columns are taken.
    """
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
    candidate = eligible & (scores > -jnp.inf)  # also false for NaN
    if threshold is not None:
        candidate &= scores >= threshold
    if top_k is None or top_k >= scores.shape[-1]:
        return candidate
    best = jax.lax.top_k(jnp.where(candidate, scores, -jnp.inf), top_k)[1]
    rows = scores.reshape(-1, scores.shape[-1]).shape[0]
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    among = jnp.zeros((rows, scores.shape[-1]), bool).at[row, best.reshape(rows, -1)].set(True)
    return candidate & among.reshape(scores.shape)


def check_scores(scores: Any, geometry: Geometry, top_k: Any, threshold: Any) -> None:
    """Raises an error that says what is wrong with block scores.

    Raises:
        TypeError: the scores are not floats.
        ValueError: their shape is not that of the blocks, or nothing says how to choose.
    """
    if not is_float(scores.dtype):
        raise TypeError(
            f"Block scores must be floating-point numbers, but they are {scores.dtype}. For a map of wanted "
            "blocks pass jnp.where(wanted, 0.0, -jnp.inf) with threshold=0.0."
        )
    if scores.ndim != 4 or scores.shape[2:] != (geometry.rows, geometry.cols):
        raise ValueError(
            f"Block scores must have shape [B, H, {geometry.rows}, {geometry.cols}], one for every block of "
            f"{geometry.q_block} x {geometry.kv_block} positions of ({geometry.q_len}, {geometry.kv_len}), but "
            f"they have {scores.shape}. Pass seq_lengths= and block_size= that fit."
        )
    if top_k is None and threshold is None:
        raise ValueError(
            "Nothing says which blocks to choose: pass top_k=, the number of blocks a row, threshold=, the "
            "lowest score that is visited, or both."
        )
