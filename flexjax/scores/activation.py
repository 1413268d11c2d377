"""Attention without softmax: weights `activation(score)`, computed by attention with softmax."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from flexjax.masks._arguments import check_mods, describe, named
from flexjax.scores._types import ScoreMod


def activation(function: Callable[[Any], Any], offset: float) -> ScoreMod:
    """The score_mod `log(function(score) + offset)`, whose softmax weighs by `function(score) + offset`.

    With `out, lse = flex_attention(query, key, value, activation(jax.nn.relu, 1e-3), return_lse=True)`
    the sum of `function(score) * value` over the keys is
    `without_softmax(out, lse, value.sum(axis=-2), 1e-3)`.

    Args:
        function: elementwise, differentiable if gradients are wanted, such as `jax.nn.sigmoid`.
        offset: what is added to it to keep it positive, >= 0. `function(score) + offset` must be positive
            for every score: at 0 the score is -inf and weighs nothing, below it is NaN.

    Returns:
        A score_mod named `activation`.

    Raises:
        TypeError: if `function` is not a function of one argument, or `offset` not a number.
        ValueError: if `offset` is negative or not finite.

    Source: So et al., "Primer", arXiv 2109.08668, and Ramapuram et al., "Theory, Analysis, and Best
    Practices for Sigmoid Self-Attention", arXiv 2409.04431 (attention without softmax).
    """
    where = "activation()"
    check_mods(where, (function,), "function", ("score",))
    if isinstance(offset, bool) or not isinstance(offset, int | float):
        raise TypeError(f"{where}: offset must be a number, but it is {describe(offset)}.")
    if not 0 <= offset < float("inf"):
        raise ValueError(f"{where}: offset must be finite and not negative, but it is {offset}.")

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return jnp.log(function(score) + offset)

    return named(score_mod, "activation")


def without_softmax(
    out: Float[Array, "B H L Dv"],
    lse: Float[Array, "B H L"],
    value_sum: Float[ArrayLike, "B H Dv"],
    offset: float,
) -> Float[Array, "B H L Dv"]:
    """The sum of `function(score) * value` over the keys, from attention with `activation`.

    Args:
        out: the output, (B, H, L, Dv).
        lse: its logsumexp, (B, H, L).
        value_sum: the sum of the values over all keys, (B, H, Dv): without a mask. Under a mask the keys
            that a query sees differ from query to query, so use `offset=0` then, and pass zeros.
        offset: that of `activation`.

    Returns:
        (B, H, L, Dv) in the dtype of `out`.

    Raises:
        ValueError: if shapes do not fit together.
    """
    sums = jnp.asarray(value_sum)
    if lse.shape != out.shape[:3] or sums.shape != (*out.shape[:2], out.shape[3]):
        raise ValueError(
            f"without_softmax(): out must have shape (B, H, L, Dv), lse (B, H, L) and value_sum (B, H, Dv), but "
            f"they have {out.shape}, {lse.shape} and {sums.shape}."
        )
    total = out.astype(jnp.float32) * jnp.exp(lse)[..., None]
    return (total - offset * sums.astype(jnp.float32)[:, :, None]).astype(out.dtype)


if __name__ == "__main__":
    import numpy as np

    from flexjax.masks._draw import draw_score

    # A ramp of scores from -63 to 63, since a constant's logarithm is a constant.
    ramp = np.subtract.outer(np.arange(64.0), np.arange(64.0))
    draw_score(activation(lambda x: jnp.maximum(x, 0.0), 0.5), scores=ramp)
