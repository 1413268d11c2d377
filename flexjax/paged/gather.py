"""Copies pages into contiguous arrays, for backends that know no page table."""

from __future__ import annotations

from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


class Pages(Protocol):
    """What attention reads of a paged cache: of `PagedCache`, and of a choice of its pages."""

    @property
    def key_pages(self) -> Any:
        """(Hkv, pages, page, D)."""

    @property
    def value_pages(self) -> Any:
        """(Hkv, pages, page, Dv)."""

    @property
    def page_table(self) -> Int32[Array, "B max_pages"]:
        """Where the pages of each row are; entries past its length are in range, and arbitrary."""

    @property
    def lengths(self) -> Int32[Array, "B"]:
        """Tokens of each row."""


def gather(
    pages: Pages, length: int
) -> tuple[Float[Array, "B Hkv S D"], Float[Array, "B Hkv S Dv"]]:
    """The first `length` keys and values of every row in their order, zero past the row's length."""
    page = pages.key_pages.shape[2]
    table = pages.page_table[:, : -(-length // page)]
    inside = jnp.arange(length, dtype=jnp.int32)[None, :] < pages.lengths[:, None]

    def gathered(pool: Array) -> Array:
        chosen = pool.at[:, table].get(mode="clip")  # Hkv, B, max_pages, page, D
        rows = chosen.reshape(*chosen.shape[:2], -1, chosen.shape[-1]).swapaxes(0, 1)
        # Selected, not multiplied: behind its length a row may name pages of others.
        return jnp.where(inside[:, None, :, None], rows[:, :, :length], jnp.zeros((), pool.dtype))

    return gathered(pages.key_pages), gathered(pages.value_pages)
