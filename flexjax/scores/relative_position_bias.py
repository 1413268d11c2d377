"""Relative position bias in logarithmic buckets, as in T5."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from flexjax.masks._arguments import check_integer, float_array, named
from flexjax.scores._types import ScoreMod


def relative_position_bias(
    table: Float[ArrayLike, "num_buckets H"],
    bidirectional: bool = True,
    max_distance: int = 128,
) -> ScoreMod:
    """T5 bias: `score + table[bucket(kv_idx - q_idx), h]`.

    Half of the buckets hold one distance each; the other half grow logarithmically up to
    `max_distance`, and the last holds everything beyond. Bidirectional, the upper half of the table
    is for keys behind the query (`kv_idx > q_idx`) and the lower half for the others;
    otherwise all of it is for the past, and keys in the future share bucket 0.

    T5 itself does not scale its scores: pass `scale=1.0` to `flex_attention` to reproduce it.

    Args:
        table: the learned bias, floating point of shape (num_buckets, H), the layout of T5's
            embedding; possibly traced, and differentiable.
        bidirectional: whether keys before and behind the query have buckets of their own.
        max_distance: distance in tokens from which on all keys share one bucket.

    Returns:
        A score_mod named `relative_position_bias`.

    Raises:
        TypeError: if `table` is not floating point or `max_distance` not an integer.
        ValueError: if `table` is not of rank 2, has fewer than 2 buckets (4, and an even number, if
            bidirectional), or `max_distance` is not beyond the distances with their own bucket.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer" (T5), arXiv 1910.10683, section 2.1, and the code released with it.
    """
    where = "relative_position_bias()"
    weights = float_array(where, "table", table, {2: "(num_buckets, H)"})
    num_buckets = weights.shape[0]
    max_distance = check_integer(where, "max_distance", max_distance, at_least=1)
    if num_buckets < (4 if bidirectional else 2) or (bidirectional and num_buckets % 2):
        raise ValueError(
            f"{where}: table must have at least 2 buckets, or an even number of at least 4 if "
            f"bidirectional, but its shape is {weights.shape}; it is (num_buckets, H)."
        )
    exact = num_buckets // (4 if bidirectional else 2)
    if max_distance <= exact:
        raise ValueError(
            f"{where}: max_distance must be more than {exact}, the number of distances that "
            f"{num_buckets} buckets keep apart, but it is {max_distance}."
        )
    # The bucket depends on nothing but the distance, and is constant from max_distance on. So the
    # logarithm is taken once a distance, here, and each score reads one number: (H, distances).
    buckets = distance_buckets(num_buckets, bidirectional, max_distance)
    bias = weights[buckets].T

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = jnp.clip(kv_idx - q_idx, -max_distance, max_distance)
        return score + bias[h, distance + max_distance].astype(score.dtype)

    return named(score_mod, "relative_position_bias")


def distance_buckets(
    num_buckets: int, bidirectional: bool, max_distance: int
) -> Int[np.ndarray, " distances"]:
    """The bucket of each distance `kv_idx - q_idx` from -max_distance to max_distance.

    With m logarithmic buckets behind e exact ones, distance n >= e lies in bucket
    e + floor(m * log(n / e) / log(max_distance / e)). Bucket e + k therefore starts at the smallest
    n with n^m >= max_distance^k * e^(m - k), which integers decide without rounding.
    """
    side = num_buckets // 2 if bidirectional else num_buckets
    exact = side // 2
    logarithmic = side - exact
    magnitude = range(max_distance + 1)
    starts = [
        max_distance**k * exact ** (logarithmic - k) for k in range(1, logarithmic)
    ]  # the first logarithmic bucket starts where the exact ones end
    bucket = np.array(
        [n if n < exact else exact + sum(n**logarithmic >= s for s in starts) for n in magnitude],
        np.int32,
    )
    future = bucket[1:] + side if bidirectional else np.zeros(max_distance, np.int32)
    return np.concatenate([bucket[::-1], future])


if __name__ == "__main__":
    from flexjax.masks._draw import draw_score

    draw_score(relative_position_bias(np.linspace(-1, 1, 16)[:, None], max_distance=48))
