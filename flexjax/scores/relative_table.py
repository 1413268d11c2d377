"""A learned bias for every relative position."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from flexjax.masks._arguments import float_array, named
from flexjax.scores._types import ScoreMod


def relative_table(table: Float[ArrayLike, " R"] | Float[ArrayLike, "H R"]) -> ScoreMod:
    """Relative bias: `score + table[h, q_idx - kv_idx + S - 1]` with R = 2 * S - 1 entries.

    Entry S - 1 belongs to the query's own position, the first entry to the key S - 1 positions
    behind it (kv_idx > q_idx) and the last to the key S - 1 positions before it. Larger distances
    share the end entries.

    Args:
        table: floating-point array of shape (2 * S - 1,), shared by the heads, or (H, 2 * S - 1);
            possibly traced, and differentiable.

    Returns:
        A score_mod named `relative_table`.

    Raises:
        TypeError: if `table` is not floating point.
        ValueError: if its rank is not 1 or 2, or its last dimension is even.

    Source: Shaw et al., "Self-Attention with Relative Position Representations", arXiv 1803.02155
    (clipped distances), with scalars for representations as in T5, arXiv 1910.10683.
    """
    where = "relative_table()"
    weights = float_array(where, "table", table, {1: "(2 * S - 1,)", 2: "(H, 2 * S - 1)"})
    entries = weights.shape[-1]
    if entries % 2 == 0:
        raise ValueError(
            f"{where}: the last dimension of table must be odd, 2 * S - 1 for distances up to "
            f"S - 1 either way, but the shape is {weights.shape}."
        )
    centre = entries // 2

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        # Clipped before reading: a negative index would count from the end of the table.
        entry = jnp.clip(q_idx - kv_idx + centre, 0, entries - 1)
        bias = weights[entry] if weights.ndim == 1 else weights[h, entry]
        return score + bias.astype(score.dtype)

    return named(score_mod, "relative_table")


if __name__ == "__main__":
    from flexjax.masks._draw import draw_score

    draw_score(relative_table(np.cos(np.linspace(-9, 9, 127))))
