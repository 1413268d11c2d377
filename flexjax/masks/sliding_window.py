"""Sliding-window (local) attention."""

from typing import Any

from flexjax.masks._arguments import check_integer, named
from flexjax.masks._types import MaskMod


def sliding_window(left: int, right: int = 0) -> MaskMod:
    """Local mask: `q_idx - left <= kv_idx <= q_idx + right`, both ends included.

    A query sees `left` keys before itself, itself, and `right` keys after itself: the convention of
    `local_window_size=(left, right)` in `jax.nn.dot_product_attention`. The default is causal;
    `sliding_window(w, w)` is symmetric.

    Args:
        left: keys visible before the query's own position, >= 0.
        right: keys visible after the query's own position, >= 0.

    Returns:
        A mask_mod named `sliding_window_<left>` or `sliding_window_<left>_<right>`.

    Raises:
        TypeError: if `left` or `right` is not an integer.
        ValueError: if `left` or `right` is negative.

    Source: Beltagy et al., "Longformer", arXiv 2004.05150, section 3.1; causal as in Jiang et al.,
    "Mistral 7B", arXiv 2310.06825 (there, a window of W counts the query itself: `left = W - 1`).
    """
    left = check_integer("sliding_window()", "left", left, at_least=0)
    right = check_integer("sliding_window()", "right", right, at_least=0)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx - left <= kv_idx) & (kv_idx <= q_idx + right)

    return named(mask, f"sliding_window_{left}" + (f"_{right}" if right else ""))


if __name__ == "__main__":
    from flexjax.masks._draw import draw_mask

    draw_mask(sliding_window(12))
