"""One multiplier a head, learned: bounded by a sigmoid, or free."""

from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from flexjax.masks._arguments import float_array, named
from flexjax.scores._types import ScoreMod


def head_gate(gate: Float[ArrayLike, " H"]) -> ScoreMod:
    """Gate a head's scores: `score * sigmoid(gate[h])`.

    Args:
        gate: floating-point logits of shape (H,), one a query head; possibly traced, and
            differentiable.

    Returns:
        A score_mod named `head_gate`.

    Raises:
        TypeError: if `gate` is not floating point.
        ValueError: if it is not of rank 1.

    Source: Dong et al., "Flex Attention", arXiv 2412.05496 (a captured, learnable array).
    """
    # The sigmoid is taken here, once a head, instead of once a score.
    factors = jax.nn.sigmoid(float_array("head_gate()", "gate", gate, {1: "(H,)"}))

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * factors[h].astype(score.dtype)

    return named(score_mod, "head_gate")


def head_scale(scale: Float[ArrayLike, " H"]) -> ScoreMod:
    """Scale a head's scores: `score * scale[h]`, an inverse temperature of its softmax.

    Args:
        scale: floating-point factors of shape (H,), one a query head; possibly traced, and
            differentiable. They multiply what `flex_attention`'s own `scale` has already scaled.

    Returns:
        A score_mod named `head_scale`.

    Raises:
        TypeError: if `scale` is not floating point.
        ValueError: if it is not of rank 1.

    Source: Henry et al., "Query-Key Normalization for Transformers", arXiv 2010.04245 (a learned
    factor in place of a fixed one), here one a head.
    """
    factors = float_array("head_scale()", "scale", scale, {1: "(H,)"})

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * factors[h].astype(score.dtype)

    return named(score_mod, "head_scale")


if __name__ == "__main__":
    from flexjax.masks._draw import draw_score

    # A ramp of scores from -63 to 63, since a gated constant is a constant.
    ramp = np.subtract.outer(np.arange(64.0), np.arange(64.0))
    draw_score(head_gate(np.zeros(1)), head_scale(np.ones(1)), scores=ramp)
