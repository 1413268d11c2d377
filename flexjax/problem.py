"""What a backend is asked to compute: a static `Problem` and its array `Operands`.

A backend never sees a user's function and the front end never sees a tile; this is all that passes between
them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.block_lists import Geometry
from flexjax.mods.graph import Graph
from flexjax.mods.trace import ScoreMod

BHLD, BLHD = "BHLD", "BLHD"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The block lists' static part.

    Attributes:
        geometry: lengths and block sizes.
        batch: batch rows that the lists distinguish; divides `Problem.batch`, row b reads list
            b // (Problem.batch / batch).
        heads: query heads that the lists distinguish: 1 or all.
        backward: whether the transposed lists are there.
    """

    geometry: Geometry
    batch: int
    heads: int
    backward: bool


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What makes an attention a decoding step: `Operands.lengths` says how many keys of every row count.

    `Problem.mask` then always knows these lengths, and hides queries that lie before the first key as well;
    listed blocks are all partial ones, and every block is asked about without lists.

    Attributes:
        bare: whether the mask hides nothing else.
        page_size: tokens of a page; None where keys and values are in one piece. Otherwise `Operands.key` and
            `value` are pools (Hkv, pages, page_size, D or Dv) that `Operands.page_table` points into.
    """

    bare: bool
    page_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """One attention: shapes, dtypes, mods. Hashable and compared by structure, as kernels' cache key.

    Attributes:
        batch: batch rows B.
        kv_batch: batch rows of keys and values; divides B, query row b reads row b // (B / kv_batch).
        q_heads, kv_heads: Hq and Hkv; query head h reads key head h // (Hq / Hkv).
        q_len, kv_len: L and S.
        qk_dim, v_dim: D of queries and keys, and of values and outputs.
        q_dtype, k_dtype, v_dtype: the output has the query's.
        scale: factor on Q K^T before score_mod.
        score: the score_mod; None for the identity.
        mask: the mask inside partial blocks; None allows every position there.
        blocks: the block lists; None visits every block, unmasked.
        layout: "BHLD" or "BLHD", of query, key, value and output.
        precision: of float32 matrix products, a name of `jax.lax.Precision`.
        max_scores: whether the row maxima are wanted.
        options: kernel options as sorted (name, value) pairs.
        decoding: how a decoding step reads its cache; None for any other attention.
    """

    batch: int
    kv_batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    qk_dim: int
    v_dim: int
    q_dtype: np.dtype
    k_dtype: np.dtype
    v_dtype: np.dtype
    scale: float
    score: ScoreMod | None = None
    mask: Graph | None = None
    blocks: Blocks | None = None
    layout: str = BHLD
    precision: str | None = None
    max_scores: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    decoding: Decoding | None = None

    @property
    def mask_loads(self) -> bool:
        """Whether the mask reads captured arrays."""
        return self.mask is not None and any(node.op == "load" for node in self.mask.nodes)

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.q_heads // self.kv_heads

    def option(self, name: str, default: Any) -> Any:
        return dict(self.options).get(name, default)

    def output_shape(self) -> tuple[int, int, int, int]:
        """Shape of the output in this problem's layout."""
        if self.layout == BLHD:
            return (self.batch, self.q_len, self.q_heads, self.v_dim)
        return (self.batch, self.q_heads, self.q_len, self.v_dim)

    def stats_shape(self) -> tuple[int, int, int]:
        """Shape of the logsumexp and of the row maxima, in both layouts."""
        return (self.batch, self.q_heads, self.q_len)


def without_gradients(problem: Problem, constant: Sequence[bool]) -> Problem:
    """The problem with a score_mod whose derivative leaves out some of the captured arrays.

    Args:
        problem: the problem.
        constant: for every capture of the score_mod, whether it is left out.
    """
    score = problem.score
    if score is None or score.gradient is None or not any(constant):
        return problem
    loads = tuple(load for load in score.gradient.loads if not constant[load.capture])
    gradient = dataclasses.replace(score.gradient, loads=loads)
    return dataclasses.replace(problem, score=dataclasses.replace(score, gradient=gradient))


_register = functools.partial(jax.tree_util.register_dataclass, meta_fields=())


@functools.partial(
    _register,
    data_fields=(
        "kv_num_blocks",
        "kv_indices",
        "full_kv_num_blocks",
        "full_kv_indices",
        "q_num_blocks",
        "q_indices",
        "full_q_num_blocks",
        "full_q_indices",
    ),
)
@dataclasses.dataclass(frozen=True)
class BlockLists:
    """The arrays of a BlockMask, [Bm, Hm, ...] int32; the transposed ones are None without a backward."""

    kv_num_blocks: Any
    kv_indices: Any
    full_kv_num_blocks: Any
    full_kv_indices: Any
    q_num_blocks: Any = None
    q_indices: Any = None
    full_q_num_blocks: Any = None
    full_q_indices: Any = None


@functools.partial(
    _register,
    data_fields=(
        *("query", "key", "value", "lists", "score_captures", "mask_captures"),
        *("lengths", "page_table"),
    ),
)
@dataclasses.dataclass(frozen=True)
class Operands:
    """The arrays of a problem.

    Attributes:
        query, key, value: in the problem's layout.
        lists: the block lists, or None.
        score_captures, mask_captures: what the mods read, in their graphs' order.
        lengths: int32 (B,), of a decoding step: keys from there on do not count, whatever they are.
        page_table: int32 (B, pages a row), of a paged one: the page of every `page_size` keys. Entries past the
            length may be anything.
    """

    query: Any
    key: Any
    value: Any
    lists: BlockLists | None = None
    score_captures: tuple[Any, ...] = ()
    mask_captures: tuple[Any, ...] = ()
    lengths: Any = None
    page_table: Any = None


@functools.partial(_register, data_fields=("out", "lse", "max_scores"))
@dataclasses.dataclass(frozen=True)
class Result:
    """What a forward pass gives.

    Attributes:
        out: the attention output, in the query's dtype and the problem's layout.
        lse: float32 [B, Hq, L], natural logarithm of the sum of exponentiated scores.
        max_scores: float32 [B, Hq, L], the largest score of every row; None if not wanted.
    """

    out: Any
    lse: Any
    max_scores: Any = None


@functools.partial(_register, data_fields=("query", "key", "value", "score_captures"))
@dataclasses.dataclass(frozen=True)
class Gradients:
    """What a backward pass gives, each shaped and typed like its operand.

    `score_captures` has None for captures that are not floating-point.
    """

    query: Any
    key: Any
    value: Any
    score_captures: tuple[Any, ...] = ()


def heads_first(x: Any, layout: str) -> Any:
    """(B, H, L, D) view of an array in `layout`."""
    return jnp.swapaxes(x, 1, 2) if layout == BLHD else x
