"""Bounds over regions are sound: no position has a value outside them, for any graph that the IR can hold.

An expression is a nested tuple: ("input", name), ("const", value), ("load", array, index...) or (operation,
operand, ...). Every node of its graph is evaluated at every position and compared with its bounds.
"""

import itertools
import warnings

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings

from flexjax.block_lists import FULL, Geometry
from flexjax.block_states import block_states
from flexjax.mods import bound_rules
from flexjax.mods.bound_rules import Bounds
from flexjax.mods.builder import Builder
from flexjax.mods.evaluate import evaluate_numpy
from flexjax.mods.ops import COMPARISONS
from flexjax.mods.range_queries import _sparse_tables
from flexjax.mods.regions import Exact, Regions, bounds, node_bounds
from flexjax.mods.trace import index_ranges, trace_mask_mod

BATCH, HEADS = 2, 2
GEOMETRIES = [Geometry(9, 11, 4, 3), Geometry(12, 8, 5, 8), Geometry(7, 7, 1, 2)]
LIMITS = np.iinfo(np.int32)
SPECIAL = [0, 1, -1, 2, 3, 5, 64, LIMITS.max, LIMITS.min, 46341, 1 << 30]
COMPARE = ["eq", "ne", "lt", "le", "gt", "ge"]
INTEGER_2 = ["add", "sub", "mul", "div", "rem", "max", "min", "and", "or", "xor"]
INTEGER_2 += ["shift_right_arithmetic"]
INTEGER_1 = ["neg", "abs", "sign", "square", "not"]
LOGIC_2, LOGIC_1 = ["and", "or", "xor"], ["not"]
FLOAT_2 = ["add", "sub", "mul", "div", "max", "min"]
FLOAT_1 = ["neg", "abs", "square", "floor", "ceil", "sign", "exp", "sqrt"]
ARRAYS = {
    "ids": np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 5, 5, -1], np.int32),
    "table": np.array([[3, -2, 7, 0, 0, 9, 1], [LIMITS.max, 4, 4, 4, LIMITS.min, 0, 2]], np.int32),
    "small": np.array([1, 200, 3, 255, 0], np.uint8),
    "flags": np.array([[True] * 6 + [False] * 6, [False, True] * 6]),
    "bias": np.array([0.5, -1.5, np.inf, 2.0, np.nan, 1e-40, 3e38, -0.0], np.float32),
    "half": np.array([0.25, -7.0, 2.5, 65504.0], np.float16),
    "scalar": np.array(3, np.int32),
}
INTEGER_ARRAYS, FLOAT_ARRAYS = ["ids", "table", "small", "scalar"], ["bias", "half"]


def loads(names):
    def indices(name):
        each = st.one_of(st.tuples(st.just("input"), st.sampled_from(["q", "kv", "b"])), integers)
        return st.tuples(st.just("load"), st.just(name), *[each] * ARRAYS[name].ndim)

    return st.sampled_from(names).flatmap(indices)


def operation(names, *operands):
    return st.tuples(st.sampled_from(names), *operands)


indices = st.tuples(st.just("input"), st.sampled_from(["q", "kv", "b", "h"]))
truths = st.deferred(
    lambda: st.one_of(
        operation(COMPARE, integers, integers),
        operation(COMPARE, integers, integers),
        operation(COMPARE, floats, floats),
        operation([*LOGIC_2, *COMPARE], truths, truths),
        operation(["not"], truths),
        operation(["bool"], integers),
        operation(["bool"], floats),
        loads(["flags"]),
    )
)
integers = st.deferred(
    lambda: st.one_of(
        st.tuples(st.just("input"), st.sampled_from(["q", "kv", "q", "kv", "b", "h"])),
        st.tuples(st.just("input"), st.sampled_from(["q", "kv"])),
        st.tuples(st.just("const"), st.one_of(st.integers(-9, 9), st.sampled_from(SPECIAL))),
        operation(INTEGER_2, integers, integers),
        operation(INTEGER_1, integers),
        operation(["clamp"], integers, integers, integers),
        operation(["select_n"], truths, integers, integers),
        operation(["choose"], integers, indices, indices, indices),
        operation(["int", "int8", "uint8"], truths),
        operation(["int8", "uint8", "uint32"], integers),
        operation(["int"], floats),
        loads(INTEGER_ARRAYS),
    )
)
floats = st.deferred(
    lambda: st.one_of(
        operation(["float", "half"], integers),
        operation(FLOAT_2, floats, floats),
        operation(FLOAT_1, floats),
        operation(["select_n"], truths, floats, floats),
        operation(["clamp"], loads(FLOAT_ARRAYS), floats, loads(FLOAT_ARRAYS)),
        loads(FLOAT_ARRAYS),
    )
)
TYPES = {"bool": "bool", "int": "int32", "float": "float32", "half": "float16"}
TYPES |= {name: name for name in ("int8", "uint8", "uint32")}


