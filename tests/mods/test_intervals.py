"""Interval arithmetic and the rewrites that it justifies, on random integer expressions.

An expression is a nested tuple: ("input", name), ("const", value) or (operation, operand, ...). It is computed
twice: one operation after another by `jax.lax`, and as the simplified graph.
"""

import itertools
import operator

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from jax import lax

from flexjax.mods.builder import Builder
from flexjax.mods.evaluate import evaluate_numpy
from flexjax.mods.intervals import decide_comparison, result_interval

SAMPLES = 40
INPUTS = ("b", "h", "q", "kv")
LIMITS = np.iinfo(np.int32)
COMPARE = {"eq": lax.eq, "ne": lax.ne, "lt": lax.lt, "le": lax.le, "gt": lax.gt, "ge": lax.ge}
BINARY = {
    "add": lax.add,
    "sub": lax.sub,
    "mul": lax.mul,
    "div": lax.div,
    "rem": lax.rem,
    "max": lax.max,
    "min": lax.min,
    "and": lax.bitwise_and,
    "or": lax.bitwise_or,
    "xor": lax.bitwise_xor,
}
UNARY = {"neg": lax.neg, "abs": lax.abs, "sign": lax.sign, "square": lax.square}
SPECIAL = [0, 1, -1, 2, 3, 7, 16, 127, 128, 1 << 24, LIMITS.max, LIMITS.min]

numbers = st.one_of(st.integers(-20, 20), st.sampled_from(SPECIAL))
leaves = st.one_of(
    st.tuples(st.just("input"), st.sampled_from(INPUTS)), st.tuples(st.just("const"), numbers)
)
truths = st.deferred(
    lambda: st.one_of(
        st.tuples(st.sampled_from(sorted(COMPARE)), integers, integers),
        st.tuples(st.sampled_from(["both", "either", "differ"]), truths, truths),
        st.tuples(st.just("negation"), truths),
    )
)
integers = st.deferred(
    lambda: st.one_of(
        leaves,
        st.tuples(st.sampled_from(sorted(BINARY)), integers, integers),
        st.tuples(st.sampled_from(sorted(BINARY)), integers, integers),
        st.tuples(st.sampled_from(sorted(UNARY)), integers),
        st.tuples(st.just("clamp"), integers, integers, integers),
        st.tuples(st.just("select"), truths, integers, integers),
        st.tuples(st.just("as integer"), truths),
    )
)


@st.composite
def ranges(draw):
    """A range for every input: around zero, far away, or unknown (that of int32)."""
    found = {}
    for name in INPUTS:
        low = draw(st.one_of(st.integers(-40, 40), st.sampled_from([LIMITS.min, LIMITS.max - 50])))
        wide = draw(st.booleans())
        found[name] = (low, LIMITS.max if wide else low + draw(st.integers(0, 40)))
    return found


def sampled(ranges, seed):
    rng = np.random.default_rng(seed)
    inputs = {}
    for name, (low, high) in ranges.items():
        values = rng.integers(low, high, SAMPLES, endpoint=True)
        values[:2] = low, high
        inputs[name] = rng.permutation(values).astype(np.int32)
    return inputs


class Both:
    """Every subexpression as (a node of the simplified graph, its value by jax.lax)."""

    def __init__(self, ranges, inputs, dtype):
        self.builder, self.inputs, self.dtype = Builder(ranges), inputs, np.dtype(dtype)
        self.seen = []

    def visit(self, expression):
        self.seen.append(self._visit(*expression))
        return self.seen[-1]

    def _visit(self, op, *operands):
        build, dtype = self.builder, self.dtype
        if op == "input":
            value = jnp.asarray(self.inputs[operands[0]])
            node = build.input(operands[0])
            return build.convert(node, dtype), lax.convert_element_type(value, dtype)
        if op == "const":
            value = np.asarray(operands[0]).astype(dtype)
            return build.const(value, dtype), jnp.full(SAMPLES, value)
        nodes, values = zip(*map(self.visit, operands), strict=True)
        if op in BINARY or op in COMPARE or op in UNARY:
            function = (BINARY | COMPARE | UNARY)[op]
            return build.apply(op, nodes), function(*values)
        if op == "clamp":
            return build.apply(op, nodes), lax.clamp(*values)
        if op == "select":
            which, yes, no = range(3)
            order = (which, no, yes)
            return (
                build.apply("select_n", [nodes[i] for i in order]),
                lax.select_n(*(values[i] for i in order)),
            )
        if op == "as integer":
            return build.convert(nodes[0], dtype), lax.convert_element_type(values[0], dtype)
        logic = {
            "both": ("and", lax.bitwise_and),
            "either": ("or", lax.bitwise_or),
            "differ": ("xor", lax.bitwise_xor),
            "negation": ("not", lax.bitwise_not),
        }
        name, function = logic[op]
        return build.apply(name, nodes), function(*values)


