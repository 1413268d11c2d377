"""Interleaved images and text: text attends to the images that belong to it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Int

from flexjax.masks._arguments import check_integer, integer_array, known_values, named
from flexjax.masks._types import MaskMod


def image_text(intervals: Int[ArrayLike, "N 2"], image_tokens: int) -> MaskMod:
    """Cross-attention of text to N images: a token sees the images whose interval holds it.

    Keys are the images' tokens, one image behind the other; queries are the text's. Image i is seen by
    the text tokens `intervals[i, 0] <= q_idx < intervals[i, 1]`: from its place in the text to the next
    image in Flamingo.

    Args:
        intervals: integers of shape (N, 2), the first text token that sees each image and the first one
            behind them; possibly traced. An empty interval hides an image, for padding.
        image_tokens: tokens of an image, >= 1. There are N * image_tokens keys.

    Returns:
        A mask_mod named `image_text_<image_tokens>`.

    Raises:
        TypeError: if an argument is not made of integers.
        ValueError: if `intervals` has another shape or an interval ends before it starts, or
            `image_tokens` is less than 1.

    Source: Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning",
    arXiv 2204.14198, section 2.3 (per-image attention masking).
    """
    where = "image_text()"
    table = integer_array(where, "intervals", intervals, {2: "(N, 2)"}).astype(jnp.int32)
    image_tokens = check_integer(where, "image_tokens", image_tokens, at_least=1)
    if table.shape[1] != 2 or table.shape[0] == 0:
        raise ValueError(
            f"{where}: intervals must have shape (N, 2), a start and an end for each of at least one image, but "
            f"it has {table.shape}."
        )
    known = known_values(intervals)
    if known is not None and (known[:, 0] > known[:, 1]).any():
        raise ValueError(
            f"{where}: an interval must not end before it starts, but intervals is "
            f"{np.asarray(known).tolist()}."
        )
    first, stop = table[:, 0], table[:, 1]

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        image = kv_idx // image_tokens
        return (first[image] <= q_idx) & (q_idx < stop[image])

    return named(mask, f"image_text_{image_tokens}")


if __name__ == "__main__":
    from flexjax.masks._draw import draw_mask

    draw_mask(image_text(np.array([[0, 14], [14, 40], [40, 64], [40, 64]]), 16))
