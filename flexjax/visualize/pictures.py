"""Masks, scores and block masks as arrays, as text, and with matplotlib."""

from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Float32, Integer, Shaped

from flexjax.block_lists import EMPTY, FULL, PARTIAL
from flexjax.masks._arguments import check_integer, name_of
from flexjax.masks._types import MaskMod
from flexjax.scores._types import ScoreMod

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flexjax.block_mask import BlockMask

STATE_NAMES = {FULL: "full", PARTIAL: "partial", EMPTY: "empty"}
_GLYPHS = " ░█"
_SHADES = " ░▒▓█"
# Two blues and a grey that differ in lightness alone: they survive printing and colour blindness.
COLOURS = {EMPTY: "#f2f2f2", PARTIAL: "#9cc3e0", FULL: "#1f5f99"}
_INK = "#444444"
_MASKED = "#c8c8c8"  # darker than the white of a score of zero
_MAX_PIXELS = 512


def mask_grid(
    mask_mod: MaskMod, q_len: int, kv_len: int, b: int = 0, h: int = 0
) -> Bool[np.ndarray, "Q KV"]:
    """Evaluates a mask_mod at every query and key of one head.

    Args:
        mask_mod: the function to evaluate.
        q_len: number of queries, >= 1.
        kv_len: number of keys, >= 1.
        b: batch entry.
        h: query head.

    Returns:
        A boolean array of shape (q_len, kv_len), True where the query may attend the key.

    Raises:
        TypeError: if the mask_mod does not return a boolean, or a length is not an integer.
        ValueError: if a length is less than 1.
    """
    q_idx, kv_idx = _indices("mask_grid()", q_len, kv_len)
    over_keys = jax.vmap(mask_mod, in_axes=(None, None, None, 0))
    over_queries = jax.vmap(over_keys, in_axes=(None, None, 0, None))
    # One fused program: evaluated operation by operation, each would hold a grid of its own.
    grid = np.asarray(jax.jit(over_queries)(jnp.int32(b), jnp.int32(h), q_idx, kv_idx))
    if grid.dtype != np.bool_:
        raise TypeError(
            f"mask_grid(): the mask_mod {name_of(mask_mod)} must return a boolean, but it returned "
            f"{grid.dtype}. Compare to make one, for example `value != 0`."
        )
    return grid


def score_grid(
    score_mod: ScoreMod,
    q_len: int,
    kv_len: int,
    b: int = 0,
    h: int = 0,
    *,
    scores: Float[ArrayLike, "Q KV"] | None = None,
    mask_mod: MaskMod | None = None,
) -> Float32[np.ndarray, "Q KV"]:
    """Evaluates a score_mod at every query and key of one head.

    Args:
        score_mod: the function to evaluate.
        q_len: number of queries, >= 1.
        kv_len: number of keys, >= 1.
        b: batch entry.
        h: query head.
        scores: what the score_mod is applied to, of shape (q_len, kv_len); zeros if None, so that a
            bias shows itself.
        mask_mod: if given, scores are -inf where it does not allow attention.

    Returns:
        A float32 array of shape (q_len, kv_len).

    Raises:
        TypeError: if a length is not an integer, or the mask_mod does not return a boolean.
        ValueError: if a length is less than 1, or `scores` has another shape.
    """
    q_idx, kv_idx = _indices("score_grid()", q_len, kv_len)
    given = jnp.zeros((q_len, kv_len)) if scores is None else jnp.asarray(scores)
    given = given.astype(jnp.float32)
    if given.shape != (q_len, kv_len):
        raise ValueError(
            f"score_grid(): scores must have shape (q_len, kv_len) = {(q_len, kv_len)}, but it has "
            f"shape {given.shape}."
        )
    over_keys = jax.vmap(score_mod, in_axes=(0, None, None, None, 0))
    over_queries = jax.vmap(over_keys, in_axes=(0, None, None, 0, None))
    indices = jnp.int32(b), jnp.int32(h), q_idx, kv_idx
    grid = np.asarray(jax.jit(over_queries)(given, *indices), np.float32)
    if mask_mod is None:
        return grid
    return np.where(mask_grid(mask_mod, q_len, kv_len, b, h), grid, np.float32(-np.inf))


