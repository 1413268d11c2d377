"""Which blocks of a mask are empty, partial or full.

Three steps, each for the blocks that the one before left open:

1. *Proof.* Interval arithmetic over the block's queries and keys (`mods.regions`) shows that the mask is false
   or true everywhere in it.
2. *Witnesses.* One corner where the mask holds and one where it does not make a block partial.
3. *Elements.* The mask is evaluated at every position of the block. Blocks are taken from a work list in
   chunks of a fixed size, as many chunks as there are such blocks, so that the work follows the data.

The first two cost a few operations a block, about as much as writing down one entry of a list, and so are
made for all blocks at once: a hierarchy of coarser regions would save nothing that is seen beside the lists
themselves. The third is what a mask costs that the proofs do not reach: at most one evaluation a position.

A block that sticks out over the last key is never full: kernels then need no bounds check in full blocks.
Queries past the end count neither way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.block_bits import bits_of, numbered
from flexjax.block_lists import EMPTY, FULL, OPEN, PARTIAL, Geometry
from flexjax.mods.bound_rules import Bounds
from flexjax.mods.evaluate import evaluate, evaluate_numpy
from flexjax.mods.graph import Graph
from flexjax.mods.regions import Exact, Regions, bounds

# Positions that are evaluated at once, and fewer of a mod that the IR does not see into: it may hold arrays
# of its own at every position.
_CHUNK_POSITIONS = 1 << 22
_OPAQUE_POSITIONS = 1 << 18

# Blocks are numbered in int32: more of them are taken one head at a time.
_NUMBERED_BLOCKS = 1 << 30

# The host takes groups of rows of at most this many blocks, which stay in its caches.
_HOST_BLOCKS = 1 << 17


def block_states(
    graph: Graph, captures: Sequence[Any], geometry: Geometry, batch: int, heads: int
) -> jax.Array:
    """int8 [batch or 1, heads or 1, rows, cols]: 0 for an empty block, 1 for a partial, 2 for a full one.

    An axis has length 1 where the mask does not depend on its index.
    """
    n_batch, n_heads = _distinct(graph, batch, heads)
    return _block_states(graph, tuple(captures), geometry, n_batch, n_heads)


def _distinct(graph: Graph, batch: int, heads: int) -> tuple[int, int]:
    return batch if "b" in graph.depends else 1, heads if "h" in graph.depends else 1


@partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _block_states(
    graph: Graph, captures: tuple[Any, ...], geometry: Geometry, batch: int, heads: int
) -> jax.Array:
    def states(b: Any, h: Any) -> jax.Array:
        grid = _Grid(geometry, b, h, jnp.arange(geometry.rows, dtype=jnp.int32), jnp)
        if graph.opaque is None:
            found = _proven(graph, captures, grid, evaluate)
        else:
            found = jnp.full(grid.shape, OPEN, jnp.int8)
        # Written down once: XLA would compute them anew in each of their uses.
        found = jax.lax.optimization_barrier(found)
        return _by_element(graph, captures, geometry, b.reshape(-1), h.reshape(-1), found)

    b = jnp.arange(batch, dtype=jnp.int32)
    h = jnp.arange(heads, dtype=jnp.int32)
    if batch * heads * geometry.rows * geometry.cols <= _NUMBERED_BLOCKS:
        return states(b[:, None, None, None], h[None, :, None, None])
    one = jax.lax.map(
        lambda i: states(*(x.reshape(1, 1, 1, 1) for x in (i // heads, i % heads))),
        jnp.arange(batch * heads, dtype=jnp.int32),
    )
    return one.reshape(batch, heads, geometry.rows, geometry.cols)


def block_states_on_host(graph: Graph, geometry: Geometry, batch: int, heads: int) -> np.ndarray:
    """`block_states` of a mask without captures, with NumPy: usable while JAX is tracing.

    Raises:
        NotImplementedError: the mask uses an operation that NumPy does not have.
    """
    n_batch, n_heads = _distinct(graph, batch, heads)
    b = np.arange(n_batch, dtype=np.int32)[:, None, None, None]
    h = np.arange(n_heads, dtype=np.int32)[None, :, None, None]
    states = np.empty((n_batch, n_heads, geometry.rows, geometry.cols), np.int8)
    step = max(1, _HOST_BLOCKS // (n_batch * n_heads * geometry.cols))
    for first in range(0, geometry.rows, step):
        rows = np.arange(first, min(first + step, geometry.rows), dtype=np.int32)
        grid = _Grid(geometry, b, h, rows, np)
        if graph.opaque is not None:
            raise NotImplementedError("NumPy does not run a mask that the IR cannot express.")
        with np.errstate(all="ignore"):
            found = _proven(graph, (), grid, evaluate_numpy)
        _by_element_on_host(graph, geometry, first, found)
        states[:, :, first : first + step] = found
    return states


class _Grid:
    """All blocks of some rows of blocks: their first and last indices, as arrays of rank 4.

    Args:
        geometry: the tiling.
        b, h: batch rows [B, 1, 1, 1] and heads [1, H, 1, 1].
        rows: rows of blocks.
        xp: `numpy` or `jax.numpy`.
    """

    def __init__(self, geometry: Geometry, b: Any, h: Any, rows: Any, xp: Any):
        self.geometry, self.b, self.h, self.xp = geometry, b, h, xp
        cols = xp.arange(geometry.cols, dtype=np.int32)
        self.first_q = (rows * geometry.q_block)[None, None, :, None]
        self.first_kv = (cols * geometry.kv_block)[None, None, None, :]
        self.last_q = xp.minimum(self.first_q + (geometry.q_block - 1), geometry.q_len - 1)
        self.last_kv = xp.minimum(self.first_kv + (geometry.kv_block - 1), geometry.kv_len - 1)
        self.shape = (b.shape[0], h.shape[1], rows.shape[0], geometry.cols)

    @property
    def sticks_out(self) -> Any:
        """Which columns of blocks reach over the last key."""
        return self.first_kv > self.geometry.kv_len - self.geometry.kv_block


def _proven(
    graph: Graph,
    captures: Sequence[Any],
    grid: _Grid,
    run: Any,
) -> Any:
    """The states of all blocks of a grid; OPEN where neither bounds nor corners tell."""
    xp, geometry = grid.xp, grid.geometry
    inputs = {
        "b": Exact(grid.b),
        "h": Exact(grid.h),
        "q": Bounds(grid.first_q, grid.last_q),
        "kv": Bounds(grid.first_kv, grid.last_kv),
    }
    blocks = {
        "q": (geometry.q_len, geometry.q_block, 2),
        "kv": (geometry.kv_len, geometry.kv_block, 3),
    }
    true, possible = bounds(graph, captures, Regions(inputs, blocks), xp)
    some, missing = true, ~possible
    for q in (grid.first_q, grid.last_q):
        for kv in (grid.first_kv, grid.last_kv):
            (seen,) = run(graph, captures, {"b": grid.b, "h": grid.h, "q": q, "kv": kv})
            some, missing = some | seen, missing | ~seen
    # A position past the last key is as good as one that the mask forbids.
    missing = missing | grid.sticks_out
    states = xp.where(true, FULL, OPEN)
    states = xp.where(some & missing, PARTIAL, states)
    states = xp.where(possible, states, EMPTY)
    return xp.broadcast_to(states, grid.shape).astype(np.int8)


def _positions(geometry: Geometry, rows: Any, cols: Any, xp: Any) -> tuple[Any, Any, Any, Any]:
    """Query and key indices of some blocks, [n, q_block, 1] and [n, 1, kv_block], and which are real."""
    q = (
        rows[:, None, None] * geometry.q_block
        + xp.arange(geometry.q_block, dtype=np.int32)[None, :, None]
    )
    kv = (
        cols[:, None, None] * geometry.kv_block
        + xp.arange(geometry.kv_block, dtype=np.int32)[None, None]
    )
    return (
        xp.minimum(q, geometry.q_len - 1),
        xp.minimum(kv, geometry.kv_len - 1),
        q < geometry.q_len,
        kv < geometry.kv_len,
    )


def _summary(allowed: Any, real_q: Any, real_kv: Any, xp: Any) -> Any:
    """The states of blocks from all of their positions."""
    some = (allowed & real_q & real_kv).any((1, 2))
    full = ((allowed | ~real_q) & real_kv).all((1, 2))
    return xp.where(full, FULL, xp.where(some, PARTIAL, EMPTY)).astype(np.int8)


def _by_element(
    graph: Graph, captures: tuple[Any, ...], geometry: Geometry, b: Any, h: Any, states: jax.Array
) -> jax.Array:
    """Settles the open blocks by evaluating the mask in them."""
    size = math.prod(states.shape)
    positions = _CHUNK_POSITIONS if graph.opaque is None else _OPAQUE_POSITIONS
    chunk = min(size, max(1, positions // (geometry.q_block * geometry.kv_block)))
    rows = states.reshape(-1, geometry.cols)
    work = numbered(bits_of(rows == OPEN))

    def evaluated(states: jax.Array, first: Any) -> jax.Array:
        number = first + jnp.arange(chunk, dtype=jnp.int32)
        row, col = work.place(number)
        head = row // geometry.rows
        q, kv, real_q, real_kv = _positions(geometry, row % geometry.rows, col, jnp)
        inputs = {
            "b": b[head // h.shape[0]][:, None, None],
            "h": h[head % h.shape[0]][:, None, None],
            "q": q,
            "kv": kv,
        }
        (allowed,) = evaluate(graph, captures, inputs)
        allowed = jnp.broadcast_to(allowed, (chunk, geometry.q_block, geometry.kv_block))
        found = _summary(allowed, real_q, real_kv, jnp)
        col = jnp.where(number < work.count, col, geometry.cols)
        return states.at[row, col].set(found, mode="drop", unique_indices=True)

    def step(carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        first, states = carry
        return first + chunk, evaluated(states, first)

    _, rows = jax.lax.while_loop(lambda carry: carry[0] < work.count, step, (jnp.int32(0), rows))
    return rows.reshape(states.shape)


def _by_element_on_host(
    graph: Graph, geometry: Geometry, first_row: int, states: np.ndarray
) -> None:
    """`_by_element` with NumPy, in place, for rows of blocks from `first_row` on."""
    where = [x.astype(np.int32) for x in np.nonzero(states == OPEN)]
    chunk = max(1, _OPAQUE_POSITIONS // (geometry.q_block * geometry.kv_block))
    for start in range(0, where[0].size, chunk):
        part = tuple(x[start : start + chunk] for x in where)
        b, h, row, col = part
        q, kv, real_q, real_kv = _positions(geometry, first_row + row, col, np)
        inputs: Mapping[str, Any] = {
            "b": b[:, None, None],
            "h": h[:, None, None],
            "q": q,
            "kv": kv,
        }
        (allowed,) = evaluate_numpy(graph, (), inputs)
        allowed = np.broadcast_to(allowed, (b.size, geometry.q_block, geometry.kv_block))
        states[part] = _summary(allowed, real_q, real_kv, np)
