"""The type of a mask_mod."""

from collections.abc import Callable

from jaxtyping import Array, Bool, Int32

MaskMod = Callable[
    [Int32[Array, ""], Int32[Array, ""], Int32[Array, ""], Int32[Array, ""]], Bool[Array, ""]
]
"""`(b, h, q_idx, kv_idx) -> bool`, all scalars; True where the query may attend the key."""
