"""Block lists: which blocks of a mask are visited, as counts and indices.

A mask is cut into blocks of queries (rows) and keys (columns). For every row, the columns of its blocks
that hold an allowed position are listed: *partial* ones, where mask_mod decides element by element, apart
from *full* ones, where every position is allowed. The backward pass walks the transposes: for every column,
its rows.

Nothing here is larger than one block row of the mask or one bit a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from flexjax.mods.evaluate import evaluate, evaluate_numpy
from flexjax.mods.graph import Graph


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


def lists_from_blocks(
    listed: Bool[Any, "*rows cols"],
) -> tuple[Int32[Any, "*rows"], Int32[Any, "*rows cols"]]:
    """(counts, indices) of the listed blocks of every row, in ascending order.

    Entries past a row's count hold an arbitrary column inside the mask.
    """
    return _lists(listed, np) if isinstance(listed, np.ndarray) else _lists_jit(listed, jnp)


def _lists(listed: Any, xp: Any) -> tuple[Any, Any]:
    cols = listed.shape[-1]
    column = xp.broadcast_to(xp.arange(cols, dtype=np.int32), listed.shape)
    order = xp.sort(xp.where(listed, column, np.int32(cols)), axis=-1)
    return listed.sum(-1, dtype=np.int32), xp.minimum(order, np.int32(cols - 1))


_lists_jit = jax.jit(_lists, static_argnums=1)


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


def classify(
    graph: Graph, captures: Sequence[Any], geometry: Geometry, batch: int, heads: int
) -> tuple[Array, Array]:
    """Which blocks are partial and which are full, [batch, heads, rows, cols] bool each.

    Evaluates one block row of the mask at a time. A block that sticks out over the last key is never full:
    the kernels then need no bounds check in full blocks. Queries past the end do not count either way.
    """
    return _classify(graph, tuple(captures), geometry, batch, heads)


def _row_inputs(geometry: Geometry, xp: Any) -> tuple[Any, Any, Any]:
    """(key indices kept inside the mask, which of them are real, offsets of queries in a block)."""
    kv = xp.arange(geometry.cols * geometry.kv_block, dtype=np.int32)
    offsets = xp.arange(geometry.q_block, dtype=np.int32)
    return xp.minimum(kv, np.int32(geometry.kv_len - 1)), kv < geometry.kv_len, offsets


def _summarise(allowed: Any, real_q: Any, real_kv: Any, geometry: Geometry) -> tuple[Any, Any]:
    """(any, all) over each block of a block row.

    Args:
        allowed: bool, broadcastable to [q_block, cols * kv_block].
        real_q: bool [q_block], which queries are inside the mask.
        real_kv: bool [cols * kv_block], which keys are.
        geometry: the tiling.
    """
    xp = np if isinstance(allowed, np.ndarray) else jnp
    allowed = xp.broadcast_to(allowed, (geometry.q_block, real_kv.shape[0]))
    real_q = real_q[:, None]
    # Over the queries first: reductions along rows of memory are the fast ones.
    some = (allowed & real_q).any(0) & real_kv
    whole = (allowed | ~real_q).all(0) & real_kv
    blocks = (geometry.cols, geometry.kv_block)
    return some.reshape(blocks).any(1), whole.reshape(blocks).all(1)


@partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _classify(
    graph: Graph, captures: tuple[Any, ...], geometry: Geometry, batch: int, heads: int
) -> tuple[Array, Array]:
    kv, real_kv, offsets = _row_inputs(geometry, jnp)

    def block_row(where: Mapping[str, Any]) -> tuple[Array, Array]:
        q = where["row"] * geometry.q_block + offsets
        inputs = {
            "b": where["b"],
            "h": where["h"],
            "q": jnp.minimum(q, geometry.q_len - 1)[:, None],
            "kv": kv[None, :],
        }
        (allowed,) = evaluate(graph, captures, inputs)
        return _summarise(allowed, q < geometry.q_len, real_kv, geometry)

    # A mask that does not depend on b or h is evaluated for one of them only.
    n_batch = batch if "b" in graph.depends else 1
    n_heads = heads if "h" in graph.depends else 1
    b, h, row = jnp.meshgrid(
        *(jnp.arange(n, dtype=jnp.int32) for n in (n_batch, n_heads, geometry.rows)), indexing="ij"
    )
    where = {"b": b.reshape(-1), "h": h.reshape(-1), "row": row.reshape(-1)}
    some, whole = jax.lax.map(block_row, where)
    shape = (n_batch, n_heads, geometry.rows, geometry.cols)
    target = (batch, heads, geometry.rows, geometry.cols)
    some, whole = (jnp.broadcast_to(x.reshape(shape), target) for x in (some, whole))
    return some & ~whole, whole


def classify_on_host(
    graph: Graph, geometry: Geometry, batch: int, heads: int
) -> tuple[np.ndarray, np.ndarray]:
    """`classify` for a mask without captures, with NumPy: usable while JAX is tracing.

    Raises:
        NotImplementedError: the mask uses an operation that NumPy does not have.
    """
    kv, real_kv, offsets = _row_inputs(geometry, np)
    n_batch = batch if "b" in graph.depends else 1
    n_heads = heads if "h" in graph.depends else 1
    shape = (n_batch, n_heads, geometry.rows, geometry.cols)
    some, whole = np.empty(shape, bool), np.empty(shape, bool)
    for b, h, row in np.ndindex(*shape[:3]):
        q = (row * geometry.q_block + offsets).astype(np.int32)
        inputs = {
            "b": np.int32(b),
            "h": np.int32(h),
            "q": np.minimum(q, geometry.q_len - 1)[:, None],
            "kv": kv[None, :],
        }
        (allowed,) = evaluate_numpy(graph, (), inputs)
        some[b, h, row], whole[b, h, row] = _summarise(
            np.asarray(allowed), q < geometry.q_len, real_kv, geometry
        )
    target = (batch, heads, geometry.rows, geometry.cols)
    return np.broadcast_to(some & ~whole, target), np.broadcast_to(whole, target)
