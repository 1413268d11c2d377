"""Neighbourhood attention: a window of constant size that is pushed inwards at the borders."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from flexjax.masks._arguments import check_integer, describe, named
from flexjax.masks._types import MaskMod
from flexjax.masks.canvas_order import CanvasOrder, coordinates_of, sizes_of, tiled_order, times


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
        return near(q_idx, kv_idx, length, window)

    return named(mask, f"neighborhood_1d_{length}_{window}")


def neighborhood_2d(canvas: tuple[int, int], window: tuple[int, int]) -> MaskMod:
    """Two-dimensional neighbourhood: a kh x kw window of an H x W image stored row by row.

    Position i is pixel `(i // W, i % W)`. In each of the two dimensions the window starts at
    `clip(q - k // 2, 0, size - k)`, so that a pixel near the border sees as many keys as any other:
    the window is shifted inwards, not cut off. For tokens that stand in another order, of which
    fewer blocks are visited, see `neighborhood`.

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
    return _row_by_row("neighborhood_2d", ("height", "width"), canvas, window)


def neighborhood_3d(canvas: tuple[int, int, int], window: tuple[int, int, int]) -> MaskMod:
    """Three-dimensional neighbourhood: a kt x kh x kw window of a T x H x W video stored row by row.

    Position i is `(i // (H * W), i // W % H, i % W)`; see `neighborhood_2d`.

    Args:
        canvas: frames, height and width (T, H, W) in tokens; the sequence has T * H * W positions.
        window: frames, height and width (kt, kh, kw) of the window, each at most the canvas's.

    Returns:
        A mask_mod named `neighborhood_3d_<T>x<H>x<W>_<kt>x<kh>x<kw>`.

    Raises:
        TypeError: if an argument is not a triple of integers.
        ValueError: if a size is less than 1, or the window larger than the canvas.

    Source: Hassani et al., "Neighborhood Attention Transformer", arXiv 2204.07143, in three
    dimensions as in "Generalized Neighborhood Attention", arXiv 2504.16922.
    """
    return _row_by_row("neighborhood_3d", ("frames", "height", "width"), canvas, window)


def neighborhood(
    order: CanvasOrder,
    window: tuple[int, ...],
    *,
    kv_order: CanvasOrder | None = None,
    dilation: int | tuple[int, ...] = 1,
) -> MaskMod:
    """Neighbourhood of tokens that stand in any order, such as tile by tile.

    The mask of `neighborhood_2d` and `neighborhood_3d`, permuted: it computes each slot's coordinates
    where tiles have sizes that are powers of two, and reads them from small tables elsewhere. A
    dilated window takes every `dilation`-th key of a dimension, among the keys whose coordinate has
    the query's remainder. Empty slots of the keys are seen by nothing; what is computed for empty
    slots of the queries means nothing, and `CanvasOrder.restore` drops it.

    Args:
        order: the order of queries and keys.
        window: keys in each dimension; times the dilation at most the canvas's sizes.
        kv_order: the order of the keys, if they stand in another one; of the same canvas.
        dilation: distance between neighbouring keys of a window, >= 1, in each dimension or in all.

    Returns:
        A mask_mod named `neighborhood_<window>_<order>`.

    Raises:
        TypeError: if an argument is not of the type above.
        ValueError: if a size is less than 1, the dilated window is larger than the canvas, or the two
            orders are of different canvases.

    Source: Hassani and Shi, "Dilated Neighborhood Attention Transformer", arXiv 2209.15001; orders
    as in Hassani et al., "Generalized Neighborhood Attention", arXiv 2504.16922.
    """
    where = "neighborhood()"
    kv_order = order if kv_order is None else kv_order
    for name, value in (("order", order), ("kv_order", kv_order)):
        if not isinstance(value, CanvasOrder):
            raise TypeError(
                f"{where}: {name} must be a CanvasOrder, such as tiled_order((128, 128), (8, 16)), "
                f"but it is {describe(value)}."
            )
    canvas = order.canvas
    if kv_order.canvas != canvas:
        raise ValueError(
            f"{where}: queries and keys must lie on one canvas, but order has {canvas} and kv_order "
            f"{kv_order.canvas}."
        )
    sizes = sizes_of(where, "window", window, len(canvas))
    steps = dilation if isinstance(dilation, tuple | list) else (dilation,) * len(canvas)
    steps = sizes_of(where, "dilation", steps, len(canvas))
    spans = []
    for n, k, d in zip(canvas, sizes, steps, strict=True):
        if k * d > n:
            raise ValueError(
                f"{where}: window times dilation must be at most the canvas in every dimension, but "
                f"the canvas is {canvas}, the window {sizes} and the dilation {steps}."
            )
        spans.append(d * (k - 1))
    first = [
        jnp.asarray(_first_keys(x, n, k, d))
        for x, n, k, d in zip(order.coordinates, canvas, sizes, steps, strict=True)
    ]
    q_class, kv_class = (jnp.asarray(_remainders(o.coordinates, steps)) for o in (order, kv_order))
    dilated = any(d > 1 for d in steps)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        allowed = True
        if dilated:
            lows = [start[q_idx] for start in first]
        else:
            queries = zip(order.coordinates_at(q_idx), canvas, sizes, strict=True)
            lows = [_start(place, n, k) for place, n, k in queries]
        for low, key, span in zip(lows, kv_order.coordinates_at(kv_idx), spans, strict=True):
            allowed = allowed & (low <= key) & (key <= low + span)
        return allowed & (q_class[q_idx] == kv_class[kv_idx]) if dilated else allowed

    suffix = f"_dilated_{times(steps)}" if dilated else ""
    other = "" if kv_order is order else f"_keys_in_{kv_order.name}"
    return named(mask, f"neighborhood_{times(sizes)}{suffix}_{order.name}{other}")


