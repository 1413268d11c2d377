"""What graphs look like: ranks, exact rewrites, sizes, and when two of them are the same."""

import operator

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax

from flexjax.mods.builder import Builder
from flexjax.mods.evaluate import evaluate, evaluate_numpy
from flexjax.mods.graph import Literal
from flexjax.mods.trace import index_ranges, trace_mask_mod, trace_score_mod
from tests.mods import zoo

RANGES = index_ranges(zoo.B, zoo.H, zoo.Q, zoo.K)


def mask_graph(mod, ranges=RANGES):
    return trace_mask_mod(mod, ranges)[0]


def score_graph(mod, ranges=RANGES):
    return trace_score_mod(mod, ranges)[0].forward


def operations(graph):
    """Names of the operations, without inputs and constants, as (operation, rank)."""
    return [(n.op, n.rank) for n in graph.nodes if n.op not in ("input", "const")]


def output(graph):
    return graph.nodes[graph.outputs[0]]


# -- dependence and rank ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mod", "rank", "depends"),
    [
        (lambda b, h, q, k: h < 2, "scalar", {"h"}),
        (lambda b, h, q, k: (b == 0) & (h < 2), "scalar", {"b", "h"}),
        (lambda b, h, q, k: q < h, "row", {"q", "h"}),
        (lambda b, h, q, k: k < 7 + b, "column", {"kv", "b"}),
        (lambda b, h, q, k: q < k, "tile", {"q", "kv"}),
        (lambda b, h, q, k: q - q + h < 3, "row", {"q", "h"}),
        (lambda b, h, q, k: (q >= 0) & (k < 7), "column", {"kv"}),
        (lambda b, h, q, k: True, "scalar", set()),
    ],
    ids=["head", "batch-head", "row", "column", "tile", "uncancelled", "decided", "constant"],
)
def test_rank_follows_from_the_inputs_that_a_node_depends_on(mod, rank, depends):
    graph = mask_graph(mod)
    assert output(graph).rank == rank
    assert output(graph).depends == graph.depends == depends


def test_whatever_depends_on_the_score_is_a_tile():
    gates = zoo.ARRAYS["gates"]
    graph = score_graph(lambda s, b, h, q, k: s * gates[h] + jnp.exp(gates[b]))
    ranks = dict(operations(graph))
    assert ranks == {"load": "scalar", "exp": "scalar", "mul": "tile", "add": "tile"}


def test_rows_and_columns_are_worked_out_once():
    ids = zoo.ARRAYS["key_docs"]
    graph = mask_graph(lambda b, h, q, k: ids[q] * 2 + 1 == ids[k] * 2 + 1)
    assert operations(graph) == [
        *[(op, "row") for op in ("load", "mul", "add")],
        *[(op, "column") for op in ("load", "mul", "add")],
        ("eq", "tile"),
    ]


def test_evaluation_keeps_every_node_at_its_own_rank():
    graph = mask_graph(lambda b, h, q, k: k < 7)
    assert evaluate(graph, (), zoo.grid())[0].shape == (1, 1, 1, zoo.K)
    assert evaluate_numpy(graph, (), zoo.grid(np))[0].shape == (1, 1, 1, zoo.K)


# -- sizes ------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (zoo.causal, [("ge", "tile")]),
        (zoo.document_of_two_arrays, [("load", "row"), ("load", "column"), ("eq", "tile")]),
        (zoo.chunked, [("div", "row"), ("div", "column"), ("eq", "tile")]),
        (
            zoo.alibi,
            [
                ("load", "scalar"),
                ("convert", "column"),
                ("convert", "row"),
                ("sub", "tile"),
                ("mul", "tile"),
                ("add", "tile"),
            ],
        ),
        (zoo.padding, [("load", "column")]),
        (zoo.dense_bias_by_head, [("load", "tile"), ("convert", "tile"), ("add", "tile")]),
        (zoo.bias_one_index_at_a_time, [("load", "tile"), ("convert", "tile"), ("add", "tile")]),
        (zoo.always, []),
        (zoo.never, []),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_indexing_leaves_nothing_behind(factory, expected):
    """No fix-up of negative indices, no clamp, no rounding of a quotient: ranges prove them idle."""
    mod = factory(**zoo.captured(factory))
    trace = score_graph if factory.__name__ in zoo.SCORES else mask_graph
    assert operations(trace(mod)) == expected


