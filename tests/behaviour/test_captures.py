"""Arrays that a score_mod captures: every way of reading them, and the gradient of every element."""

import jax
import jax.numpy as jnp
import numpy as np

from flexjax import create_block_mask, flex_attention, masks
from flexjax.testing import assert_close, oracle_grads
from tests.behaviour.harness import Case, cases, check, normal

causal = masks.causal()

HEADS, BATCH_HEADS = normal(2), normal(2, 2)
VECTOR, TABLE, TABLES = normal(40), normal(40, 40), normal(2, 40, 40)
OFFSETS = jnp.asarray(np.random.default_rng(5).permutation(40), jnp.int32)


def added(name, mask=causal, smoke=False, **terms):
    """Adds terms to the score, each (an array, how it is read: (array, b, h, q, k) -> a number).

    A test reads several arrays to save compilations; the gradient of each is checked on its own.
    """

    def score(arrays):
        def score_mod(s, b, h, q, k):
            for term, (_, read) in terms.items():
                s = s + read(arrays[term], b, h, q, k)
            return s

        return score_mod

    captures = {term: array for term, (array, _) in terms.items()}
    return Case(name, score=score, captures=captures, mask=mask, smoke=smoke)


def modified(name, score, captures, mask=causal, smoke=False):
    """The score_mod `score(captures, s, b, h, q, k)`."""

    def with_captures(c):
        return lambda s, b, h, q, k: score(c, s, b, h, q, k)

    return Case(name, score=with_captures, captures=captures, mask=mask, smoke=smoke)


