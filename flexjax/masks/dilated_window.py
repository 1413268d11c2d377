"""Dilated sliding window: every d-th key within a distance."""

from typing import Any

import jax.numpy as jnp

from flexjax.masks._arguments import check_integer, named
from flexjax.masks._types import MaskMod


def dilated_window(window: int, dilation: int) -> MaskMod:
    """Dilated local mask: `|q_idx - kv_idx| <= window` and `(q_idx - kv_idx) % dilation == 0`.

    Symmetric; `and_masks(causal(), dilated_window(...))` keeps the past only.

    Args:
        window: largest visible distance in positions (not in steps of the dilation), >= 0.
        dilation: distance between neighbouring visible keys, >= 1; 1 is a plain window.

    Returns:
        A mask_mod named `dilated_window_<window>_<dilation>`.

    Raises:
        TypeError: if an argument is not an integer.
        ValueError: if `window` is negative or `dilation` is less than 1.

    Source: Beltagy et al., "Longformer", arXiv 2004.05150, section 3.1, "Dilated Sliding Window".
    """
    window = check_integer("dilated_window()", "window", window, at_least=0)
    dilation = check_integer("dilated_window()", "dilation", dilation, at_least=1)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        # The remainder of a magnitude: that of a signed number costs a correction a score.
        distance = jnp.abs(q_idx - kv_idx)
        return (distance <= window) & (distance % dilation == 0)

    return named(mask, f"dilated_window_{window}_{dilation}")


if __name__ == "__main__":
    from flexjax.masks._draw import draw_mask

    draw_mask(dilated_window(16, 4))
