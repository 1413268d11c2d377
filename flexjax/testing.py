"""The truth to test an attention against: a dense float64 oracle, its gradients, a rule of comparison.

The oracle applies score_mod and mask_mod as they are, by four nested `jax.vmap`s over batch, head, query
and key, to the dense specification of `flexjax.backends.reference`. Nothing of what the other backends rely
on (the mod IR, block masks, blockwise softmax) takes part in it. It holds several score matrices, so it is
for lengths of a few thousand at most.

    exact = oracle(query, key, value, score_mod=score_mod, mask_mod=mask_mod)
    out = flex_attention(query, key, value, score_mod, mask_mod=mask_mod)
    assert_close("out", out, exact.out)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from flexjax import _compat
from flexjax.backends.reference import dense_attention
from flexjax.problem import BHLD, heads_first

# Relative errors that are always accepted, by the dtype of what is compared.
FLOORS = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-3}


class OracleResult(NamedTuple):
    """What `oracle` computes.

    Attributes:
        out: the output, (B, Hq, L, Dv) in the layout of the query.
        lse: (B, Hq, L) in both layouts, natural logarithm, without the sinks; -inf for a row without keys.
        max_scores: (B, Hq, L), the largest modified and masked score.
    """

    out: Float[Array, "B Hq L Dv"]
    lse: Float[Array, "B Hq L"]
    max_scores: Float[Array, "B Hq L"]


class OracleGradients(NamedTuple):
    """What `oracle_grads` computes, each part shaped like what it is the gradient of.

    Attributes:
        query, key, value: gradients of the operands.
        captures: gradients of the captured arrays; integers and booleans have none (dtype float0).
        scale: gradient of the scale, None where it was not given.
        sinks: gradient of the sinks, None where they were not given.
    """

    query: Float[Array, "B Hq L D"]
    key: Float[Array, "Bkv Hkv S D"]
    value: Float[Array, "Bkv Hkv S Dv"]
    captures: Any
    scale: Any
    sinks: Any


def oracle(
    query: Float[ArrayLike, "B Hq L D"],
    key: Float[ArrayLike, "Bkv Hkv S D"],
    value: Float[ArrayLike, "Bkv Hkv S Dv"],
    *,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    scale: Float[ArrayLike, ""] | None = None,
    sinks: Float[ArrayLike, " Hq"] | None = None,
    layout: str = BHLD,
    exact: bool = True,
) -> OracleResult:
    """Attention as `flex_attention` defines it, computed densely and, by default, in float64.

    Args:
        query: as for `flex_attention`, like all that follow.
        key: Bkv may be 1, and Hkv may divide Hq.
        value: Dv may differ from D.
        score_mod: `(score, b, h, q_idx, kv_idx) -> score`, called with a float64 score. It must not insist
            on float32: write `score.dtype` where it needs a dtype.
        mask_mod: `(b, h, q_idx, kv_idx) -> bool`.
        scale: factor on Q K^T; 1 / sqrt(D) by default.
        sinks: a logit for every query head.
        layout: "BHLD" or "BLHD".
        exact: True for the truth, in float64. False for the yardstick of `assert_close`: what the same dense
            computation makes of these inputs in their own dtypes.
    """
    with jax.enable_x64(exact), jax.default_device(_host()):
        query, key, value, scale, sinks = _as_arrays((query, key, value, scale, sinks), exact)
        return _dense(query, key, value, scale, sinks, score_mod, mask_mod, layout)


def oracle_grads(
    query: Float[ArrayLike, "B Hq L D"],
    key: Float[ArrayLike, "Bkv Hkv S D"],
    value: Float[ArrayLike, "Bkv Hkv S Dv"],
    d_out: Float[ArrayLike, "B Hq L Dv"],
    d_lse: Float[ArrayLike, "B Hq L"] | None = None,
    *,
    captures: Any = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    scale: Float[ArrayLike, ""] | None = None,
    sinks: Float[ArrayLike, " Hq"] | None = None,
    layout: str = BHLD,
    exact: bool = True,
) -> OracleGradients:
    """Gradients of `oracle`, by JAX's differentiation of the dense computation.

    A score_mod that is infinite or NaN where the mask hides it makes these gradients NaN: JAX multiplies its
    derivative with a cotangent of zero. Give the oracle a score_mod that is finite there.

    Args:
        query: as for `oracle`, like key, value and all that is not described here.
        key: see `oracle`.
        value: see `oracle`.
        d_out: cotangent of the output.
        d_lse: cotangent of the logsumexp; zero by default.
        captures: a pytree of the arrays that score_mod reads. If it is given, `score_mod(captures)` must
            return the mod, so that the oracle can differentiate with respect to them.
        score_mod: see `oracle`, or a function of the captures that returns it.
        mask_mod: see `oracle`.
        scale: see `oracle`.
        sinks: see `oracle`.
        layout: see `oracle`.
        exact: see `oracle`.
    """

    def attend(query: Any, key: Any, value: Any, captures: Any, scale: Any, sinks: Any) -> Any:
        mod = score_mod if captures is None or score_mod is None else score_mod(captures)
        result = _dense(query, key, value, scale, sinks, mod, mask_mod, layout)
        return result.out, result.lse

    with jax.enable_x64(exact), jax.default_device(_host()):
        operands = _as_arrays((query, key, value, captures, scale, sinks), exact)
        (out, lse), pullback = jax.vjp(attend, *operands)
        d_lse = jnp.zeros_like(lse) if d_lse is None else d_lse
        cotangents = jnp.asarray(d_out, out.dtype), jnp.asarray(d_lse, lse.dtype)
        return OracleGradients(*pullback(cotangents))


def relative_error(actual: ArrayLike, exact: ArrayLike) -> float:
    """||actual - exact|| / ||exact|| in float64, over the positions where `exact` is finite.

    Where `exact` is zero throughout, ||actual||.
    """
    actual, exact = _as_doubles(actual), _as_doubles(exact)
    finite = np.isfinite(exact)
    norm = float(np.linalg.norm(exact[finite]))
    return float(np.linalg.norm(actual[finite] - exact[finite])) / (norm or 1.0)


def assert_close(
    name: str,
    actual: ArrayLike,
    exact: ArrayLike,
    dense_same_dtype: ArrayLike | Callable[[], ArrayLike] | None = None,
    *,
    floor: float | None = None,
) -> None:
    """Asserts that `actual` is as exact as the dense computation in the same dtypes, within a factor of two.

    The relative error must not exceed 2 * (that of `dense_same_dtype`) + floor. Infinite values (the
    logsumexp of a row without keys) must be equal, and `actual` must be finite wherever `exact` is.

    Args:
        name: what is compared, for the message.
        actual: the array under test.
        exact: the truth, from `oracle` or `oracle_grads`.
        dense_same_dtype: the same, computed densely in the dtypes of the inputs (`exact=False`), or a
            function that returns it, called only if the floor alone does not suffice.
        floor: relative error that is always accepted; by default that of `actual`'s dtype: 1e-5 for
            float32, 1e-3 for bfloat16 and float16.

    Raises:
        AssertionError: with the errors and the place of the largest difference.
    """
    if floor is None:
        floor = FLOORS[jnp.asarray(actual).dtype.name]
    assert np.shape(actual) == np.shape(exact), (
        f"{name} has shape {np.shape(actual)} where {np.shape(exact)} was expected."
    )
    actual, exact = _as_doubles(actual), _as_doubles(exact)
    wrong = ~np.isfinite(actual) | ~np.isfinite(exact)
    wrong &= actual != exact
    assert not wrong.any(), (
        f"{name} differs in {wrong.sum()} of {wrong.size} places where it or the truth is not finite, first at "
        f"{_first(wrong)}: {actual[_first(wrong)]} where {exact[_first(wrong)]} was expected."
    )
    error, limit = relative_error(actual, exact), floor
    if error > limit and dense_same_dtype is not None:
        dense = dense_same_dtype() if callable(dense_same_dtype) else dense_same_dtype
        limit += 2.0 * relative_error(dense, exact)
    if error > limit:
        difference = np.where(np.isfinite(exact), np.abs(actual - exact), 0.0)
        worst = np.unravel_index(int(difference.argmax()), difference.shape)
        where = tuple(int(i) for i in worst)
        raise AssertionError(
            f"{name} has a relative error of {error:.3g}; at most {limit:.3g} is accepted. The largest difference "
            f"is at {where}: {actual[where]:.6g} where {exact[where]:.6g} was expected."
        )


# -- the dense computation --------------------------------------------------------------------------


def _dense(
    query: Any,
    key: Any,
    value: Any,
    scale: Any,
    sinks: Any,
    score_mod: Any,
    mask_mod: Any,
    layout: str,
) -> OracleResult:
    query, key, value = (heads_first(x, layout) for x in (query, key, value))
    key, value = (jnp.broadcast_to(x, (query.shape[0], *x.shape[1:])) for x in (key, value))
    shape = (*query.shape[:3], key.shape[2])
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    mask = None if mask_mod is None else _over(mask_mod, shape)()
    modify = None if score_mod is None else _over(score_mod, shape)

    def score(s: Any) -> Any:
        return s if modify is None else jnp.asarray(modify(s), s.dtype)

    out, lse, max_scores = dense_attention(query, key, value, scale, score, mask)
    if sinks is not None:
        # One more key, whose score is the sink, whose value is zero, and which every query sees.
        key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0))) for x in (key, value))
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=True)

        def with_sink(s: Any) -> Any:
            sink = jnp.broadcast_to(sinks[None, :, None, None], (*s.shape[:3], 1))
            return jnp.concatenate([score(s[..., :-1]), sink.astype(s.dtype)], -1)

        out = dense_attention(query, key, value, scale, with_sink, mask)[0]
    return OracleResult(heads_first(out, layout), lse, max_scores)


def _over(mod: Callable[..., Any], shape: tuple[int, ...]) -> Callable[..., Any]:
    """A mod of scalars over whole (B, H, L, S) arrays of them: a score, if it takes one, and four indices."""
    indices = [jnp.arange(n, dtype=jnp.int32) for n in shape]

    def apply(*score: Any) -> Any:
        mapped = mod
        for axis in (3, 2, 1, 0):
            axes = tuple(0 if i == axis else None for i in range(4))
            mapped = jax.vmap(mapped, (*(0 for _ in score), *axes))
        return mapped(*score, *indices)

    return apply


def _host() -> jax.Device:
    """Where the oracle computes: beside a GPU that is under test, and fast at compiling small programs."""
    return jax.local_devices(backend="cpu")[0]


def _as_arrays(tree: Any, doubles: bool) -> Any:
    """The tree with arrays on the host for leaves, in float64 if `doubles` and they are floating-point."""

    def convert(x: Any) -> Any:
        x = jnp.asarray(x)
        x = x if _compat.is_tracer(x) else jax.device_put(x, _host())
        return x.astype(jnp.float64) if doubles and jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(convert, tree)


def _as_doubles(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _first(where: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(where.argmax()), where.shape))