@settings(max_examples=120)
@given(integers, ranges(), st.sampled_from(["int32", "int8", "uint8"]), st.integers(0, 99))
@example(
    ("div", ("input", "q"), ("const", -1)),
    dict.fromkeys(INPUTS, (LIMITS.min, LIMITS.min + 1)),
    "int32",
    0,
)
@example(("rem", ("input", "q"), ("const", 0)), dict.fromkeys(INPUTS, (-3, 3)), "int32", 0)
def test_graph_equals_expression_and_stays_in_its_interval(expression, ranges, dtype, seed):
    inputs = sampled(ranges, seed)
    both = Both(ranges, inputs, dtype)
    both.visit(expression)
    nodes, expected = zip(*both.seen, strict=True)
    graph, _ = both.builder.finish(nodes)
    for node, actual, value in zip(nodes, evaluate_numpy(graph, (), inputs), expected, strict=True):
        np.testing.assert_array_equal(np.broadcast_to(actual, SAMPLES), value)
        assert node.dtype == value.dtype
        if node.interval is not None:
            low, high = node.interval
            assert low <= int(value.min())
            assert int(value.max()) <= high


intervals = st.tuples(st.integers(-30, 30), st.integers(0, 12)).map(lambda x: (x[0], x[0] + x[1]))


@given(st.sampled_from(sorted(COMPARE)), intervals, intervals)
def test_comparison_is_decided_exactly_where_all_values_agree(op, x, y):
    compare = getattr(operator, op)
    pairs = itertools.product(range(x[0], x[1] + 1), range(y[0], y[1] + 1))
    outcomes = {compare(i, j) for i, j in pairs}
    decided = decide_comparison(op, x, y)
    assert decided == (outcomes.pop() if len(outcomes) == 1 else None)


def test_only_comparisons_are_decided():
    with pytest.raises(ValueError, match="'add' is not a comparison"):
        decide_comparison("add", (0, 1), (0, 1))


@given(
    st.sampled_from(["add", "sub", "mul", "max", "min", "neg", "abs", "clamp"]),
    st.lists(intervals, min_size=3, max_size=3),
)
def test_interval_is_as_tight_as_its_operands_allow(op, operands):
    """These operations reach both ends of the interval that is claimed for them."""
    function = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "max": np.maximum,
        "min": np.minimum,
        "neg": np.negative,
        "abs": np.abs,
        "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    }[op]
    count = {"neg": 1, "abs": 1, "clamp": 3}.get(op, 2)
    operands = operands[:count]
    values = function(*np.ix_(*(np.arange(a, b + 1) for a, b in operands)))
    assert result_interval(op, operands) == (values.min(), values.max())


def test_nothing_is_known_of_an_operation_on_unknown_integers():
    assert result_interval("add", [(0, 3), None]) is None
    assert result_interval("div", [(0, 3), (-1, 1)]) is None
    assert result_interval("shift_left", [(0, 3), (0, 1)]) is None


def test_what_is_known_of_an_operation_on_an_unknown_integer():
    assert result_interval("sign", [None]) == (-1, 1)
    assert result_interval("clamp", [(0, 0), None, (9, 9)]) == (0, 9)
    assert result_interval("select_n", [None, (0, 2), (5, 6)]) == (0, 6)