def _row_by_row(
    function: str, dimensions: tuple[str, ...], canvas: tuple[int, ...], window: tuple[int, ...]
) -> MaskMod:
    where = f"{function}()"
    given = {"canvas": canvas, "window": window}
    for name, sizes in given.items():
        if not isinstance(sizes, tuple | list) or len(sizes) != len(dimensions):
            kind = {2: "pair", 3: "triple"}[len(dimensions)]
            raise TypeError(
                f"{where}: {name} must be a {kind} ({', '.join(dimensions)}) of integers, but it is "
                f"{describe(sizes)}."
            )
    lengths = [
        check_integer(where, f"the canvas's {name}", n, at_least=1)
        for name, n in zip(dimensions, canvas, strict=True)
    ]
    windows = [
        _check_window(where, f"the window's {name}", k, n)
        for name, k, n in zip(dimensions, window, lengths, strict=True)
    ]

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        allowed = True
        places = (coordinates_of(index, lengths) for index in (q_idx, kv_idx))
        for query, key, length, size in zip(*places, lengths, windows, strict=True):
            allowed = allowed & near(query, key, length, size)
        return allowed

    return named(mask, f"{function}_{times(lengths)}_{times(windows)}")


def _first_keys(places: np.ndarray, length: int, window: int, dilation: int) -> np.ndarray:
    """Where the window of each query starts along one dimension.

    Keys with the query's remainder are a sequence of their own, of `length // dilation` keys or one more.
    """
    places = np.clip(places, 0, length - 1)  # empty slots see what the nearest token sees
    number, remainder = places // dilation, places % dilation
    count = (length - remainder + dilation - 1) // dilation
    start = np.clip(number - window // 2, 0, count - window)
    return (start * dilation + remainder).astype(np.int32)


def _remainders(coordinates: np.ndarray, dilation: tuple[int, ...]) -> np.ndarray:
    """A number for every combination of remainders of a slot's coordinates."""
    remainders = np.asarray(coordinates) % np.asarray(dilation)[:, None]
    return np.ravel_multi_index(tuple(remainders), dilation).astype(np.int32)


def near(query: Any, key: Any, length: int, window: int) -> Any:
    """Whether `key` lies in the window of `query` along one dimension."""
    start = _start(query, length, window)
    return (start <= key) & (key < start + window)


def _start(query: Any, length: int, window: int) -> Any:
    """Where the window of a query starts along one dimension; off the canvas it is that of the nearest token."""
    return jnp.clip(query - window // 2, 0, length - window)


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

    draw_mask(neighborhood_2d((8, 8), (3, 3)), neighborhood(tiled_order((8, 8), (4, 4)), (3, 3)))
