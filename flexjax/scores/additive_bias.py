"""A bias array added to the scores."""

from typing import Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from flexjax.masks._arguments import float_array, named
from flexjax.scores._types import ScoreMod


def additive_bias(
    bias: Float[ArrayLike, "L S"] | Float[ArrayLike, "H L S"] | Float[ArrayLike, "B H L S"],
) -> ScoreMod:
    """Additive bias: `score + bias[b, h, q_idx, kv_idx]`.

    Args:
        bias: floating-point array of shape (L, S), (H, L, S) or (B, H, L, S); dimensions of size 1
            broadcast. Possibly traced, and differentiable. It is as large as it looks: where the
            bias follows from the indices, a score_mod that computes it needs no such memory.

    Returns:
        A score_mod named `additive_bias`.

    Raises:
        TypeError: if `bias` is not floating point; a boolean array is a mask, not a bias.
        ValueError: if its rank is not 2, 3 or 4.

    Source: Dong et al., "Flex Attention", arXiv 2412.05496 (a bias captured by a score_mod).
    """
    shapes = {2: "(L, S)", 3: "(H, L, S)", 4: "(B, H, L, S)"}
    array = float_array("additive_bias()", "bias", bias, shapes)
    # Dimensions of size 1 are dropped rather than read at 0, so that what is left shows on which
    # indices the bias depends: one of shape (1, 1, 1, S) is then a single row for every query.
    kept = tuple(axis for axis in range(-array.ndim, 0) if array.shape[axis] != 1)
    values = array.reshape(tuple(array.shape[axis] for axis in kept))

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        indices = (b, h, q_idx, kv_idx)
        return score + values[tuple(indices[axis] for axis in kept)].astype(score.dtype)

    return named(score_mod, "additive_bias")


if __name__ == "__main__":
    from flexjax.masks._draw import draw_score

    draw_score(additive_bias(np.outer(np.sin(np.arange(64) / 6), np.cos(np.arange(64) / 9))))
