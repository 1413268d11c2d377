"""The training mask of block diffusion language models."""

from typing import Any

from flexjax.masks._arguments import check_integer, named
from flexjax.masks._types import MaskMod


def block_diffusion(seq_len: int, block: int) -> MaskMod:
    """BD3-LM training mask over the noised sequence followed by the clean one, 2 * seq_len tokens.

    With `B(i) = (i mod seq_len) // block` a position's block, a query may attend a key where

    - both are noised and in the same block (a block is denoised bidirectionally),
    - the query is noised, the key clean and in an earlier block (the context of the denoising), or
    - both are clean and the key's block is not later (block-causal).

    Args:
        seq_len: length of one copy, >= 1. Attention runs over `2 * seq_len` positions: noised at
            0 to `seq_len - 1`, clean from `seq_len` on.
        block: tokens in a diffusion block, >= 1. The last block may be shorter.

    Returns:
        A mask_mod named `block_diffusion_<seq_len>_<block>`.

    Raises:
        TypeError: if an argument is not an integer.
        ValueError: if an argument is less than 1.

    Source: Arriola et al., "Block Diffusion: Interpolating Between Autoregressive and Diffusion
    Language Models", arXiv 2503.09573.
    """
    seq_len = check_integer("block_diffusion()", "seq_len", seq_len, at_least=1)
    block = check_integer("block_diffusion()", "block", block, at_least=1)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        q_clean, kv_clean = q_idx >= seq_len, kv_idx >= seq_len
        q_block, kv_block = q_idx % seq_len // block, kv_idx % seq_len // block
        # Noised keys serve their own block only. Clean keys serve clean queries of their own and of
        # later blocks, but noised ones of later blocks only: these must not see their answer.
        noised_key = (q_block == kv_block) & (q_clean == kv_clean)
        clean_key = kv_clean & ((kv_block < q_block) | (q_clean & (kv_block == q_block)))
        return noised_key | clean_key

    return named(mask, f"block_diffusion_{seq_len}_{block}")


if __name__ == "__main__":
    from flexjax.masks._draw import draw_mask

    draw_mask(block_diffusion(32, 8))