def blocks_text(
    states: Integer[np.ndarray, "R C"], rows: int = 32, cols: int = 32, *, width: int = 2
) -> str:
    """Draws block states as text: `█` full, `░` partial, a space for empty.

    A picture of more than `rows` x `cols` blocks is merged down to that; a merged block is full if
    all of it is, empty if all of it is, and otherwise partial.

    Args:
        states: 0 (empty), 1 (partial) or 2 (full), with a row for each block of queries.
        rows: most lines to draw, >= 1.
        cols: most blocks to draw in a line, >= 1.
        width: characters a block; two make it about square in a terminal.

    Returns:
        The lines, joined by newlines, all of one length.

    Raises:
        ValueError: if `states` is not two-dimensional, is empty, or holds other numbers.
    """
    states = np.asarray(states)
    if states.ndim != 2 or 0 in states.shape:
        raise ValueError(
            f"blocks_text(): states must have shape (query blocks, kv blocks), both at least 1, "
            f"but it has shape {states.shape}."
        )
    if not np.isin(states, (EMPTY, PARTIAL, FULL)).all():
        raise ValueError(
            f"blocks_text(): states must be 0 (empty), 1 (partial) or 2 (full), but they include "
            f"{sorted(set(np.unique(states).tolist()) - {EMPTY, PARTIAL, FULL})}."
        )
    rows = check_integer("blocks_text()", "rows", rows, at_least=1)
    cols = check_integer("blocks_text()", "cols", cols, at_least=1)
    merged = merged_states(states, rows, cols)
    return "\n".join("".join(_GLYPHS[state] * width for state in row) for row in merged)


def merged_states(
    states: Integer[np.ndarray, "R C"], rows: int, cols: int
) -> Integer[np.ndarray, "r c"]:
    """Block states merged down to at most `rows` x `cols`, as `blocks_text` draws them."""
    lowest = _merge(np.minimum, states, rows, cols)
    highest = _merge(np.maximum, states, rows, cols)
    return np.where(lowest == highest, lowest, PARTIAL)


def mask_text(
    mask_mod: MaskMod,
    q_len: int,
    kv_len: int,
    b: int = 0,
    h: int = 0,
    *,
    rows: int = 32,
    cols: int = 32,
) -> str:
    """Draws a mask_mod as text, one line a query (downwards) or a group of them, keys to the right.

    Args:
        mask_mod: the mask to draw.
        q_len: number of queries, >= 1.
        kv_len: number of keys, >= 1.
        b: batch entry.
        h: query head.
        rows: most lines to draw.
        cols: most cells to draw in a line; merged cells are drawn as in `blocks_text`.

    Returns:
        A line with the name, the lengths and the share of allowed pairs, then the picture.

    Raises:
        TypeError: see `mask_grid`.
        ValueError: see `mask_grid`.
    """
    grid = mask_grid(mask_mod, q_len, kv_len, b, h)
    title = f"{name_of(mask_mod)}  {q_len} x {kv_len}, {grid.mean():.1%} allowed"
    return f"{title}\n{blocks_text(np.where(grid, FULL, EMPTY), rows, cols)}"


def score_text(
    score_mod: ScoreMod,
    q_len: int,
    kv_len: int,
    b: int = 0,
    h: int = 0,
    *,
    scores: Float[ArrayLike, "Q KV"] | None = None,
    rows: int = 32,
    cols: int = 32,
) -> str:
    """Draws what a score_mod makes of `scores` as text, in five shades from lowest to highest.

    Args:
        score_mod: the function to draw.
        q_len: number of queries, >= 1.
        kv_len: number of keys, >= 1.
        b: batch entry.
        h: query head.
        scores: what it is applied to; zeros if None.
        rows: most lines to draw.
        cols: most cells to draw in a line; merged cells show their mean.

    Returns:
        A line with the name, the lengths and the range of the scores, then the picture.

    Raises:
        TypeError: see `score_grid`.
        ValueError: see `score_grid`.
    """
    grid = score_grid(score_mod, q_len, kv_len, b, h, scores=scores)
    low, high = float(grid.min()), float(grid.max())
    shade = (_mean(grid, rows, cols) - low) / ((high - low) or 1.0) * len(_SHADES)
    cells = np.clip(shade.astype(int), 0, len(_SHADES) - 1)
    title = f"{name_of(score_mod)}  {q_len} x {kv_len}, from {low:.4g} to {high:.4g}"
    return "\n".join([title, *("".join(_SHADES[cell] * 2 for cell in row) for row in cells)])


