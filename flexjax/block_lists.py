"""Block lists: which blocks of a mask are visited, as counts and indices.

A mask is cut into blocks of queries (rows) and keys (columns). For every row, the columns of its blocks
that hold an allowed position are listed: *partial* ones, where mask_mod decides element by element, apart
from *full* ones, where every position is allowed. The backward pass walks the transposes: for every column,
its rows.

Beside the lists themselves nothing here is larger than a byte a block, and a few megabytes: `block_bits`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int8, Int32

from flexjax import _compat
from flexjax.block_bits import WORD, Bits, bits_of

# States of a block. OPEN: not settled yet.
EMPTY, PARTIAL, FULL, OPEN = np.int8(0), np.int8(1), np.int8(2), np.int8(3)

# Lists are made for groups of rows of at most this many blocks. Elsewhere than on a CPU XLA fuses all of it, and
# writes down a quarter of a byte a block; on a CPU some words a block, which stay in its caches.
_GROUP = 1 << 26
_GROUP_ON_CPU = 1 << 17


def cdiv(a: int, b: int) -> int:
    """Quotient a / b, rounded up."""
    return -(-a // b)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The tiling of an (L, S) mask.

    Attributes:
        q_len, kv_len: lengths L and S, in tokens.
        q_block, kv_block: block lengths, in tokens.
    """

    q_len: int
    kv_len: int
    q_block: int
    kv_block: int

    @property
    def rows(self) -> int:
        return cdiv(self.q_len, self.q_block)

    @property
    def cols(self) -> int:
        return cdiv(self.kv_len, self.kv_block)


@dataclasses.dataclass(frozen=True)
class Lists:
    """Partial and full blocks of every row, in one direction.

    Attributes:
        counts: int32 [..., rows], how many partial blocks each row has.
        indices: int32 [..., rows, width], their columns, ascending; the last column past the count.
        full_counts: int32 [..., rows], how many full blocks.
        full_indices: int32 [..., rows, width], their columns.
        overflow: bool scalar, whether any row has more than fit; False where all fit by construction.
    """

    counts: Any
    indices: Any
    full_counts: Any
    full_indices: Any
    overflow: Any

    @property
    def arrays(self) -> tuple[Any, Any, Any, Any]:
        return self.counts, self.indices, self.full_counts, self.full_indices


def lists_from_states(
    states: Int8[Any, "*rows cols"],
    widths: tuple[int, int] | None = None,
    of_columns: bool = False,
) -> Lists:
    """Lists of the partial and full blocks of every row, from states as `block_states` gives them.

    Args:
        states: 0 for an empty block, 1 for a partial and 2 for a full one. A NumPy array gives NumPy lists.
        widths: entries a row for partial and for full blocks; all columns if None. Of a row that has more the
            first ones are kept.
        of_columns: make those of every column instead, [..., cols, width] of rows.
    """
    *lead, cols = states.swapaxes(-1, -2).shape if of_columns else states.shape
    widths = (cols, cols) if widths is None else widths
    if isinstance(states, np.ndarray):
        turned = states.swapaxes(-1, -2) if of_columns else states
        made = _lists_on_host(turned.reshape(-1, cols), widths)
    else:
        made = _lists(states, widths, of_columns)
    counts, indices, full_counts, full_indices, overflow = made
    return Lists(
        counts.reshape(lead),
        indices.reshape(*lead, widths[0]),
        full_counts.reshape(lead),
        full_indices.reshape(*lead, widths[1]),
        overflow,
    )


def most_blocks(states: Int8[Any, "*rows cols"]) -> tuple[int, int]:
    """How many partial and how many full blocks the rows with most of them have; needs concrete states."""
    most = _most_blocks(states) if isinstance(states, jax.Array) else _counts(states)
    return int(most[0]), int(most[1])


def _counts(states: Any) -> list[Any]:
    return [(states == state).sum(-1, dtype=np.int32).max() for state in (PARTIAL, FULL)]


_most_blocks = jax.jit(_counts)


