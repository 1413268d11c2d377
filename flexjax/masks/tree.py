"""Trees of tokens, as speculative decoding verifies them: a token sees itself and its ancestors."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from flexjax.masks._arguments import as_array, check_integer, describe, known_values, named
from flexjax.masks._types import MaskMod


def tree(parents: Int[np.ndarray, " N"] | Sequence[int], prefix: int = 0) -> MaskMod:
    """Tree mask: a causal prefix, then N tokens that see all of it, their ancestors and themselves.

    Whether one token is another's ancestor is not looked up in an N x N matrix but decided by two
    numbers a token, when a walk through the tree enters and when it leaves it.

    Args:
        parents: integers of shape (N,), known while tracing: the number of each token's parent among the
            N, which stands before it, or -1 for a child of the prefix's last token.
        prefix: tokens before the tree, >= 0. The sequence has `prefix + N` positions. To let only the
            tree's tokens ask, pass `q_idx + prefix` on: `lambda b, h, q, kv: mod(b, h, q + prefix, kv)`.

    Returns:
        A mask_mod named `tree_<N>`.

    Raises:
        TypeError: if `parents` is not made of integers or is traced, or `prefix` is not an integer.
        ValueError: if a parent does not stand before its child, or `prefix` is negative.

    Source: Miao et al., "SpecInfer", arXiv 2305.09781, section 4 (tree attention).
    """
    where = "tree()"
    prefix = check_integer(where, "prefix", prefix, at_least=0)
    known = known_values(parents)
    if known is None or known.dtype.kind not in "iu" or known.ndim != 1:
        raise TypeError(
            f"{where}: parents must be a list of integers that is known while tracing, but it is "
            f"{describe(parents if known is None else as_array(where, 'parents', known))}."
        )
    if (known < -1).any() or (known >= np.arange(len(known))).any():
        raise ValueError(
            f"{where}: every parent must be -1 or stand before its child, but parents is {known.tolist()}."
        )
    enter, leave = (jnp.asarray(x) for x in _walk(known, prefix))

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        time = enter[q_idx]
        return (enter[kv_idx] <= time) & (time < leave[kv_idx])

    return named(mask, f"tree_{len(known)}")


def _walk(parents: np.ndarray, prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """When a walk in depth enters each token, and the first time after it has left its descendants."""
    total = prefix + len(parents)
    sizes = np.ones(len(parents), np.int32)  # of the subtrees
    for child in range(len(parents) - 1, -1, -1):
        if parents[child] >= 0:
            sizes[parents[child]] += sizes[child]
    enter = np.arange(total, dtype=np.int32)
    free = enter[prefix:].copy()  # when the next child of each token is entered
    at_root = prefix
    for child, parent in enumerate(parents):
        start = at_root if parent < 0 else free[parent]
        enter[prefix + child], free[child] = start, start + 1
        if parent < 0:
            at_root += sizes[child]
        else:
            free[parent] += sizes[child]
    leave = np.full(total, total, np.int32)
    leave[prefix:] = enter[prefix:] + sizes
    return enter, leave


if __name__ == "__main__":
    from flexjax.masks._draw import draw_mask

    parents = [-1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, -1, 12, 12, 13]
    draw_mask(tree(parents, prefix=48))
