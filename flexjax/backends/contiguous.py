"""A decoding step as an ordinary attention, for the backends that know nothing of caches.

Pages are gathered into one piece, and what lies past the lengths is replaced by zeros: a masked score may be NaN,
but a masked value that is NaN would still reach the output, as 0 * NaN. The mask, which knows the lengths, becomes
block lists.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from flexjax.block_lists import Geometry, lists_from_states
from flexjax.block_states import block_states
from flexjax.problem import BLHD, BlockLists, Blocks, Gradients, Operands, Problem, heads_first

_BLOCK = 128


def contiguous(problem: Problem, operands: Operands) -> tuple[Problem, Operands]:
    """The same attention without lengths and pages."""
    if problem.decoding is None:
        return problem, operands
    key, value = operands.key, operands.value
    if problem.decoding.page_size is not None:
        key, value = (
            heads_first(gathered(x, operands.page_table), problem.layout) for x in (key, value)
        )
    axis = 1 if problem.layout == BLHD else 2
    key, value = (without_tail(x, operands.lengths, axis) for x in (key, value))
    operands = dataclasses.replace(operands, key=key, value=value, lengths=None, page_table=None)
    problem = dataclasses.replace(problem, decoding=None, kv_batch=problem.batch)
    if problem.blocks is not None:
        return problem, operands
    assert problem.mask is not None, "a decoding step's mask knows the lengths"
    geometry = Geometry(problem.q_len, problem.kv_len, problem.q_len, _BLOCK)
    states = block_states(
        problem.mask, operands.mask_captures, geometry, problem.batch, problem.q_heads
    )
    lists = lists_from_states(states)
    blocks = Blocks(geometry, states.shape[0], states.shape[1], backward=False)
    return (
        dataclasses.replace(problem, blocks=blocks),
        dataclasses.replace(operands, lists=BlockLists(*lists.arrays)),
    )


def with_decoding(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A backward pass of ordinary attentions as one of decoding steps too."""

    @functools.wraps(backward)
    def run(problem: Problem, operands: Operands, *args: Any, **kwargs: Any) -> Gradients:
        if problem.decoding is None:
            return backward(problem, operands, *args, **kwargs)
        if problem.decoding.page_size is not None:
            raise NotImplementedError(
                "Attention over a paged cache has no gradients. Train with flex_attention, or differentiate "
                "flexjax.decode over a KVCache."
            )
        gradients = backward(*contiguous(problem, operands), *args, **kwargs)
        if problem.kv_batch == problem.batch:
            return gradients

        def shared(x: Any) -> Any:
            return x.reshape(problem.kv_batch, -1, *x.shape[1:]).sum(1)

        return dataclasses.replace(
            gradients, key=shared(gradients.key), value=shared(gradients.value)
        )

    return run


def gathered(pool: Any, page_table: Any) -> Any:
    """(B, Hkv, pages a row * page, D) from a pool (Hkv, pages, page, D); entries out of range read any page."""
    kv_heads, pages, page, dim = pool.shape
    rows, per_row = page_table.shape
    taken = pool[:, jnp.clip(page_table, 0, pages - 1)]
    return jnp.moveaxis(taken, 0, 1).reshape(rows, kv_heads, per_row * page, dim)


def without_tail(x: Any, lengths: Any, axis: int) -> Any:
    """Zeros past lengths (B,) along the axis of tokens, in a copy for every batch row."""
    position = jnp.arange(x.shape[axis], dtype=jnp.int32)
    shape = [1] * 4
    shape[axis] = x.shape[axis]
    inside = position.reshape(shape) < lengths.reshape(-1, 1, 1, 1)
    x = jnp.repeat(x, lengths.shape[0] // x.shape[0], axis=0)
    return jnp.where(inside, x, jnp.zeros((), x.dtype))
