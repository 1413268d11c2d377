"""Padded batches: keys behind a row's own length are invisible."""

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Int

from flexjax.masks._arguments import batch_integer, named
from flexjax.masks._types import MaskMod


def padding(lengths: int | Int[ArrayLike, ""] | Int[ArrayLike, " B"]) -> MaskMod:
    """Padding mask: `kv_idx < lengths[b]`.

    Only keys are hidden. Queries behind the length still attend the valid keys; their outputs are
    meant to be ignored. Combine with others: `and_masks(causal(), padding(lengths))`.

    Args:
        lengths: valid keys of each batch entry, an integer array of shape (B,), possibly traced; or
            one number for all of them, a static integer >= 0 or a scalar integer array.

    Returns:
        A mask_mod named `padding_per_batch`, `padding_dynamic` or `padding_<length>`.

    Raises:
        TypeError: if `lengths` is not an integer or an integer array.
        ValueError: if a static length is negative, or an array has rank 2 or more.

    Source: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762 (batches of padded
    sentences).
    """
    read, label = batch_integer("padding()", "lengths", lengths, at_least=0)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx < read(b)

    return named(mask, f"padding_{label}")


if __name__ == "__main__":
    from flexjax.masks._draw import draw_mask

    draw_mask(padding(jnp.asarray([40])))