def test_remainder_of_what_is_never_negative_is_one_operation():
    assert operations(mask_graph(lambda b, h, q, k: q % 6 == 2)) == [("rem", "row"), ("eq", "row")]


def test_sign_is_looked_at_where_it_may_be_negative():
    ops = [op for op, _ in operations(mask_graph(lambda b, h, q, k: (q - k) // 4 == 1))]
    assert ops.count("div") == 1
    assert "select_n" in ops


DIVIDENDS = {
    "q": lambda q, k: q,
    "q - k": lambda q, k: q - k,
    "k - 50": lambda q, k: k - 50,
    "q * k": lambda q, k: q * k,
}


@settings(max_examples=40)
@given(
    st.sampled_from([operator.floordiv, operator.mod]),
    st.sampled_from(sorted(DIVIDENDS)),
    st.integers(-9, 9).filter(bool),
    st.integers(-3, 3),
)
def test_floor_division_and_modulo_are_pythons(divide, dividend, divisor, result):
    def mod(b, h, q, k):
        return divide(DIVIDENDS[dividend](q, k), divisor) == result

    (actual,) = evaluate_numpy(mask_graph(mod), (), zoo.grid(np))
    expected = [[mod(0, 0, q, k) for k in range(zoo.K)] for q in range(zoo.Q)]
    actual = np.broadcast_to(actual, (zoo.B, zoo.H, zoo.Q, zoo.K))
    np.testing.assert_array_equal(actual[-1, -1], expected)


def test_an_index_that_may_leave_its_array_is_clamped():
    ids = jnp.arange(5, dtype=jnp.int32)
    inside = mask_graph(lambda b, h, q, k: ids[jnp.minimum(q, 4)] == 1)
    outside = mask_graph(lambda b, h, q, k: ids[q] == 1)
    assert [op for op, _ in operations(inside)] == ["min", "load", "eq"]
    assert [op for op, _ in operations(outside)] == ["clamp", "load", "eq"]


def test_computation_on_captures_alone_is_not_in_the_graph():
    factory = zoo.computed_inside_the_mod
    mod, captures = trace_score_mod(factory(**zoo.captured(factory)), RANGES)
    assert [op for op, _ in operations(mod.forward)] == ["load", "mul", "load", "add"]
    assert sorted(c.shape for c in captures) == [(zoo.H,), (zoo.H, zoo.Q, zoo.K)]


def test_one_array_is_captured_once():
    factory = zoo.two_reads_of_one_table
    _, captures = trace_score_mod(factory(**zoo.captured(factory)), RANGES)
    assert len(captures) == 1
    assert captures[0] is zoo.ARRAYS["table"]


def test_an_array_that_makes_no_difference_is_not_captured():
    ids = zoo.ARRAYS["key_docs"]
    graph, captures = trace_mask_mod(lambda b, h, q, k: (ids[q] == 3) & (k < 0), RANGES)
    assert captures == []
    assert graph.is_constant(False)


# -- conversions ------------------------------------------------------------------------------------


def converted(graph):
    return [n.rank for n in graph.nodes if n.op == "convert"]


@pytest.mark.parametrize(
    ("mod", "ranks"),
    [
        (lambda s, b, h, q, k: s + (k - q), ["column", "row"]),
        (lambda s, b, h, q, k: s + (k + q), ["column", "row"]),
        (lambda s, b, h, q, k: s + (k - q + 5), ["column", "row"]),
        (lambda s, b, h, q, k: s + (2 * k - (q - 3)), ["column", "row"]),
        (lambda s, b, h, q, k: s + (k * q), ["tile"]),
        (lambda s, b, h, q, k: s + jnp.abs(k - q), ["tile"]),
        (lambda s, b, h, q, k: s + (q - 7), ["row"]),
        (lambda s, b, h, q, k: s + (k - q).astype(jnp.bfloat16), ["tile", "tile"]),
    ],
    ids=["difference", "sum", "shifted", "scaled", "product", "absolute", "row", "bfloat16"],
)
def test_differences_are_converted_at_the_lowest_rank(mod, ranks):
    assert converted(score_graph(mod)) == ranks


@pytest.mark.parametrize("length", [1 << 24, (1 << 24) + 2], ids=["exact", "inexact"])
def test_differences_are_converted_apart_only_while_both_are_exact(length):
    graph = score_graph(
        lambda s, b, h, q, k: (k - q).astype(jnp.float32), index_ranges(1, 1, length, length)
    )
    assert converted(graph) == (["column", "row"] if length == 1 << 24 else ["tile"])
    q = np.array([0, 1, length - 1, length // 3], np.int32)
    inputs = {"q": q[:, None], "kv": q[None, ::-1]}
    (actual,) = evaluate_numpy(graph, (), inputs)
    np.testing.assert_array_equal(actual, (inputs["kv"] - inputs["q"]).astype(np.float32))


def test_an_unbounded_difference_is_converted_whole():
    graph = score_graph(lambda s, b, h, q, k: s + (h + q + k), index_ranges(1, 1, 64, 64))
    assert converted(graph) == ["tile"]


# -- floating point ---------------------------------------------------------------------------------


def test_floats_are_not_simplified_where_that_could_change_a_bit():
    ops = [op for op, _ in operations(score_graph(lambda s, b, h, q, k: (s + 0.0) - s + s * 0.0))]
    assert ops == ["add", "sub", "mul", "add"]


def test_multiplication_by_one_is_dropped():
    assert operations(score_graph(lambda s, b, h, q, k: s * 1.0)) == []


def test_zero_over_zero_keeps_a_float_remainder():
    """x == 0 and x rem c != 0 is never true of integers, but 0.0 rem 0.0 is NaN."""
    c = jnp.zeros(1)
    graph = score_graph(lambda s, b, h, q, k: jnp.where((s == 0) & (lax.rem(s, c[0]) != 0), 1.0, s))
    (actual,) = evaluate(graph, [c], zoo.grid() | {"score": jnp.zeros((1, 1, 1, 1))})
    assert actual.item() == 1.0


# -- equality ---------------------------------------------------------------------------------------


def same(left, right):
    """Whether two mods are one and the same compiled program; equality and hash agree."""
    if left == right:
        assert hash(left) == hash(right)
    return left == right


def make(factory, **changed):
    arrays = zoo.captured(factory) | changed
    trace = (
        trace_score_mod if factory.__name__ in zoo.SCORES | zoo.OPAQUE_SCORES else trace_mask_mod
    )
    return trace(factory(**arrays), RANGES)[0]


@pytest.mark.parametrize(
    "factory",
    zoo.params(
        {
            f.__name__: f
            for f in (
                zoo.document,
                zoo.any_segment,
                zoo.captured_window,
                zoo.t5_buckets,
                zoo.captured_cap,
                zoo.other_gradient,
                zoo.computed_before_the_kernel,
                zoo.sorted_pair,
                zoo.median_of_three,
                zoo.cumulative,
            )
        },
        smoke=("document", "other_gradient", "median_of_three"),
    ),
)
def test_same_body_with_other_arrays_is_the_same_mod(factory):
    first = make(factory)
    changed = {name: a + a.dtype.type(1) for name, a in zoo.captured(factory).items()}
    assert same(first, make(factory, **changed))


def test_shapes_and_types_of_captures_matter():
    f = zoo.key_bias
    bias = zoo.ARRAYS["bias_bhk"]
    assert not same(make(f), make(f, bias_bhk=bias.astype(jnp.bfloat16)))
    assert not same(make(f), make(f, bias_bhk=jnp.concatenate([bias, bias])))


def scaled(factor):
    return score_graph(lambda s, b, h, q, k: s * factor)


def test_other_constants_are_another_mod():
    assert same(scaled(0.5), scaled(0.5))
    assert not same(scaled(0.5), scaled(0.25))
    assert not same(scaled(2.0), scaled(np.float32(2.0000002)))
    assert not same(mask_graph(lambda b, h, q, k: q < 3), mask_graph(lambda b, h, q, k: q < 4))


def test_constants_are_compared_by_their_bits():
    assert same(scaled(np.nan), scaled(np.nan))
    assert same(scaled(-np.inf), scaled(-np.inf))
    assert not same(scaled(0.0), scaled(-0.0))
    assert Literal.of(1, np.int32) != Literal.of(1, np.float32)
    assert Literal.of(True, bool) != Literal.of(1, np.uint8)
    assert Literal.of(0.1, jnp.bfloat16) == Literal.of(0.1, jnp.bfloat16)
    assert repr(Literal.of(0.5, jnp.bfloat16)) == "0.5"


def test_other_operations_and_operands_are_another_mod():
    assert not same(mask_graph(lambda b, h, q, k: q < k), mask_graph(lambda b, h, q, k: q <= k))
    assert not same(mask_graph(lambda b, h, q, k: q < k), mask_graph(lambda b, h, q, k: k < q))
    assert mask_graph(lambda b, h, q, k: q < k) != "q < k"


def test_lengths_matter_only_where_they_decide_something():
    def mod(b, h, q, k):
        return q >= k

    assert same(mask_graph(mod), mask_graph(mod, index_ranges(1, 1, 99, 99)))
    ids = jnp.zeros(50, jnp.int32)

    def read(b, h, q, k):
        return ids[q] == 0

    assert not same(mask_graph(read), mask_graph(read, index_ranges(1, 1, 51, 51)))


def other_rule(factor, kind):
    if kind == "jvp":

        @jax.custom_jvp
        def f(x):
            return x

        f.defjvp(lambda p, t: (p[0], factor * t[0]))
    else:

        @jax.custom_vjp
        def f(x):
            return x

        f.defvjp(lambda x: (x, None), lambda _, ct: (factor * ct,))
    return f


@pytest.mark.parametrize("kind", ["jvp", "vjp"])
@pytest.mark.parametrize("opaque", [False, True], ids=["graph", "opaque"])
def test_another_derivative_rule_is_another_mod(kind, opaque):
    def mod(factor):
        f = other_rule(factor, kind)
        last = (lambda x: jnp.sort(jnp.stack([x, x]))[0]) if opaque else (lambda x: x)
        return trace_score_mod(lambda s, b, h, q, k: last(f(s)), RANGES)[0]

    assert same(mod(2.0), mod(2.0))
    assert not same(mod(2.0), mod(3.0))


def test_printing_shows_types_and_ranks():
    ids = zoo.ARRAYS["row_docs"]
    graph = mask_graph(lambda b, h, q, k: (ids[q] == 2) & (q >= k))
    assert str(graph).splitlines() == [
        "%0: int32<row> = load(q) capture=0",
        "%1: bool<row> = eq(%0, 2)",
        "%2: bool<tile> = ge(q, kv)",
        "%3: bool<tile> = and(%1, %2)",
        "return %3",
    ]


def test_equal_subexpressions_are_one_node():
    builder = Builder(RANGES)
    q, k = builder.input("q"), builder.input("kv")
    assert builder.apply("sub", (q, k)) is builder.apply("sub", (q, k))
    assert builder.apply("sub", (q, k)) is not builder.apply("sub", (k, q))
