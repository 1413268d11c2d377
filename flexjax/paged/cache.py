"""PagedCache: keys and values of many sequences in pages that they take as they grow."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from flexjax.backends.contiguous import gathered, without_tail
from flexjax.block_arguments import positive
from flexjax.mods.ops import is_float
from flexjax.paged.errors import PageError, sentences

PAGE_SIZES = (16, 32, 64, 128, 256)

type Pool = Float[Array, "Hkv pages page D"] | tuple[Float[Array, "Hkv pages page D"], ...]
"""Pages of one layer, or of every layer."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "key_pages",
        "value_pages",
        "page_table",
        "lengths",
        "held_pages",
        "active",
        "reference_counts",
        "free_pages",
        "free_count",
        "errors",
        "key_min",
        "key_max",
    ),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, eq=False)
class PagedCache:
    """Pools of pages, and which page of which sequence each of them is (Kwon et al. 2023, arXiv:2309.06180).

    Token t of the sequence in row b lies in page `page_table[b, t // page_size]` at `t % page_size`. The
    functions of `flexjax.paged` (`allocate`, `append`, `fork`, `free`) take a cache and return another. They are
    meant to be called inside `jax.jit` with the cache donated, where they change the pools in place; elsewhere
    each of them copies the pools:

        @functools.partial(jax.jit, donate_argnums=0)
        def step(cache, query, key, value):
            cache = paged.append(cache, key, value)  # one token for every active sequence
            return cache, flexjax.decode(query, cache, score_mod, mask_mod)

    An operation that cannot be carried out as a whole is refused as a whole: nothing but `errors` changes.
    Outside of `jax.jit` it raises a `PageError`; inside, `cache.ok` becomes False and stays so, and
    `cache.check()` raises on the host.

    One table serves all layers of a model: with `layers=` the pools are tuples, `extend` makes room in all of
    them, `write` stores what one layer computed, and `layer` is the cache that this layer attends to.

    Attributes:
        key_pages: (Hkv, pages, page_size, D), or a tuple of these, one a layer. Positions past a sequence's length
            are zero in the pages that it reaches.
        value_pages: (Hkv, pages, page_size, Dv), likewise.
        page_table: int32 (B, max_pages). Entries past `held_pages` are stale, but always in [0, pages).
        lengths: int32 (B,), tokens of each sequence; 0 in rows without one.
        held_pages: int32 (B,), entries of the table that belong to each sequence: those that its length reaches,
            and those reserved ahead.
        active: bool (B,), whether a row holds a sequence.
        reference_counts: int32 (pages,), how many rows hold each page.
        free_pages: int32 (pages,), a stack whose first `free_count` entries are the free pages.
        free_count: int32 scalar.
        errors: int32 scalar, what has been refused so far, as bits; 0 for nothing.
        key_min: (Hkv, pages, D), the least of each coordinate of the keys in a page, or a tuple of these; None
            without `bounds=True`.
        key_max: the greatest, likewise.
    """

    key_pages: Pool
    value_pages: Pool
    page_table: Int32[Array, "B max_pages"]
    lengths: Int32[Array, "B"]
    held_pages: Int32[Array, "B"]
    active: Bool[Array, "B"]
    reference_counts: Int32[Array, "pages"]
    free_pages: Int32[Array, "pages"]
    free_count: Int32[Array, ""]
    errors: Int32[Array, ""]
    key_min: Any = None
    key_max: Any = None

    @classmethod
    def create(
        cls,
        batch: int,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        max_length: int | None = None,
        value_dim: int | None = None,
        layers: int | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        bounds: bool = False,
    ) -> PagedCache:
        """An empty cache.

        Args:
            batch: rows B, the most sequences at a time.
            pages: pages in the pool, shared by all of them.
            page_size: tokens in a page: 16, 32, 64, 128 or 256.
            kv_heads: key heads Hkv.
            head_dim: dimension D of a key.
            max_length: the most tokens of one sequence, rounded up to whole pages; by default all pages.
            value_dim: dimension Dv of a value; D by default.
            layers: make pools for so many layers, which share the table; None for one cache without layers.
            dtype: of keys and values, a float type.
            bounds: keep each page's least and greatest key coordinates, which `flexjax.paged.select_pages`
                ranks pages by.

        Raises:
            TypeError: an argument is not an integer, or the dtype not a float type.
            ValueError: a size is not positive, or not a size that pages can have.
        """
        batch, pages = positive(batch, "batch"), positive(pages, "pages")
        heads, dim = positive(kv_heads, "kv_heads"), positive(head_dim, "head_dim")
        v_dim = dim if value_dim is None else positive(value_dim, "value_dim")
        if page_size not in PAGE_SIZES:
            raise ValueError(
                f"page_size must be one of {PAGE_SIZES}, but it is {page_size!r}: kernels copy pages in tiles of "
                "these sizes."
            )
        if not is_float(np.dtype(dtype)):
            raise TypeError(
                f"The dtype of keys and values must be a float type, but it is {dtype!r}."
            )
        capacity = pages * page_size if max_length is None else positive(max_length, "max_length")
        max_pages = min(pages, -(-capacity // page_size))
        count = None if layers is None else positive(layers, "layers")

        def pool(*shape: int, fill: float = 0.0) -> Any:
            def one() -> Array:
                return jnp.full((heads, pages, *shape), fill, dtype)

            return one() if count is None else tuple(one() for _ in range(count))

        return cls(
            key_pages=pool(page_size, dim),
            value_pages=pool(page_size, v_dim),
            page_table=jnp.zeros((batch, max_pages), jnp.int32),
            lengths=jnp.zeros(batch, jnp.int32),
            held_pages=jnp.zeros(batch, jnp.int32),
            active=jnp.zeros(batch, bool),
            reference_counts=jnp.zeros(pages, jnp.int32),
            free_pages=jnp.arange(pages - 1, -1, -1, dtype=jnp.int32),  # page 0 on top
            free_count=jnp.asarray(pages, jnp.int32),
            errors=jnp.zeros((), jnp.int32),
            key_min=pool(dim) if bounds else None,
            key_max=pool(dim) if bounds else None,
        )

    # -- sizes ----------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Rows B."""
        return self.page_table.shape[0]

    @property
    def max_pages(self) -> int:
        """Pages that one sequence can have."""
        return self.page_table.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return jax.tree.leaves(self.key_pages)[0].shape[2]

    @property
    def pages(self) -> int:
        """Pages in the pool."""
        return self.reference_counts.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that one sequence can have."""
        return self.max_pages * self.page_size

    @property
    def layers(self) -> int | None:
        """Layers; None for a cache without them."""
        return len(self.key_pages) if isinstance(self.key_pages, tuple) else None

    def __repr__(self) -> str:
        if not hasattr(self.page_table, "shape"):  # JAX keeps placeholders in pytrees too
            return "PagedCache(...)"
        return (
            f"PagedCache(batch={self.batch}, pages={self.pages}, page_size={self.page_size}, "
            f"max_pages={self.max_pages}, layers={self.layers})"
        )

    # -- views ----------------------------------------------------------------------------------

    def layer(self, index: int) -> PagedCache:
        """The cache of one layer, to attend to. It shares its arrays with this one: do not donate it.

        Raises:
            ValueError: the cache has no layers, or not this one.
        """
        if self.layers is None:
            raise ValueError(
                "This cache has no layers. Create it with PagedCache.create(..., layers=...), or use it as it is."
            )
        if not 0 <= index < self.layers:
            raise ValueError(
                f"There is no layer {index!r} in a cache of {self.layers} layers, which are counted from 0."
            )
        parts = (self.key_pages, self.value_pages, self.key_min, self.key_max)
        keys, values, low, high = (None if p is None else p[index] for p in parts)
        return dataclasses.replace(
            self, key_pages=keys, value_pages=values, key_min=low, key_max=high
        )

    def pools(self) -> tuple[Array, Array]:
        """(key_pages, value_pages) of a cache of one layer.

        Raises:
            ValueError: the cache has several layers.
        """
        if isinstance(self.key_pages, tuple) or isinstance(self.value_pages, tuple):
            raise ValueError(
                f"This cache has {self.layers} layers: choose one with cache.layer(index), or layer= where there "
                "is such an argument."
            )
        return self.key_pages, self.value_pages

    def contiguous(
        self, max_length: int | None = None
    ) -> tuple[Float[Array, "B Hkv S D"], Float[Array, "B Hkv S Dv"]]:
        """Copies of all keys and values in logical order, zero past each sequence's length.

        Args:
            max_length: S; by default the capacity of a row.

        Raises:
            ValueError: max_length is not positive or exceeds the capacity, or the cache has several layers.
        """
        length = self.capacity if max_length is None else positive(max_length, "max_length")
        if length > self.capacity:
            raise ValueError(
                f"max_length is {length}, but a sequence of this cache has at most {self.capacity} tokens."
            )
        table = self.page_table[:, : -(-length // self.page_size)]
        keys, values = (
            without_tail(gathered(pool, table)[:, :, :length], self.lengths, 2)
            for pool in self.pools()
        )
        return keys, values

    # -- refusals -------------------------------------------------------------------------------

    @property
    def ok(self) -> Bool[Array, ""]:
        """Whether no operation has been refused so far."""
        return self.errors == 0

    def check(self) -> PagedCache:
        """The cache itself, if no operation on it was refused; for the host, after a jitted step.

        Raises:
            PageError: what was refused, and the way out.
        """
        code = int(self.errors)
        if code:
            raise PageError(self.explain(code))
        return self

    def explain(self, code: int) -> str:
        """Bits of `errors` as sentences."""
        return sentences(
            code,
            free=int(self.free_count),
            pages=self.pages,
            capacity=self.capacity,
            max_pages=self.max_pages,
            page_size=self.page_size,
            batch=self.batch,
        )

    def cleared(self) -> PagedCache:
        """The cache with its errors forgotten, once the caller has dealt with them."""
        return dataclasses.replace(self, errors=jnp.zeros_like(self.errors))
