"""Chunked causal attention: nothing is seen across a chunk's border."""

from typing import Any

from flexjax.masks._arguments import check_integer, named
from flexjax.masks._types import MaskMod


def chunked(chunk: int) -> MaskMod:
    """Chunked causal mask: `q_idx // chunk == kv_idx // chunk` and `kv_idx <= q_idx`.

    Args:
        chunk: tokens in a chunk, >= 1. Chunks are aligned to position 0.

    Returns:
        A mask_mod named `chunked_<chunk>`.

    Raises:
        TypeError: if `chunk` is not an integer.
        ValueError: if `chunk` is less than 1.

    Source: the local layers of Llama 4 (Meta, 2025), with chunks of 8192 tokens.
    """
    chunk = check_integer("chunked()", "chunk", chunk, at_least=1)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx // chunk == kv_idx // chunk) & (kv_idx <= q_idx)

    return named(mask, f"chunked_{chunk}")


if __name__ == "__main__":
    from flexjax.masks._draw import draw_mask

    draw_mask(chunked(16))