READS = [
    added(
        "one_index",
        head=(HEADS, lambda a, b, h, q, k: a[h]),
        batch_and_head=(BATCH_HEADS, lambda a, b, h, q, k: a[b, h]),
        query=(VECTOR, lambda a, b, h, q, k: a[q]),
        key=(VECTOR, lambda a, b, h, q, k: a[k]),
        only_element=(normal(1), lambda a, b, h, q, k: a[0] * k),
        one_element=(normal(3, 4), lambda a, b, h, q, k: a[1, 2] * k),
    ),
    added(
        "query_and_key",
        mask=None,
        straight=(TABLE, lambda a, b, h, q, k: a[q, k]),
        swapped=(TABLE, lambda a, b, h, q, k: a[k, q]),
        relative=(normal(79), lambda a, b, h, q, k: a[q - k + 39]),
    ),
    added(
        "all_indices",
        per_batch=(TABLES, lambda a, b, h, q, k: a[b, q, k]),
        per_head=(TABLES, lambda a, b, h, q, k: a[h, q, k]),
        per_both=(normal(2, 2, 40, 40), lambda a, b, h, q, k: a[b, h, q, k]),
        relative=(normal(40, 2), lambda a, b, h, q, k: a[q - k, h]),
    ),
    added(
        "views",
        chained=(TABLES, lambda a, b, h, q, k: a[h][q][k]),
        transposed=(TABLE, lambda a, b, h, q, k: a.T[q, k]),
        strided=(normal(80, 41), lambda a, b, h, q, k: a[::2, 1:][q, k]),
        sliced=(normal(40, 24), lambda a, b, h, q, k: a[q, 3:20][k % 17]),
        dynamic=(TABLE, lambda a, b, h, q, k: jax.lax.dynamic_slice(a, (q, k), (1, 1))[0, 0]),
        computed=(VECTOR, lambda a, b, h, q, k: jnp.sin(a)[k] * 2.0),
    ),
    added(
        "indirect",
        mask=None,
        one=(VECTOR, lambda a, b, h, q, k: a[OFFSETS[q]]),
        two=(normal(40, 20), lambda a, b, h, q, k: a[OFFSETS[k], OFFSETS[q] // 2]),
    ),
    added(
        "two_reads_of_one_array",
        mask=None,
        smoke=True,
        symmetric=(VECTOR, lambda a, b, h, q, k: a[q] + a[k]),
    ),
    added(
        "many_reads_of_one_array",
        product=(normal(2, 40), lambda a, b, h, q, k: a[h, q] * a[h, k]),
        three=(TABLE, lambda a, b, h, q, k: a[q, k] + a[k, q] - a[q, q]),
        row_and_column=(TABLE, lambda a, b, h, q, k: a[q, 0] * a[0, q] * a[0, k]),
    ),
    added(
        "low_precision",
        bfloat16=(normal(40, 40, dtype="bfloat16"), lambda a, b, h, q, k: a[q, k]),
        twice=(normal(40, dtype="bfloat16"), lambda a, b, h, q, k: jnp.float32(a[q]) * a[k]),
        float16=(jnp.float16(0.125), lambda a, b, h, q, k: a * (k - q)),
    ),
]

# Indices out of range mean what they mean in JAX: scalar indexing clamps, negative ones count from the end.
RANGES = [
    added(
        "indexing_clamps",
        mask=None,
        beyond=(VECTOR, lambda a, b, h, q, k: a[q + 30] * a[k + 20]),
        far_beyond=(VECTOR, lambda a, b, h, q, k: a[k * 1000000]),
        below=(VECTOR, lambda a, b, h, q, k: a[k - 70]),
        too_few_heads=(HEADS, lambda a, b, h, q, k: a[h + 1] * k * 0.1),
    ),
    added(
        "negative_indices_wrap",
        mask=None,
        constant=(normal(3, 40), lambda a, b, h, q, k: a[-1, k]),
        difference=(VECTOR, lambda a, b, h, q, k: a[q - k]),
        flipped=(TABLE, lambda a, b, h, q, k: a[-1 - q, 39 - k]),
    ),
    added(
        "take_and_get_have_modes",
        mask=None,
        fill=(VECTOR, lambda a, b, h, q, k: jnp.take(a, q + k, mode="fill", fill_value=0.5)),
        clip=(normal(20), lambda a, b, h, q, k: jnp.take(a, q - k, mode="clip")),
        wrap=(normal(13), lambda a, b, h, q, k: jnp.take(a, q + k, mode="wrap")),
        get=(
            normal(2, 40),
            lambda a, b, h, q, k: a.at[h, k + 5].get(mode="fill", fill_value=-1.0),
        ),
        drop_negative=(
            VECTOR,
            lambda a, b, h, q, k: a.at[q - k].get(
                mode="fill", fill_value=0.0, wrap_negative_indices=False
            ),
        ),
    ),
]


def all_dimensions(c, s, b, h, q, k):
    return s * c["batch"][b] * c["head"][h] * c["query"][q] * c["key"][k] * c["table"][h, k]


def gates(c, s, b, h, q, k):
    inside = jax.nn.sigmoid(c["gate"][h]) * jax.nn.softplus(c["w"][k])
    return jnp.tanh(s * c["w"][q]) * inside


def scalars(c, s, b, h, q, k):
    return s * c["factor"] + c["slope"] ** 2 * (q - k)


def window_bias(c, s, b, h, q, k):
    near = jnp.abs(q - k) <= 8
    return jnp.where(near, s + c["a"][jnp.clip(q - k + 8, 0, 16)], -jnp.inf)


def global_tokens_bias(c, s, b, h, q, k):
    special = c["flag"][k] | (q < 2)
    return s + jnp.where(special, c["a"][h, k], 0.0) + c["level"][k] * 0.25 + c["b"][c["small"][q]]


def stopped(c, s, b, h, q, k):
    return s + c["a"][q] * jax.lax.stop_gradient(c["a"][k])


MODIFIED = [
    modified(
        "multiplied_in_all_dimensions",
        all_dimensions,
        {"batch": HEADS, "head": HEADS, "query": VECTOR, "key": VECTOR, "table": normal(2, 40)},
    ),
    modified("gates", gates, {"gate": HEADS, "w": VECTOR}, mask=None),
    modified("scalars", scalars, {"factor": jnp.float32(0.7), "slope": jnp.float32(0.1)}),
    modified("window_bias", window_bias, {"a": normal(17)}, mask=None),
    modified(
        "global_tokens_bias_with_integers_and_booleans",
        global_tokens_bias,
        {
            "a": normal(2, 40),
            "flag": jnp.arange(40) % 7 == 0,
            "level": jnp.arange(40, dtype=jnp.int32) % 11,
            "b": normal(5),
            "small": jnp.arange(40, dtype=jnp.uint8) % 5,
        },
    ),
    modified("stopped_gradient", stopped, {"a": VECTOR}),
]


@cases(*READS)
def test_read(case, backend):
    check(case, backend)


@cases(*RANGES)
def test_out_of_range(case, backend):
    check(case, backend)


@cases(*MODIFIED)
def test_use(case, backend):
    check(case, backend)


def test_only_the_bias_is_differentiated(backend):
    """Neither query nor key nor value is: their gradients are never asked for."""
    case = added("only_bias", bias=(normal(2, 40), lambda a, b, h, q, k: a[h, q - k]))
    d_out, _ = case.cotangents

    @jax.jit
    @jax.grad
    def gradient(captures):
        mask = create_block_mask(causal, None, None, 40, 40, 16)
        out = flex_attention(*case.operands, case.score(captures), mask, backend=backend)
        return (out * d_out).sum()

    exact = oracle_grads(
        *case.operands, d_out, captures=case.captures, score_mod=case.score, mask_mod=causal
    )
    assert_close("bias", gradient(case.captures)["bias"], exact.captures["bias"])


def test_float_captures_of_a_mask_have_zero_gradient(backend):
    case = Case("threshold")

    @jax.jit
    @jax.grad
    def gradient(threshold):
        mask = lambda b, h, q, k: jnp.abs(q - k) * 0.1 < threshold[h]
        block_mask = create_block_mask(mask, None, 2, 40, 40, 16)
        return flex_attention(*case.operands, block_mask=block_mask, backend=backend).sum()

    assert not np.asarray(gradient(jnp.asarray([0.5, 3.0]))).any()