def plot_mask(
    mask_mod: MaskMod,
    q_len: int,
    kv_len: int,
    b: int = 0,
    h: int = 0,
    *,
    ax: "Axes | None" = None,
    title: str | None = None,
) -> "Axes":
    """Plots a mask_mod element by element: dark where attention is allowed.

    Args:
        mask_mod: the mask to draw.
        q_len: number of queries, >= 1.
        kv_len: number of keys, >= 1.
        b: batch entry.
        h: query head.
        ax: matplotlib axes to draw into; new ones if None.
        title: above the picture; the mask's name if None.

    Returns:
        The axes. `ax.figure.savefig("mask.png")` writes the picture.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError: see `mask_grid`.
        ValueError: see `mask_grid`.
    """
    colors = _matplotlib_colors()
    grid = mask_grid(mask_mod, q_len, kv_len, b, h)
    ax = _new_axes() if ax is None else ax
    # The share of allowed pairs, so that a picture smaller than the mask loses no thin line.
    share = _mean(grid.astype(np.float32), _MAX_PIXELS, _MAX_PIXELS)
    shades = colors.LinearSegmentedColormap.from_list("allowed", [COLOURS[EMPTY], COLOURS[FULL]])
    extent = (0, kv_len, q_len, 0)
    ax.imshow(share, cmap=shades, vmin=0, vmax=1, extent=extent, interpolation="nearest")
    _label(ax, name_of(mask_mod) if title is None else title, f"{grid.mean():.1%} allowed")
    _frame(ax, (0, kv_len), (0, q_len))
    return ax


def plot_scores(
    score_mod: ScoreMod,
    q_len: int,
    kv_len: int,
    b: int = 0,
    h: int = 0,
    *,
    scores: Float[ArrayLike, "Q KV"] | None = None,
    mask_mod: MaskMod | None = None,
    ax: "Axes | None" = None,
    title: str | None = None,
) -> "Axes":
    """Plots what a score_mod makes of `scores`: blue below zero, red above, grey where masked.

    Args:
        score_mod: the function to draw.
        q_len: number of queries, >= 1.
        kv_len: number of keys, >= 1.
        b: batch entry.
        h: query head.
        scores: what it is applied to, of shape (q_len, kv_len); zeros if None.
        mask_mod: if given, what it does not allow is left grey.
        ax: matplotlib axes to draw into; new ones if None.
        title: above the picture; the score_mod's name if None.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError: see `score_grid`.
        ValueError: see `score_grid`.
    """
    require_matplotlib()
    grid = score_grid(score_mod, q_len, kv_len, b, h, scores=scores, mask_mod=mask_mod)
    return draw_heat(grid, ax=ax, title=name_of(score_mod) if title is None else title)


def draw_heat(
    grid: Float32[np.ndarray, "Q KV"],
    *,
    ax: "Axes | None",
    title: str,
    colours: str | None = None,
) -> "Axes":
    """Draws an array of numbers, -inf in grey: signed ones around white, or in a palette from 0 on."""
    shown = np.ma.masked_invalid(grid)
    low, high = (min(shown.min(), 0.0), max(shown.max(), 0.0)) if shown.count() else (0.0, 0.0)
    limit = max(-low, high) or 1.0
    ax = _new_axes() if ax is None else ax
    ax.set_facecolor(_MASKED)
    q_len, kv_len = grid.shape
    image = ax.imshow(
        shown,
        cmap="RdBu_r" if colours is None else colours,
        vmin=-limit if colours is None else 0.0,
        vmax=limit,
        extent=(0, kv_len, q_len, 0),
        interpolation="nearest",
    )
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)
    if low < high:
        bar.ax.set_ylim(low, high)  # white stays zero, and the bar shows what occurs
    bar.ax.tick_params(labelsize=8, color=_INK, labelcolor=_INK, length=2)
    _label(ax, title)
    _frame(ax, (0, kv_len), (0, q_len))
    return ax


def plot_blocks(
    block_mask: "BlockMask",
    b: int = 0,
    h: int = 0,
    *,
    ax: "Axes | None" = None,
    title: str | None = None,
) -> "Axes":
    """Plots a BlockMask block by block: empty blocks are skipped, full ones need no mask.

    Args:
        block_mask: a concrete BlockMask.
        b: batch entry; any, if the mask broadcasts over the batch.
        h: query head; any, if the mask broadcasts over the heads.
        ax: matplotlib axes to draw into; new ones if None.
        title: above the picture; the lengths and the block size if None.

    Returns:
        The axes, in units of positions. A sliced mask is drawn at its place: `q_idx` starts at its
        offset.

    Raises:
        ImportError: if matplotlib is missing.
    """
    colors = _matplotlib_colors()
    batch, heads = block_mask.shape[:2]
    states = np.asarray(block_mask.block_states())[b if batch > 1 else 0, h if heads > 1 else 0]
    (q_len, kv_len), (q_block, kv_block) = block_mask.seq_lengths, block_mask.block_size
    first = 0 if block_mask.q_offset is None else int(block_mask.q_offset)
    rows, columns = states.shape
    ax = _new_axes() if ax is None else ax
    # One pixel a block; the axes then end at the lengths, inside the last block if it is ragged.
    extent = (0, columns * kv_block, first + rows * q_block, first)
    palette = colors.ListedColormap([COLOURS[state] for state in (EMPTY, PARTIAL, FULL)])
    ax.imshow(states, cmap=palette, vmin=EMPTY, vmax=FULL, extent=extent, interpolation="nearest")
    if max(rows, columns) <= 64:
        line = {"color": "white", "linewidth": 0.8 if max(rows, columns) <= 32 else 0.4}
        ax.vlines(np.arange(1, columns) * kv_block, first, first + rows * q_block, **line)
        ax.hlines(first + np.arange(1, rows) * q_block, 0, columns * kv_block, **line)
    name = f"{q_len} x {kv_len} in blocks of {q_block} x {kv_block}" if title is None else title
    _label(ax, name, f"{np.mean(states != EMPTY):.1%} of blocks visited")
    _frame(ax, (0, kv_len), (first, first + q_len))
    _legend(ax, states)
    return ax