class Graphs:
    """Builds an expression's graph; all of its subexpressions are outputs."""

    def __init__(self, geometry):
        self.builder = Builder(index_ranges(BATCH, HEADS, geometry.q_len, geometry.kv_len))
        self.nodes = []

    def visit(self, op, *operands):
        self.nodes.append(self._visit(op, *operands))
        return self.nodes[-1]

    def _visit(self, op, *operands):
        build = self.builder
        if op == "input":
            return build.input(operands[0])
        if op == "const":
            return build.const(operands[0], np.int32)
        if op == "load":
            array = ARRAYS[operands[0]]
            capture = build.capture(array)
            indices = [self._integer(self.visit(*i)) for i in operands[1:]]
            inside = [build.clamp(i, 0, n - 1) for i, n in zip(indices, array.shape, strict=True)]
            loaded = build.load(capture, inside, array.dtype)
            if array.dtype.kind == "b":
                return loaded
            return build.convert(loaded, np.int32 if array.dtype.kind in "iu" else np.float32)
        nodes = [self.visit(*o) for o in operands]
        if op == "choose":  # one of three, by a number
            return build.apply("select_n", [build.clamp(nodes[0], 0, 2), *nodes[1:]])
        if op in TYPES:  # and back: operands of other operations have one type each
            narrow = build.convert(nodes[0], TYPES[op])
            kind = np.dtype(TYPES[op]).kind
            self.nodes.append(narrow)
            return build.convert(narrow, {"b": "bool", "f": "float32"}.get(kind, "int32"))
        return build.apply(op, nodes)

    def _integer(self, ref):
        return ref if ref.dtype == np.int32 else self.builder.convert(ref, np.int32)


def regions_of(geometry, xp):
    def first(count, block, axis):
        shape = [1] * 4
        shape[axis] = count
        return (xp.arange(count, dtype=np.int32) * block).reshape(shape)

    q, kv = (
        first(geometry.rows, geometry.q_block, 2),
        first(geometry.cols, geometry.kv_block, 3),
    )
    return Regions(
        {
            "b": Exact(first(BATCH, 1, 0)),
            "h": Exact(first(HEADS, 1, 1)),
            "q": Bounds(q, xp.minimum(q + geometry.q_block, geometry.q_len) - 1),
            "kv": Bounds(kv, xp.minimum(kv + geometry.kv_block, geometry.kv_len) - 1),
        },
        {
            "q": (geometry.q_len, geometry.q_block, 2),
            "kv": (geometry.kv_len, geometry.kv_block, 3),
        },
    )


def everywhere(geometry):
    sizes = (BATCH, HEADS, geometry.q_len, geometry.kv_len)
    grid = np.ogrid[tuple(map(slice, sizes))]
    return sizes, {n: x.astype(np.int32) for n, x in zip(("b", "h", "q", "kv"), grid, strict=True)}


def spread(bound, geometry):
    """A bound of every region as one of every position."""
    shape = (BATCH, HEADS, geometry.rows, geometry.cols)
    wide = np.broadcast_to(np.asarray(bound), shape)
    wide = wide.repeat(geometry.q_block, 2).repeat(geometry.kv_block, 3)
    return wide[:, :, : geometry.q_len, : geometry.kv_len]


def check(geometry, graph, captures, found):
    """No value lies outside the bounds; NaN bounds of floats claim nothing."""
    sizes, inputs = everywhere(geometry)
    whole = type(graph)(graph.nodes, tuple(range(len(graph.nodes))), graph.captures)
    for node, value, known in zip(
        graph.nodes, evaluate_numpy(whole, captures, inputs), found, strict=True
    ):
        value = np.broadcast_to(value, sizes)
        if known is None:
            continue
        if isinstance(known, Exact):
            np.testing.assert_array_equal(spread(known.value, geometry), value)
            continue
        low, high = spread(known.low, geometry), spread(known.high, geometry)
        value = value.astype(low.dtype)
        outside = (value < low) | (value > high)
        if low.dtype.kind == "f":
            assert (np.isnan(low) == np.isnan(high)).all()
            outside |= np.isnan(value) & ~np.isnan(low)
        assert not outside.any(), f"{node.op}: {value[outside][0]} is outside its bounds\n{graph}"


def built(geometry, expression):
    graphs = Graphs(geometry)
    graphs.visit(*expression)
    graph, kept = graphs.builder.finish(graphs.nodes)
    return graph, [graphs.builder.captures[i] for i in kept]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=80)
