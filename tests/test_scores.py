"""Score factories as pure functions: values against NumPy, and gradients of what they capture."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import scores
from flexjax.scores.relative_position_bias import distance_buckets

B, H, Q, KV = 2, 3, 9, 11
B_IDX, H_IDX, Q_IDX, KV_IDX = np.ogrid[:B, :H, :Q, :KV]
DISTANCE = KV_IDX - Q_IDX

rng = np.random.default_rng(0)
SCORES = rng.normal(size=(B, H, Q, KV)).astype(np.float32) * 3
PER_HEAD = rng.normal(size=H).astype(np.float32)
BIAS = rng.normal(size=(B, H, Q, KV)).astype(np.float32)
BUCKETS = rng.normal(size=(8, H)).astype(np.float32)
TABLE = rng.normal(size=(H, 2 * KV - 1)).astype(np.float32)
SHORT_TABLE = rng.normal(size=5).astype(np.float32)


@pytest.fixture(autouse=True)
def _strict_jax():
    """No score_mod may lean on implicit broadcasting or on implicit dtype promotion."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def apply(mod, values=SCORES):
    """The score_mod at every (b, h, q, kv), by vmap over the scalar function."""
    values = jnp.asarray(values)
    over = mod
    for axis in (3, 2, 1, 0):
        over = jax.vmap(over, [0, *(0 if i == axis else None for i in range(4))])
    return jax.jit(over)(values, *(jnp.arange(n, dtype=jnp.int32) for n in values.shape))


def t5_bucket(distance, num_buckets, bidirectional, max_distance):
    """The bucket of `key - query` as the T5 paper describes it, one distance at a time."""
    first, n = 0, -distance
    if bidirectional:
        num_buckets //= 2
        first, n = (num_buckets if distance > 0 else 0), abs(distance)
    n = max(n, 0)
    exact = num_buckets // 2
    if n < exact:
        return first + n
    growth = math.log(n / exact) / math.log(max_distance / exact)
    # The tolerance keeps distances that lie on a boundary there in spite of the rounding of log.
    return first + min(exact + int(growth * (num_buckets - exact) + 1e-9), num_buckets - 1)


def t5_bias(bidirectional, max_distance):
    bias = np.zeros((B, H, Q, KV), np.float32)
    for q in range(Q):
        for k in range(KV):
            bias[:, :, q, k] = BUCKETS[t5_bucket(k - q, len(BUCKETS), bidirectional, max_distance)]
    return bias


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


HEADS = PER_HEAD[H_IDX]

FORMULAS = [
    (
        "alibi",
        lambda: scores.alibi(3),
        SCORES + np.array([2**-4, 2**-8, 2**-2])[H_IDX] * DISTANCE,
        "alibi",
    ),
    (
        "alibi-slopes",
        lambda: scores.alibi(slopes=PER_HEAD),
        SCORES + HEADS * DISTANCE,
        "alibi",
    ),
    (
        "alibi-symmetric",
        lambda: scores.alibi(slopes=PER_HEAD, symmetric=True),
        SCORES - HEADS * abs(DISTANCE),
        "symmetric_alibi",
    ),
    ("soft-cap", lambda: scores.soft_cap(2), 2 * np.tanh(SCORES / 2), "soft_cap_2"),
    (
        "soft-cap-array",
        lambda: scores.soft_cap(jnp.float32(1.5)),
        1.5 * np.tanh(SCORES / 1.5),
        "soft_cap_dynamic",
    ),
    (
        "t5-bidirectional",
        lambda: scores.relative_position_bias(BUCKETS, max_distance=6),
        SCORES + t5_bias(True, 6),
        "relative_position_bias",
    ),
    (
        "t5-causal",
        lambda: scores.relative_position_bias(BUCKETS, False, 7),
        SCORES + t5_bias(False, 7),
        "relative_position_bias",
    ),
    (
        "relative-table",
        lambda: scores.relative_table(TABLE),
        SCORES + TABLE[H_IDX, Q_IDX - KV_IDX + KV - 1],
        "relative_table",
    ),
    (
        "relative-table-clipped",
        lambda: scores.relative_table(SHORT_TABLE),
        SCORES + SHORT_TABLE[np.clip(Q_IDX - KV_IDX, -2, 2) + 2],
        "relative_table",
    ),
    ("bias-4d", lambda: scores.additive_bias(BIAS), SCORES + BIAS, "additive_bias"),
    ("bias-3d", lambda: scores.additive_bias(BIAS[0]), SCORES + BIAS[:1], "additive_bias"),
    ("bias-2d", lambda: scores.additive_bias(BIAS[0, 0]), SCORES + BIAS[0, 0], "additive_bias"),
    (
        "bias-broadcast-heads-and-queries",
        lambda: scores.additive_bias(BIAS[:, :1, :1]),
        SCORES + BIAS[:, :1, :1],
        "additive_bias",
    ),
    (
        "bias-broadcast-keys",
        lambda: scores.additive_bias(BIAS[0, :, :, :1]),
        SCORES + BIAS[:1, :, :, :1],
        "additive_bias",
    ),
    (
        "bias-broadcast-all",
        lambda: scores.additive_bias(BIAS[:1, :1, :1, :1]),
        SCORES + BIAS[0, 0, 0, 0],
        "additive_bias",
    ),
    (
        "head-gate",
        lambda: scores.head_gate(PER_HEAD),
        SCORES * sigmoid(HEADS),
        "head_gate",
    ),
    ("head-scale", lambda: scores.head_scale(PER_HEAD), SCORES * HEADS, "head_scale"),
    (
        "compose",
        lambda: scores.compose(
            scores.head_scale(PER_HEAD), scores.additive_bias(BIAS), scores.soft_cap(2.5)
        ),
        2.5 * np.tanh((SCORES * HEADS + BIAS) / 2.5),
        "head_scale_then_additive_bias_then_soft_cap_2.5",
    ),
    (
        "compose-reversed",
        lambda: scores.compose(scores.soft_cap(2.5), scores.head_scale(PER_HEAD)),
        2.5 * np.tanh(SCORES / 2.5) * HEADS,
        "soft_cap_2.5_then_head_scale",
    ),
    ("compose-nothing", scores.compose, SCORES, "identity"),
]


