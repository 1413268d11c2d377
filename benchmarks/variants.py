"""The attention variants and shapes that are measured, defined once for every peer.

A variant's mods are written once, over a namespace that is `jax.numpy` or `torch` and over captured arrays in
that namespace. So flexjax, PyTorch and the dense reference run the same functions. Which keys a query sees is
written a second time, as a range, from which the work is counted without holding a mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

DOCUMENTS = 12
SOFT_CAP = 20.0
COUNTED_BLOCK = 128  # TFLOP/s are counted from blocks of 128 x 128, whatever blocks a peer visits


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one attention, and the variants that are measured on it.

    Attributes:
        name: for `--shapes`.
        batch, q_heads, kv_heads, q_len, kv_len, dim: B, Hq, Hkv, L, S and D (of values too).
        variants: what is measured unless the command line says otherwise.
        window: keys before its own that a query sees under `sliding_window`.
    """

    name: str
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    variants: tuple[str, ...]
    window: int = 1024

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes under the names that records have."""
        return {
            "B": self.batch,
            "Hq": self.q_heads,
            "Hkv": self.kv_heads,
            "L": self.q_len,
            "S": self.kv_len,
            "D": self.dim,
        }

    def with_length(self, length: int) -> Shape:
        """The same number of tokens, as nearly as whole sequences allow, in sequences of `length`."""
        batch = max(1, self.batch * self.q_len // length)
        return dataclasses.replace(self, batch=batch, q_len=length, kv_len=length)

    def shrunk(self) -> Shape:
        """The same kind of problem in a size that a CPU computes at once."""
        group = self.q_heads // self.kv_heads
        return dataclasses.replace(
            self,
            batch=min(self.batch, 2),
            q_heads=2 * group,
            kv_heads=2,
            q_len=256,
            kv_len=256,
            window=64,
        )


class Mods(NamedTuple):
    """A score_mod and a mask_mod; None for the identity and for no mask."""

    score: Callable[..., Any] | None = None
    mask: Callable[..., Any] | None = None


Captures = dict[str, Any]


class Visible(NamedTuple):
    """The keys first <= kv < stop that each query sees, int64 [L] each."""

    first: np.ndarray
    stop: np.ndarray


@dataclasses.dataclass(frozen=True)
class Variant:
    """One attention variant.

    Attributes:
        name: as in the records.
        mods: `(xp, captures, shape) -> Mods`, where xp is jax.numpy or torch, and captures has the arrays
            of `captures` in that namespace.
        visible: `(shape, queries) -> Visible`, which must say what the mask of `mods` says.
        captures: the arrays that the mods read, from NumPy.
    """

    name: str
    mods: Callable[[Any, Captures, Shape], Mods]
    visible: Callable[[Shape, np.ndarray], Visible]
    captures: Callable[[Shape], dict[str, np.ndarray]] = lambda shape: {}


# -- captured arrays --------------------------------------------------------------------------------


def document_ids(length: int, count: int = DOCUMENTS) -> np.ndarray:
    """int32 [length], the document of each token; the cuts that all of flexjax's benchmarks use."""
    cuts = np.sort(np.random.RandomState(1).permutation(length - 1)[: count - 1] + 1)
    return np.searchsorted(cuts, np.arange(length), side="right").astype(np.int32)


def _slopes(shape: Shape) -> dict[str, np.ndarray]:
    heads = np.arange(1, shape.q_heads + 1)
    return {"slopes": np.exp2(-8.0 * heads / shape.q_heads).astype(np.float32)}


def _documents(shape: Shape) -> dict[str, np.ndarray]:
    return {"ids": document_ids(shape.kv_len)}


def _table(shape: Shape) -> dict[str, np.ndarray]:
    entries = shape.q_len + shape.kv_len - 1
    return {"table": np.random.RandomState(2).randn(entries).astype(np.float32)}


def _head_tables(shape: Shape) -> dict[str, np.ndarray]:
    entries = shape.q_len + shape.kv_len - 1
    return {"table": np.random.RandomState(2).randn(shape.q_heads, entries).astype(np.float32)}


# -- mods -------------------------------------------------------------------------------------------


def _is_causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return q >= kv


def _noop(xp: Any, captures: Captures, shape: Shape) -> Mods:
    return Mods()


def _causal(xp: Any, captures: Captures, shape: Shape) -> Mods:
    return Mods(mask=_is_causal)


def _alibi(xp: Any, captures: Captures, shape: Shape) -> Mods:
    slopes = captures["slopes"]
    return Mods(lambda s, b, h, q, kv: s + slopes[h] * (kv - q), _is_causal)


def _sliding_window(xp: Any, captures: Captures, shape: Shape) -> Mods:
    window = shape.window
    return Mods(mask=lambda b, h, q, kv: (q >= kv) & (q - kv <= window))


def _prefix_lm(xp: Any, captures: Captures, shape: Shape) -> Mods:
    prefix = shape.kv_len // 4
    return Mods(mask=lambda b, h, q, kv: (q >= kv) | (kv < prefix))


