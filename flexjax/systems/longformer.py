"""Longformer: a window for all tokens, and a few global ones with projections of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flexjax.attention import flex_attention
from flexjax.masks import and_masks, dilated_window, or_masks, padding, sliding_window
from flexjax.masks._arguments import check_integer

type Triple = tuple[Float[Array, "B Hq L D"], Float[Array, "B Hkv L D"], Float[Array, "B Hkv L Dv"]]


def longformer_attention(
    query: Float[Array, "B Hq L D"],
    key: Float[Array, "B Hkv L D"],
    value: Float[Array, "B Hkv L Dv"],
    window: int,
    global_tokens: Sequence[int],
    *,
    global_projections: Triple | None = None,
    dilation: int = 1,
    lengths: Any = None,
    backend: str | None = None,
) -> Float[Array, "B Hq L Dv"]:
    """Windowed attention in which global tokens see, and are seen by, all.

    Two calls: every token attends to its window and to the global tokens; then the few global tokens attend
    to everything, with their own queries, keys and values. With one set of projections and no dilation this
    is `masks.global_window`, but global tokens in the middle of the sequence do not turn whole rows of blocks
    into visited ones.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        window: visible distance to either side, in positions, >= 0.
        global_tokens: the positions of the global tokens, known while tracing; none is allowed.
        global_projections: query, key and value of the same shapes, projected for global attention, of which
            the queries at global tokens and all keys and values are used; the first three if None.
        dilation: of the window, >= 1, see `masks.dilated_window`.
        lengths: valid tokens of each batch row, integers (B,); keys behind are invisible.
        backend: see `flex_attention`.

    Returns:
        The output (B, Hq, L, Dv).

    Raises:
        TypeError: if `window`, `dilation` or a global token is not an integer.
        ValueError: if one of them is out of its range, or shapes do not fit.

    Source: Beltagy et al., "Longformer: The Long-Document Transformer", arXiv 2004.05150, section 3.1
    (linear projections for global attention).
    """
    where = "longformer_attention()"
    wide = (query, key, value) if global_projections is None else global_projections
    lengths_of = {x.shape[2] if x.ndim == 4 else None for x in (query, key, value, *wide)}
    if len(lengths_of) > 1 or None in lengths_of:
        raise ValueError(
            f"{where}: query, key, value and their global projections must have shapes (B, H, L, D) with one "
            f"length L, but they have {', '.join(str(x.shape) for x in (query, key, value, *wide))}."
        )
    length = query.shape[2]
    dilation = check_integer(where, "dilation", dilation, at_least=1)
    tokens = np.unique([check_integer(where, "a global token", t) for t in global_tokens])
    if len(tokens) and not 0 <= tokens[0] <= tokens[-1] < length:
        raise ValueError(
            f"{where}: global tokens must be positions from 0 to {length - 1}, but they are {tokens.tolist()}."
        )
    flags = np.zeros(length, bool)
    flags[tokens.astype(int)] = True
    is_global = jnp.asarray(flags)
    # Global tokens are keys here like any others that all see; as queries they follow below.
    local = dilated_window(window, dilation) if dilation > 1 else sliding_window(window, window)
    seen = or_masks(local, lambda b, h, q_idx, kv_idx: is_global[kv_idx]) if len(tokens) else local
    valid = None if lengths is None else padding(lengths)
    mask = seen if valid is None else and_masks(seen, valid)
    out = flex_attention(query, key, value, mask_mod=mask, backend=backend)
    if len(tokens) == 0:
        return out
    few = jnp.asarray(tokens, jnp.int32)
    seeing = flex_attention(wide[0][:, :, few], *wide[1:], mask_mod=valid, backend=backend)
    return out.at[:, :, few].set(seeing)
