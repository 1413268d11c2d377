"""Rows without keys, and values at masked places that are infinite or NaN: nothing of them leaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import create_block_mask, flex_attention, masks, scores
from tests.behaviour.harness import Case, attend, cases, check, normal

causal = masks.causal()


def odd_queries_only(b, h, q_idx, kv_idx):
    return (q_idx % 2 == 1) & (kv_idx <= q_idx)


def later_half_only(b, h, q_idx, kv_idx):
    """The first rows of blocks are skipped altogether."""
    return q_idx >= 20


def dead_batch_row_and_head(b, h, q_idx, kv_idx):
    return (b == 1) & (h == 0) & (kv_idx < 30)


def dead_by_score(c):
    return lambda s, b, h, q, k: jnp.where((q % 3 == 0) | (k > q), -jnp.inf, s * c["a"][q])


DEAD_ROWS = [
    Case("dead_rows_inside_blocks", mask=odd_queries_only, smoke=True),
    Case("dead_rows_of_blocks", mask=later_half_only),
    Case("dead_rows_before_the_first_key", mask=masks.causal(-25), block=(32, 8)),
    Case("all_rows_dead", mask=lambda b, h, q, k: q < 0),
    Case("dead_batch_row_and_head", mask=dead_batch_row_and_head, mask_shape=(2, 2)),
    Case(
        "dead_rows_by_score_and_mask",
        score=dead_by_score,
        captures={"a": normal(40)},
        mask=masks.sliding_window(6),
    ),
    Case(
        "dead_rows_with_bias_and_sinks",
        score=lambda c: lambda s, b, h, q, k: s + c["a"][h, q, k],
        captures={"a": normal(2, 40, 40)},
        mask=odd_queries_only,
        sinks=normal(2),
    ),
    Case("dead_rows_bfloat16", mask=odd_queries_only, dtype="bfloat16", layout="BLHD"),
    Case("dead_rows_gqa", mask=odd_queries_only, heads=4, kv_heads=2, batch=1),
]

# Where the poison lies, and a poisonous score_mod. The oracle, whose gradient cannot bear it, gets the same
# mod with the poison taken out by hand.
#
# `hide_some_keys` makes the scores of every third key zero or negative, and `without_them` masks those keys.


def visible(k):
    return k % 3 != 2


def without_them(b, h, q_idx, kv_idx):
    return visible(kv_idx) & (kv_idx <= q_idx + 15)


def zero_scores(query, key, value):
    key[:, :, 2::3] = 0.0
    return query, key, value


def negative_scores(query, key, value):
    """Positive scores, but for the hidden keys."""
    query, key = np.abs(query) + 0.1, np.abs(key) + 0.1
    key[:, :, 2::3] *= -1.0
    return query, key, value


def positive_scores(query, key, value):
    return np.abs(query) + 0.1, np.abs(key) + 0.1, value


def safe(function, fallback=1.0):
    """The mod of `function(score)`, and the same with hidden scores replaced before they enter it."""

    def poisoned(c):
        return lambda s, b, h, q, k: function(s)

    def clean(c):
        return lambda s, b, h, q, k: function(jnp.where(visible(k), s, fallback))

    return {"score": poisoned, "true_score": clean}


def hidden(name, function, edit, fallback=1.0, **options):
    return Case(name, **safe(function, fallback), edit=edit, mask=without_them, **options)


SCORES = [
    hidden("inverse_of_zero", lambda s: 1.0 / s, zero_scores),
    hidden("log_of_negative", jnp.log, negative_scores),
    hidden("log_of_zero", lambda s: jnp.log(s * s), zero_scores),
    hidden("root_of_zero", lambda s: jnp.sqrt(jnp.abs(s)), zero_scores),
    hidden("exp_overflows", lambda s: jnp.exp(-40.0 * s) * 1e-3, negative_scores, 0.0, scale=1.0),
    hidden("bfloat16", lambda s: 1.0 / s, zero_scores, dtype="bfloat16", batch=1),
]


def unmasked(name, function, **options):
    """No key is hidden: only what a backend pads with could poison the result."""
    return Case(
        name,
        score=lambda c: lambda s, b, h, q, k: function(s),
        edit=positive_scores,
        batch=1,
        **options,
    )


PADDING = [
    unmasked("inverse_in_the_tail", lambda s: 1.0 / s, q_len=37, kv_len=37, mask=masks.noop_mask),
    unmasked("inverse_in_the_tail_without_mask", lambda s: 1.0 / s, q_len=150, kv_len=140),
    unmasked("root_in_the_tail", jnp.sqrt, q_len=37, kv_len=45, mask=causal),
    unmasked("short_of_one_block", jnp.log, q_len=5, kv_len=3, mask=causal, block=32),
]

POSITIONS = np.arange(40)
FUTURE = jnp.asarray(np.where(POSITIONS[None, :] > POSITIONS[:, None], np.nan, 0.0), jnp.float32)
HIDDEN = jnp.where(visible(jnp.arange(40)), 0.0, jnp.inf)


def added(read, true_read):
    return {
        "score": lambda c: lambda s, b, h, q, k: s + read(c, q, k),
        "true_score": lambda c: lambda s, b, h, q, k: s + true_read(c, q, k),
    }


def past(x, q, k):
    return jnp.where(k <= q, x, 0.0)


CAPTURES = [
    Case(
        "nan_in_the_future_of_a_bias",
        **added(lambda c, q, k: c["a"][q, k], lambda c, q, k: past(c["a"][q, k], q, k)),
        captures={"a": normal(40, 40) + FUTURE},
        mask=causal,
    ),
    Case(
        "nan_times_a_learned_scale",
        **added(
            lambda c, q, k: c["a"][q, k] * c["w"][q],
            lambda c, q, k: past(c["a"][q, k], q, k) * c["w"][q],
        ),
        captures={"a": normal(40, 40) + FUTURE, "w": normal(40)},
        mask=causal,
    ),
    Case(
        "infinite_bias_of_hidden_keys",
        **added(
            lambda c, q, k: c["a"][k] * c["w"],
            lambda c, q, k: jnp.where(visible(k), c["a"][k], 0.0) * c["w"],
        ),
        captures={"a": normal(40) + HIDDEN, "w": jnp.float32(0.5)},
        mask=without_them,
    ),
    Case(
        "take_fills_with_nan_behind_the_end",
        **added(
            lambda c, q, k: jnp.take(c["a"], k, mode="fill"),
            lambda c, q, k: c["a"][k],
        ),
        captures={"a": normal(30)},
        mask=masks.and_masks(masks.padding(30), masks.sliding_window(35, 35)),
    ),
    Case(
        "division_by_a_captured_zero",
        **added(
            lambda c, q, k: c["w"][q] / c["a"][k],
            lambda c, q, k: c["w"][q] / jnp.where(visible(k), c["a"][k], 1.0),
        ),
        captures={"a": jnp.where(visible(jnp.arange(40)), 1.5, 0.0), "w": normal(40)},
        mask=without_them,
    ),
    Case(
        "nan_in_dead_rows",
        **added(
            lambda c, q, k: c["a"][q],
            lambda c, q, k: jnp.where(q % 2 == 1, c["a"][q], 0.0),
        ),
        captures={"a": jnp.where(jnp.arange(40) % 2 == 1, normal(40), jnp.nan)},
        mask=odd_queries_only,
    ),
]

# The mask comes after score_mod, which never sees -inf and cannot bring a hidden position back.
ORDER = [
    Case(
        "score_mod_cannot_unmask",
        score=lambda c: lambda s, b, h, q, k: 5.0 * (k > q) + jnp.tanh(s) + 1.0 / (s + 9.0),
        mask=causal,
    ),
    Case("soft_cap_before_the_mask", score=lambda c: scores.soft_cap(0.5), mask=causal),
    Case(
        "finite_minimum_is_not_a_mask",
        score=lambda c: lambda s, b, h, q, k: jnp.where(k < 3, s, -1e30),
        mask=masks.causal(-1),
    ),
]


@cases(*DEAD_ROWS)
def test_dead_rows(case, backend):
    check(case, backend)


@cases(*SCORES, *PADDING, *CAPTURES)
def test_poison(case, backend):
    check(case, backend)


@cases(*ORDER)
def test_mask_after_score(case, backend):
    check(case, backend)


def test_garbage_behind_a_hidden_key_does_not_matter(backend):
    """Values of keys that nobody sees, in blocks that are visited, change nothing as long as they are finite."""
    hidden = lambda b, h, q, k: k != 7
    plain = Case("hidden_key", mask=hidden)

    def huge(query, key, value):
        key[:, :, 7], value[:, :, 7] = 1e18, -1e18
        return query, key, value

    expected = attend(plain, backend)
    actual = attend(Case("hidden_key", mask=hidden, edit=huge), backend)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_poisoned_keys_outside_the_visited_blocks_are_never_read(backend, bad):
    """A skipped block may hold anything: with window attention, so may a far-away key."""
    if backend == "reference":
        pytest.skip("the dense reference reads every key")
    mask = masks.sliding_window(10)
    block_mask = create_block_mask(mask, None, None, 16, 64, 16)
    case = Case("poisoned_keys", q_len=16, kv_len=64)
    query, key, value = case.operands
    bad_key, bad_value = key.at[:, :, 16:].set(bad), value.at[:, :, 16:].set(bad)

    @jax.jit
    def run(*operands):
        attention = lambda *x: flex_attention(*x, block_mask=block_mask, backend=backend)
        out, pullback = jax.vjp(attention, *operands)
        return out, pullback(case.cotangents[0])

    expected, actual = run(query, key, value), run(query, bad_key, bad_value)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
