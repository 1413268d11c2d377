"""Longformer attention: a local window plus tokens that see and are seen by all."""

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool

from flexjax.masks._arguments import (
    as_array,
    batch_row,
    check_integer,
    check_rank,
    describe,
    named,
)
from flexjax.masks._types import MaskMod


def global_window(
    window: int, is_global: Bool[ArrayLike, " S"] | Bool[ArrayLike, "B S"]
) -> MaskMod:
    """Longformer mask: `|q_idx - kv_idx| <= window` or `is_global[q_idx]` or `is_global[kv_idx]`.

    Args:
        window: visible distance to either side, >= 0.
        is_global: boolean array of shape (S,), or (B, S) with one row a batch entry: the tokens
            that attend everything and that everything attends. Queries and keys share its
            positions, so the mask is meant for self-attention over S tokens.

    Returns:
        A mask_mod named `global_window_<window>`.

    Raises:
        TypeError: if `window` is not an integer or `is_global` not boolean.
        ValueError: if `window` is negative, or `is_global` has another rank.

    Source: Beltagy et al., "Longformer", arXiv 2004.05150, section 3.1, "Global Attention".
    """
    where = "global_window()"
    window = check_integer(where, "window", window, at_least=0)
    flags = as_array(where, "is_global", is_global)
    if flags.dtype != jnp.bool_:
        raise TypeError(
            f"{where}: is_global must be boolean, but it is {describe(flags)}. Build it by a "
            f"comparison, for example `tokens == CLS`, or write is_global != 0."
        )
    check_rank(where, "is_global", flags, {1: "(S,)", 2: "(B, S)"})
    read = batch_row(flags)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (jnp.abs(q_idx - kv_idx) <= window) | read(b, q_idx) | read(b, kv_idx)

    return named(mask, f"global_window_{window}")


if __name__ == "__main__":
    from flexjax.masks._draw import draw_mask

    draw_mask(global_window(6, jnp.isin(jnp.arange(64), jnp.asarray([0, 1, 30, 31]))))
