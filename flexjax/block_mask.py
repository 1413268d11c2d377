"""BlockMask: a mask_mod together with the blocks of the score matrix that it leaves anything in."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from flexjax import _compat
from flexjax.block_arguments import block_pair, checked_lists, lengths, list_pair
from flexjax.block_lists import Geometry, states_from_lists
from flexjax.block_slicing import KV_LISTS, Q_LISTS, cut, row_range, selected, taken, transposed
from flexjax.mods.evaluate import evaluate
from flexjax.mods.graph import Graph
from flexjax.mods.trace import index_ranges, trace_mask_mod
from flexjax.mods.transform import rewrite_graph, select

MaskMod = Callable[..., Any]


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
        "overflow",
    ),
    meta_fields=("seq_lengths", "block_size", "mask_graph"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """Which blocks of an (L, S) score matrix are computed, and the mask inside them.

    A pytree: the lists, the arrays that mask_mod captured and the query offset are leaves; lengths, block
    sizes and the mask's graph are static. A mask rebuilt with new document ids therefore passes through
    `jax.jit` without retracing. Make one with `create_block_mask`, `BlockMask.from_kv_blocks`,
    `BlockMask.from_dense` or `BlockMask.from_block_scores`.

    With R = ceil(L / q_block) rows and C = ceil(S / kv_block) columns of blocks, and B and H either 1
    (broadcast) or the numbers of batch rows and query heads:

    Attributes:
        kv_num_blocks: int32 [B, H, R], how many partial blocks each row of blocks has.
        kv_indices: int32 [B, H, R, <= C], their columns; entries past the count are arbitrary.
        full_kv_num_blocks: int32 [B, H, R], how many full blocks, in which mask_mod is not evaluated.
        full_kv_indices: int32 [B, H, R, <= C], their columns.
        q_num_blocks: int32 [B, H, C], the transpose for the backward pass: how many partial blocks each
            column has. None, like the next three, in an inference-only mask.
        q_indices: int32 [B, H, C, <= R], their rows.
        full_q_num_blocks: int32 [B, H, C], how many full blocks each column has.
        full_q_indices: int32 [B, H, C, <= R], their rows.
        mask_captures: the arrays that mask_mod reads.
        q_offset: int32 scalar, the query index of the first row after slicing; None for 0.
        overflow: bool scalar, whether `max_blocks=` cut any list short, so that attention with this mask
            misses blocks; None in a mask whose lists hold everything.
        seq_lengths: (L, S) in tokens.
        block_size: (q_block, kv_block) in tokens.
        mask_graph: the mask in global query indices; None where every listed position is allowed.
    """

    kv_num_blocks: Int32[Array, "B H R"]
    kv_indices: Int32[Array, "B H R W"]
    full_kv_num_blocks: Int32[Array, "B H R"]
    full_kv_indices: Int32[Array, "B H R V"]
    q_num_blocks: Int32[Array, "B H C"] | None
    q_indices: Int32[Array, "B H C W2"] | None
    full_q_num_blocks: Int32[Array, "B H C"] | None
    full_q_indices: Int32[Array, "B H C V2"] | None
    mask_captures: tuple[Any, ...]
    q_offset: Int32[Array, ""] | None
    overflow: Bool[Array, ""] | None
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
        return states_from_lists(*self._rows_lists, self.geometry.cols)

    def to_dense(self) -> Int32[Array, "B H R C"]:
        """The map of computed blocks: 1 where a block is partial or full, 0 where it is skipped."""
        return (self.block_states() > 0).astype(jnp.int32)

    def sparsity(self) -> float:
        """Percentage of blocks that are not computed; needs concrete arrays."""
        counts = np.asarray(self.kv_num_blocks) + np.asarray(self.full_kv_num_blocks)
        total = counts.size * self.geometry.cols
        return 100.0 * (1.0 - float(counts.sum()) / total) if total else 0.0

    @property
    def _known(self) -> bool:
        """Whether the lists are arrays with values."""
        known = isinstance(self.kv_num_blocks, (jax.Array, np.ndarray))
        return known and not _compat.is_tracer(self.kv_num_blocks)

    def _repr_html_(self) -> str | None:
        """What notebooks show; None, and so the plain text, for a mask without values."""
        if not self._known:
            return None
        from flexjax.visualize import blocks_html

        return blocks_html(self)

    def __str__(self) -> str:
        if not self._known:
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
    def _rows_lists(self) -> list[Array]:
        return [getattr(self, name) for name in KV_LISTS]

    @property
    def _lists(self) -> dict[str, Array]:
        fields = {name: getattr(self, name) for name in (*KV_LISTS, *Q_LISTS)}
        return {name: x for name, x in fields.items() if x is not None}

    def _select(self, axis: int, part: Any) -> BlockMask:
        if isinstance(part, slice) and part == slice(None):
            return self
        name, size = ("batch", "head")[axis], self.shape[axis]
        table = selected(part, size, name)
        if table.shape[0] == 0:
            raise IndexError(
                f"The {name} index {part!r} selects nothing of a BlockMask {self.shape}."
            )
        lists = taken(self._lists, table, axis)
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
        start, count, q_len = row_range(part, geometry)
        cols = None if self.inference_only else geometry.cols
        lists = cut(self._lists, start, count, cols)
        offset = jnp.asarray(start * geometry.q_block, jnp.int32)
        if self.q_offset is not None:
            offset = offset + self.q_offset
        return dataclasses.replace(
            self, **lists, q_offset=offset, seq_lengths=(q_len, geometry.kv_len)
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
        block_size = block_pair(block_size, BLOCK_SIZE)
        if (full_kv_num_blocks is None) != (full_kv_indices is None):
            raise ValueError(
                "full_kv_num_blocks and full_kv_indices describe the full blocks together: pass both or "
                "neither."
            )
        partial = list_pair(kv_num_blocks, kv_indices, "kv")
        if full_kv_num_blocks is None:
            full = (jnp.zeros_like(partial[0]), jnp.zeros((*partial[0].shape, 1), jnp.int32))
        else:
            full = list_pair(full_kv_num_blocks, full_kv_indices, "full_kv")
        if partial[0].shape != full[0].shape:
            raise ValueError(
                f"kv_num_blocks has shape {partial[0].shape} and full_kv_num_blocks {full[0].shape}; both "
                "must be [B, H, rows of blocks]."
            )
        batch, heads, rows = partial[0].shape
        if seq_lengths is None:
            width = max(partial[1].shape[-1], full[1].shape[-1])
            seq_lengths = (rows * block_size[0], width * block_size[1])
        geometry = Geometry(*lengths(*seq_lengths), *block_size)
        if geometry.rows != rows:
            raise ValueError(
                f"kv_num_blocks lists {rows} rows of blocks, but {geometry.q_len} queries in blocks of "
                f"{block_size[0]} make {geometry.rows}. Pass seq_lengths=(L, S) that fit."
            )
        partial, full = checked_lists(partial, full, geometry)
        graph, captures = None, []
        if mask_mod is not None:
            graph, captures = trace_mask_mod(
                mask_mod, index_ranges(batch, heads, geometry.q_len, geometry.kv_len)
            )
        lists = (*partial, *full)
        columns = None
        if compute_q_blocks:
            columns = transposed(dict(zip(KV_LISTS, lists, strict=True)), geometry.cols).values()
        return assemble(lists, columns, geometry, graph, captures)

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
        from flexjax.block_creation import create_block_mask

        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        batch, heads, q_len, kv_len = mask.shape

        def dense(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return mask[b if batch > 1 else 0, h if heads > 1 else 0, q_idx, kv_idx]

        return create_block_mask(
            dense, batch, heads, q_len, kv_len, block_size, compute_q_blocks=compute_q_blocks
        )

    @classmethod
    def from_block_scores(
        cls,
        scores: Float[Array, "B H R C"],
        *,
        top_k: int | None = None,
        threshold: float | Float[Array, "..."] | None = None,
        mask_mod: MaskMod | None = None,
        always: MaskMod | None = None,
        seq_lengths: tuple[int, int] | None = None,
        block_size: int | tuple[int, int] = 128,
        compute_q_blocks: bool = True,
        max_blocks: int | tuple[int, int] | None = None,
    ) -> BlockMask:
        """A BlockMask of the blocks with the highest scores: attention whose sparsity follows the data.

        Usable inside `jax.jit` with traced scores, as in a model that scores blocks of keys by pooled queries
        and keys and attends to the best of them. The choice itself has no gradient; attention to what was
        chosen is differentiated as always. To train whatever makes the scores, let them enter the output in
        another way too, for example as a bias that score_mod reads.

        Args:
            scores: a float for every block, [B, H, rows of blocks, columns of blocks]; B and H may be 1. A
                block of score -inf or NaN is never chosen by score.
            top_k: how many blocks are chosen in each row, in addition to those that `always` names.
            threshold: the lowest score that is chosen, a number or an array that broadcasts to the scores.
                With top_k, blocks must pass both.
            mask_mod: the mask inside chosen blocks, for example `masks.causal()`: blocks in which it allows
                nothing are no candidates. None allows every position.
            always: a mask_mod; blocks in which it allows anything are visited whatever their score (inside
                them mask_mod alone decides), for example `masks.sliding_window(128)`, so that no query is left
                without keys.
            seq_lengths: (L, S) in tokens; by default all of the scored blocks.
            block_size: block length in tokens, or (q_block, kv_block).
            compute_q_blocks: False makes an inference-only mask.
            max_blocks: see `create_block_mask`. With top_k and without `always` the lists of rows need no more
                than top_k entries, and have no more.

        Raises:
            TypeError: the scores are not floats.
            ValueError: shapes do not fit together, or neither top_k nor threshold is given.
        """
        from flexjax.block_creation import choose_blocks

        return choose_blocks(
            jnp.asarray(scores),
            top_k,
            threshold,
            mask_mod,
            always,
            seq_lengths,
            block_pair(block_size, None),
            compute_q_blocks,
            max_blocks,
        )

    @classmethod
    def from_mixed_blocks(
        cls,
        levels: Sequence[tuple[int | tuple[int, int], Bool[Array, "B H R C"]]],
        *,
        seq_lengths: tuple[int, int],
        mask_mod: MaskMod | None = None,
        compute_q_blocks: bool = True,
        max_blocks: int | tuple[int, int] | None = None,
    ) -> BlockMask:
        """A BlockMask of blocks of several sizes: coarse where whole regions are wanted, fine where it matters.

        Usable inside `jax.jit` with traced levels: a coarse level may come from few, pooled scores, and a fine one
        from scores that are made only where they matter. The mask has the finest size, which is what kernels
        visit: a coarse block becomes a run of neighbours in the lists.

        Args:
            levels: (block size, blocks) each. The blocks are booleans [B, H, rows, columns], True where a block of
                that size is visited; B and H may be 1. Sizes are whole multiples of the finest. What any level
                names is visited, once.
            seq_lengths: (L, S) in tokens.
            mask_mod: the mask inside visited blocks; those in which it allows nothing are skipped. None allows
                every position.
            compute_q_blocks: False makes an inference-only mask.
            max_blocks: see `create_block_mask`.

        Raises:
            TypeError: the blocks of a level are not boolean.
            ValueError: there is no level, a size is no multiple of the finest, or a shape does not fit.
        """
        from flexjax.block_creation import mix_blocks

        return mix_blocks(levels, mask_mod, seq_lengths, compute_q_blocks, max_blocks)


def assemble(
    lists: Sequence[Any],
    transposed_lists: Iterable[Any] | None,
    geometry: Geometry,
    graph: Graph | None,
    captures: Sequence[Any],
    overflow: Any = None,
) -> BlockMask:
    """A BlockMask from the arrays of its lists.

    Args:
        lists: counts and indices of partial blocks, then of full blocks, of every row.
        transposed_lists: the same of every column; None makes an inference-only mask.
        geometry: the tiling.
        graph: the mask inside partial blocks; None allows all of it.
        captures: the arrays that the graph reads.
        overflow: whether lists were cut short; None where they cannot be.
    """
    columns = (None,) * 4 if transposed_lists is None else map(jnp.asarray, transposed_lists)
    return BlockMask(
        *map(jnp.asarray, lists),
        *columns,
        mask_captures=tuple(captures),
        q_offset=None,
        overflow=None if overflow is None else jnp.asarray(overflow),
        seq_lengths=(geometry.q_len, geometry.kv_len),
        block_size=(geometry.q_block, geometry.kv_block),
        mask_graph=None if graph is not None and graph.is_constant(True) else graph,
    )


def _ranges(batch: int, heads: int, lengths: tuple[int, int], offset: Any) -> Any:
    ranges = index_ranges(batch, heads, *lengths)
    return ranges if offset is None else ranges | {"q": (0, int(np.iinfo(np.int32).max))}
