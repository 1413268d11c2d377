"""The specification: attention as a dense computation, in the dtype of its inputs.

Every backend is held to this. It materialises the whole score matrix and does nothing clever; it runs in
float64 as well as in float32, so that tests can ask how far any other computation is from the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

ScoreFn = Callable[[Any], Any]


def dense_attention(
    query: Any, key: Any, value: Any, scale: float, score: ScoreFn | None = None, mask: Any = None
) -> tuple[Any, Any, Any]:
    """softmax(score(Q K^T scale) where mask, else -inf) V, row by row.

    Args:
        query: (B, Hq, L, D).
        key: (B or 1, Hkv, S, D), where Hkv divides Hq: query head h reads key head h // (Hq / Hkv).
        value: (B or 1, Hkv, S, Dv).
        scale: factor on Q K^T.
        score: maps all scores (B, Hq, L, S) to modified ones.
        mask: bool, broadcastable to (B, Hq, L, S); False hides a key from a query.

    Returns:
        Output (B, Hq, L, Dv), logsumexp and row maximum (B, Hq, L). A row without any visible key gives an
        output of 0, and -inf for the other two.
    """
    exact = {"precision": lax.Precision.HIGHEST, "preferred_element_type": _wide(query.dtype)}
    group = query.shape[1] // key.shape[1]
    key, value = (jnp.repeat(x, group, axis=1) for x in (key, value))
    s = jnp.einsum("bhld,bhsd->bhls", query, key.astype(query.dtype), **exact) * scale
    s = s if score is None else score(s)
    s = s if mask is None else jnp.where(mask, s, -jnp.inf)
    m = lax.stop_gradient(s.max(-1, keepdims=True))
    dead = m == -jnp.inf
    p = jnp.exp(s - jnp.where(dead, 0, m))
    total = p.sum(-1, keepdims=True)
    p = (p / jnp.where(dead, 1, total)).astype(query.dtype)
    out = jnp.einsum("bhls,bhsd->bhld", p, value.astype(query.dtype), **exact)
    lse = jnp.where(dead, -jnp.inf, m + jnp.log(jnp.where(dead, 1, total)))
    return out.astype(query.dtype), lse[..., 0], m[..., 0]


def _wide(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
