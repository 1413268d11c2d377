"""Causal attention: a query sees itself and what came before it."""

from typing import Any

from jax.typing import ArrayLike
from jaxtyping import Int

from flexjax.masks._arguments import batch_integer, named
from flexjax.masks._types import MaskMod


def causal(offset: int | Int[ArrayLike, ""] | Int[ArrayLike, " B"] = 0) -> MaskMod:
    """Causal mask: `kv_idx <= q_idx + offset`.

    Indices are raw, counted from the first query and the first key (top-left alignment). With fewer
    queries than keys, `offset=kv_len - q_len` aligns the last query with the last key, and
    `offset=cache_length` places new queries behind a cache.

    Args:
        offset: by how many positions the queries lie behind the keys. A static integer (negative
            ones hide the most recent keys), a scalar integer array, possibly traced, or an integer
            array of shape (B,), one offset a batch entry.

    Returns:
        A mask_mod named `causal`, `causal_offset_<offset>`, `causal_offset_dynamic` or
        `causal_offset_per_batch`.

    Raises:
        TypeError: if `offset` is not an integer.
        ValueError: if `offset` is an array of rank 2 or more.

    Source: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, section 3.2.3.
    """
    read, label = batch_integer("causal()", "offset", offset)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx <= q_idx

    def offset_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx <= q_idx + read(b)

    return named(mask, "causal") if label == "0" else named(offset_mask, f"causal_offset_{label}")


if __name__ == "__main__":
    from flexjax.masks._draw import draw_mask

    draw_mask(causal())
