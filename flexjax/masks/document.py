"""Packed documents: attention stays inside a document.

A block mask of documents takes O(S + blocks) work, whatever they are given by: `create_block_mask` compares the
least and the greatest id of a block of queries with those of a block of keys, which settles every block if the
ids never decrease. Ids in another order are as correct, but more blocks are looked into.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from flexjax.masks._arguments import (
    batch_row,
    check_integer,
    describe,
    integer_array,
    known_values,
    named,
)
from flexjax.masks._types import MaskMod

type Lengths = (
    Int[ArrayLike, " N"] | Int[ArrayLike, "B N"] | Sequence[int] | Sequence[Sequence[int]]
)
"""One integer a document, for all batch entries alike or one row for each."""


def document(
    ids: Int[ArrayLike, " S"] | Int[ArrayLike, "B S"],
    kv_ids: Int[ArrayLike, " S2"] | Int[ArrayLike, "B S2"] | None = None,
    *,
    causal: bool = False,
) -> MaskMod:
    """Document mask: `ids[q_idx] == kv_ids[kv_idx]`, and `kv_idx <= q_idx` if causal.

    Args:
        ids: the document of each position, an integer array of shape (S,), or (B, S) with one row a
            batch entry; possibly traced. Any integers, in any order: only equality counts.
        kv_ids: the document of each key, if keys and queries differ (cross-attention); `ids` if
            None. A key whose id no query has is attended by nothing: one way to hide padding.
        causal: whether a query sees only its own and earlier positions.

    Returns:
        A mask_mod named `document` or `causal_document`.

    Raises:
        TypeError: if the ids are not integers.
        ValueError: if their rank is not 1 or 2, or their batch sizes differ.

    Source: Krell et al., "Efficient Sequence Packing without Cross-contamination",
    arXiv 2107.02027.
    """
    shapes = {1: "(S,)", 2: "(B, S)"}
    q_ids = integer_array("document()", "ids", ids, shapes)
    if kv_ids is None:
        return _same_document(q_ids, q_ids, causal)
    k_ids = integer_array("document()", "kv_ids", kv_ids, shapes)
    batches = {array.shape[0] for array in (q_ids, k_ids) if array.ndim == 2} - {1}
    if len(batches) > 1:
        raise ValueError(
            f"document(): ids and kv_ids must have the same batch size, but their shapes are "
            f"{q_ids.shape} and {k_ids.shape}."
        )
    return _same_document(q_ids, k_ids, causal)


def document_from_lengths(
    lengths: Lengths, total_length: int | None = None, causal: bool = False
) -> MaskMod:
    """Document mask of documents that lie one behind the other, from their lengths.

    Args:
        lengths: tokens in each document, integers of shape (N,), or (B, N) with one row a batch
            entry; possibly traced. Zeros are empty documents, so rows may be padded with them.
        total_length: length of the packed sequence; by default the sum of the lengths (the largest
            sum if there are several rows), which must then be known while tracing. Positions behind
            the last document belong to none: they attend nothing and nothing attends them.
        causal: whether a query sees only its own and earlier positions.

    Returns:
        A mask_mod named `document` or `causal_document`.

    Raises:
        TypeError: if the lengths are not integers.
        ValueError: if a length is negative, the documents do not fit into `total_length`, the rank
            is not 1 or 2, or `lengths` is traced and `total_length` missing.
    """
    where = "document_from_lengths()"
    counts = integer_array(where, "lengths", lengths, {1: "(N,)", 2: "(B, N)"}).astype(jnp.int32)
    known = known_values(lengths)
    if known is not None and (known < 0).any():
        raise ValueError(f"{where}: lengths must not be negative, but they are {known.tolist()}.")
    ends = None if known is None else known.sum(axis=-1, dtype=np.int64)
    total_length = _check_total(where, "lengths", lengths, ends, total_length)
    zero = jnp.zeros((*counts.shape[:-1], 1), jnp.int32)
    offsets = jnp.concatenate([zero, jnp.cumsum(counts, axis=-1, dtype=jnp.int32)], axis=-1)
    return _same_document(*ids_from_offsets(offsets, total_length), causal)


def document_from_offsets(
    offsets: Lengths, total_length: int | None = None, causal: bool = False
) -> MaskMod:
    """Document mask from offsets: document i holds positions `offsets[i]` to `offsets[i+1] - 1`.

    Args:
        offsets: N + 1 integers that start at 0 and never decrease, shape (N + 1,), or (B, N + 1)
            with one row a batch entry; possibly traced. Repeats are empty documents, so rows may be
            padded with their last offset.
        total_length: length of the packed sequence; by default the last offset (the largest if
            there are several rows), which must then be known while tracing. Positions behind the
            last offset belong to no document: they attend nothing and nothing attends them.
        causal: whether a query sees only its own and earlier positions.

    Returns:
        A mask_mod named `document` or `causal_document`.

    Raises:
        TypeError: if the offsets are not integers.
        ValueError: if they are not such a list, do not fit into `total_length`, have another rank,
            or if `offsets` is traced and `total_length` missing.
    """
    checked = check_offsets("document_from_offsets()", "offsets", offsets, total_length)
    return _same_document(*ids_from_offsets(*checked), causal)


def document_from_cu_seqlens(
    cu_seqlens: Lengths, total_length: int | None = None, causal: bool = False
) -> MaskMod:
    """Document mask from cumulative lengths, the name that variable-length kernels give to offsets.

    The same as `document_from_offsets`: `[0, 5, 8]` are two documents, of five and three tokens.

    Args:
        cu_seqlens: see `offsets` there.
        total_length: see there.
        causal: see there.

    Returns:
        A mask_mod named `document` or `causal_document`.

    Raises:
        TypeError: see there.
        ValueError: see there.
    """
    checked = check_offsets("document_from_cu_seqlens()", "cu_seqlens", cu_seqlens, total_length)
    return _same_document(*ids_from_offsets(*checked), causal)


def check_offsets(
    where: str, name: str, offsets: Lengths, total_length: int | None
) -> tuple[Int[Array, "*B N"], int]:
    """Validates offsets as far as they are known, and gives them with the packed length."""
    array = integer_array(where, name, offsets, {1: "(N + 1,)", 2: "(B, N + 1)"}).astype(jnp.int32)
    if array.shape[-1] < 1:
        raise ValueError(f"{where}: {name} must hold at least the offset 0, but it is empty.")
    known = known_values(offsets)
    if known is not None and ((known[..., 0] != 0).any() or (np.diff(known, axis=-1) < 0).any()):
        raise ValueError(
            f"{where}: {name} must start at 0 and never decrease, but it is {known.tolist()}. "
            f"For lengths instead of offsets use document_from_lengths()."
        )
    ends = None if known is None else known[..., -1]
    return array, _check_total(where, name, offsets, ends, total_length)


def ids_from_offsets(
    offsets: Int[Array, "*B N"], total_length: int
) -> tuple[Int[Array, "*B S"], Int[Array, "*B S"]]:
    """The document of each position, as ids for the queries and ids for the keys.

    Positions behind the last offset get -1 as queries and -2 as keys, so that a bare comparison of
    the two keeps them apart from everything and from one another, at no cost a score.
    """
    if offsets.ndim == 2:
        return jax.vmap(lambda row: ids_from_offsets(row, total_length))(offsets)
    positions = jnp.arange(total_length, dtype=jnp.int32)
    # side="right" skips empty documents: the last offset <= position is the one that holds it.
    ids = jnp.searchsorted(offsets, positions, side="right").astype(jnp.int32) - 1
    inside = positions < offsets[-1]
    return jnp.where(inside, ids, -1), jnp.where(inside, ids, -2)


def _same_document(q_ids: Array, kv_ids: Array, causal: bool) -> MaskMod:
    read_q, read_kv = batch_row(q_ids), batch_row(kv_ids)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return read_q(b, q_idx) == read_kv(b, kv_idx)

    def causal_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx <= q_idx) & (read_q(b, q_idx) == read_kv(b, kv_idx))

    return named(causal_mask, "causal_document") if causal else named(mask, "document")


def _check_total(
    where: str, name: str, given: Any, ends: np.ndarray | None, total_length: int | None
) -> int:
    """The length of the packed sequence, which must be static."""
    if total_length is None:
        if ends is None:
            raise ValueError(
                f"{where}: {name} is traced ({describe(given)}), so its end is not known while "
                f"tracing. Pass total_length=, the length of the packed sequence."
            )
        return int(ends.max())
    total_length = check_integer(where, "total_length", total_length, at_least=1)
    if ends is not None and ends.max() > total_length:
        raise ValueError(
            f"{where}: the documents end at {int(ends.max())}, behind total_length={total_length}. "
            f"Make total_length at least that, or drop documents."
        )
    return total_length


if __name__ == "__main__":
    from flexjax.masks._draw import draw_mask

    draw_mask(document_from_lengths([20, 8, 24], total_length=64, causal=True))