def _group(rows: int, cols: int, blocks: int) -> int:
    return min(rows, max(1, blocks // cols))


@partial(jax.jit, static_argnums=(1, 2))
def _lists(states: Any, widths: tuple[int, int], of_columns: bool) -> tuple[Any, ...]:
    """(counts, indices) of partial and of full blocks, and whether any row has more than fit."""
    cols = states.shape[-2 if of_columns else -1]

    def in_groups(states: Any, blocks: int) -> Any:
        turned = states.swapaxes(-1, -2) if of_columns else states
        return _lists_in_groups(turned.reshape(-1, cols), widths, blocks)

    def at_once(states: Any) -> Any:
        if states.size > _GROUP:
            return in_groups(states, _GROUP)
        return _listed(states, widths, of_columns)

    partial, indices, full, full_indices = jax.lax.platform_dependent(
        states, cpu=lambda states: in_groups(states, _GROUP_ON_CPU), default=at_once
    )
    if min(widths) >= cols:
        return partial, indices, full, full_indices, jnp.zeros((), bool)
    overflow = (partial > widths[0]).any() | (full > widths[1]).any()
    partial, full = jnp.minimum(partial, widths[0]), jnp.minimum(full, widths[1])
    return partial, indices, full, full_indices, overflow


def _lists_in_groups(states: Any, widths: tuple[int, int], blocks: int) -> Any:
    """Lists made for groups of rows of `blocks` blocks, one after the other."""
    rows, cols = states.shape
    group = _group(rows, cols, blocks)
    if group == rows:
        return _listed(states, widths)

    def step(i: Any, lists: Any) -> Any:
        # The last group begins earlier and lists some rows again, rather than being padded.
        start = jnp.minimum(i * group, rows - group)
        part = jax.lax.dynamic_slice_in_dim(states, start, group)
        return [
            jax.lax.dynamic_update_slice_in_dim(old, new, start, 0)
            for old, new in zip(lists, _listed(part, widths), strict=True)
        ]

    lists = [jnp.zeros(s, jnp.int32) for w in widths for s in ((rows,), (rows, w))]
    lists = [_compat.like_varying(x, states) for x in lists]
    return jax.lax.fori_loop(0, cdiv(rows, group), step, lists)


def _listed(states: Any, widths: tuple[int, int], of_columns: bool = False) -> list[Any]:
    """(count, indices) of the partial and of the full blocks of every row, rows being one axis.

    A block's place in its list is the number of blocks of its state before it. Nothing is sorted: every block
    writes its own column there.
    """
    cols = states.shape[-2 if of_columns else -1]
    made = []
    for state, width in zip((PARTIAL, FULL), widths, strict=True):
        bits = bits_of(states == state, of_columns)
        bits = Bits(*(x.reshape(-1, x.shape[-1]) for x in (bits.words, bits.sums)))
        row, word, bit = (
            jax.lax.broadcasted_iota(jnp.int32, (*bits.words.shape, WORD), axis)
            for axis in range(3)
        )
        # Past the list: not listed.
        place = jnp.where(bits.members(), bits.ranks(), cols)
        indices = jnp.full((row.shape[0], width), cols - 1, jnp.int32)
        indices = indices.at[row, place].set(word * WORD + bit, mode="drop", unique_indices=True)
        made += [bits.counts, indices]
    return made


def _lists_on_host(states: np.ndarray, widths: tuple[int, int]) -> tuple[Any, ...]:
    rows, cols = states.shape
    lists: list[np.ndarray] = []
    overflow = False
    for state, width in zip((PARTIAL, FULL), widths, strict=True):
        counts = np.empty(rows, np.int32)
        indices = np.full((rows, width), cols - 1, np.int32)
        group = _group(rows, cols, _GROUP_ON_CPU)
        for start in range(0, rows, group):
            part = slice(start, start + group)
            row, col = np.nonzero(states[part] == state)
            found = np.bincount(row, minlength=indices[part].shape[0])
            counts[part] = found
            rank = np.arange(row.size) - (np.cumsum(found) - found)[row]
            fits = rank < width
            indices[part][row[fits], rank[fits]] = col[fits]
        overflow = overflow or bool(counts.max() > width)
        lists += [np.minimum(counts, width), indices]
    return *lists, np.bool_(overflow)


@partial(jax.jit, static_argnums=2)
def blocks_from_lists(
    counts: Int32[Array, "B H R"], indices: Int32[Array, "B H R W"], cols: int
) -> Bool[Array, "B H R C"]:
    """The listed blocks as a dense block map; entries past the counts or outside the mask are ignored."""
    width = indices.shape[-1]
    position = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), indices.shape)
    valid = (position < counts[..., None]) & (indices >= 0) & (indices < cols)
    flat = jnp.where(valid, indices, cols).reshape(-1, width)
    rows = jnp.arange(flat.shape[0], dtype=jnp.int32)[:, None]
    dense = jnp.zeros((flat.shape[0], cols), bool).at[rows, flat].set(True, mode="drop")
    return dense.reshape(*counts.shape, cols)


@partial(jax.jit, static_argnums=4)
def states_from_lists(
    counts: Int32[Array, "B H R"],
    indices: Int32[Array, "B H R W"],
    full_counts: Int32[Array, "B H R"],
    full_indices: Int32[Array, "B H R V"],
    cols: int,
) -> Int8[Array, "B H R C"]:
    """The states of all blocks, from lists in any order; a block that is listed as both is full."""
    partial = blocks_from_lists(counts, indices, cols)
    full = blocks_from_lists(full_counts, full_indices, cols)
    return jnp.where(full, FULL, jnp.where(partial, PARTIAL, EMPTY))
