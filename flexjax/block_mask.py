"""BlockMask: a mask_mod together with the blocks of the score matrix that it leaves anything in."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from flexjax import _compat
from flexjax.block_lists import (
    Geometry,
    blocks_from_lists,
    classify,
    classify_on_host,
    lists_from_blocks,
)
from flexjax.mods.evaluate import evaluate
from flexjax.mods.graph import Graph
from flexjax.mods.trace import index_ranges, trace_mask_mod, trace_score_mod
from flexjax.mods.transform import rewrite_graph, select
from flexjax.sharding import replicated

MaskMod = Callable[..., Any]

# Lists of a mask that is known while JAX traces become constants of the program up to this size; larger
# ones are computed when it runs.
_CONSTANT_BYTES = 16 << 20


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "kv_num_blocks",
        "kv_indices",
        "full_kv_num_blocks",
        "full_kv_indices",
        "q_num_blocks",
        "q_indices",
        "full_q_num_blocks",
        "full_q_indices",
        "mask_captures",
        "q_offset",
    ),
    meta_fields=("seq_lengths", "block_size", "mask_graph"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """Which blocks of an (L, S) score matrix are computed, and the mask inside them.

    A pytree: the lists, the arrays that mask_mod captured and the query offset are leaves; lengths, block
    sizes and the mask's graph are static. A mask rebuilt with new document ids therefore passes through
    `jax.jit` without retracing. Make one with `create_block_mask`, `BlockMask.from_kv_blocks` or
    `BlockMask.from_dense`.

    With R = ceil(L / q_block) rows and C = ceil(S / kv_block) columns of blocks, and B and H either 1
    (broadcast) or the numbers of batch rows and query heads:

    Attributes:
        kv_num_blocks: int32 [B, H, R], how many partial blocks each row of blocks has.
        kv_indices: int32 [B, H, R, <= C], their columns; entries past the count are arbitrary.
        full_kv_num_blocks: int32 [B, H, R], how many full blocks, in which mask_mod is not evaluated.
        full_kv_indices: int32 [B, H, R, <= C], their columns.
        q_num_blocks: int32 [B, H, C], the transpose for the backward pass: how many partial blocks each
            column has. None, like the next three, in an inference-only mask.
        q_indices: int32 [B, H, C, R], their rows.
        full_q_num_blocks: int32 [B, H, C], how many full blocks each column has.
        full_q_indices: int32 [B, H, C, R], their rows.
        mask_captures: the arrays that mask_mod reads.
        q_offset: int32 scalar, the query index of the first row after slicing; None for 0.
        seq_lengths: (L, S) in tokens.
        block_size: (q_block, kv_block) in tokens.
        mask_graph: the mask in global query indices; None where every listed position is allowed.
    """

    kv_num_blocks: Int32[Array, "B H R"]
    kv_indices: Int32[Array, "B H R W"]
    full_kv_num_blocks: Int32[Array, "B H R"]
    full_kv_indices: Int32[Array, "B H R V"]
    q_num_blocks: Int32[Array, "B H C"] | None
    q_indices: Int32[Array, "B H C R"] | None
    full_q_num_blocks: Int32[Array, "B H C"] | None
    full_q_indices: Int32[Array, "B H C R"] | None
    mask_captures: tuple[Any, ...]
    q_offset: Int32[Array, ""] | None
    seq_lengths: tuple[int, int]
    block_size: tuple[int, int]
    mask_graph: Graph | None

    # -- shape ----------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, L, S)."""
        return (*self.kv_num_blocks.shape[:2], *self.seq_lengths)  # pyrefly: ignore[bad-return]

    @property
    def BLOCK_SIZE(self) -> tuple[int, int]:  # noqa: N802 (PyTorch's name)
        """(q_block, kv_block) in tokens, under PyTorch's name."""
        return self.block_size

    @property
    def geometry(self) -> Geometry:
        """Lengths and block sizes as one value."""
        return Geometry(*self.seq_lengths, *self.block_size)

    @property
    def inference_only(self) -> bool:
        """Whether the transposed lists are missing, so that there is no backward pass."""
        return self.q_num_blocks is None

    @property
    def mask_mod(self) -> MaskMod:
        """The mask as a function `(b, h, q_idx, kv_idx) -> bool` of indices into this mask."""
        graph, captures, offset = self.mask_graph, self.mask_captures, self.q_offset

        def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            if graph is None:
                return jnp.asarray(True)
            q = q_idx if offset is None else q_idx + offset
            return evaluate(graph, captures, {"b": b, "h": h, "q": q, "kv": kv_idx})[0]

        return mask_mod

    def numel(self) -> int:
        """B * H * L * S, whatever is masked."""
        return math.prod(self.shape)

    # -- contents -------------------------------------------------------------------------------

    def block_states(self) -> Array:
        """int8 [B, H, R, C]: 0 for an empty block, 1 for a partial and 2 for a full one."""
        cols = self.geometry.cols
        partial = blocks_from_lists(self.kv_num_blocks, self.kv_indices, cols)
        full = blocks_from_lists(self.full_kv_num_blocks, self.full_kv_indices, cols)
        return jnp.where(full, 2, partial).astype(jnp.int8)

    def to_dense(self) -> Int32[Array, "B H R C"]:
        """The map of computed blocks: 1 where a block is partial or full, 0 where it is skipped."""
        return (self.block_states() > 0).astype(jnp.int32)

    def sparsity(self) -> float:
        """Percentage of blocks that are not computed; needs concrete arrays."""
        counts = np.asarray(self.kv_num_blocks) + np.asarray(self.full_kv_num_blocks)
        total = counts.size * self.geometry.cols
        return 100.0 * (1.0 - float(counts.sum()) / total) if total else 0.0

    def __str__(self) -> str:
        if not isinstance(self.kv_num_blocks, (jax.Array, np.ndarray)) or _compat.is_tracer(
            self.kv_num_blocks
        ):
            return repr(self)
        from flexjax.visualize import blocks_text

        header = (
            f"BlockMask(shape={self.shape}, block_size={self.block_size}, "
            f"sparsity={self.sparsity():.2f}%)"
        )
        states = np.asarray(self.block_states())
        pictures = []
        for b, h in list(np.ndindex(*states.shape[:2]))[:4]:
            pictures.append(f"({b}, {h})\n{blocks_text(states[b, h])}")
        hidden = states.shape[0] * states.shape[1] - len(pictures)
        if hidden > 0:
            pictures.append(f"... and {hidden} more")
        return "\n".join([header, *pictures])

    def __repr__(self) -> str:
        # Leaves need not be arrays: JAX keeps shardings, axes and placeholders in pytrees too.
        known = hasattr(self.kv_num_blocks, "shape")
        shape = f"shape={self.shape}" if known else f"seq_lengths={self.seq_lengths}"
        return (
            f"BlockMask({shape}, block_size={self.block_size}, "
            f"inference_only={self.inference_only})"
        )

    # -- slicing --------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> BlockMask:
        """Selects batch rows, heads and rows of blocks: `mask[b]`, `mask[b, h]`, `mask[:, :, rows]`.

        Integers keep their dimension with length 1. Batch and head indices may be integers, slices or
        integer arrays; rows of blocks (not tokens) an integer or a slice of step 1. The slice remembers
        its query offset, so that mask_mod, and the score_mod used with it, still see the query's index in
        the whole mask. Keys are never sliced.

        Raises:
            IndexError: more than three indices, an index out of range, or rows that are not contiguous.
        """
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) > 3:
            raise IndexError(
                f"A BlockMask takes up to three indices (batch, head, row of blocks), but got "
                f"{len(parts)}. Keys cannot be sliced; build a mask of another length instead."
            )
        mask = self
        for axis, part in enumerate(parts[:2]):
            mask = mask._select(axis, part)
        return mask._rows(parts[2]) if len(parts) == 3 else mask

    @property
    def _lists(self) -> dict[str, Array]:
        fields = {name: getattr(self, name) for name in _LIST_FIELDS}
        return {name: x for name, x in fields.items() if x is not None}

    def _select(self, axis: int, part: Any) -> BlockMask:
        if isinstance(part, slice) and part == slice(None):
            return self
        name, size = ("batch", "head")[axis], self.shape[axis]
        table = _selected(part, size, name)
        if table.shape[0] == 0:
            raise IndexError(
                f"The {name} index {part!r} selects nothing of a BlockMask {self.shape}."
            )
        lists = _taken(self._lists, table, axis)
        graph, captures = self.mask_graph, self.mask_captures
        role = ("b", "h")[axis]
        if graph is not None and role in graph.depends:
            batch, heads = lists["kv_num_blocks"].shape[:2]
            ranges = _ranges(batch, heads, self.seq_lengths, self.q_offset)
            graph = rewrite_graph(graph, select(ranges, role, table.shape[0], size))
            captures = (*captures, table)
        return dataclasses.replace(self, **lists, mask_graph=graph, mask_captures=captures)

    def _rows(self, part: Any) -> BlockMask:
        geometry = self.geometry
        start, count, q_len = _row_range(part, geometry)
        cols = None if self.inference_only else geometry.cols
        cut = _cut(self._lists, start, count, cols)
        offset = jnp.asarray(start * geometry.q_block, jnp.int32)
        if self.q_offset is not None:
            offset = offset + self.q_offset
        return dataclasses.replace(
            self, **cut, q_offset=offset, seq_lengths=(q_len, geometry.kv_len)
        )

    # -- construction ---------------------------------------------------------------------------

    @classmethod
    def from_kv_blocks(
        cls,
        kv_num_blocks: Any,
        kv_indices: Any,
        full_kv_num_blocks: Any = None,
        full_kv_indices: Any = None,
        block_size: int | tuple[int, int] = 128,
        mask_mod: MaskMod | None = None,
        seq_lengths: tuple[int, int] | None = None,
        compute_q_blocks: bool = True,
        *,
        BLOCK_SIZE: int | tuple[int, int] | None = None,
    ) -> BlockMask:
        """A BlockMask from lists of key blocks for every row of query blocks.

        Args:
            kv_num_blocks: int [B, H, R] (or [R]), how many partial blocks each row has.
            kv_indices: int [B, H, R, W] (or [R, W]), their columns.
            full_kv_num_blocks: int [B, H, R], how many full blocks; none if omitted.
            full_kv_indices: int [B, H, R, V], their columns.
            block_size: block length in tokens, or (q_block, kv_block).
            mask_mod: the mask inside partial blocks; None allows every position of a listed block.
            seq_lengths: (L, S) in tokens; by default all of R rows and W columns of blocks.
            compute_q_blocks: False makes an inference-only mask, which has no backward pass.
            BLOCK_SIZE: PyTorch's spelling of `block_size`.

        Raises:
            ValueError: shapes do not fit together, or, for arrays that are not traced, a count or an index
                is out of range or a block is listed twice. Under `jax.jit` such entries are dropped.
        """
        block_size = _block_size(block_size, BLOCK_SIZE)
        if (full_kv_num_blocks is None) != (full_kv_indices is None):
            raise ValueError(
                "full_kv_num_blocks and full_kv_indices describe the full blocks together: pass both or "
                "neither."
            )
        partial = _list_pair(kv_num_blocks, kv_indices, "kv")
        if full_kv_num_blocks is None:
            full = (jnp.zeros_like(partial[0]), jnp.zeros((*partial[0].shape, 1), jnp.int32))
        else:
            full = _list_pair(full_kv_num_blocks, full_kv_indices, "full_kv")
        if partial[0].shape != full[0].shape:
            raise ValueError(
                f"kv_num_blocks has shape {partial[0].shape} and full_kv_num_blocks {full[0].shape}; both "
                "must be [B, H, rows of blocks]."
            )
        batch, heads, rows = partial[0].shape
        if seq_lengths is None:
            width = max(partial[1].shape[-1], full[1].shape[-1])
            seq_lengths = (rows * block_size[0], width * block_size[1])
        geometry = Geometry(*_lengths(*seq_lengths), *block_size)
        if geometry.rows != rows:
            raise ValueError(
                f"kv_num_blocks lists {rows} rows of blocks, but {geometry.q_len} queries in blocks of "
                f"{block_size[0]} make {geometry.rows}. Pass seq_lengths=(L, S) that fit."
            )
        partial, full = _checked_lists(partial, full, geometry)
        graph, captures = None, []
        if mask_mod is not None:
            graph, captures = trace_mask_mod(
                mask_mod, index_ranges(batch, heads, geometry.q_len, geometry.kv_len)
            )
        return _assemble(partial, full, geometry, graph, captures, compute_q_blocks)

    @classmethod
    def from_dense(
        cls,
        mask: Bool[Array, "*BH L S"],
        block_size: int | tuple[int, int] = 128,
        *,
        compute_q_blocks: bool = True,
    ) -> BlockMask:
        """A BlockMask from a dense boolean mask, which stays in memory and is read in partial blocks.

        Args:
            mask: bool [L, S], [H, L, S] or [B, H, L, S]; sizes of 1 in B and H broadcast.
            block_size: block length in tokens, or (q_block, kv_block).
            compute_q_blocks: False makes an inference-only mask.

        Raises:
            TypeError: the mask is not boolean.
            ValueError: its rank is not 2, 3 or 4.
        """
        mask = jnp.asarray(mask)
        if mask.dtype != jnp.bool_:
            raise TypeError(
                f"A dense mask must be boolean (True where a query may attend), but it is {mask.dtype}. "
                "Pass `mask != 0`, or for an additive bias `bias > -jnp.inf`."
            )
        if not 2 <= mask.ndim <= 4:
            raise ValueError(
                f"A dense mask must have shape (L, S), (H, L, S) or (B, H, L, S), but it has {mask.shape}."
            )
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        batch, heads, q_len, kv_len = mask.shape

        def dense(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return mask[b if batch > 1 else 0, h if heads > 1 else 0, q_idx, kv_idx]

        return create_block_mask(
            dense, batch, heads, q_len, kv_len, block_size, compute_q_blocks=compute_q_blocks
        )


_LIST_FIELDS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    block_size: int | tuple[int, int] = 128,
    *,
    compute_q_blocks: bool = True,
    BLOCK_SIZE: int | tuple[int, int] | None = None,
) -> BlockMask:
    """Finds the blocks that `mask_mod` leaves anything in.

    Usable inside `jax.jit`, where arrays that mask_mod captures may be traced. At most one row of blocks of
    the mask exists at a time. The widths of the lists depend on lengths and block sizes only, never on
    data, so that masks of different packed batches do not recompile what uses them.

    Args:
        mask_mod: `(b, h, q_idx, kv_idx) -> bool`, True where the query may attend to the key.
        B: batch rows that the mask distinguishes; None or 1 makes one mask for all of them.
        H: query heads that the mask distinguishes; None or 1 makes one mask for all of them.
        Q_LEN: number of queries L.
        KV_LEN: number of keys S.
        block_size: block length in tokens, or (q_block, kv_block). Any positive lengths.
        compute_q_blocks: False makes an inference-only mask, which is smaller and has no backward pass.
        BLOCK_SIZE: PyTorch's spelling of `block_size`.

    Raises:
        TypeError: mask_mod is not a traceable boolean function of four indices.
        ValueError: a length, count or block size is not a positive integer.
    """
    block_size = _block_size(block_size, BLOCK_SIZE)
    geometry = Geometry(*_lengths(Q_LEN, KV_LEN), *block_size)
    batch = 1 if B is None else _positive(B, "B")
    heads = 1 if H is None else _positive(H, "H")
    ranges = index_ranges(batch, heads, geometry.q_len, geometry.kv_len)
    graph, captures = trace_mask_mod(mask_mod, ranges)
    captures = [replicated(c) for c in captures]
    blocks = None
    if (
        not captures
        and _compat.is_tracing()
        and _list_bytes(geometry, batch, heads) <= _CONSTANT_BYTES
    ):
        # Evaluated now, so that every run of the traced program finds the lists ready.
        try:
            blocks = classify_on_host(graph, geometry, batch, heads)
        except NotImplementedError:
            blocks = None
    partial, full = blocks or classify(graph, captures, geometry, batch, heads)
    lists = lists_from_blocks(partial), lists_from_blocks(full)
    transposed = None
    if compute_q_blocks:
        transposed = tuple(lists_from_blocks(x.swapaxes(-1, -2)) for x in (partial, full))
    return _assemble(*lists, geometry, graph, captures, compute_q_blocks, transposed)


