"""Soft capping of scores by a hyperbolic tangent."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from flexjax.masks._arguments import describe, float_array, named
from flexjax.scores._types import ScoreMod


def soft_cap(cap: float | Float[ArrayLike, ""]) -> ScoreMod:
    """Soft cap: `cap * tanh(score / cap)`, which keeps scores inside (-cap, cap).

    Args:
        cap: the bound, in units of the scaled score: a positive finite number, or a floating-point
            scalar array, possibly traced, and differentiable.

    Returns:
        A score_mod named `soft_cap_<cap>`, or `soft_cap_dynamic` for an array.

    Raises:
        TypeError: if `cap` is not a real number or a floating-point array.
        ValueError: if a static `cap` is not positive and finite, or an array is not a scalar.

    Source: Gemma Team, "Gemma 2", arXiv 2408.00118, section 2 ("Logit soft-capping").
    """
    if isinstance(cap, bool | str) or cap is None:
        raise TypeError(f"soft_cap(): cap must be a positive number, but it is {describe(cap)}.")
    if isinstance(cap, int | float | np.integer | np.floating):
        bound, label = float(cap), f"{float(cap):g}"
        if not (bound > 0 and math.isfinite(bound)):
            raise ValueError(f"soft_cap(): cap must be positive and finite, but it is {bound}.")
    else:
        bound, label = float_array("soft_cap()", "cap", cap, {0: "()"}), "dynamic"

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        limit = bound if isinstance(bound, float) else bound.astype(score.dtype)
        return limit * jnp.tanh(score / limit)

    return named(score_mod, f"soft_cap_{label}")


if __name__ == "__main__":
    from flexjax.masks._draw import draw_score

    # A ramp of scores from -63 to 63, since the cap of a constant is a constant.
    draw_score(soft_cap(20.0), scores=np.subtract.outer(np.arange(64.0), np.arange(64.0)))
