"""The correctness gate: a peer is timed only if its result is as exact as the dense computation.

The reference applies the same mods to whole score matrices of a few heads, in float64 and, for the yardstick,
with products and probabilities rounded as the dense computation in the inputs' dtype rounds them. Queries
are taken a chunk at a time, so that long sequences fit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.variants import Shape, Variant

FLOOR = 1e-3  # relative error that half precision is always allowed
_CHUNK_SCORES = 1 << 26

# A matrix product that is run once need not be tuned; the tuning would take longer than the run.
UNTUNED = {"xla_gpu_autotune_level": 0}


@dataclasses.dataclass(frozen=True)
class HeadReference:
    """What one head of a result should be.

    Attributes:
        batch, head: which one.
        out: float32 [L, D], computed in float64: the output, or a gradient.
        limit: largest relative error that is accepted: twice the dense computation's, and the floor.
    """

    batch: int
    head: int
    out: np.ndarray
    limit: float


def checked_heads(shape: Shape) -> list[tuple[int, int]]:
    """(batch row, query head) pairs that are checked: the first, the last and one between."""
    last = (shape.batch - 1, shape.q_heads - 1)
    return sorted({(0, 0), (shape.batch // 2, shape.q_heads // 3), last})


def reference_heads(
    variant: Variant, shape: Shape, inputs: tuple[Any, Any, Any]
) -> list[HeadReference]:
    """The checked heads of one (query, key, value) triple in layout BHLD."""
    query, key, value = inputs
    group = shape.q_heads // shape.kv_heads
    captures = variant.captures(shape)
    references = []
    with jax.enable_x64(True):
        run = jax.jit(functools.partial(_head, variant, shape), compiler_options=UNTUNED)
        for b, h in checked_heads(shape):
            operands = query[b, h], key[b, h // group], value[b, h // group]
            exact, dense = (
                np.asarray(x) for x in run(*operands, captures, np.int32(b), np.int32(h))
            )
            limit = 2.0 * relative_error(dense, exact) + FLOOR
            references.append(HeadReference(b, h, exact.astype(np.float32), limit))
    return references


def reference_gradients(
    variant: Variant, shape: Shape, inputs: tuple[Any, Any, Any], cotangent: Any
) -> list[HeadReference]:
    """The checked heads of the gradients, for each of them of query, key and value in turn.

    Raises:
        ValueError: query heads share key heads, whose gradients are sums that this does not form.
    """
    if shape.q_heads != shape.kv_heads:
        raise ValueError(f"{shape.name} has grouped heads: {shape.q_heads} and {shape.kv_heads}.")
    captures = variant.captures(shape)
    references = []
    with jax.enable_x64(True):
        run = jax.jit(functools.partial(_head_gradients, variant, shape), compiler_options=UNTUNED)
        for b, h in checked_heads(shape):
            operands = *(x[b, h] for x in inputs), cotangent[b, h]
            exact, dense = run(*operands, captures, np.int32(b), np.int32(h))
            for one, other in zip(exact, dense, strict=True):
                one, other = np.asarray(one), np.asarray(other)
                limit = 2.0 * relative_error(other, one) + FLOOR
                references.append(HeadReference(b, h, one.astype(np.float32), limit))
    return references


def relative_error(actual: np.ndarray, exact: np.ndarray) -> float:
    """||actual - exact|| / ||exact||."""
    actual, exact = actual.astype(np.float64), exact.astype(np.float64)
    return float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))


def gate(heads: Sequence[np.ndarray], references: Sequence[HeadReference]) -> tuple[float, bool]:
    """(largest relative error of the checked heads, whether all are accepted); NaN is not."""
    errors = [
        relative_error(np.asarray(head), r.out) for head, r in zip(heads, references, strict=True)
    ]
    accepted = all(error <= r.limit for error, r in zip(errors, references, strict=True))
    return (math.nan if any(map(math.isnan, errors)) else max(errors)), accepted


def _head(
    variant: Variant, shape: Shape, query: Any, key: Any, value: Any, captures: Any, b: Any, h: Any
) -> tuple[Any, Any]:
    """(in float64, in the inputs' own dtype) for one head: query [L, D], key and value [S, D]."""
    score_mod, mask_mod = variant.mods(jnp, captures, shape)
    scale = 1.0 / math.sqrt(shape.dim)
    kv = jnp.arange(shape.kv_len, dtype=jnp.int32)[None, :]
    rows = max(1, min(shape.q_len, _CHUNK_SCORES // shape.kv_len))
    chunks = -(-shape.q_len // rows)

    def attend(q_rows: Any, q: Any, dtype: Any, wide: Any) -> Any:
        keys, values = key.astype(dtype), value.astype(dtype)
        scores = jnp.matmul(q_rows.astype(dtype), keys.T, preferred_element_type=wide) * scale
        if score_mod is not None:
            scores = score_mod(scores, b, h, q, kv).astype(wide)
        if mask_mod is not None:
            scores = jnp.where(mask_mod(b, h, q, kv), scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
        return jnp.matmul(weights, values, preferred_element_type=wide).astype(dtype)

    def chunk(index: Any) -> tuple[Any, Any]:
        q = jnp.minimum(index * rows + jnp.arange(rows, dtype=jnp.int32), shape.q_len - 1)
        q_rows, q = query[q], q[:, None]
        exact = attend(q_rows, q, jnp.float64, jnp.float64)
        return exact, attend(q_rows, q, query.dtype, jnp.float32)

    results = jax.lax.map(chunk, jnp.arange(chunks, dtype=jnp.int32))
    exact, dense = (x.reshape(chunks * rows, -1)[: shape.q_len] for x in results)
    return exact, dense


def _head_gradients(
    variant: Variant,
    shape: Shape,
    query: Any,
    key: Any,
    value: Any,
    cotangent: Any,
    captures: Any,
    b: Any,
    h: Any,
) -> tuple[Any, Any]:
    """Gradients of (query, key, value) of one head, in float64 and in the inputs' own dtype."""
    score_mod, mask_mod = variant.mods(jnp, captures, shape)
    scale = 1.0 / math.sqrt(shape.dim)
    kv = jnp.arange(shape.kv_len, dtype=jnp.int32)[None, :]
    rows = max(1, min(shape.q_len, _CHUNK_SCORES // shape.kv_len))
    chunks = -(-shape.q_len // rows)

    def gradients(dtype: Any, wide: Any) -> Any:
        keys, values = key.astype(dtype), value.astype(dtype)
        product = functools.partial(jnp.matmul, preferred_element_type=wide)

        def chunk(sums: Any, index: Any) -> tuple[Any, Any]:
            place = index * rows + jnp.arange(rows, dtype=jnp.int32)
            real, q = (place < shape.q_len)[:, None], jnp.minimum(place, shape.q_len - 1)
            q_rows, d_out = query[q].astype(dtype), jnp.where(real, cotangent[q], 0).astype(dtype)

            def modified(scores: Any) -> Any:
                y = scores if score_mod is None else score_mod(scores, b, h, q[:, None], kv)
                return y.astype(wide)

            y, pull = jax.vjp(modified, product(q_rows, keys.T) * scale)
            allowed = True if mask_mod is None else mask_mod(b, h, q[:, None], kv)
            p = jax.nn.softmax(jnp.where(allowed, y, -jnp.inf), axis=-1)
            rounded = p.astype(dtype)
            out = product(rounded, values).astype(dtype)
            delta = (out.astype(wide) * d_out.astype(wide)).sum(-1, keepdims=True)
            (d_scores,) = pull(p * (product(d_out, values.T) - delta))
            d_scores = jnp.where(allowed, d_scores, 0).astype(dtype)
            dk = sums[0] + product(d_scores.T, q_rows) * scale
            dv = sums[1] + product(rounded.T, d_out)
            return (dk, dv), product(d_scores, keys) * scale

        zeros = jnp.zeros(key.shape, wide), jnp.zeros(value.shape, wide)
        (dk, dv), dq = jax.lax.scan(chunk, zeros, jnp.arange(chunks, dtype=jnp.int32))
        dq = dq.reshape(chunks * rows, -1)[: shape.q_len]
        return tuple(x.astype(dtype) for x in (dq, dk, dv))

    return gradients(jnp.float64, jnp.float64), gradients(query.dtype, jnp.float32)
