"""Orders in which the positions of an image or a video stand in a sequence.

Attention skips whole blocks of a sequence. Row by row, a block of 128 tokens of a 128 x 128 image is one row, and
a 13 x 13 window around its tokens touches 13 such blocks; tile by tile it is a square, whose window touches 9 or
fewer. So a model that attends locally keeps its tokens in tiles, arranges them once at its start and restores
them at its end:

    order = tiled_order((128, 128), (8, 16))
    tokens = order.arrange(tokens)  # (B, H * W, D) to (B, order.length, D)
    ...  # layers with neighborhood(order, (13, 13))
    tokens = order.restore(tokens)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int32, Shaped

from flexjax.masks._arguments import as_array, check_integer, describe


@dataclasses.dataclass(frozen=True, eq=False)
class CanvasOrder:
    """An order of the positions of a canvas; made by `row_order`, `tiled_order` or `morton_order`.

    Attributes:
        name: for the names of masks.
        canvas: the canvas's sizes, in row order the slowest first: (H, W) or (T, H, W).
        coordinates: int32 (len(canvas), length), where the token of each slot of the sequence lies. A slot
            whose coordinates are outside the canvas is empty: tiles at the border may have some.
        tiling: sizes of the tiles and how far the first one sticks out, if the order is one of tiles.
    """

    name: str
    canvas: tuple[int, ...]
    coordinates: Int32[np.ndarray, "N slots"]
    tiling: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def length(self) -> int:
        """Slots of the sequence: the canvas's tokens and the empty slots."""
        return self.coordinates.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens of the canvas."""
        return math.prod(self.canvas)

    @functools.cached_property
    def filled(self) -> Bool[np.ndarray, " slots"]:
        """Which slots hold a token."""
        sizes = np.asarray(self.canvas)[:, None]
        return ((self.coordinates >= 0) & (self.coordinates < sizes)).all(axis=0)

    def coordinates_at(self, index: Any) -> list[Any]:
        """The coordinates of slots, one number or array a dimension; `index` may be traced.

        Tiles whose sizes are powers of two are computed: kernels then see that a block of keys has few different
        coordinates. Other orders are read from tables.
        """
        if self.tiling is None or any(n & (n - 1) for n in self.tiling[0]):
            return [jnp.asarray(x)[index] for x in self.coordinates]
        tile, shift = self.tiling
        counts = _tile_counts(self.canvas, tile, shift)
        slots = math.prod(tile)
        places = zip(
            coordinates_of(index // slots, counts),
            coordinates_of(index % slots, tile),
            tile,
            shift,
            strict=True,
        )
        return [number * size + inside - before for number, inside, size, before in places]

    @functools.cached_property
    def token_of_slot(self) -> Int32[np.ndarray, " slots"]:
        """The token of each slot, numbered in row order; an empty slot has the number of tokens."""
        inside = np.where(self.filled, self.coordinates, 0)
        tokens = np.ravel_multi_index(tuple(inside), self.canvas)
        return np.where(self.filled, tokens, self.tokens).astype(np.int32)

    @functools.cached_property
    def slot_of_token(self) -> Int32[np.ndarray, " tokens"]:
        """The slot of each token, which are numbered in row order."""
        slots = np.empty(self.tokens, np.int32)
        slots[self.token_of_slot[self.filled]] = np.flatnonzero(self.filled)
        return slots

    def arrange(self, x: Shaped[ArrayLike, "..."], axis: int = -2) -> Shaped[Array, "..."]:
        """Puts tokens that stand row by row into this order.

        Args:
            x: an array with the canvas's tokens along `axis`, for example (B, H * W, D) or (B, heads, H * W, D).
            axis: where the tokens are.

        Returns:
            The same with `length` entries along `axis`; zero (or False) in empty slots.

        Raises:
            ValueError: the axis has another length, or there is no such axis.
        """
        array = _along("arrange()", x, axis, self.tokens, "tokens of the canvas")
        return jnp.take(array, self.token_of_slot, axis=axis, mode="fill", fill_value=0)

    def restore(self, x: Shaped[ArrayLike, "..."], axis: int = -2) -> Shaped[Array, "..."]:
        """Puts tokens that stand in this order back row by row; what empty slots hold is dropped.

        Args:
            x: an array with `length` entries along `axis`.
            axis: where the tokens are.

        Returns:
            The same with the canvas's tokens along `axis`.

        Raises:
            ValueError: the axis has another length, or there is no such axis.
        """
        array = _along("restore()", x, axis, self.length, "slots of the order")
        return jnp.take(array, self.slot_of_token, axis=axis)

    def __repr__(self) -> str:
        return f"CanvasOrder({self.name}, canvas={self.canvas}, length={self.length})"


def row_order(canvas: Sequence[int]) -> CanvasOrder:
    """Row by row, as images are stored: the last coordinate varies fastest.

    Args:
        canvas: the canvas's sizes, one to three: (H, W), or (T, H, W) of a video.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is less than 1, or there are none, or more than three.
    """
    canvas = sizes_of("row_order()", "canvas", canvas)
    return CanvasOrder("rows", canvas, _grid(canvas), (canvas, (0,) * len(canvas)))


def tiled_order(
    canvas: Sequence[int], tile: Sequence[int], *, shift: Sequence[int] | None = None
) -> CanvasOrder:
    """Tile by tile: tiles in row order, and the tokens of a tile in row order.

    A tile has the same number of slots everywhere, so that tiles and blocks of attention stay aligned: where
    it sticks out over the canvas, those slots are empty. Best is a tile of as many tokens as a block has, or a
    whole multiple or fraction of it.

    Args:
        canvas: the canvas's sizes, as in `row_order`.
        tile: the tile's sizes, one for each of the canvas's.
        shift: how far the first tile sticks out before the canvas, at least 0 and less than the tile; zeros if
            None. Keys in an order that is shifted by half a window less than their queries' touch fewer blocks.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is less than 1, a shift out of range, or the numbers of sizes differ.

    Source: Hassani et al., "Generalized Neighborhood Attention", arXiv 2504.16922 (token permutation, section 3).
    """
    where = "tiled_order()"
    canvas = sizes_of(where, "canvas", canvas)
    tile = sizes_of(where, "tile", tile, len(canvas))
    shift = (0,) * len(canvas) if shift is None else shift
    shift = sizes_of(where, "shift", shift, len(canvas), at_least=0)
    if any(s >= t for s, t in zip(shift, tile, strict=True)):
        raise ValueError(
            f"{where}: shift must be less than the tile in every dimension, but shift is {shift} and the tile "
            f"{tile}. A shift by a whole tile is an empty tile."
        )
    counts = _tile_counts(canvas, tile, shift)
    grid = np.indices((*counts, *tile), np.int32)
    axes = range(len(canvas))
    places = [grid[a] * tile[a] + grid[len(canvas) + a] - shift[a] for a in axes]
    name = "tiles_" + times(tile) + (f"_shifted_{times(shift)}" if any(shift) else "")
    coordinates = np.stack(places).reshape(len(canvas), -1).astype(np.int32)
    return CanvasOrder(name, canvas, coordinates, (tile, shift))


def morton_order(canvas: Sequence[int]) -> CanvasOrder:
    """Along the Z-shaped curve of Morton: any aligned square of 2^k x 2^k tokens is contiguous.

    That holds wherever such a square lies in the canvas; sizes need not be powers of two, nor equal. Blocks of
    64 tokens of an image are 8 x 8 squares, those of 128 8 x 16 rectangles, whatever block size is chosen later.

    Args:
        canvas: the canvas's sizes, as in `row_order`.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is less than 1, or there are none, or more than three.

    Source: Morton, "A Computer Oriented Geodetic Data Base and a New Technique in File Sequencing", IBM, 1966.
    """
    canvas = sizes_of("morton_order()", "canvas", canvas)
    grid = _grid(canvas)
    bits = max(canvas).bit_length()
    code = np.zeros(grid.shape[1], np.int64)
    digits = itertools.product(range(bits), reversed(range(len(canvas))))
    for place, (bit, axis) in enumerate(digits):
        code |= (grid[axis].astype(np.int64) >> bit & 1) << place
    return CanvasOrder("morton", canvas, grid[:, np.argsort(code, kind="stable")])


def sizes_of(
    where: str, name: str, sizes: Any, count: int | None = None, *, at_least: int = 1
) -> tuple[int, ...]:
    """A tuple of one to three integers, or of `count`."""
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise TypeError(
            f"{where}: {name} must be a tuple of integers, one a dimension, but it is {describe(sizes)}."
        )
    if not 1 <= len(sizes) <= 3 or (count is not None and len(sizes) != count):
        wanted = "one to three" if count is None else f"{count}, one for each size of the canvas,"
        raise ValueError(f"{where}: {name} must have {wanted} entries, but it is {tuple(sizes)}.")
    return tuple(check_integer(where, f"an entry of {name}", n, at_least=at_least) for n in sizes)


def _tile_counts(
    canvas: Sequence[int], tile: Sequence[int], shift: Sequence[int]
) -> tuple[int, ...]:
    """Tiles in each dimension."""
    return tuple(-(-(n + s) // t) for n, t, s in zip(canvas, tile, shift, strict=True))


def _along(where: str, x: Any, axis: int, length: int, what: str) -> Array:
    array = as_array(where, "x", x)
    if not -array.ndim <= axis < array.ndim or array.shape[axis] != length:
        raise ValueError(
            f"{where}: x must have the {length} {what} along axis {axis}, but its shape is {array.shape}. Name "
            f"the right axis with axis=."
        )
    return array


def _grid(canvas: tuple[int, ...]) -> Int32[np.ndarray, "N tokens"]:
    return np.indices(canvas, np.int32).reshape(len(canvas), -1)


def times(sizes: Iterable[int]) -> str:
    """Sizes as names of masks have them: 8x16."""
    return "x".join(map(str, sizes))


def coordinates_of(index: Any, sizes: Sequence[int]) -> list[Any]:
    """The coordinates of a position in row order; beyond the last one, the first coordinate grows on."""
    places = []
    for n in reversed(sizes[1:]):
        places.append(index % n)
        index = index // n
    return [index, *reversed(places)]


if __name__ == "__main__":
    from flexjax import masks
    from flexjax.masks._draw import draw_mask

    # By the package, whose CanvasOrder is not this script's.
    draw_mask(
        masks.neighborhood(masks.tiled_order((8, 8), (2, 4)), (3, 3)),
        masks.neighborhood(masks.morton_order((8, 8)), (3, 3)),
    )