def require_matplotlib() -> ModuleType:
    """`matplotlib.pyplot`, imported on first use.

    Raises:
        ImportError: if matplotlib is missing, with the way to install it.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed. Install it with the viz extra, "
            'pip install "flexjax[viz]", or draw text instead with flexjax.visualize.mask_text.'
        ) from error
    return plt


def _matplotlib_colors() -> ModuleType:
    require_matplotlib()
    from matplotlib import colors

    return colors


def _indices(where: str, q_len: int, kv_len: int) -> tuple[Any, Any]:
    q_len = check_integer(where, "q_len", q_len, at_least=1)
    kv_len = check_integer(where, "kv_len", kv_len, at_least=1)
    return jnp.arange(q_len, dtype=jnp.int32), jnp.arange(kv_len, dtype=jnp.int32)


def _starts(length: int, most: int) -> np.ndarray:
    """Where each of at most `most` nearly equal groups of `length` cells starts."""
    groups = min(length, most)
    return np.arange(groups) * length // groups


def _merge(
    reduce: np.ufunc, cells: Shaped[np.ndarray, "R C"], rows: int, cols: int
) -> Shaped[np.ndarray, "r c"]:
    """Reduces neighbouring cells until at most `rows` x `cols` are left."""
    over_rows = reduce.reduceat(cells, _starts(cells.shape[0], rows), axis=0)
    return reduce.reduceat(over_rows, _starts(cells.shape[1], cols), axis=1)


def _mean(cells: Float32[np.ndarray, "R C"], rows: int, cols: int) -> Float32[np.ndarray, "r c"]:
    total = _merge(np.add, cells, rows, cols)
    return total / _merge(np.add, np.ones_like(cells), rows, cols)


def _new_axes() -> "Axes":
    _, ax = require_matplotlib().subplots(figsize=(4.4, 4.4), layout="constrained")
    return ax


def _label(ax: "Axes", title: str, note: str = "") -> None:
    ax.set_title(title, fontsize=10, color="black", loc="left")
    ax.set_xlabel("kv_idx" + (f"\n{note}" if note else ""), fontsize=9, color=_INK)
    ax.set_ylabel("q_idx", fontsize=9, color=_INK)


def _frame(ax: "Axes", keys: tuple[int, int], queries: tuple[int, int]) -> None:
    """Limits, with the first query on top, whole-numbered ticks and a quiet border."""
    ax.set_xlim(*keys)
    ax.set_ylim(queries[1], queries[0])
    if not 1 / 6 < (queries[1] - queries[0]) / (keys[1] - keys[0]) < 6:
        ax.set_aspect("auto")  # a few queries over many keys would be a hair line
    for axis, (first, last) in ((ax.xaxis, keys), (ax.yaxis, queries)):
        axis.set_major_locator(_ticks(first, last))
    ax.tick_params(labelsize=8, color=_INK, labelcolor=_INK, length=2)
    for spine in ax.spines.values():
        spine.set(color="#bbbbbb", linewidth=0.6)


def _ticks(first: int, last: int) -> Any:
    """Quarters of the range where they are whole, as they are for most lengths in practice."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    quarter, rest = divmod(last - first, 4)
    if rest == 0:
        return FixedLocator([first + quarter * i for i in range(5)])
    return MaxNLocator(nbins=5, integer=True)


def _legend(ax: "Axes", states: np.ndarray) -> None:
    """Names the colours that occur, beside the picture."""
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=COLOURS[state], edgecolor="#bbbbbb", linewidth=0.6, label=label)
        for state, label in STATE_NAMES.items()
        if (states == state).any()
    ]
    ax.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        frameon=False,
        fontsize=8,
        labelcolor=_INK,
        handlelength=1.0,
        handleheight=1.0,
        borderaxespad=0.0,
    )
