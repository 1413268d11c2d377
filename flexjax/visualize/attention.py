"""Heat-maps of attention: the scores or the weights that queries give to keys."""

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from flexjax.masks._types import MaskMod
from flexjax.scores._types import ScoreMod
from flexjax.visualize import pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flexjax.block_mask import BlockMask


def attention_grid(
    query: Float[Array, "B Hq L D"],
    key: Float[Array, "Bkv Hkv S D"],
    b: int = 0,
    h: int = 0,
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: "BlockMask | None" = None,
    scale: float | None = None,
    softmax: bool = True,
) -> Float32[np.ndarray, "L S"]:
    """What the queries of one head give to each key, computed densely in float32.

    Args:
        query: (B, Hq, L, D), as for `flex_attention`.
        key: (Bkv, Hkv, S, D).
        b: batch entry.
        h: query head.
        score_mod: as for `flex_attention`.
        mask_mod: as there.
        block_mask: as there; excludes mask_mod.
        scale: factor on Q K^T; 1 / sqrt(D) by default.
        softmax: whether to return weights, which sum to 1 in a row, or scores, -inf where masked.

    Returns:
        A float32 array of shape (L, S). Weights of a row that sees no key are 0.

    Raises:
        TypeError: if the mask_mod does not return a boolean.
        ValueError: if shapes do not fit together, `b` or `h` is out of range, or two masks are given.
    """
    where = "attention_grid()"
    fits = query.ndim == key.ndim == 4 and query.shape[-1] == key.shape[-1]
    if not fits or query.shape[1] % key.shape[1] or key.shape[0] not in (1, query.shape[0]):
        raise ValueError(
            f"{where}: query must have shape (B, Hq, L, D) and key (B or 1, Hkv, S, D) with Hkv a divisor of Hq, "
            f"but they have {query.shape} and {key.shape}."
        )
    if not (0 <= b < query.shape[0] and 0 <= h < query.shape[1]):
        raise ValueError(
            f"{where}: b and h must name one of {query.shape[0]} batch rows and one of {query.shape[1]} query "
            f"heads, but they are {b} and {h}."
        )
    if mask_mod is not None and block_mask is not None:
        raise ValueError(f"{where} takes mask_mod or block_mask, but both were given.")
    q_len, kv_len = query.shape[2], key.shape[2]
    rows = query[b, h].astype(jnp.float32)
    columns = key[b if key.shape[0] > 1 else 0, h // (query.shape[1] // key.shape[1])]
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    precise = jax.lax.Precision.HIGHEST
    scores = factor * jnp.matmul(rows, columns.astype(jnp.float32).T, precision=precise)
    if block_mask is not None:
        if block_mask.seq_lengths != (q_len, kv_len):
            raise ValueError(
                f"{where}: the block mask is for lengths {block_mask.seq_lengths}, but query and key have "
                f"{(q_len, kv_len)}."
            )
        mask_mod = block_mask.mask_mod
        score_mod = _shifted(score_mod, block_mask)
    grid = pictures.score_grid(
        score_mod or _unchanged, q_len, kv_len, b, h, scores=scores, mask_mod=mask_mod
    )
    if block_mask is not None:
        grid = np.where(_visited(block_mask, b, h), grid, np.float32(-np.inf))
    return _softmax(grid) if softmax else grid


def plot_attention(
    query: Float[Array, "B Hq L D"],
    key: Float[Array, "Bkv Hkv S D"],
    b: int = 0,
    h: int = 0,
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: "BlockMask | None" = None,
    scale: float | None = None,
    softmax: bool = True,
    ax: "Axes | None" = None,
    title: str | None = None,
) -> "Axes":
    """Plots what the queries of one head give to each key as a heat-map.

    Args:
        query: see `attention_grid`, like all up to `softmax`.
        key: see there.
        b: see there.
        h: see there.
        score_mod: see there.
        mask_mod: see there.
        block_mask: see there.
        scale: see there.
        softmax: weights, from white for 0 to dark; or scores, blue below zero and red above. What is masked
            is grey.
        ax: matplotlib axes to draw into; new ones if None.
        title: above the picture; the batch row and the head if None.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError: see `attention_grid`.
        ValueError: see `attention_grid`.
    """
    pictures.require_matplotlib()
    scores = attention_grid(
        query,
        key,
        b,
        h,
        score_mod=score_mod,
        mask_mod=mask_mod,
        block_mask=block_mask,
        scale=scale,
        softmax=False,
    )
    title = f"batch row {b}, head {h}" if title is None else title
    if not softmax:
        return pictures.draw_heat(scores, ax=ax, title=title)
    weights = np.where(np.isneginf(scores), scores, _softmax(scores))
    return pictures.draw_heat(weights, ax=ax, title=title, colours="Blues")


def _softmax(scores: Float32[np.ndarray, "L S"]) -> Float32[np.ndarray, "L S"]:
    """Weights of each row; 0 where all of it is -inf."""
    highest = np.maximum(scores.max(axis=1, keepdims=True), np.finfo(np.float32).min)
    weights = np.exp(scores - highest)
    total = weights.sum(axis=1, keepdims=True)
    return weights / np.where(total > 0, total, 1).astype(np.float32)


def _unchanged(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score


def _shifted(score_mod: ScoreMod | None, block_mask: "BlockMask") -> ScoreMod | None:
    """The score_mod of a sliced mask, which sees the query's index in the whole mask."""
    offset = block_mask.q_offset
    if score_mod is None or offset is None:
        return score_mod
    return lambda score, b, h, q_idx, kv_idx: score_mod(score, b, h, q_idx + offset, kv_idx)


def _visited(block_mask: "BlockMask", b: int, h: int) -> Any:
    """Which positions lie in a block that is computed, (L, S)."""
    batch, heads, q_len, kv_len = block_mask.shape
    blocks = np.asarray(block_mask.to_dense())[b if batch > 1 else 0, h if heads > 1 else 0] > 0
    wide = blocks.repeat(block_mask.block_size[0], 0).repeat(block_mask.block_size[1], 1)
    return wide[:q_len, :kv_len]