def _soft_cap(xp: Any, captures: Captures, shape: Shape) -> Mods:
    return Mods(lambda s, b, h, q, kv: SOFT_CAP * xp.tanh(s / SOFT_CAP), _is_causal)


def _document(xp: Any, captures: Captures, shape: Shape) -> Mods:
    ids = captures["ids"]
    return Mods(mask=lambda b, h, q, kv: (ids[q] == ids[kv]) & (q >= kv))


def _rel_bias(xp: Any, captures: Captures, shape: Shape) -> Mods:
    return Mods(lambda s, b, h, q, kv: s + (q - kv))


def _rel_table(xp: Any, captures: Captures, shape: Shape) -> Mods:
    table, last = captures["table"], shape.kv_len - 1
    return Mods(lambda s, b, h, q, kv: s + table[q - kv + last], _is_causal)


def _head_table(xp: Any, captures: Captures, shape: Shape) -> Mods:
    table, last = captures["table"], shape.kv_len - 1
    return Mods(lambda s, b, h, q, kv: s + table[h, q - kv + last], _is_causal)


# -- the same masks as ranges of keys ---------------------------------------------------------------


def _everything(shape: Shape, q: np.ndarray) -> Visible:
    return Visible(np.zeros_like(q), np.full_like(q, shape.kv_len))


def _past(shape: Shape, q: np.ndarray) -> Visible:
    return Visible(np.zeros_like(q), np.minimum(q + 1, shape.kv_len))


def _recent(shape: Shape, q: np.ndarray) -> Visible:
    return Visible(np.maximum(q - shape.window, 0), np.minimum(q + 1, shape.kv_len))


def _prefix_and_past(shape: Shape, q: np.ndarray) -> Visible:
    stop = np.maximum(q + 1, shape.kv_len // 4)
    return Visible(np.zeros_like(q), np.minimum(stop, shape.kv_len))


def _own_document(shape: Shape, q: np.ndarray) -> Visible:
    ids = document_ids(shape.kv_len)
    return Visible(np.searchsorted(ids, ids[q], side="left"), q + 1)


_DEFINED = (
    Variant("noop", _noop, _everything),
    Variant("causal", _causal, _past),
    Variant("alibi", _alibi, _past, _slopes),
    Variant("sliding_window", _sliding_window, _recent),
    Variant("prefix_lm", _prefix_lm, _prefix_and_past),
    Variant("soft_cap", _soft_cap, _past),
    Variant("document", _document, _own_document, _documents),
    Variant("rel_bias", _rel_bias, _everything),
    Variant("rel_table", _rel_table, _past, _table),
    Variant("head_table", _head_table, _past, _head_tables),
)
VARIANTS = {variant.name: variant for variant in _DEFINED}

_DEFINED_SHAPES = (
    Shape("D128", 2, 16, 16, 8192, 8192, 128, tuple(VARIANTS)),
    Shape("D64", 4, 16, 16, 4096, 4096, 64, tuple(VARIANTS)),
    Shape("D256", 2, 16, 16, 8192, 8192, 256, ("causal",)),
    Shape("S32768", 1, 32, 8, 32768, 32768, 128, ("document",)),
    Shape("S131072", 1, 32, 8, 131072, 131072, 128, ("sliding_window",), window=4096),
)
SHAPES = {shape.name: shape for shape in _DEFINED_SHAPES}


# -- work -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Work:
    """What a variant has to compute at a shape.

    Attributes:
        density: fraction of the blocks of 128 x 128 that hold a visible position.
        forward_flops: multiplications and additions of the two matrix products over those blocks.
    """

    density: float
    forward_flops: float


def work(variant: Variant, shape: Shape, block: int = COUNTED_BLOCK) -> Work:
    """Counts the blocks that hold a visible position; those that stick out of the mask count less."""
    visited = visited_blocks(variant, shape, block)
    heights = _block_lengths(shape.q_len, block)
    widths = _block_lengths(shape.kv_len, block)
    positions = float(heights @ visited @ widths)
    flops = 4.0 * shape.batch * shape.q_heads * shape.dim * positions
    return Work(float(visited.mean()), flops)


def visited_blocks(variant: Variant, shape: Shape, block: int) -> np.ndarray:
    """bool [rows, cols]: which blocks hold a visible position."""
    queries = np.arange(shape.q_len)
    first, stop = variant.visible(shape, queries)
    rows, cols = -(-shape.q_len // block), -(-shape.kv_len // block)
    some = stop > first
    row = queries[some] // block
    # Every query opens a run of blocks and closes it; where more are open than closed, one is visited.
    change = np.zeros((rows, cols + 1), np.int64)
    np.add.at(change, (row, first[some] // block), 1)
    np.add.at(change, (row, (stop[some] - 1) // block + 1), -1)
    return change.cumsum(axis=1)[:, :cols] > 0


def _block_lengths(length: int, block: int) -> np.ndarray:
    return np.minimum(block, length - np.arange(0, length, block)).astype(np.float64)
