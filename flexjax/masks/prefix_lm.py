"""Prefix language model: bidirectional in the prefix, causal behind it."""

from typing import Any

from jax.typing import ArrayLike
from jaxtyping import Int

from flexjax.masks._arguments import batch_integer, named
from flexjax.masks._types import MaskMod


def prefix_lm(n: int | Int[ArrayLike, ""] | Int[ArrayLike, " B"]) -> MaskMod:
    """Prefix-LM mask: `(kv_idx < n) | (kv_idx <= q_idx)`.

    Args:
        n: length of the prefix in tokens: a static integer >= 0, a scalar integer array, possibly
            traced, or an integer array of shape (B,), one length a batch entry.

    Returns:
        A mask_mod named `prefix_lm_<n>`, `prefix_lm_dynamic` or `prefix_lm_per_batch`.

    Raises:
        TypeError: if `n` is not an integer.
        ValueError: if a static `n` is negative, or an array has rank 2 or more.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer" (T5), arXiv 1910.10683, section 3.2.1.
    """
    read, label = batch_integer("prefix_lm()", "n", n, at_least=0)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx < read(b)) | (kv_idx <= q_idx)

    return named(mask, f"prefix_lm_{label}")


if __name__ == "__main__":
    from flexjax.masks._draw import draw_mask

    draw_mask(prefix_lm(20))
