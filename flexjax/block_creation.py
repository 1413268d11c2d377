"""Makes block masks from mask_mods, and chooses their blocks by score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from flexjax import _compat
from flexjax.block_arguments import block_pair, lengths, positive
from flexjax.block_lists import EMPTY, Geometry, lists_from_states, most_blocks
from flexjax.block_mask import BlockMask, MaskMod, assemble
from flexjax.block_selection import check_scores, selected_blocks
from flexjax.block_sizes import AUTO, FINEST, cheapest_size, coarsened, union_of_levels
from flexjax.block_states import block_states, block_states_on_host
from flexjax.masks.combine import noop_mask
from flexjax.mods.evaluate import evaluate
from flexjax.mods.graph import Graph
from flexjax.mods.trace import Ranges, index_ranges, trace_mask_mod, trace_score_mod
from flexjax.sharding import replicated

# The blocks of a mask without captures are found by the host up to these sizes of its lists. In a traced program
# they become constants; outside one they need no compilation, which larger ones are worth.
_HOST_BYTES = 16 << 20
_HOST_BYTES_EAGER = 1 << 20

Widths = tuple[int, int]


def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    block_size: int | tuple[int, int] | str = 128,
    *,
    compute_q_blocks: bool = True,
    compact: bool = False,
    max_blocks: int | tuple[int, int] | None = None,
    BLOCK_SIZE: int | tuple[int, int] | str | None = None,
) -> BlockMask:
    """Finds the blocks that `mask_mod` leaves anything in.

    Usable inside `jax.jit`, where arrays that mask_mod captures may be traced. No matrix of L x S elements
    exists at any time: interval arithmetic shows most blocks to be empty or full, corners show others to be
    partial, and only the rest are evaluated position by position. The widths of the lists depend on lengths
    and block sizes only, never on data, so that masks of different packed batches do not recompile what uses
    them; `compact` and `max_blocks` make them narrower.

    Args:
        mask_mod: `(b, h, q_idx, kv_idx) -> bool`, True where the query may attend to the key.
        B: batch rows that the mask distinguishes; None or 1 makes one mask for all of them.
        H: query heads that the mask distinguishes; None or 1 makes one mask for all of them.
        Q_LEN: number of queries L.
        KV_LEN: number of keys S.
        block_size: block length in tokens, or (q_block, kv_block). Any positive lengths. "auto" takes that of
            (128, 128), (128, 64), (64, 128) and (64, 64), the sizes of the GPU kernels, of which the visited
            scores, weighed by what a score costs in blocks of that size, are cheapest: see
            `flexjax.block_sizes`. Short documents and neighbourhoods get smaller blocks. What the mask
            captures must not be traced; another mask may get another size, and so recompile what uses it.
        compute_q_blocks: False makes an inference-only mask, which is smaller and has no backward pass.
        compact: fit the lists' widths to the fullest row and column, rounded up to a power of two. The mask
            must not be traced; another mask may have other widths, and so recompile what uses it.
        max_blocks: the most partial, and the most full blocks that a row or a column may have, or one such
            number for rows and one for columns. The lists have this width. Of a row or column with more
            blocks the first ones are kept, and `BlockMask.overflow` is True.
        BLOCK_SIZE: PyTorch's spelling of `block_size`.

    Raises:
        TypeError: mask_mod is not a traceable boolean function of four indices.
        ValueError: a length, count or block size is not a positive integer, `compact` or `block_size="auto"`
            meets a traced mask, or `compact` and `max_blocks` are both given.
    """
    asked = block_size if BLOCK_SIZE is None else BLOCK_SIZE
    chooses = isinstance(asked, str) and asked == AUTO
    pair = FINEST if chooses else block_pair(asked, None)
    geometry = Geometry(*lengths(Q_LEN, KV_LEN), *pair)
    batch = 1 if B is None else positive(B, "B")
    heads = 1 if H is None else positive(H, "H")
    limits = _limits(max_blocks, compact)
    ranges = index_ranges(batch, heads, geometry.q_len, geometry.kv_len)
    graph, captures = _traced(mask_mod, ranges)
    if chooses:
        states, geometry = _in_best_size(graph, captures, geometry, batch, heads)
    else:
        states = _states(graph, captures, geometry, batch, heads)
    return _from_states(
        states,
        geometry,
        graph,
        captures,
        limits or (None, None),
        compute_q_blocks,
        compact=compact,
        flagged=limits is not None,
        shape=(batch, heads),
    )


def _traced(mask_mod: MaskMod, ranges: Ranges) -> tuple[Graph, list[Any]]:
    """A mask's graph and its captured arrays, which every device of a mesh with explicit axes holds."""
    graph, captures = trace_mask_mod(mask_mod, ranges)
    return graph, [replicated(c) for c in captures]


