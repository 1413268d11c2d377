"""One prompt, many responses: documents that share a prefix document."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Int

from flexjax.masks._arguments import batch_row, check_integer, integer_array, known_values, named
from flexjax.masks._types import MaskMod
from flexjax.masks.document import Lengths, check_offsets, ids_from_offsets


def shared_prefix(
    offsets: Lengths,
    total_length: int | None = None,
    *,
    prefix: int | Int[ArrayLike, " N"] = 0,
) -> MaskMod:
    """Shared-prefix mask: causal in the own document, plus the whole of its prefix document.

    A query may attend a key where they are in the same document and `kv_idx <= q_idx`, or where the
    query's document has the key's document as its prefix. A prompt and the G responses sampled for
    it, packed as G + 1 documents, are trained on in one row without repeating the prompt. The
    responses' positions (rotary or learned) must each continue the prompt's.

    Args:
        offsets: N + 1 offsets of the N documents, as in `document_from_offsets`: shape (N + 1,), or
            (B, N + 1); possibly traced.
        total_length: length of the packed sequence, as there. Positions behind the last offset
            attend nothing and nothing attends them.
        prefix: the index of the document that is everybody's prefix; or an integer array of shape
            (N,) with the index of each document's prefix, to pack several prompts into a row. A
            document that is its own prefix is a prompt, and has none.

    Returns:
        A mask_mod named `shared_prefix`.

    Raises:
        TypeError: if the offsets or `prefix` are not integers.
        ValueError: if the offsets are no such list, if `prefix` names a document that does not
            exist or has another shape, or if `offsets` is traced and `total_length` missing.

    Source: Shao et al., "DeepSeekMath" (GRPO: a group of responses to one prompt),
    arXiv 2402.03300; Liu et al., "Prefix Grouper", arXiv 2506.05433.
    """
    where = "shared_prefix()"
    starts, total_length = check_offsets(where, "offsets", offsets, total_length)
    q_ids, kv_ids = ids_from_offsets(starts, total_length)
    count = starts.shape[-1] - 1
    if isinstance(prefix, int | np.integer):
        check_integer(where, "prefix", prefix, at_least=0)
        parents = jnp.full((count,), prefix, jnp.int32)
    else:
        parents = integer_array(where, "prefix", prefix, {1: "(N,)"}).astype(jnp.int32)
    known = known_values(prefix)
    if parents.shape != (count,) or (
        known is not None and count and not (0 <= known.min() <= known.max() < count)
    ):
        given = f"an array of shape {parents.shape}" if known is None else np.array2string(known)
        raise ValueError(
            f"{where}: prefix must be the index of one of the {count} documents, or {count} such "
            f"indices, but it is {given}. Documents are counted from 0."
        )
    # The id that a query's prefix has among the keys. Prompts and padding have none: no key is -1.
    own = jnp.arange(count, dtype=jnp.int32)
    parent_ids = jnp.where(parents == own, -1, parents)
    prefix_ids = jnp.where(q_ids < 0, -1, parent_ids[jnp.maximum(q_ids, 0)])
    read_q, read_prefix, read_kv = batch_row(q_ids), batch_row(prefix_ids), batch_row(kv_ids)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        key = read_kv(b, kv_idx)
        own_past = (read_q(b, q_idx) == key) & (kv_idx <= q_idx)
        return own_past | (read_prefix(b, q_idx) == key)

    return named(mask, "shared_prefix")


if __name__ == "__main__":
    from flexjax.masks._draw import draw_mask

    draw_mask(shared_prefix([0, 20, 34, 46, 60], total_length=64))