def create_mask(
    mod: Callable[..., Any],
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
) -> Bool[Array, "B H L S"]:
    """The dense mask of a mask_mod, or of a score_mod (True where it leaves a score above -inf).

    For looking at masks and for testing: it holds B * H * L * S booleans.

    Args:
        mod: `(b, h, q_idx, kv_idx) -> bool` or `(score, b, h, q_idx, kv_idx) -> score`.
        B: batch rows; None for 1.
        H: query heads; None for 1.
        Q_LEN: number of queries L.
        KV_LEN: number of keys S.
    """
    batch = 1 if B is None else _positive(B, "B")
    heads = 1 if H is None else _positive(H, "H")
    q_len, kv_len = _lengths(Q_LEN, KV_LEN)
    shape = (batch, heads, q_len, kv_len)
    ranges = index_ranges(*shape)
    inputs = {
        name: jnp.arange(n, dtype=jnp.int32).reshape([n if i == axis else 1 for i in range(4)])
        for axis, (name, n) in enumerate(zip(("b", "h", "q", "kv"), shape, strict=True))
    }
    if _compat.takes_positional(mod, 5) and not _compat.takes_positional(mod, 4):
        score_mod, captures = trace_score_mod(mod, ranges)
        scores = evaluate(score_mod.forward, captures, inputs | {"score": jnp.zeros((1, 1, 1, 1))})
        return jnp.broadcast_to(scores[0] != -jnp.inf, shape)
    graph, captures = trace_mask_mod(mod, ranges)
    return jnp.broadcast_to(evaluate(graph, captures, inputs)[0], shape)