@pytest.mark.parametrize(
    ("factory", "expected", "name"),
    [pytest.param(*case[1:], id=case[0]) for case in FORMULAS],
)
def test_values(factory, expected, name):
    mod = factory()
    result = apply(mod)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=2e-6, atol=2e-6)
    assert mod.__name__ == name


@pytest.mark.parametrize(
    ("factory", "array"),
    [
        pytest.param(lambda a: scores.alibi(slopes=a), PER_HEAD, id="alibi"),
        pytest.param(scores.soft_cap, np.float32(1.5), id="soft-cap"),
        pytest.param(scores.relative_position_bias, BUCKETS, id="t5"),
        pytest.param(scores.relative_table, TABLE, id="relative-table"),
        pytest.param(scores.additive_bias, BIAS, id="bias"),
        pytest.param(scores.head_gate, PER_HEAD, id="head-gate"),
        pytest.param(scores.head_scale, PER_HEAD, id="head-scale"),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_captured_arrays_are_traced_and_differentiable(factory, array, dtype):
    """Under jit and grad the array is a tracer; the gradient is that of finite differences."""
    array = jnp.asarray(array, dtype)

    def loss(array):
        return jnp.sum(jnp.sin(apply(factory(array))))

    def loss_f32(values):
        return float(loss(jnp.asarray(values, jnp.float32)))

    gradient = jax.jit(jax.grad(loss))(array)
    assert gradient.dtype == dtype
    direction = rng.normal(size=array.shape).astype(np.float32)
    values, step = np.asarray(array, np.float32), 1e-2
    rise = (loss_f32(values + step * direction) - loss_f32(values - step * direction)) / (2 * step)
    slope = float(np.sum(np.asarray(gradient, np.float32) * direction))
    np.testing.assert_allclose(slope, rise, rtol=2e-2, atol=0.2)
    assert abs(slope) > 0.05


def test_gradient_of_a_table_counts_its_reads():
    """The derivative of the sum of all scores for an entry is how often the entry was added."""
    gradient = jax.grad(lambda table: apply(scores.relative_table(table)).sum())(TABLE)
    counts = np.zeros(2 * KV - 1)
    for q in range(Q):
        for k in range(KV):
            counts[q - k + KV - 1] += B
    np.testing.assert_allclose(gradient, np.tile(counts, (H, 1)))


# ALiBi


@pytest.mark.parametrize("num_heads", [1, 2, 8, 16, 64])
def test_alibi_slopes_of_a_power_of_two(num_heads):
    expected = [2 ** (-8 * (h + 1) / num_heads) for h in range(num_heads)]
    np.testing.assert_allclose(scores.alibi_slopes(num_heads), expected, rtol=1e-6)


@pytest.mark.parametrize("num_heads", [3, 5, 6, 7, 12, 20, 40])
def test_alibi_slopes_of_other_head_counts(num_heads):
    power = max(p for p in (1, 2, 4, 8, 16, 32) if p < num_heads)
    below = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    above = [2 ** (-8 * (h + 1) / (2 * power)) for h in range(2 * power)]
    expected = below + above[::2][: num_heads - power]
    assert len(expected) == num_heads
    np.testing.assert_allclose(scores.alibi_slopes(num_heads), expected, rtol=1e-6)


# T5's buckets


@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (32, 256), (16, 50), (64, 1000), (4, 2), (6, 5)]
)
@pytest.mark.parametrize("bidirectional", [True, False], ids=["bidirectional", "causal"])
def test_t5_buckets(num_buckets, max_distance, bidirectional):
    if max_distance <= num_buckets // (4 if bidirectional else 2):
        max_distance += num_buckets
    expected = [
        t5_bucket(d, num_buckets, bidirectional, max_distance)
        for d in range(-max_distance, max_distance + 1)
    ]
    result = distance_buckets(num_buckets, bidirectional, max_distance)
    np.testing.assert_array_equal(result, expected)
    # Everything farther away shares the bucket of max_distance, so the table may end there.
    far = t5_bucket(-9 * max_distance, num_buckets, bidirectional, max_distance)
    assert result[0] == far
    assert sorted(set(result.tolist())) == sorted(set(expected))