def _states(
    graph: Graph, captures: Sequence[Any], geometry: Geometry, batch: int, heads: int
) -> Any:
    """States of all blocks, [B or 1, H or 1, R, C]; a NumPy array where the host computed them."""
    size = 16 * batch * heads * geometry.rows * geometry.cols
    limit = _HOST_BYTES if _compat.is_tracing() else min(_HOST_BYTES, _HOST_BYTES_EAGER)
    if not captures and size <= limit:
        try:
            return block_states_on_host(graph, geometry, batch, heads)
        except NotImplementedError:  # an operation that NumPy lacks
            pass
    return block_states(graph, captures, geometry, batch, heads)


def _in_best_size(
    graph: Graph, captures: Sequence[Any], geometry: Geometry, batch: int, heads: int
) -> tuple[Any, Geometry]:
    """States of the blocks of the cheapest size, and the tiling by it."""
    if any(map(_compat.is_tracer, captures)):
        raise ValueError(
            'block_size="auto" follows from the mask\'s contents, which are not known while JAX is tracing: '
            "mask_mod captures traced arrays. Build the mask outside jax.jit, or name a block size."
        )
    with jax.ensure_compile_time_eval():
        states = _states(graph, captures, geometry, batch, heads)
        size = cheapest_size(states)
        states = coarsened(states, size[0] // FINEST[0], size[1] // FINEST[1])
    return states, dataclasses.replace(geometry, q_block=size[0], kv_block=size[1])


def mix_blocks(
    levels: Sequence[tuple[Any, Any]],
    mask_mod: MaskMod | None,
    seq_lengths: tuple[int, int],
    compute_q_blocks: bool,
    max_blocks: Any,
) -> BlockMask:
    """See `BlockMask.from_mixed_blocks`."""
    if not levels:
        raise ValueError("A mask of mixed blocks needs at least one level, (block size, blocks).")
    sized = [(block_pair(size, None), blocks) for size, blocks in levels]
    finest = tuple(min(size[axis] for size, _ in sized) for axis in (0, 1))
    geometry = Geometry(*lengths(*seq_lengths), *finest)
    named = replicated(union_of_levels(sized, geometry))
    batch, heads = named.shape[:2]
    ranges = index_ranges(batch, heads, geometry.q_len, geometry.kv_len)
    graph, captures = _traced(mask_mod or noop_mask, ranges)
    states = jnp.asarray(_states(graph, captures, geometry, batch, heads))
    return _from_states(
        jnp.where(named, states, EMPTY),
        geometry,
        graph,
        captures,
        _limits(max_blocks, False) or (None, None),
        compute_q_blocks,
        flagged=max_blocks is not None,
    )


def _limits(max_blocks: Any, compact: bool) -> tuple[int, int] | None:
    """(blocks a row, blocks a column) that lists hold at most, or None."""
    if max_blocks is None:
        return None
    if compact:
        raise ValueError(
            "compact=True fits the lists to what a mask holds, max_blocks= to what it may hold: pass one of "
            "the two."
        )
    pair = max_blocks if isinstance(max_blocks, (tuple, list)) else (max_blocks, max_blocks)
    if len(pair) != 2:
        raise ValueError(
            f"max_blocks must be one number or (blocks a row, blocks a column), but it is {max_blocks!r}."
        )
    return positive(pair[0], "max_blocks"), positive(pair[1], "max_blocks")


def choose_blocks(
    scores: Any,
    top_k: int | None,
    threshold: Any,
    mask_mod: MaskMod | None,
    always: MaskMod | None,
    seq_lengths: tuple[int, int] | None,
    block_size: tuple[int, int],
    compute_q_blocks: bool,
    max_blocks: Any,
) -> BlockMask:
    """See `BlockMask.from_block_scores`."""
    if seq_lengths is None and scores.ndim == 4:
        seq_lengths = (scores.shape[2] * block_size[0], scores.shape[3] * block_size[1])
    geometry = Geometry(*lengths(*(seq_lengths or (1, 1))), *block_size)
    top_k = None if top_k is None else positive(top_k, "top_k")
    check_scores(scores, geometry, top_k, threshold)
    scores = replicated(scores)
    batch, heads = scores.shape[:2]
    ranges = index_ranges(batch, heads, geometry.q_len, geometry.kv_len)
    graph, captures = _traced(mask_mod or noop_mask, ranges)
    states = jnp.asarray(_states(graph, captures, geometry, batch, heads))
    eligible = states != EMPTY
    kept = jnp.asarray(False)
    if always is not None:
        found = _states(*_traced(always, ranges), geometry, batch, heads)
        kept = jnp.asarray(found) != EMPTY
    if threshold is not None:
        threshold = jnp.asarray(threshold)
        threshold = threshold.reshape((1,) * (4 - threshold.ndim) + threshold.shape)
    selected = selected_blocks(scores, eligible & ~kept, top_k, threshold) | kept
    chosen = jnp.where(selected, states, EMPTY)
    rows, columns = _limits(max_blocks, False) or (None, None)
    width = rows
    if top_k is not None and always is None:
        width = top_k if rows is None else min(rows, top_k)
    return _from_states(
        chosen,
        geometry,
        graph,
        captures,
        (width, columns),
        compute_q_blocks,
        flagged=max_blocks is not None,
    )


def _from_states(
    states: Any,
    geometry: Geometry,
    graph: Graph,
    captures: Sequence[Any],
    limits: tuple[int | None, int | None],
    compute_q_blocks: bool,
    *,
    compact: bool = False,
    flagged: bool = False,
    shape: tuple[int, int] | None = None,
) -> BlockMask:
    """The mask of given block states.

    Args:
        states: int8 [B or 1, H or 1, R, C].
        geometry: the tiling.
        graph: the mask inside partial blocks.
        captures: what it reads.
        limits: widths of the lists of rows and of columns; None for all blocks.
        compute_q_blocks: whether to make the lists of columns.
        compact: fit the widths to the states instead.
        flagged: whether the mask says if a limit was exceeded.
        shape: the mask's B and H, if they are more than the states distinguish.
    """
    xp = np if isinstance(states, np.ndarray) else jnp

    def lists_of(of_columns: bool) -> tuple[list[Any], Any]:
        limit, cols = limits[of_columns], states.shape[-2 if of_columns else -1]
        widths = (cols if limit is None else min(limit, cols),) * 2
        if compact:
            widths = _fitting(states.swapaxes(-1, -2) if of_columns else states)
        lists = lists_from_states(states, widths, of_columns)
        # Batch rows and heads that the mask does not distinguish share the work, not the arrays.
        lead = states.shape[:2] if shape is None else shape
        wide = [xp.broadcast_to(x, (*lead, *x.shape[2:])) for x in lists.arrays]
        return wide, lists.overflow

    rows, overflow = lists_of(False)
    columns = None
    if compute_q_blocks:
        columns, more = lists_of(True)
        overflow = overflow | more
    return assemble(rows, columns, geometry, graph, captures, overflow if flagged else None)


def _fitting(states: Any) -> Widths:
    """Widths of lists that hold all blocks, powers of two so that similar masks have equal ones."""
    if _compat.is_tracer(states):
        raise ValueError(
            "compact=True fits the lists' widths to the mask's contents, which are not known while JAX is "
            "tracing. Build the mask outside jax.jit, or pass max_blocks=, the most blocks that a row or a "
            "column may have, and look at block_mask.overflow."
        )
    cols = states.shape[-1]
    partial, full = (min(cols, 1 << max(0, n - 1).bit_length()) for n in most_blocks(states))
    return partial, full


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
    batch = 1 if B is None else positive(B, "B")
    heads = 1 if H is None else positive(H, "H")
    q_len, kv_len = lengths(Q_LEN, KV_LEN)
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