# -- helpers ----------------------------------------------------------------------------------------


def _assemble(
    partial: Sequence[Any],
    full: Sequence[Any],
    geometry: Geometry,
    graph: Graph | None,
    captures: Sequence[Any],
    compute_q_blocks: bool,
    transposed: Sequence[Sequence[Any]] | None = None,
) -> BlockMask:
    arrays = (*partial, *full)
    fields: dict[str, Any] = {
        name: jnp.asarray(a) for name, a in zip(_LIST_FIELDS[:4], arrays, strict=True)
    }
    if not compute_q_blocks:
        fields |= dict.fromkeys(_LIST_FIELDS[4:])
    elif transposed is None:
        fields |= _transposed(fields, geometry.cols)
    else:
        flat = [jnp.asarray(a) for pair in transposed for a in pair]
        fields |= dict(zip(_LIST_FIELDS[4:], flat, strict=True))
    return BlockMask(
        **fields,
        mask_captures=tuple(captures),
        q_offset=None,
        seq_lengths=(geometry.q_len, geometry.kv_len),
        block_size=(geometry.q_block, geometry.kv_block),
        mask_graph=None if graph is not None and graph.is_constant(True) else graph,
    )


@functools.partial(jax.jit, static_argnums=2)
def _taken(lists: dict[str, Array], table: Array, axis: int) -> dict[str, Array]:
    """The lists of the selected batch rows or heads."""
    return {name: jnp.take(x, table, axis=axis) for name, x in lists.items()}


