"""Attentions to run the Mosaic GPU kernel on, as data, and their check against the dense oracle."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import BlockMask, create_block_mask
from flexjax.backends import mosaic_gpu
from flexjax.problem import BLHD, Operands, Problem, Result
from flexjax.testing import assert_close, oracle
from tests.mosaic_gpu.problems import problem_of


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One attention.

    Attributes:
        id: name of the test.
        score, mask: the mods.
        block: block sizes of the mask; None for no block mask, so that the mask is for the oracle alone.
        block_mask: makes the BlockMask where `create_block_mask(mask, ...)` is not what is tested.
        mask_shape: B and H of the block mask.
        edit: changes (query, key, value) in NumPy before they are cast.
        edit_mask: changes the BlockMask.
        options: kernel options.
    """

    id: str
    score: Callable[..., Any] | None = None
    mask: Callable[..., Any] | None = None
    block: tuple[int, int] | None = (128, 128)
    block_mask: Callable[[], BlockMask] | None = None
    mask_shape: tuple[int | None, int | None] = (None, None)
    edit: Callable[..., tuple] | None = None
    edit_mask: Callable[[BlockMask], BlockMask] | None = None
    batch: int = 1
    kv_batch: int | None = None
    heads: int = 1
    kv_heads: int | None = None
    q_len: int = 130
    kv_len: int | None = None
    dim: int = 64
    v_dim: int | None = None
    dtype: str = "bfloat16"
    layout: str = "BHLD"
    scale: float | None = None
    max_scores: bool = False
    options: dict = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def operands(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        rng = np.random.default_rng(zlib.crc32(self.id.encode()))
        kv = (self.kv_batch or self.batch, self.kv_heads or self.heads, self.kv_len or self.q_len)
        shapes = [(self.batch, self.heads, self.q_len, self.dim)]
        shapes += [(*kv, self.dim), (*kv, self.v_dim or self.dim)]
        arrays = [rng.standard_normal(shape) for shape in shapes]
        if self.edit is not None:
            arrays = self.edit(*arrays)
        if self.layout == BLHD:
            arrays = [x.swapaxes(1, 2) for x in arrays]
        return tuple(jnp.asarray(x, self.dtype) for x in arrays)

    @functools.cached_property
    def blocks(self) -> BlockMask | None:
        mask = None
        if self.block_mask is not None:
            mask = self.block_mask()
        elif self.mask is not None and self.block is not None:
            lengths = (self.q_len, self.kv_len or self.q_len)
            mask = create_block_mask(self.mask, *self.mask_shape, *lengths, self.block)
        return mask if self.edit_mask is None else self.edit_mask(mask)

    def problem(self, **options: Any) -> tuple[Problem, Operands]:
        return problem_of(
            *self.operands,
            score_mod=self.score,
            block_mask=self.blocks,
            scale=self.scale,
            layout=self.layout,
            max_scores=self.max_scores,
            options=self.options | options,
        )


def cases(*items: Case) -> pytest.MarkDecorator:
    """Parametrises a test over cases."""
    assert len({c.id for c in items}) == len(items), "two cases have the same id"
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in items])


def check(case: Case, **options: Any) -> Result:
    """Runs the kernel and holds output and statistics against the oracle."""
    problem, operands = case.problem(**options)
    mosaic_gpu.check(problem)
    result = mosaic_gpu.forward(problem, operands)
    assert result.out.shape == problem.output_shape()
    assert result.out.dtype == problem.q_dtype
    mods = {"score_mod": case.score, "mask_mod": case.mask, "scale": case.scale}
    exact = oracle(*case.operands, **mods, layout=case.layout)
    dense = functools.cache(lambda: oracle(*case.operands, **mods, layout=case.layout, exact=False))
    assert_close("out", result.out, exact.out, lambda: dense().out, floor=1e-3)
    assert_close("lse", result.lse, exact.lse, lambda: dense().lse, floor=1e-4)
    if case.max_scores:
        assert_close(
            "max_scores",
            result.max_scores,
            exact.max_scores,
            lambda: dense().max_scores,
            floor=1e-4,
        )
    dead = np.asarray(exact.lse) == -np.inf
    out = np.asarray(result.out).astype(np.float64)
    out = out.swapaxes(1, 2) if case.layout == BLHD else out
    assert not out[dead].any(), "the output is not exactly zero in rows without keys"
    return result
