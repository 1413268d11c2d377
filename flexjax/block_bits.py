"""Sets of blocks as bits: for every row of blocks, words of 32, and how many members come before each word.

The rank of a block in its row, and the block of a given rank, both follow from these with a few operations an
element. XLA fuses them into what uses them: no array of ranks or of members is written down, and few kernels
have to be compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, UInt32

WORD = 32

# Up to this many terms are summed up one by one: n^2 additions in one kernel, of which a parallel prefix sum has
# two for every factor of 16.
_FEW_TERMS = 1 << 13


@dataclasses.dataclass(frozen=True)
class Bits:
    """A set of blocks.

    Attributes:
        words: block c of a row is bit c % 32 of word c // 32.
        before: members of the row in the words before each.
        counts: members of the row.
    """

    words: UInt32[Array, "*rows words"]
    before: Int32[Array, "*rows words"]
    counts: Int32[Array, "*rows"]

    def members(self) -> Bool[Array, "*rows words 32"]:
        """Which blocks are members; what asks needs only the words, an eighth of the states in size."""
        return (self.words[..., None] >> _places(self.words.ndim)) & np.uint32(1) != 0

    def ranks(self) -> Int32[Array, "*rows words 32"]:
        """How many members precede each block in its row."""
        below = (np.uint32(1) << _places(self.words.ndim)) - np.uint32(1)
        return self.before[..., None] + _bit_count(self.words[..., None] & below)


def by_words(x: Any) -> Any:
    """[..., cols] as [..., words, 32]; zeros follow the last column."""
    padding = -x.shape[-1] % WORD
    if padding:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return x.reshape(*x.shape[:-1], -1, WORD)


def bits_of(members: Bool[Array, "*rows words 32"]) -> Bits:
    words = members.astype(jnp.uint32) << _places(members.ndim - 1)
    words = words.sum(-1, dtype=jnp.uint32)
    ends = jnp.cumsum(_bit_count(words), -1, dtype=jnp.int32)
    return Bits(words, ends - _bit_count(words), ends[..., -1])


@dataclasses.dataclass(frozen=True)
class Members:
    """The members of a set, numbered row after row.

    Attributes:
        bits: the set, of one axis of rows.
        starts: members in the rows before each.
        count: members of all rows.
    """

    bits: Bits
    starts: Int32[Array, " rows"]
    count: Int32[Array, ""]

    def position(self, number: Int32[Array, "*n"]) -> tuple[Any, Any]:
        """(row, column) of members by number; some position of the mask where there is no such member."""
        words, before = self.bits.words, self.bits.before
        row = (self.starts[None] <= number[:, None]).sum(1, dtype=jnp.int32) - 1
        rank = number - self.starts[row]
        word = (before[row] <= rank[:, None]).sum(1, dtype=jnp.int32) - 1
        bit = _set_bit(words[row, word], rank - before[row, word])
        return row, word * WORD + bit


def members_of(bits: Bits) -> Members:
    ends = _running_sums(bits.counts)
    return Members(bits, ends - bits.counts, ends[-1])


def _running_sums(x: Int32[Array, " n"]) -> Int32[Array, " n"]:
    if x.size > _FEW_TERMS:
        return jnp.cumsum(x, dtype=jnp.int32)
    place = jnp.arange(x.size, dtype=jnp.int32)
    return jnp.where(place[None] <= place[:, None], x[None], 0).sum(1, dtype=jnp.int32)


def _last_at_most(read: Callable[[Any], Any], length: int, value: Any) -> Any:
    """The last i below `length` with read(i) <= value, of ascending values the first of which is 0."""
    found = jnp.zeros_like(value)
    for power in reversed(range((length - 1).bit_length())):
        ahead = jnp.minimum(found + (1 << power), length - 1)
        found = jnp.where(read(ahead) <= value, ahead, found)
    return found


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


def _places(axes: int) -> UInt32[Array, "*axes 32"]:
    """The bits of a word, along an axis after `axes` others."""
    return jnp.arange(WORD, dtype=jnp.uint32).reshape((1,) * axes + (WORD,))


def _bit_count(words: Any) -> Any:
    return jax.lax.population_count(words).astype(jnp.int32)