@functools.partial(jax.jit, static_argnums=(2, 3))
def _cut(lists: dict[str, Array], start: Any, count: int, cols: int | None) -> dict[str, Array]:
    """The lists of `count` rows of blocks; the transposed ones too, unless `cols` is None."""
    cut = {
        name: jax.lax.dynamic_slice_in_dim(lists[name], start, count, axis=2)
        for name in _LIST_FIELDS[:4]
    }
    return cut if cols is None else cut | _transposed(cut, cols)


def _transposed(fields: dict[str, Any], cols: int) -> dict[str, Array]:
    """The transposed lists of partial and full blocks."""
    out: dict[str, Array] = {}
    for prefix in ("", "full_"):
        blocks = blocks_from_lists(
            fields[f"{prefix}kv_num_blocks"], fields[f"{prefix}kv_indices"], cols
        )
        counts, indices = lists_from_blocks(blocks.swapaxes(-1, -2))
        out |= {f"{prefix}q_num_blocks": counts, f"{prefix}q_indices": indices}
    return out


def _list_bytes(geometry: Geometry, batch: int, heads: int) -> int:
    return 16 * batch * heads * geometry.rows * geometry.cols


def _ranges(batch: int, heads: int, lengths: tuple[int, int], offset: Any) -> Any:
    ranges = index_ranges(batch, heads, *lengths)
    return ranges if offset is None else ranges | {"q": (0, int(np.iinfo(np.int32).max))}


