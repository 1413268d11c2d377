"""The decoding steps that are measured, in groups whose members are timed in turns, and the arrays of a step."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.variants import VARIANTS, Shape, Variant

# Sequences are copies of these, so that caches of many GB are drawn at once.
_DRAWN = 2


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """One step: the last `q_len` tokens of every sequence attend to its cache.

    Attributes:
        variant: name in `benchmarks.variants`; positions are those in the sequence.
        q_heads, kv_heads, dim: of the model.
        capacity: tokens that a sequence of the cache may have.
        lengths: tokens of every sequence.
        q_len: queries.
        page: tokens of a page; None for a contiguous cache.
        placement: of pages in their pool: `random`; `in order`, as a fresh `PagedCache` gives them to prompts; or
            `in turns`, as it gives them to sequences that grow together.
        window: of `sliding_window`.
    """

    variant: str
    q_heads: int
    kv_heads: int
    capacity: int
    lengths: tuple[int, ...]
    q_len: int = 1
    page: int | None = None
    placement: str = "random"
    window: int = 1023  # keys before the query's own
    dim: int = 128

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def shape(self) -> Shape:
        sizes = self.batch, self.q_heads, self.kv_heads, self.capacity, self.capacity, self.dim
        return Shape("", *sizes, (self.variant,), self.window)

    @property
    def definition(self) -> Variant:
        return VARIANTS[self.variant]

    @property
    def bytes(self) -> int:
        """Of the keys and values that some query sees, in 16 bits each."""
        seen = self.lengths
        if self.variant == "sliding_window":
            seen = tuple(min(n, self.window + self.q_len) for n in seen)
        return 2 * 2 * sum(seen) * self.kv_heads * self.dim

    @property
    def label(self) -> str:
        lengths = sorted(set(self.lengths))
        text = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]}..{lengths[-1]}"
        parts = [f"B{self.batch} {self.q_heads}/{self.kv_heads} S{text}"]
        parts += [f"L{self.q_len}"] if self.q_len > 1 else []
        parts += [f"of {self.capacity}"] if self.capacity > lengths[-1] else []
        parts += [f"page {self.page} {self.placement}"] if self.page else []
        return " ".join([*parts, self.variant])

    def shrunk(self) -> DecodeStep:
        """The same kind of step in a size that a CPU computes at once."""
        scale = max(1, self.capacity // 256)
        lengths = tuple(max(self.q_len, n // scale) for n in self.lengths[:2])
        small = {"capacity": 256, "lengths": lengths, "dim": 32, "window": 63}
        return dataclasses.replace(self, **small)


class Group(NamedTuple):
    """Steps that are compared with each other.

    Attributes:
        name: for `--groups`.
        steps: the first is the one that the others are compared with.
        peers: whether other libraries are measured too.
    """

    name: str
    steps: tuple[DecodeStep, ...]
    peers: bool = False


_MODS = ("noop", "causal", "alibi", "soft_cap")


def _mods(batch: int, q_heads: int, kv_heads: int, length: int) -> tuple[DecodeStep, ...]:
    return tuple(DecodeStep(name, q_heads, kv_heads, length, (length,) * batch) for name in _MODS)


def _with(step: DecodeStep, **lists: tuple[Any, ...]) -> tuple[DecodeStep, ...]:
    ((name, values),) = lists.items()
    return tuple(dataclasses.replace(step, **{name: value}) for value in values)


def _placed(step: DecodeStep) -> tuple[DecodeStep, ...]:
    pages = _with(step, page=(128, 64, 16))
    return step, *(x for page in pages for x in _with(page, placement=("in order", "in turns")))


_PAGED = DecodeStep("causal", 32, 8, 16384, (16384,) * 8)
_LONG = 131072
GROUPS = {
    group.name: group
    for group in (
        Group("b8_gqa", _mods(8, 32, 8, 32768), peers=True),
        Group("b32_gqa", _mods(32, 32, 8, 4096), peers=True),
        Group("paged", _with(_PAGED, page=(None, 128, 64, 16))),
        Group("placed", _placed(_PAGED)),
        Group(
            "queries",
            _with(DecodeStep("causal", 32, 8, 32768, (32768,) * 8), q_len=(1, 4, 16)),
        ),
        Group(
            "window",
            (
                DecodeStep("noop", 32, 8, 1024, (1024,) * 32),
                DecodeStep("sliding_window", 32, 8, _LONG, (_LONG,) * 32),
            ),
        ),
        Group(
            "uneven",
            (
                DecodeStep("causal", 32, 8, 32768, (32768,) * 8),
                DecodeStep("causal", 32, 8, _LONG, (_LONG, *(512,) * 7)),
                DecodeStep("causal", 32, 8, _LONG, tuple(_LONG >> i for i in range(8))),
            ),
        ),
        Group("b8_mha", _mods(8, 16, 16, 16384), peers=True),
        Group("b1_gqa", _mods(1, 32, 8, _LONG), peers=True),
        Group(
            "queries_b32",
            _with(DecodeStep("causal", 32, 8, 4096, (4096,) * 32), q_len=(1, 4, 16)),
        ),
    )
}


# -- arrays -----------------------------------------------------------------------------------------


class Pages(NamedTuple):
    """A paged cache, as `flexjax.decode` takes it."""

    key_pages: Any
    value_pages: Any
    page_table: Any
    lengths: Any


@functools.cache
def cache_arrays(batch: int, kv_heads: int, capacity: int, dim: int) -> tuple[Any, Any]:
    """Keys and values (B, Hkv, S, D) of a contiguous cache."""

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key: Any, batch: int) -> Any:
        few = jax.random.normal(key, (min(batch, _DRAWN), kv_heads, capacity, dim), jnp.bfloat16)
        return jnp.concatenate([few] * -(-batch // few.shape[0]))[:batch]

    keys = jax.random.split(jax.random.key(0))
    return draw(keys[0], batch), draw(keys[1], batch)


def query_of(step: DecodeStep) -> Any:
    shape = (step.batch, step.q_heads, step.q_len, step.dim)
    return jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)


def contiguous(step: DecodeStep) -> tuple[Any, Any]:
    return cache_arrays(step.batch, step.kv_heads, step.capacity, step.dim)


def _order(step: DecodeStep, count: int) -> np.ndarray:
    """The numbers of the pages of all sequences, one after another."""
    pages = np.arange(count, dtype=np.int32)
    if step.placement == "in order":
        return pages
    if step.placement == "in turns":
        return pages.reshape(-1, step.batch).T.reshape(-1)
    return np.random.default_rng(0).permutation(pages)


def paged(step: DecodeStep) -> Pages:
    """The same keys and values in pages."""
    page = step.page
    assert page is not None, "only paged steps have pages"
    per_row = step.capacity // page
    count = step.batch * per_row
    order = _order(step, count)
    source = jnp.asarray(np.argsort(order).astype(np.int32))

    @jax.jit
    def pool(x: Any, source: Any) -> Any:
        x = jnp.moveaxis(x, 1, 0).reshape(step.kv_heads, count, page, step.dim)
        return x[:, source]

    key, value = (pool(x, source) for x in contiguous(step))
    table = jnp.asarray(order.reshape(step.batch, per_row))
    return Pages(key, value, table, jnp.asarray(step.lengths, jnp.int32))


def mods(step: DecodeStep, xp: Any, captures: dict[str, Any]) -> tuple[Any, Any]:
    """score_mod and mask_mod of positions in the sequence."""
    return step.definition.mods(xp, captures, step.shape)


def captures_of(step: DecodeStep) -> dict[str, np.ndarray]:
    return step.definition.captures(step.shape)


# -- what is right ----------------------------------------------------------------------------------


def error(step: DecodeStep, result: Any) -> tuple[float, bool]:
    """(largest relative error of some heads, whether it is small enough), against float64."""
    key, value = contiguous(step)
    query, worst = query_of(step), 0.0
    score_mod, mask_mod = mods(step, np, captures_of(step))
    for b, h in {(0, 0), (step.batch - 1, step.q_heads - 1), (step.batch // 2, step.q_heads // 2)}:
        length, head = step.lengths[b], h // (step.q_heads // step.kv_heads)
        q, k, v = (
            np.asarray(x).astype(np.float64)
            for x in (query[b, h], key[b, head, :length], value[b, head, :length])
        )
        position = length - step.q_len + np.arange(step.q_len)[:, None]
        keys = np.arange(length)[None]
        scores = q @ k.T / np.sqrt(step.dim)
        if score_mod is not None:
            scores = score_mod(scores, b, h, position, keys)
        if mask_mod is not None:
            scores = np.where(mask_mod(b, h, position, keys), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        exact = weights @ v / weights.sum(-1, keepdims=True)
        mine = np.asarray(result[b, h]).astype(np.float64)
        off = float(np.linalg.norm(mine - exact) / np.linalg.norm(exact))
        worst = off if np.isnan(off) else max(worst, off)
        if np.isnan(worst):
            break
    # Twice the rounding of probabilities and output to bfloat16.
    return worst, bool(worst <= 8e-3)
