"""Rewritten mods against the original evaluated at the indices that the rewrite stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.mods.evaluate import evaluate
from flexjax.mods.trace import index_ranges, trace_mask_mod, trace_score_mod
from flexjax.mods.transform import (
    fold_batch,
    rewrite_graph,
    rewrite_score_mod,
    select,
    shift_queries,
)
from tests.mods import zoo

ROWS = 8
INT32_MAX = int(np.iinfo(np.int32).max)
FACTORIES = {
    f.__name__: f
    for f in (
        zoo.causal,
        zoo.causal_document_by_batch,
        zoo.neighbourhood,
        zoo.branch_by_head,
        zoo.document_of_offsets,
        zoo.always,
        zoo.sorted_pair,
        zoo.open_ended_loop,
        zoo.alibi,
        zoo.relative_table,
        zoo.two_reads_of_one_table,
        zoo.key_bias,
        zoo.low_rank_bias,
        zoo.other_gradient,
        zoo.median_of_three,
        zoo.cumulative,
    )
}
factories = pytest.mark.parametrize(
    "factory", zoo.params(FACTORIES, smoke=("causal_document_by_batch", "cumulative"))
)


def is_score(factory):
    return factory.__name__ in zoo.SCORES | zoo.OPAQUE_SCORES


def traced(factory, ranges, arrays=None):
    arrays = zoo.captured(factory) if arrays is None else arrays
    trace = trace_score_mod if is_score(factory) else trace_mask_mod
    return trace(factory(**arrays), ranges)


def rewritten(mod, rewrite):
    return (rewrite_graph if not hasattr(mod, "forward") else rewrite_score_mod)(mod, rewrite)


def inputs(batch=zoo.B, heads=zoo.H, q_len=zoo.Q, kv_len=zoo.K):
    """Indices and, for scores, a value that differs at every position."""
    sizes = (batch, heads, q_len, kv_len)
    found = {
        name: jnp.arange(n, dtype=jnp.int32).reshape([n if i == axis else 1 for i in range(4)])
        for axis, (name, n) in enumerate(zip(("b", "h", "q", "kv"), sizes, strict=True))
    }
    score = jnp.sin(jnp.arange(np.prod(sizes), dtype=jnp.float32)).reshape(sizes)
    return found | {"score": 3 * score}


@functools.partial(jax.jit, static_argnums=0)
def values(mod, captures, at):
    """Every output of a mask, or of a score and its gradient graph, at full shape."""
    graph = mod
    if hasattr(mod, "forward"):
        graph = mod.forward if mod.gradient is None else mod.gradient.graph
    shape = jnp.broadcast_shapes(*(x.shape for x in at.values()))
    return [jnp.broadcast_to(x, shape) for x in evaluate(graph, captures, at)]


def derivatives(mod, outputs):
    """(output, dy/ds, {(capture, derivative)...}) without the indices, which a rewrite moves."""
    if not hasattr(mod, "forward") or mod.gradient is None:
        return outputs
    return outputs[:2] + [outputs[load.derivative] for load in mod.gradient.loads]


def check(new, new_captures, at, old, old_captures, old_at):
    actual, expected = (
        values(new, tuple(new_captures), at),
        values(old, tuple(old_captures), old_at),
    )
    for x, y in zip(derivatives(new, actual), derivatives(old, expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@factories
@pytest.mark.parametrize("offset", [0, 5, zoo.Q - ROWS])
def test_shifted_queries(factory, offset):
    unbounded = index_ranges(zoo.B, zoo.H, zoo.Q, zoo.K) | {"q": (0, INT32_MAX)}
    mod, captures = traced(factory, unbounded)
    new = rewritten(mod, shift_queries(index_ranges(zoo.B, zoo.H, ROWS, zoo.K)))
    at = inputs(q_len=ROWS)
    check(new, [*captures, jnp.int32(offset)], at, mod, captures, at | {"q": at["q"] + offset})


@factories
@pytest.mark.parametrize(("name", "size"), [("b", zoo.B), ("h", zoo.H)])
def test_selected_rows_and_heads(factory, name, size):
    table = jnp.asarray([size - 1, 0, size - 1], jnp.int32)
    mod, captures = traced(factory, index_ranges(zoo.B, zoo.H, zoo.Q, zoo.K))
    sizes = {"b": zoo.B, "h": zoo.H} | {name: len(table)}
    rewrite = select(index_ranges(sizes["b"], sizes["h"], zoo.Q, zoo.K), name, len(table), size)
    at = inputs(batch=sizes["b"], heads=sizes["h"])
    old = at | {name: table[at[name].reshape(-1)].reshape(at[name].shape)}
    check(rewritten(mod, rewrite), [*captures, table], at, mod, captures, old)


@factories
def test_folded_batch_of_captures(factory):
    """Three lanes with captures of their own, as rows n * B + b of one batch."""
    lanes = 3
    mod, captures = traced(factory, index_ranges(zoo.B, zoo.H, zoo.Q, zoo.K))
    own = [
        jnp.stack([c, c + c.dtype.type(1), c - c.dtype.type(1)]) if i % 2 == 0 else c
        for i, c in enumerate(captures)
    ]
    leading = [i % 2 == 0 for i in range(len(captures))]
    batch = lanes * zoo.B
    rewrite = fold_batch(index_ranges(batch, zoo.H, zoo.Q, zoo.K), zoo.B, lanes, leading)
    new = rewritten(mod, rewrite)
    at = inputs(batch=batch)
    actual = derivatives(new, values(new, tuple(own), at))
    for lane in range(lanes):
        rows = slice(lane * zoo.B, (lane + 1) * zoo.B)
        mine = [c[lane] if lead else c for c, lead in zip(own, leading, strict=True)]
        expected = derivatives(
            mod, values(mod, tuple(mine), inputs() | {"score": at["score"][rows]})
        )
        for x, y in zip(actual, expected, strict=True):
            np.testing.assert_allclose(x[rows], y, rtol=1e-5, atol=1e-5)


def test_folded_batch_names_the_lane_of_every_element_that_is_read():
    factory = zoo.relative_table
    mod, captures = traced(factory, index_ranges(zoo.B, zoo.H, zoo.Q, zoo.K))
    rewrite = fold_batch(index_ranges(3 * zoo.B, zoo.H, zoo.Q, zoo.K), zoo.B, 3, [True])
    new = rewritten(mod, rewrite)
    (load,), (old,) = new.gradient.loads, mod.gradient.loads
    stacked = jnp.stack([captures[0]] * 3)
    at = inputs(batch=3 * zoo.B)
    outputs = values(new, (stacked,), at)
    lane, *indices = (outputs[i] for i in load.indices)
    np.testing.assert_array_equal(lane, jnp.broadcast_to(at["b"] // zoo.B, lane.shape))
    single = values(mod, tuple(captures), inputs())
    for x, i in zip(indices, old.indices, strict=True):
        np.testing.assert_array_equal(x[: zoo.B], single[i])
    assert new.forward.captures[0].shape == (3, *captures[0].shape)


def test_rewrites_compose():
    """Rows of a selected head of a mask, under vmap: each rewrite works on the one before."""
    factory = zoo.branch_by_head
    arrays = zoo.captured(factory)
    graph, captures = traced(
        factory, index_ranges(zoo.B, zoo.H, zoo.Q, zoo.K) | {"q": (0, INT32_MAX)}
    )
    table, offset = jnp.asarray([3, 1], jnp.int32), jnp.int32(7)
    ranges = index_ranges(zoo.B, 2, ROWS, zoo.K)
    graph = rewrite_graph(graph, select(ranges | {"q": (0, INT32_MAX)}, "h", 2, zoo.H))
    graph = rewrite_graph(graph, shift_queries(ranges))
    captures = [*captures, table, offset]
    folded = index_ranges(2 * zoo.B, 2, ROWS, zoo.K)
    graph = rewrite_graph(graph, fold_batch(folded, zoo.B, 2, [False] * len(captures)))
    (actual,) = values(graph, tuple(captures), inputs(2 * zoo.B, 2, ROWS, zoo.K))
    expected = zoo.everywhere(factory(**arrays), scored=False)()[:, table, 7 : 7 + ROWS]
    np.testing.assert_array_equal(actual, jnp.concatenate([expected, expected]))


def test_rewrites_are_part_of_the_identity():
    ranges = index_ranges(zoo.B, zoo.H, zoo.Q, zoo.K)
    for factory in (zoo.document, zoo.sorted_pair):
        first, _ = traced(factory, ranges)
        again, _ = traced(factory, ranges)
        rewrite = shift_queries(index_ranges(zoo.B, zoo.H, ROWS, zoo.K))
        assert rewrite_graph(first, rewrite) == rewrite_graph(again, rewrite)
        assert rewrite_graph(first, rewrite) != first


def test_captures_keep_their_places():
    """A rewrite that makes a capture useless keeps it: the arrays stay with the caller."""
    gates = zoo.ARRAYS["gates"]
    table = zoo.ARRAYS["row_docs"]
    ranges = index_ranges(3, zoo.H, zoo.Q, zoo.K)
    graph, captures = trace_mask_mod(
        lambda b, h, q, k: jnp.where(b < 1, table[q] == 1, gates[h] > 0), ranges
    )
    assert len(captures) == 2
    only_first = select(index_ranges(1, zoo.H, zoo.Q, zoo.K), "b", 1, 1)
    new = rewrite_graph(graph, only_first)
    assert [c.shape for c in new.captures] == [*(c.shape for c in captures), (1,)]
    extra = jnp.zeros(1, jnp.int32)
    (actual,) = values(new, (*captures, extra), inputs(batch=1))
    np.testing.assert_array_equal(actual[0, 0, :, 0], table == 1)
