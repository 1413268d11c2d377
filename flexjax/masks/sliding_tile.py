"""Sliding tile attention: a neighbourhood of whole tiles, in which no block is partial."""

import math
from typing import Any

from flexjax.masks._arguments import check_integer, named
from flexjax.masks._types import MaskMod
from flexjax.masks.canvas_order import coordinates_of, sizes_of, times
from flexjax.masks.neighborhood import near


def sliding_tile(
    canvas: tuple[int, ...],
    tile: tuple[int, ...],
    window: tuple[int, ...],
    *,
    text_length: int = 0,
) -> MaskMod:
    """Tokens of a tile see the tiles of a window around it, and text is seen by all.

    Tokens stand tile by tile, as `tiled_order(canvas, tile)` arranges them, and behind them stand
    `text_length` tokens of text, which see everything and are seen by everything. The window counts
    tiles; it is pushed inwards at the borders. With as many tokens in a tile as in a block of the
    attention every block of the canvas is full or empty, so that the mask costs nothing a score.

    Args:
        canvas: (H, W) or (T, H, W) in tokens, whole multiples of the tile.
        tile: the tile's sizes in tokens.
        window: the window's sizes in tiles, each at most the canvas's.
        text_length: tokens of text behind the canvas, >= 0.

    Returns:
        A mask_mod named `sliding_tile_<tile>_<window>`.

    Raises:
        TypeError: if an argument is not made of integers.
        ValueError: if the tile does not divide the canvas, the window is larger than it, or numbers of
            dimensions differ.

    Source: Zhang et al., "Fast Video Generation with Sliding Tile Attention", arXiv 2502.04507.
    """
    where = "sliding_tile()"
    canvas = sizes_of(where, "canvas", canvas)
    tile = sizes_of(where, "tile", tile, len(canvas))
    window = sizes_of(where, "window", window, len(canvas))
    text_length = check_integer(where, "text_length", text_length, at_least=0)
    counts = [n // t for n, t in zip(canvas, tile, strict=True)]
    if any(n % t for n, t in zip(canvas, tile, strict=True)):
        raise ValueError(
            f"{where}: the tile must divide the canvas in every dimension, but the canvas is {canvas} and the "
            f"tile {tile}. Pad the canvas, or use neighborhood(tiled_order(canvas, tile), ...)."
        )
    if any(w > n for w, n in zip(window, counts, strict=True)):
        raise ValueError(
            f"{where}: window counts tiles and must be at most the canvas, which has {tuple(counts)} of them, "
            f"but it is {window}."
        )
    tokens, tile_tokens = math.prod(canvas), math.prod(tile)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        allowed = True
        places = (coordinates_of(index // tile_tokens, counts) for index in (q_idx, kv_idx))
        for query, key, n, w in zip(*places, counts, window, strict=True):
            allowed = allowed & near(query, key, n, w)
        return allowed | (q_idx >= tokens) | (kv_idx >= tokens) if text_length else allowed

    return named(mask, f"sliding_tile_{times(tile)}_{times(window)}")


if __name__ == "__main__":
    from flexjax.masks._draw import draw_mask

    draw_mask(sliding_tile((6, 8), (2, 2), (3, 1), text_length=16))
