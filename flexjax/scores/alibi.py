"""ALiBi: attention with linear biases."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32

from flexjax.masks._arguments import check_integer, float_array, named
from flexjax.scores._types import ScoreMod


def alibi(
    num_heads: int | None = None,
    slopes: Float[ArrayLike, " H"] | None = None,
    *,
    symmetric: bool = False,
) -> ScoreMod:
    """ALiBi bias: `score + slopes[h] * (kv_idx - q_idx)`.

    Keys in the past are penalised in proportion to their distance. The bias of future keys is
    positive: combine it with a causal mask, or take `symmetric=True` for encoders.

    Args:
        num_heads: number of query heads, >= 1, for the paper's slopes (see `alibi_slopes`).
        slopes: instead, a floating-point array of shape (H,), one slope a query head; possibly
            traced, and differentiable, so slopes can be learned.
        symmetric: whether the bias is `-slopes[h] * |kv_idx - q_idx|`.

    Returns:
        A score_mod named `alibi` or `symmetric_alibi`.

    Raises:
        TypeError: if `num_heads` is not an integer or `slopes` not floating point.
        ValueError: if both or neither of `num_heads` and `slopes` are given, `num_heads` is less
            than 1, or `slopes` has another rank.

    Source: Press et al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length
    Extrapolation", arXiv 2108.12409, section 3.
    """
    if (num_heads is None) is (slopes is None):
        raise ValueError(
            "alibi() takes either num_heads, for the paper's slopes, or slopes, an array of shape "
            "(H,), and exactly one of the two: write alibi(8) or alibi(slopes=array)."
        )
    given = slopes if num_heads is None else alibi_slopes(num_heads)
    table = float_array("alibi()", "slopes", given, {1: "(H,)"})

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = jnp.asarray(kv_idx - q_idx, score.dtype)
        return score + table[h].astype(score.dtype) * distance

    def symmetric_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = jnp.asarray(jnp.abs(kv_idx - q_idx), score.dtype)
        return score - table[h].astype(score.dtype) * distance

    return named(symmetric_mod, "symmetric_alibi") if symmetric else named(score_mod, "alibi")


def alibi_slopes(num_heads: int) -> Float32[Array, " H"]:
    """The slopes of the ALiBi paper: `2 ** (-8 * (h + 1) / H)` where H is a power of two.

    For other head counts, with P the largest power of two below H: the P slopes of P heads, then
    every other slope of 2 * P heads, starting with the first, as many as are missing.

    Args:
        num_heads: number of query heads H, >= 1.

    Returns:
        The slopes, float32 of shape (H,).

    Raises:
        TypeError: if `num_heads` is not an integer.
        ValueError: if it is less than 1.

    Source: Press et al., arXiv 2108.12409, section 3; the rule for other head counts is that of the
    code released with the paper.
    """
    num_heads = check_integer("alibi_slopes()", "num_heads", num_heads, at_least=1)
    power = 1 << (num_heads.bit_length() - 1)
    regular = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8.0 * np.arange(1, 2 * power, 2) / (2 * power))
    return jnp.asarray(np.concatenate([regular, between])[:num_heads], jnp.float32)


if __name__ == "__main__":
    from flexjax.masks._draw import draw_score

    draw_score(alibi(8), alibi(8, symmetric=True))
