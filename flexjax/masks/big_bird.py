"""BigBird: a window, global blocks and random blocks."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from flexjax.masks._arguments import check_integer, named
from flexjax.masks._types import MaskMod


def big_bird(
    length: int,
    block: int = 64,
    *,
    window: int = 3,
    global_blocks: int = 2,
    random_blocks: int = 3,
    heads: int = 1,
    seed: int = 0,
) -> MaskMod:
    """BigBird mask over blocks of tokens: window, global blocks, and random ones of a fixed draw.

    The first and the last `global_blocks // 2` blocks (the first ones get one more of an odd number)
    see everything and are seen by everything. Every other block of queries sees the `window` blocks
    around itself, and `random_blocks` further blocks. These are drawn by NumPy from `seed` when the
    mask is made: a mask made inside `jax.jit` is the same in every call.

    Args:
        length: tokens, >= 1.
        block: tokens in a block, >= 1; best the block size of the attention.
        window: blocks of the window, odd and >= 1.
        global_blocks: how many blocks are global, >= 0.
        random_blocks: random blocks of each row, >= 0; fewer where fewer are left to draw from.
        heads: how many different draws there are, >= 1: head h has that of `h % heads`.
        seed: of the draw, >= 0.

    Returns:
        A mask_mod named `big_bird_<block>_<window>_<global_blocks>_<random_blocks>`.

    Raises:
        TypeError: if an argument is not an integer.
        ValueError: if one is out of its range.

    Source: Zaheer et al., "Big Bird: Transformers for Longer Sequences", arXiv 2007.14062, section 2
    and appendix D (the internal construction; blocks of global tokens at both ends).
    """
    where = "big_bird()"
    length = check_integer(where, "length", length, at_least=1)
    block = check_integer(where, "block", block, at_least=1)
    window = check_integer(where, "window", window, at_least=1)
    n_global = check_integer(where, "global_blocks", global_blocks, at_least=0)
    n_random = check_integer(where, "random_blocks", random_blocks, at_least=0)
    heads = check_integer(where, "heads", heads, at_least=1)
    seed = check_integer(where, "seed", seed, at_least=0)
    if window % 2 == 0:
        raise ValueError(f"{where}: window must be odd, to have a middle, but it is {window}.")
    rows = -(-length // block)
    first, last = (n_global + 1) // 2, rows - n_global // 2
    drawn = jnp.asarray(_draw(rows, window // 2, (first, last), n_random, heads, seed))

    def is_global(index: Any) -> Any:
        return (index < first) | (index >= last)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        q_block, kv_block = q_idx // block, kv_idx // block
        allowed = jnp.abs(q_block - kv_block) <= window // 2
        if n_global:
            allowed = allowed | is_global(q_block) | is_global(kv_block)
        for i in range(drawn.shape[-1]):
            draw = drawn[0, q_block, i] if heads == 1 else drawn[h % heads, q_block, i]
            allowed = allowed | (draw == kv_block)
        return allowed

    return named(mask, f"big_bird_{block}_{window}_{n_global}_{n_random}")


def _draw(
    rows: int, reach: int, inner: tuple[int, int], count: int, heads: int, seed: int
) -> np.ndarray:
    """int32 (heads, rows, <= count): random blocks, none of them global or in the window; -1 for none."""
    random = np.random.default_rng(seed)
    columns = np.arange(inner[0], max(inner))
    drawn = np.full((heads, rows, min(count, len(columns))), -1, np.int32)
    for head, row in np.ndindex(heads, rows):
        open_columns = columns[abs(columns - row) > reach]
        chosen = random.permutation(open_columns)[: drawn.shape[-1]]
        drawn[head, row, : len(chosen)] = chosen
    return drawn


if __name__ == "__main__":
    from flexjax.masks._draw import draw_mask

    draw_mask(big_bird(64, 4))
