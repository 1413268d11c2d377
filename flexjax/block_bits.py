"""Sets of blocks as bits: for every row of blocks, words of 32, and how many members come before each word.

The rank of a block in its row, and the block of a given rank, both follow from these with a few operations an
element. XLA fuses them into what uses them: no array of ranks or of members is written down, and few kernels
have to be compiled.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, UInt32

WORD = 32

# Sums of up to this many terms in all are computed one by one, in one kernel; a parallel prefix sum is two kernels
# for every factor of 16.
_FEW_TERMS = 1 << 26


@dataclasses.dataclass(frozen=True)
class Bits:
    """A set of blocks.

    Attributes:
        words: block c of a row is bit c % 32 of word c // 32.
        sums: members of the row in its first 0, 1, ..., all words.
    """

    words: UInt32[Array, "*rows words"]
    sums: Int32[Array, "*rows words+1"]

    @property
    def counts(self) -> Int32[Array, "*rows"]:
        """Members of every row."""
        return self.sums[..., -1]

    def members(self) -> Bool[Array, "*rows words 32"]:
        """Which blocks are members."""
        return (self.words[..., None] >> _places(self.words.ndim + 1)) & np.uint32(1) != 0

    def ranks(self) -> Int32[Array, "*rows words 32"]:
        """How many members precede each block in its row."""
        below = (np.uint32(1) << _places(self.words.ndim + 1)) - np.uint32(1)
        return self.sums[..., :-1, None] + _bit_count(self.words[..., None] & below)


def bits_of(members: Bool[Array, "*rows r c"], of_columns: bool = False) -> Bits:
    """The set that holds these blocks.

    Args:
        members: bool [..., R, C].
        of_columns: whether columns of blocks are the set's rows. Its words are then gathered down the columns and
            turned over, so that XLA need not write down the blocks themselves turned over.
    """
    axis = members.ndim - 2 if of_columns else members.ndim - 1
    padding = [(0, 0)] * members.ndim
    padding[axis] = (0, -members.shape[axis] % WORD)
    if padding[axis][1]:
        members = jnp.pad(members, padding)
    shape = members.shape
    bits = members.reshape(*shape[:axis], -1, WORD, *shape[axis + 1 :]).astype(jnp.uint32)
    words = (bits << _places(bits.ndim, axis + 1)).sum(axis + 1, dtype=jnp.uint32)
    words = words.swapaxes(-1, -2) if of_columns else words
    return Bits(words, _sums(_bit_count(words)))


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A set whose members are numbered row after row.

    Attributes:
        bits: the set.
        sums: members of its first 0, 1, ..., all rows.
    """

    bits: Bits
    sums: Int32[Array, " rows+1"]

    @property
    def count(self) -> Int32[Array, ""]:
        """Members of all rows."""
        return self.sums[-1]

    def place(self, number: Int32[Array, " n"]) -> tuple[Int32[Array, " n"], Int32[Array, " n"]]:
        """(row, column) of members by number.

        A number that no member has yields an existing row, and a column that may lie beyond the last.
        """
        words, sums = self.bits.words, self.bits.sums
        row = _last_at_most(self.sums[None], number)
        rank = number - self.sums[row]
        word = _last_at_most(sums[row], rank)
        return row, word * WORD + _set_bit(words[row, word], rank - sums[row, word])


def numbered(bits: Bits) -> Numbered:
    """The members of a set with one axis of rows by their number."""
    return Numbered(bits, _sums(bits.counts))


def _sums(x: Int32[Array, "*rows n"]) -> Int32[Array, "*rows n+1"]:
    """Sums of the first 0, 1, ..., n terms."""
    if x.size * x.shape[-1] > _FEW_TERMS:
        return _sums_in_parallel(x)
    # A CPU would write all the terms down.
    return jax.lax.platform_dependent(x, cpu=_sums_in_parallel, default=_sums_one_by_one)


def _sums_in_parallel(x: Any) -> Any:
    sums = jnp.cumsum(x, -1, dtype=jnp.int32)
    return jnp.pad(sums, [(0, 0)] * (x.ndim - 1) + [(1, 0)])


def _sums_one_by_one(x: Any) -> Any:
    length = x.shape[-1]
    place = jnp.arange(length + 1, dtype=jnp.int32)
    summed = place[None, :-1] < place[:, None]
    summed = jnp.broadcast_to(summed, (*x.shape[:-1], length + 1, length))
    return jnp.where(summed, x[..., None, :], 0).sum(-1, dtype=jnp.int32)


def _last_at_most(sums: Int32[Array, "#n m+1"], value: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """The last i < m with sums[:, i] <= value, found by comparing with all of them."""
    found = (sums <= value[:, None]).sum(1, dtype=jnp.int32) - 1
    return jnp.minimum(found, sums.shape[1] - 2)


def _set_bit(word: Any, rank: Any) -> Any:
    """Which bit of a word is set and has `rank` set bits below it."""
    found = jnp.zeros_like(rank)
    for width in (16, 8, 4, 2, 1):
        part = (word >> found.astype(jnp.uint32)) & np.uint32((1 << width) - 1)
        below = _bit_count(part)
        beyond = rank >= below
        found = jnp.where(beyond, found + width, found)
        rank = jnp.where(beyond, rank - below, rank)
    return found


def _places(rank: int, axis: int = -1) -> UInt32[np.ndarray, "..."]:
    """The bits of a word along one axis of an array of this rank."""
    shape = [1] * rank
    shape[axis] = WORD
    return np.arange(WORD, dtype=np.uint32).reshape(shape)


def _bit_count(words: Any) -> Any:
    return jax.lax.population_count(words).astype(jnp.int32)
