"""Sandwich: the part of sinusoidal position embeddings that depends on distances alone."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from flexjax.masks._arguments import check_integer, named
from flexjax.scores._types import ScoreMod


def sandwich(num_heads: int, max_length: int, dim: int = 128) -> ScoreMod:
    """Sandwich bias: `score + (sum_i cos((q_idx - kv_idx) w_i) - dim / 2) / ratio[h]`.

    The frequencies are w_i = 10000^(-2 i / dim), i from 0 to dim / 2 - 1, and head h of H divides by the
    compression ratio 8 (h + 1) / H. Subtracting dim / 2 makes the bias 0 at the query's own position and
    changes no softmax.

    Args:
        num_heads: query heads H, >= 1.
        max_length: distances from `max_length - 1` on share one bias; >= 1.
        dim: the number of sines and cosines, even and >= 2; 128 in the paper.

    Returns:
        A score_mod named `sandwich`.

    Raises:
        TypeError: if an argument is not an integer.
        ValueError: if one is too small or `dim` odd.

    Source: Chi et al., "Dissecting Transformer Length Extrapolation via the Lens of Receptive Field
    Analysis", arXiv 2212.10356, section 5.
    """
    where = "sandwich()"
    num_heads = check_integer(where, "num_heads", num_heads, at_least=1)
    max_length = check_integer(where, "max_length", max_length, at_least=1)
    dim = check_integer(where, "dim", dim, at_least=2)
    if dim % 2:
        raise ValueError(f"{where}: dim must be even, but it is {dim}.")
    frequencies = 10000.0 ** (-2.0 * np.arange(dim // 2) / dim)
    distances = np.arange(max_length, dtype=np.float64)
    table = jnp.asarray((np.cos(np.outer(distances, frequencies)) - 1).sum(axis=1), jnp.float32)
    factors = jnp.asarray(num_heads / (8.0 * np.arange(1, num_heads + 1)), jnp.float32)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = jnp.minimum(jnp.abs(q_idx - kv_idx), max_length - 1)
        return score + (table[distance] * factors[h]).astype(score.dtype)

    return named(score_mod, "sandwich")


if __name__ == "__main__":
    from flexjax.masks._draw import draw_score

    draw_score(sandwich(8, 64))