@given(truths, st.sampled_from(GEOMETRIES))
@example(("eq", ("load", "ids", ("input", "q")), ("load", "ids", ("input", "kv"))), GEOMETRIES[0])
@example(("le", ("load", "bias", ("input", "q")), ("load", "bias", ("input", "kv"))), GEOMETRIES[0])
@example(("load", "flags", ("input", "b"), ("sub", ("input", "q"), ("input", "kv"))), GEOMETRIES[1])
def test_no_value_is_outside_its_bounds(expression, geometry):
    graph, captures = built(geometry, expression)
    check(geometry, graph, captures, node_bounds(graph, captures, regions_of(geometry, np), np))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=15)
@given(truths, st.sampled_from(GEOMETRIES[:1]))
def test_bounds_by_jax_are_sound(expression, geometry):
    graph, captures = built(geometry, expression)
    arrays = [jnp.asarray(c) for c in captures]
    run = jax.jit(lambda a: [
        v and (v.value if isinstance(v, Exact) else (v.low, v.high))
        for v in node_bounds(graph, a, regions_of(geometry, jnp), jnp)
    ])  # fmt: skip
    found = [
        v if v is None else Bounds(*v) if isinstance(v, tuple) else Exact(v) for v in run(arrays)
    ]
    check(geometry, graph, captures, found)


@pytest.mark.parametrize("operation", [*INTEGER_2, *INTEGER_1])
def test_every_integer_rule_is_sound(operation):
    """Each rule on its own, at ranges around zero and at both ends of int32."""
    for scale, offset in [(1, -4), (3, 0), (1, LIMITS.max - 12), (2, LIMITS.min), (9000, -40000)]:
        terms = [
            ("add", ("mul", ("input", name), ("const", scale)), ("const", offset))
            for name in ("q", "kv")
        ]
        others = [terms[1], ("sub", ("input", "kv"), ("const", 5)), ("const", 3), ("const", -4)]
        for other in others if operation in INTEGER_2 else [None]:
            operands = [terms[0]] if other is None else [terms[0], other]
            for order in (operands, operands[::-1]):
                graph, captures = built(GEOMETRIES[0], (operation, *order))
                with np.errstate(all="ignore"):
                    found = node_bounds(graph, captures, regions_of(GEOMETRIES[0], np), np)
                    check(GEOMETRIES[0], graph, captures, found)


@pytest.mark.parametrize("operation", [*FLOAT_2, *FLOAT_1, "clamp"])
def test_every_float_rule_is_sound(operation):
    """Each rule on its own, around zero, where sums lose digits, and at infinity and NaN."""
    q, kv = (("float", ("input", name)) for name in ("q", "kv"))
    tenth = ("load", "bias", ("const", 0))
    terms = [
        ("sub", q, ("float", ("const", 4))),
        ("mul", ("sub", kv, q), tenth),
        ("add", ("mul", kv, tenth), ("float", ("const", 1 << 24))),
        ("load", "bias", ("input", "kv")),
    ]
    count = 3 if operation == "clamp" else 2 if operation in FLOAT_2 else 1
    for first, second in itertools.product(terms, terms if count > 1 else terms[:1]):
        operands = {1: [first], 2: [first, second], 3: [terms[0], first, second]}[count]
        expression = ("lt", (operation, *operands), q)
        graph, captures = built(GEOMETRIES[0], expression)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found = node_bounds(graph, captures, regions_of(GEOMETRIES[0], np), np)
            check(GEOMETRIES[0], graph, captures, found)


def test_no_rule_is_without_a_test():
    """Rules of `bound_rules` that no random graph would meet."""
    assert bound_rules.INTEGER.keys() <= {*INTEGER_2, *INTEGER_1}
    assert bound_rules.FLOAT.keys() <= {*FLOAT_2, *FLOAT_1}
    assert bound_rules.LOGIC.keys() <= {*LOGIC_2, *LOGIC_1}
    assert bound_rules.MONOTONE.keys() <= {*INTEGER_2, *FLOAT_2, *FLOAT_1, "clamp"}
    assert set(COMPARISONS) <= set(COMPARE)


def decided(mod, geometry):
    """How many regions are decided, and how many could be."""
    ranges = index_ranges(BATCH, HEADS, geometry.q_len, geometry.kv_len)
    graph, captures = trace_mask_mod(mod, ranges)
    captures = [np.asarray(c) for c in captures]
    true, possible = bounds(graph, captures, regions_of(geometry, np), np)
    sizes, inputs = everywhere(geometry)
    (value,) = evaluate_numpy(graph, captures, inputs)
    value = np.broadcast_to(value, sizes)
    rows, cols = np.arange(geometry.rows), np.arange(geometry.cols)

    def each(reduce):
        by_row = reduce.reduceat(value, rows * geometry.q_block, 2)
        return reduce.reduceat(by_row, cols * geometry.kv_block, 3)

    everything, anything = each(np.logical_and), each(np.logical_or)
    wide = np.broadcast_to(true, everything.shape), np.broadcast_to(possible, everything.shape)
    return (wide[0] | ~wide[1]).sum(), (everything | ~anything).sum()


