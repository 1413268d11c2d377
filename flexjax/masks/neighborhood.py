"""Neighbourhood attention: a window of constant size that is pushed inwards at the borders."""

from typing import Any

import jax.numpy as jnp

from flexjax.masks._arguments import check_integer, describe, named
from flexjax.masks._types import MaskMod


def neighborhood_1d(length: int, window: int) -> MaskMod:
    """One-dimensional neighbourhood: the `window` keys nearest to the query, always all of them.

    `start <= kv_idx < start + window` with `start = clip(q_idx - window // 2, 0, length - window)`.

    Args:
        length: tokens in the sequence, >= 1.
        window: visible keys, 1 to `length`. An even window has one more key before than behind.

    Returns:
        A mask_mod named `neighborhood_1d_<length>_<window>`.

    Raises:
        TypeError: if an argument is not an integer.
        ValueError: if it is less than 1, or the window larger than the sequence.

    Source: Hassani et al., "Neighborhood Attention Transformer", arXiv 2204.07143.
    """
    length = check_integer("neighborhood_1d()", "length", length, at_least=1)
    window = _check_window("neighborhood_1d()", "window", window, length)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return _near(q_idx, kv_idx, length, window)

    return named(mask, f"neighborhood_1d_{length}_{window}")


def neighborhood_2d(canvas: tuple[int, int], window: tuple[int, int]) -> MaskMod:
    """Two-dimensional neighbourhood: a kh x kw window of an H x W image stored row by row.

    Position i is pixel `(i // W, i % W)`. In each of the two dimensions the window starts at
    `clip(q - k // 2, 0, size - k)`, so that a pixel near the border sees as many keys as any other:
    the window is shifted inwards, not cut off.

    Args:
        canvas: height and width (H, W) of the image in tokens; the sequence has H * W positions.
        window: height and width (kh, kw) of the window, each at most the canvas's. Even sizes have
            one more key before than behind.

    Returns:
        A mask_mod named `neighborhood_2d_<H>x<W>_<kh>x<kw>`.

    Raises:
        TypeError: if an argument is not a pair of integers.
        ValueError: if a size is less than 1, or the window larger than the canvas.

    Source: Hassani et al., "Neighborhood Attention Transformer", arXiv 2204.07143.
    """
    where = "neighborhood_2d()"
    for name, pair in (("canvas", canvas), ("window", window)):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(
                f"{where}: {name} must be a pair (height, width) of integers, but it is "
                f"{describe(pair)}."
            )
    height = check_integer(where, "the canvas's height", canvas[0], at_least=1)
    width = check_integer(where, "the canvas's width", canvas[1], at_least=1)
    rows = _check_window(where, "the window's height", window[0], height)
    columns = _check_window(where, "the window's width", window[1], width)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        near_row = _near(q_idx // width, kv_idx // width, height, rows)
        return near_row & _near(q_idx % width, kv_idx % width, width, columns)

    return named(mask, f"neighborhood_2d_{height}x{width}_{rows}x{columns}")


def _near(query: Any, key: Any, length: int, window: int) -> Any:
    """Whether `key` lies in the window of `query` along one dimension."""
    start = jnp.clip(query - window // 2, 0, length - window)
    return (start <= key) & (key < start + window)


def _check_window(where: str, name: str, window: int, length: int) -> int:
    window = check_integer(where, name, window, at_least=1)
    if window > length:
        raise ValueError(
            f"{where}: {name} must be at most the length it moves along, but it is {window} and "
            f"the length {length}."
        )
    return window


if __name__ == "__main__":
    from flexjax.masks._draw import draw_mask

    draw_mask(neighborhood_2d((8, 8), (3, 3)))
