"""KVCache: the keys and values of sequences that grow, in one piece each."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from flexjax import _compat
from flexjax.problem import BHLD, BLHD


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key", "value", "lengths"),
    meta_fields=("layout",),
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Room for the keys and values of B sequences, and how much of it each has filled.

    A pytree of three arrays: carry it through `jax.lax.scan`, donate it to `jax.jit`. Lengths are data, so that
    nothing is compiled again as sequences grow. On a GPU a capacity that is a multiple of 8, and head dimensions
    that are multiples of 16, spare a copy of the cache at every step.

    Attributes:
        key: (B, Hkv, S, D), where S is the capacity; (B, S, Hkv, D) in layout "BLHD".
        value: (B, Hkv, S, Dv), alike.
        lengths: int32 (B,), the tokens that each sequence has. What lies past them is never looked at, and may
            be anything. A scalar serves all sequences; None says that all are full. `append` returns (B,), so
            that a cache which `jax.lax.scan` carries through it has to begin with (B,) too, as `empty` does.
        layout: "BHLD" or "BLHD".
    """

    key: Float[Array, "B Hkv S D"]
    value: Float[Array, "B Hkv S Dv"]
    lengths: Int32[Array, "B"] | None = None
    layout: str = BHLD

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        capacity: int,
        dim: int,
        v_dim: int | None = None,
        dtype: Any = jnp.bfloat16,
        layout: str = BHLD,
    ) -> KVCache:
        """A cache of zeros without any token.

        Args:
            batch: sequences B.
            kv_heads: Hkv.
            capacity: tokens S that a sequence may have.
            dim: D of the keys.
            v_dim: Dv of the values; D by default.
            dtype: of both.
            layout: "BHLD" or "BLHD".
        """

        def zeros(d: int) -> Any:
            middle = (capacity, kv_heads) if layout == BLHD else (kv_heads, capacity)
            return jnp.zeros((batch, *middle, d), dtype)

        return cls(
            zeros(dim), zeros(dim if v_dim is None else v_dim), jnp.zeros(batch, jnp.int32), layout
        )

    @property
    def capacity(self) -> int:
        """Tokens that a sequence may have."""
        return self.key.shape[1 if self.layout == BLHD else 2]

    def append(self, key: Float[Array, "B Hkv T D"], value: Float[Array, "B Hkv T Dv"]) -> KVCache:
        """The cache with T more tokens behind those of every sequence.

        Args:
            key: (B, Hkv, T, D) in the cache's layout; cast to its dtype.
            value: (B, Hkv, T, Dv), alike.

        Raises:
            ValueError: the shapes do not fit, or the lengths are concrete and a sequence has no room left. In a
                traced program such a sequence stays as it was, its length included, which tells.
        """
        axis = 1 if self.layout == BLHD else 2
        batch, count = self.key.shape[0], key.shape[axis] if key.ndim == 4 else -1
        for name, new, old in (("key", key, self.key), ("value", value, self.value)):
            wanted = (*old.shape[:axis], count, *old.shape[axis + 1 :])
            if new.shape != wanted:
                raise ValueError(
                    f"The {name} to append has shape {new.shape}, but the cache holds {old.shape} in layout "
                    f"{self.layout}: it must be of that shape with the number of new tokens, the same for key "
                    f"and value, in place of the capacity {self.capacity}."
                )
        full = self.capacity if self.lengths is None else self.lengths
        lengths = jnp.asarray(full)
        if lengths.shape not in ((), (batch,)) or not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(
                f"The cache has lengths of shape {lengths.shape} and dtype {lengths.dtype}, but to append to its "
                f"{batch} sequences they must be integers of shape ({batch},), or one for all."
            )
        lengths = jnp.broadcast_to(lengths.astype(jnp.int32), (batch,))
        # A negative length would wrap around to the end of the cache.
        fits = (lengths >= 0) & (lengths <= self.capacity - count)
        if not _compat.is_tracer(fits) and not bool(fits.all()):
            raise ValueError(
                f"{count} tokens do not fit behind sequences of lengths {np.asarray(lengths).tolist()} in a cache "
                f"of capacity {self.capacity}. Lengths are at least 0; make the cache larger."
            )
        # Positions outside of the cache are dropped.
        place = jnp.where(fits, lengths, self.capacity)[:, None] + jnp.arange(count)[None]
        rows = jnp.arange(batch)[:, None]

        def written(old: Any, new: Any) -> Any:
            old, new = jnp.asarray(old), jnp.asarray(new, old.dtype)
            if self.layout == BLHD:
                return old.at[rows, place].set(new, mode="drop", unique_indices=True)
            return old.at[rows, :, place].set(
                jnp.swapaxes(new, 1, 2), mode="drop", unique_indices=True
            )

        return dataclasses.replace(
            self,
            key=written(self.key, key),
            value=written(self.value, value),
            lengths=jnp.where(fits, lengths + count, lengths),
        )
