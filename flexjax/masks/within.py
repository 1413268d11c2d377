"""A mask of its own in every part of a packed sequence: parts are numbered from 0 inside."""

from typing import Any

import jax.numpy as jnp

from flexjax.masks._arguments import batch_row, check_integer, check_mods, name_of, named
from flexjax.masks._types import MaskMod
from flexjax.masks.document import Lengths, check_offsets, ids_from_offsets

_ARGUMENTS = ("b", "h", "q_idx", "kv_idx")


def within_documents(
    mask_mod: MaskMod, offsets: Lengths, total_length: int | None = None
) -> MaskMod:
    """A mask inside each document, which sees positions counted from the document's start.

    `same document & mask_mod(b, h, q_idx - start, kv_idx - start)`. For masks that depend on distances
    only, such as `causal()` and `sliding_window(w)`, `and_masks(document_from_offsets(offsets), mask)` says
    the same for less; this is for those that do not, such as `prefix_lm(n)` or `neighborhood_2d(...)`.

    Args:
        mask_mod: the mask of one document.
        offsets: as in `document_from_offsets`.
        total_length: as there.

    Returns:
        A mask_mod named `<mask_mod>_within_documents`.

    Raises:
        TypeError: if `mask_mod` is not a function of four arguments, or the offsets are not integers.
        ValueError: see `document_from_offsets`.
    """
    where = "within_documents()"
    check_mods(where, (mask_mod,), "mask_mod", _ARGUMENTS)
    starts, total_length = check_offsets(where, "offsets", offsets, total_length)
    q_ids, kv_ids = ids_from_offsets(starts, total_length)
    # Padding is in no document: what start it has does not matter.
    own = jnp.maximum(q_ids, 0)
    begins = starts[own] if starts.ndim == 1 else jnp.take_along_axis(starts, own, axis=-1)
    read_q, read_kv, read_start = batch_row(q_ids), batch_row(kv_ids), batch_row(begins)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        start = read_start(b, q_idx)
        same = read_q(b, q_idx) == read_kv(b, kv_idx)
        return same & mask_mod(b, h, q_idx - start, kv_idx - start)

    return named(mask, f"{name_of(mask_mod)}_within_documents")


def within_groups(mask_mod: MaskMod, group: int) -> MaskMod:
    """A mask inside groups of equal length, which sees positions counted from the group's start.

    `q_idx // group == kv_idx // group` and `mask_mod(b, h, q_idx % group, kv_idx % group)`: a batch laid
    out as one sequence.

    Args:
        mask_mod: the mask of one group.
        group: tokens of a group, >= 1.

    Returns:
        A mask_mod named `<mask_mod>_within_groups_<group>`.

    Raises:
        TypeError: if `mask_mod` is not a function of four arguments, or `group` not an integer.
        ValueError: if `group` is less than 1.
    """
    where = "within_groups()"
    check_mods(where, (mask_mod,), "mask_mod", _ARGUMENTS)
    group = check_integer(where, "group", group, at_least=1)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        same = q_idx // group == kv_idx // group
        return same & mask_mod(b, h, q_idx % group, kv_idx % group)

    return named(mask, f"{name_of(mask_mod)}_within_groups_{group}")


if __name__ == "__main__":
    from flexjax.masks import prefix_lm
    from flexjax.masks._draw import draw_mask

    draw_mask(within_documents(prefix_lm(6), [0, 20, 28, 64]), within_groups(prefix_lm(5), 16))