IDS = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 6, 96)), jnp.int32)
WIDTH = jnp.asarray(np.random.default_rng(1).integers(0, 40, 96), jnp.int32)


@pytest.mark.parametrize(
    "mod",
    [
        lambda b, h, q, k: q >= k,
        lambda b, h, q, k: jnp.abs(q - k) <= 10,
        lambda b, h, q, k: (q - k <= 12) & (k <= q),
        lambda b, h, q, k: q // 12 == k // 12,
        lambda b, h, q, k: (k <= q) | (k < 16),
        lambda b, h, q, k: IDS[q] == IDS[k],
        lambda b, h, q, k: (IDS[q] == IDS[k]) & (k <= q),
        lambda b, h, q, k: ~(IDS[q] != IDS[k]) ^ (h > 0),
        lambda b, h, q, k: jnp.where(h == 0, q >= k, q - k < 8),
        lambda b, h, q, k: q * 1.0 >= k * 1.0 + 8.0,
        lambda b, h, q, k: (q >> 3) == (k >> 3),
        lambda b, h, q, k: (q // 8 % 2 == 0) & (k <= q),
    ],
    ids=[
        *(
            "causal",
            "distance",
            "window",
            "chunks",
            "prefix",
            "document",
            "causal document",
            "heads",
        ),
        *("window by head", "floats", "shift", "remainder"),
    ],
)
def test_usual_masks_are_decided_wherever_they_are_constant(mod):
    found, possible = decided(mod, Geometry(96, 96, 8, 8))
    assert found == possible


def test_widths_that_vary_inside_a_block_leave_little_open():
    found, possible = decided(lambda b, h, q, k: q - k <= WIDTH[q], Geometry(96, 96, 8, 8))
    assert 0.9 * possible < found < possible


def test_ranges_of_large_arrays_are_bounded_by_chunks():
    """The table of a large array holds chunks of it: bounds are wider, and still sound."""
    values = np.random.default_rng(0).integers(-50, 50, 40000).cumsum().astype(np.int32)
    array = jnp.asarray(values)
    geometry = Geometry(2000, 1900, 100, 100)
    graph, captures = trace_mask_mod(
        lambda b, h, q, k: array[10 * (q + k)] > 0, index_ranges(BATCH, HEADS, 2000, 1900)
    )
    regions = regions_of(geometry, np)
    for xp, arrays in ((np, [values]), (jnp, captures)):
        found = node_bounds(graph, arrays, regions_of(geometry, xp), xp)
        check(geometry, graph, [values], found)
    true, possible = bounds(graph, [values], regions, np)
    assert (true | ~possible).mean() > 0.5


@pytest.mark.parametrize("length", [1, 2, 33, 70])
def test_tables_of_ranges_hold_the_extremes(length):
    array = np.random.default_rng(length).standard_normal((2, length, 3)).astype(np.float32)
    array[1, length // 2, 0] = np.nan
    for xp in (np, jnp):
        low, high = _sparse_tables((array, array), 1, xp)
        assert low.shape == high.shape == (length.bit_length(), 2, length, 3)
        for level, first in itertools.product(range(low.shape[0]), range(length)):
            part = array[:, first : first + 2**level]
            if part.shape[1] == 2**level:
                np.testing.assert_array_equal(low[level, :, first], part.min(1))
                np.testing.assert_array_equal(high[level, :, first], part.max(1))


def test_a_number_that_is_none_is_seen_in_any_reduction():
    """XLA's minimum over an axis that is not the last passed over NaN on a CPU."""
    table = np.ones((96, 3), np.float32)
    table[40, 1] = np.nan
    captured = jnp.asarray(table)
    for mod in (
        lambda b, h, q, k: captured[q, b] > 0,
        lambda b, h, q, k: captured[q - k + 48, b] > 0,
        lambda b, h, q, k: captured[q + k, k // 40] > 0,
    ):
        geometry = Geometry(48, 48, 16, 16)
        graph, captures = trace_mask_mod(mod, index_ranges(3, 1, 48, 48))
        found = np.broadcast_to(block_states(graph, captures, geometry, 3, 1), (3, 1, 3, 3))
        b, h, q, k = np.ogrid[:3, :1, :48, :48]
        (dense,) = evaluate_numpy(graph, [table], {"b": b, "h": h, "q": q, "kv": k})
        dense = np.broadcast_to(dense, (3, 1, 48, 48)).reshape(3, 1, 3, 16, 3, 16)
        np.testing.assert_array_equal(found == FULL, dense.all((3, 5)))
