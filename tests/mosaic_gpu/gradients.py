"""Attentions to run the Mosaic GPU backward pass on, and their check against the dense oracle."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexjax.backends import mosaic_gpu
from flexjax.problem import BLHD, Gradients, Operands, Problem, Result, heads_first
from flexjax.testing import assert_close, oracle, oracle_grads
from tests.mosaic_gpu.attention import Case


@dataclasses.dataclass(frozen=True, eq=False)
class GradientCase(Case):
    """An attention and what its score_mod captures.

    Attributes:
        captures: makes the captured arrays from a generator of random numbers; `score` is then a function of them
            that returns the score_mod.
        cotangents_of_lse: whether the logsumexp has cotangents.
        exact_score: the score_mod (or function of captures) that the oracle differentiates, where that of the
            case is not finite at masked places.
    """

    captures: Callable[[np.random.Generator], tuple[Any, ...]] | None = None
    cotangents_of_lse: bool = False
    exact_score: Callable[..., Any] | None = None

    @functools.cached_property
    def _random(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(self.id.encode()) + 1)

    @functools.cached_property
    def captured(self) -> tuple[Any, ...]:
        return () if self.captures is None else self.captures(np.random.default_rng(5))

    @functools.cached_property
    def d_out(self) -> Any:
        shape = (self.batch, self.heads, self.q_len, self.v_dim or self.dim)
        if self.layout == BLHD:
            shape = (shape[0], shape[2], shape[1], shape[3])
        return jnp.asarray(np.random.default_rng(6).standard_normal(shape), self.dtype)

    @functools.cached_property
    def d_lse(self) -> Any:
        shape = (self.batch, self.heads, self.q_len)
        values = np.random.default_rng(7).standard_normal(shape) * self.cotangents_of_lse
        return jnp.asarray(values, jnp.float32)

    def _score(self) -> Any:
        if self.captures is None or self.score is None:
            return self.score
        return self.score(self.captured)

    def inputs(self, **options: Any) -> tuple[Problem, Operands, Result, Any, Any]:
        """Arguments of `mosaic_gpu.backward`; the forward's results are the exact ones, rounded."""
        plain = dataclasses.replace(self, score=self._score())
        problem, operands = plain.problem(**options)
        mods = {"score_mod": plain.score, "mask_mod": self.mask, "scale": self.scale}
        exact = oracle(*self.operands, **mods, layout=self.layout)
        out, lse = map(np.asarray, (exact.out, exact.lse))  # off the oracle's device
        result = Result(jnp.asarray(out, self.dtype), jnp.asarray(lse, jnp.float32))
        return problem, operands, result, self.d_out, self.d_lse

    def exact(self, exact: bool = True) -> Any:
        score = self.exact_score or self.score
        return oracle_grads(
            *self.operands,
            self.d_out,
            self.d_lse,
            captures=self.captured if self.captures is not None else None,
            score_mod=score,
            mask_mod=self.mask,
            scale=self.scale,
            layout=self.layout,
            exact=exact,
        )


def check_gradients(case: GradientCase, **options: Any) -> Gradients:
    """Runs the kernel and holds the gradients against the oracle."""
    problem, operands, *rest = case.inputs(**options)
    mosaic_gpu.check(problem)
    mosaic_gpu.check_backward(problem)
    gradients = mosaic_gpu.backward(problem, operands, *rest)
    exact, dense = case.exact(), functools.cache(lambda: case.exact(exact=False))
    for name in ("query", "key", "value"):
        actual = getattr(gradients, name)
        assert actual.dtype == getattr(operands, name).dtype
        assert_close(
            name, actual, getattr(exact, name), lambda n=name: getattr(dense(), n), floor=3e-3
        )
    for i, expected in enumerate(case.captured and exact.captures):
        actual = _gradient_of(gradients, operands, case.captured[i])
        scale = np.abs(np.asarray(expected, np.float64)).max()
        # What the sum of rounded terms that cancel leaves is judged by the size of the terms.
        np.testing.assert_allclose(
            np.asarray(actual, np.float64),
            np.asarray(expected, np.float64),
            atol=2e-2 * max(scale, 1e-3),
            rtol=2e-2,
            err_msg=f"captured array {i}",
        )
    dead = np.asarray(rest[0].lse) == -np.inf
    dq = np.asarray(heads_first(gradients.query, case.layout)).astype(np.float64)
    assert not dq[dead].any(), "dQ is not exactly zero in rows without keys"
    return gradients


def _gradient_of(gradients: Gradients, operands: Operands, array: Any) -> Any:
    """The gradient of a captured array, wherever the score_mod's graph put it."""
    for capture, gradient in zip(operands.score_captures, gradients.score_captures, strict=True):
        if capture.shape == np.shape(array) and np.array_equal(
            np.asarray(capture, np.float64), np.asarray(array, np.float64)
        ):
            assert gradient.dtype == capture.dtype
            return gradient
    raise AssertionError("the captured array is not among the operands")