def _positive(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(
            f"{name} must be a positive integer known when tracing, but it is {value!r}."
        )
    return int(value)


def _lengths(q_len: Any, kv_len: Any) -> tuple[int, int]:
    return _positive(q_len, "The number of queries Q_LEN"), _positive(
        kv_len, "The number of keys KV_LEN"
    )


def _block_size(block_size: Any, alias: Any) -> tuple[int, int]:
    if alias is not None:
        block_size = alias
    pair = block_size if isinstance(block_size, (tuple, list)) else (block_size, block_size)
    if len(pair) != 2:
        raise ValueError(
            f"block_size must be one length or (q_block, kv_block), but it is {block_size!r}."
        )
    return _positive(pair[0], "The block size"), _positive(pair[1], "The block size")


def _selected(part: Any, size: int, name: str) -> Array:
    """The int32 table of selected indices along an axis of length `size`."""
    if isinstance(part, slice):
        return jnp.arange(size, dtype=jnp.int32)[part]
    table = _integers(part)
    if table is None or table.ndim > 1:
        raise IndexError(
            f"A {name} index must be an integer, a slice or a 1-D integer array, but it is {part!r}."
        )
    if (
        isinstance(table, np.ndarray)
        and table.size
        and not -size <= table.min() <= table.max() < size
    ):
        raise IndexError(f"The {name} index {part!r} is out of range for {size} of them.")
    return _from_the_start(jnp.atleast_1d(table), size)


def _integers(index: Any) -> Any:
    """An index as an integer array, of NumPy where its value is known; None if it is something else."""
    array = index if _compat.is_tracer(index) else np.asarray(index)
    return array if jnp.issubdtype(array.dtype, jnp.integer) else None


def _from_the_start(index: Any, size: int) -> Array:
    """An int32 index into an axis with negative values counted from its end, inside the axis."""
    index = jnp.where(index < 0, index + size, index)
    return jnp.clip(index, 0, size - 1).astype(jnp.int32)


def _row_range(part: Any, geometry: Geometry) -> tuple[Any, int, int]:
    """(first row, number of rows, number of queries) of a slice along the rows of blocks."""
    rows, q_block = geometry.rows, geometry.q_block
    if isinstance(part, slice):
        start, stop, step = part.indices(rows)
        if step != 1 or stop <= start:
            raise IndexError(
                f"Rows of blocks must be sliced contiguously and not empty, but the slice is {part!r} of "
                f"{rows} rows. Index one row at a time instead."
            )
        return start, stop - start, min(geometry.q_len, stop * q_block) - start * q_block
    row = _integers(part)
    if row is None or row.ndim:
        raise IndexError(
            f"Rows of blocks must be selected by an integer or a contiguous slice, but got {part!r}: one mask "
            "has one query offset."
        )
    if _compat.is_tracer(row):
        if geometry.q_len % q_block:
            raise IndexError(
                f"A traced row index needs rows of equal length, but {geometry.q_len} queries do not divide "
                f"into blocks of {q_block}."
            )
        return _from_the_start(row, rows), 1, q_block
    row = int(row)
    if not -rows <= row < rows:
        raise IndexError(f"Row {row} is out of range for {rows} rows of blocks.")
    row %= rows
    return row, 1, min(geometry.q_len, (row + 1) * q_block) - row * q_block


def _list_pair(counts: Any, indices: Any, prefix: str) -> tuple[Array, Array]:
    counts, indices = jnp.asarray(counts), jnp.asarray(indices)
    for name, array in ((f"{prefix}_num_blocks", counts), (f"{prefix}_indices", indices)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must hold integers, but it is {array.dtype}.")
    if not 1 <= counts.ndim <= 3 or indices.shape[:-1] != counts.shape or indices.shape[-1] < 1:
        raise ValueError(
            f"{prefix}_num_blocks must have shape [B, H, rows] (or [rows]) and {prefix}_indices one dimension "
            f"more, but they have {counts.shape} and {indices.shape}."
        )
    lead = (1,) * (3 - counts.ndim)
    return (
        counts.reshape(lead + counts.shape).astype(jnp.int32),
        indices.reshape(lead + indices.shape).astype(jnp.int32),
    )


def _checked_lists(
    partial: tuple[Any, Any], full: tuple[Any, Any], geometry: Geometry
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The same lists if they are sound; rebuilt without the unsound entries if they are traced.

    They are also rebuilt where a block sticks out over the last key: no list of full blocks names one.
    """
    traced = any(map(_compat.is_tracer, (*partial, *full)))
    if not traced:
        _check_lists(partial, full, geometry.cols)
    column = np.arange(geometry.cols)[None, None, None, :]
    sticks_out = column >= geometry.kv_len // geometry.kv_block
    if not traced and not sticks_out.any():
        return partial, full
    full_blocks = blocks_from_lists(full[0], full[1], geometry.cols)
    partial_blocks = blocks_from_lists(partial[0], partial[1], geometry.cols)
    partial_blocks = (partial_blocks & ~full_blocks) | (full_blocks & sticks_out)
    return lists_from_blocks(partial_blocks), lists_from_blocks(full_blocks & ~sticks_out)


def _check_lists(partial: tuple[Any, Any], full: tuple[Any, Any], cols: int) -> None:
    """Raises a ValueError if known lists name a block twice or one outside the mask."""
    listed = np.zeros((*partial[0].shape, cols), np.int32)
    for prefix, (counts, indices) in (("kv", partial), ("full_kv", full)):
        counts, indices = np.asarray(counts), np.asarray(indices)
        width = indices.shape[-1]
        if counts.min() < 0 or counts.max() > min(width, cols):
            raise ValueError(
                f"{prefix}_num_blocks must lie between 0 and {min(width, cols)} (the lists hold {width} "
                f"entries, the mask {cols} columns of blocks), but they span {counts.min()} to {counts.max()}."
            )
        valid = np.arange(width) < counts[..., None]
        used = indices[valid]
        if used.size and (used.min() < 0 or used.max() >= cols):
            raise ValueError(
                f"{prefix}_indices must name columns of blocks from 0 to {cols - 1}, but the listed ones span "
                f"{used.min()} to {used.max()}."
            )
        where = np.nonzero(valid)
        np.add.at(listed, (*where[:3], used), 1)
    if listed.max() > 1:
        b, h, row, col = (int(i[0]) for i in np.nonzero(listed > 1))
        raise ValueError(
            f"Block (row {row}, column {col}) of batch {b}, head {h} is listed more than once, so its keys "
            "would count twice. List every block once, as partial or as full."
        )