def test_t5_buckets_of_the_paper():
    """32 buckets up to 128, bidirectional: distances 0 to 7 alone, then 8, 12, 16, 23, 32, ..."""
    buckets = distance_buckets(32, True, 128)
    past = buckets[:129][::-1]
    starts = [int(np.flatnonzero(past == bucket)[0]) for bucket in range(16)]
    assert starts == [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    assert past[128] == 15
    np.testing.assert_array_equal(buckets[129:], past[1:] + 16)


# Bad input

ERRORS = [
    (lambda: scores.alibi(), ValueError, r"exactly one.*alibi\(8\)"),
    (lambda: scores.alibi(3, PER_HEAD), ValueError, "exactly one"),
    (lambda: scores.alibi(0), ValueError, "num_heads must be at least 1"),
    (lambda: scores.alibi(8.0), TypeError, "num_heads must be a Python integer"),
    (lambda: scores.alibi(slopes=[1, 2]), TypeError, "slopes must be floating point.*int32"),
    (lambda: scores.alibi(slopes=TABLE), ValueError, r"slopes must have shape \(H,\).*\(3, 21\)"),
    (lambda: scores.soft_cap(0), ValueError, "cap must be positive and finite, but it is 0"),
    (lambda: scores.soft_cap(-3.0), ValueError, "cap must be positive"),
    (lambda: scores.soft_cap(math.inf), ValueError, "finite"),
    (lambda: scores.soft_cap(None), TypeError, "cap must be a positive number, but it is None"),
    (lambda: scores.soft_cap("20"), TypeError, "cap must be a positive number"),
    (lambda: scores.soft_cap(PER_HEAD), ValueError, r"cap must have shape \(\)"),
    (lambda: scores.relative_position_bias(PER_HEAD), ValueError, r"\(num_buckets, H\).*\(3,\)"),
    (lambda: scores.relative_position_bias(BUCKETS[:7]), ValueError, r"even number.*\(7, 3\)"),
    (lambda: scores.relative_position_bias(BUCKETS[:1], False), ValueError, "at least 2 buckets"),
    (lambda: scores.relative_position_bias(BUCKETS, max_distance=2), ValueError, "more than 2"),
    (lambda: scores.relative_position_bias(BUCKETS, False, 4), ValueError, "more than 4"),
    (lambda: scores.relative_position_bias([[1], [2]]), TypeError, "table must be floating point"),
    (lambda: scores.relative_table(TABLE[:, 1:]), ValueError, r"must be odd.*\(3, 20\)"),
    (lambda: scores.relative_table(BIAS), ValueError, r"\(2 \* S - 1,\) or \(H, 2 \* S - 1\)"),
    (lambda: scores.relative_table([1, 2, 3]), TypeError, "table must be floating point"),
    (lambda: scores.additive_bias(PER_HEAD), ValueError, r"\(L, S\) or \(H, L, S\) or \(B, H, L"),
    (lambda: scores.additive_bias(BIAS > 0), TypeError, "boolean array is a mask.*mask_mod"),
    (lambda: scores.additive_bias([[object()]]), TypeError, "bias must be an array of numbers"),
    (lambda: scores.head_gate(1.0), ValueError, r"gate must have shape \(H,\)"),
    (lambda: scores.head_gate([1]), TypeError, "gate must be floating point"),
    (lambda: scores.head_scale(BIAS), ValueError, r"scale must have shape \(H,\)"),
    (lambda: scores.compose(BIAS), TypeError, "score_mods.*argument 0 is an array of shape"),
    (lambda: scores.compose(scores.alibi), TypeError, "factory.*call it first"),
    (lambda: scores.compose(lambda b, h, q, k: q > k), TypeError, "lambda.*cannot be called so"),
]


@pytest.mark.parametrize(
    ("build", "error", "message"), ERRORS, ids=[re.sub(r"\W+", "-", e[2])[:40] for e in ERRORS]
)
def test_bad_arguments(build, error, message):
    with pytest.raises(error, match=f"(?s){message}") as caught:
        build()
    assert str(caught.value).endswith((".", ")"))  # a whole sentence
