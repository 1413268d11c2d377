"""The type of a score_mod."""

from collections.abc import Callable

from jaxtyping import Array, Float32, Int32

ScoreMod = Callable[
    [Float32[Array, ""], Int32[Array, ""], Int32[Array, ""], Int32[Array, ""], Int32[Array, ""]],
    Float32[Array, ""],
]
"""`(score, b, h, q_idx, kv_idx) -> score`, all scalars; `h` counts the query's heads."""
