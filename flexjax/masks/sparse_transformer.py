"""The two factorised patterns of the Sparse Transformer, each as the union of its two heads."""

from typing import Any

import jax.numpy as jnp

from flexjax.masks._arguments import check_integer, named
from flexjax.masks._types import MaskMod


def strided(stride: int) -> MaskMod:
    """Strided causal mask: the last `stride` keys and every `stride`-th key before them.

    `kv_idx <= q_idx` and (`q_idx - kv_idx <= stride` or `(q_idx - kv_idx) % stride == 0`).

    Args:
        stride: length of the local part and distance between the others, >= 1; close to the square
            root of the sequence length in the paper.

    Returns:
        A mask_mod named `strided_<stride>`.

    Raises:
        TypeError: if `stride` is not an integer.
        ValueError: if `stride` is less than 1.

    Source: Child et al., "Generating Long Sequences with Sparse Transformers", arXiv 1904.10509,
    section 4.3 (both heads of the factorisation merged into one).
    """
    stride = check_integer("strided()", "stride", stride, at_least=1)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        # The remainder of a magnitude: that of a signed number costs a correction a score.
        distance = jnp.abs(q_idx - kv_idx)
        return (kv_idx <= q_idx) & ((distance <= stride) | (distance % stride == 0))

    return named(mask, f"strided_{stride}")


def fixed(block: int, summary: int = 1) -> MaskMod:
    """Fixed causal mask: the query's own block, and the last `summary` keys of every block.

    `kv_idx <= q_idx` and (`kv_idx // block == q_idx // block` or
    `kv_idx % block >= block - summary`).

    Args:
        block: length of a block, >= 1.
        summary: keys at the end of each block that all later queries see, 1 to `block`.

    Returns:
        A mask_mod named `fixed_<block>_<summary>`.

    Raises:
        TypeError: if an argument is not an integer.
        ValueError: if `block` is less than 1, or `summary` is not in 1 to `block`.

    Source: Child et al., "Generating Long Sequences with Sparse Transformers", arXiv 1904.10509,
    section 4.3 (both heads of the factorisation merged into one).
    """
    block = check_integer("fixed()", "block", block, at_least=1)
    summary = check_integer("fixed()", "summary", summary, at_least=1)
    if summary > block:
        raise ValueError(
            f"fixed(): summary must be at most block, but it is {summary} and block is {block}."
        )

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        own_block = kv_idx // block == q_idx // block
        return (kv_idx <= q_idx) & (own_block | (kv_idx % block >= block - summary))

    return named(mask, f"fixed_{block}_{summary}")


if __name__ == "__main__":
    from flexjax.masks._draw import draw_mask

    draw_mask(strided(8), fixed(8, 2))
