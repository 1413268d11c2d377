"""Scale, logsumexp, attention sinks, and scores of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import AuxRequest, create_block_mask, flex_attention, masks, scores
from flexjax.testing import assert_close, oracle, oracle_grads
from tests.behaviour.harness import Case, cases, check, normal

causal = masks.causal()
window = masks.sliding_window(7)
beyond = masks.and_masks(causal, masks.not_mask(window))

SCALES = [
    Case("scale_number", scale=-0.3, mask=causal),
    Case("scale_zero", scale=0.0, mask=causal),
    Case("scale_array", scale=jnp.float32(0.8), mask=causal,
         score=lambda c: scores.soft_cap(1.0)),
    Case("scale_before_score_mod", scale=2.0, score=lambda c: lambda s, b, h, q, k: s * s / 8,
         mask=causal),
    Case("default_scale_of_dim_64", dim=64, batch=1),
]  # fmt: skip


def whole_numbers(query, key, value):
    """Scores that float32 represents exactly however large they are, with ties among the largest."""
    return np.round(query), np.round(key), value


SIZES = [
    Case("scores_of_1e4", scale=1024.0, edit=whole_numbers, mask=causal),
    Case("scores_of_minus_1e4", scale=1.0, edit=whole_numbers, mask=causal,
         score=lambda c: lambda s, b, h, q, k: s - 16384.0),
    Case("score_mod_of_minus_1e30", scale=1.0, edit=whole_numbers, mask=causal,
         score=lambda c: lambda s, b, h, q, k: jnp.where((q + k) % 2 == 0, s, -1e30)),
    Case("tiny_scores", scale=1e-20, mask=causal),
    Case("growing_maximum", mask=causal, score=lambda c: lambda s, b, h, q, k: s + 3.0 * k),
]  # fmt: skip

SINKS = [
    Case("sinks", sinks=normal(2), mask=causal, smoke=True),
    Case("sinks_without_mask", sinks=jnp.asarray([-6.0, 6.0])),
    Case("sinks_gqa", sinks=normal(4), heads=4, kv_heads=2, batch=1, mask=window),
    Case("sinks_and_dead_rows", sinks=normal(2), mask=masks.causal(-9)),
    Case("sinks_bfloat16", sinks=normal(2), mask=causal, dtype="bfloat16", batch=1),
]  # fmt: skip


@cases(*SCALES)
def test_scale(case, backend):
    check(case, backend)


@cases(*SIZES)
def test_size_of_scores(case, backend):
    check(case, backend)


@cases(*SINKS)
def test_sinks(case, backend):
    check(case, backend)


@pytest.mark.smoke
@pytest.mark.parametrize("score", [None, "bias"])
def test_split_attention_merges_by_its_logsumexp(backend, score):
    """Local attention and the rest, merged with weights exp(lse), are attention over both, gradients too."""
    case = Case("split", captures={"bias": normal(2, 40, 40)})
    d_out, d_lse = case.cotangents

    def make_score(captures):
        return lambda s, b, h, q, k: s * captures["bias"][h, q, k]

    @jax.jit
    def run(query, key, value, captures):
        def merged(query, key, value, captures):
            parts = []
            for mask in (window, beyond):
                block_mask = create_block_mask(mask, None, None, 40, 40, 16)
                mod = make_score(captures) if score else None
                attention = flex_attention(
                    query, key, value, mod, block_mask, return_lse=True, backend=backend
                )
                parts.append(attention)
            (local, local_lse), (rest, rest_lse) = parts
            weight = jax.nn.sigmoid(local_lse - rest_lse)[..., None]  # rows without a rest: 1
            out = weight * local + (1.0 - weight) * rest
            return out, jnp.logaddexp(local_lse, rest_lse)

        outputs, pullback = jax.vjp(merged, query, key, value, captures)
        return outputs, pullback((d_out, d_lse))

    (out, lse), (*gradients, captured) = run(*case.operands, case.captures)
    options = {"mask_mod": causal}
    exact = oracle(
        *case.operands, score_mod=make_score(case.captures) if score else None, **options
    )
    assert_close("out", out, exact.out)
    assert_close("lse", lse, exact.lse)
    captures = {"captures": case.captures, "score_mod": make_score} if score else {}
    exact = oracle_grads(*case.operands, d_out, d_lse, **captures, **options)
    for name, actual in zip(("query", "key", "value"), gradients, strict=True):
        assert_close(name, actual, getattr(exact, name))
    if score:
        assert_close("bias", captured["bias"], exact.captures["bias"])


def test_gradient_of_the_logsumexp_alone(backend):
    case = Case("lse_only")
    _, d_lse = case.cotangents

    @jax.jit
    def run(*operands):
        def lse(*operands):
            block_mask = create_block_mask(causal, None, None, 40, 40, 16)
            aux = flex_attention(
                *operands,
                block_mask=block_mask,
                return_aux=AuxRequest(lse=True),
                backend=backend,
            )[1]
            assert aux.max_scores is None
            return (aux.lse * d_lse).sum()

        return jax.grad(lse, argnums=(0, 1, 2))(*operands)

    zero = jnp.zeros_like(case.cotangents[0])
    exact = oracle_grads(*case.operands, zero, d_lse, mask_mod=causal)
    query, key, value = run(*case.operands)
    assert_close("query", query, exact.query)
    assert_close("key", key, exact.key)
    assert not np.asarray(value).any()


def test_max_scores_carry_no_gradient(backend):
    case = Case("max_scores")

    @jax.jit
    @jax.grad
    def gradient(query):
        options = {"return_aux": AuxRequest(max_scores=True), "backend": backend}
        return flex_attention(query, *case.operands[1:], **options)[1].max_scores.sum()

    assert not np.asarray(gradient(case.operands[0])).any()


def test_a_single_key(backend):
    """One key takes all the weight: the output is its value, and the score has no influence."""
    case = Case("single_key", q_len=3, kv_len=1)
    query, key, value = case.operands
    d_out, d_lse = case.cotangents

    @jax.jit
    def run(query, key, value):
        attention = lambda *x: flex_attention(*x, return_lse=True, backend=backend)
        outputs, pullback = jax.vjp(attention, query, key, value)
        return outputs, pullback((d_out, jnp.zeros_like(d_lse)))

    (out, lse), (d_query, d_key, d_value) = run(query, key, value)
    np.testing.assert_allclose(out, jnp.broadcast_to(value, out.shape), rtol=1e-6)
    scale = case.dim**-0.5
    np.testing.assert_allclose(lse, (query * key).sum(-1) * scale, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_value, d_out.sum(2, keepdims=True), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_query, np.zeros_like(d_query), atol=3e-6)
    np.testing.assert_allclose(d_key, np.zeros_like(d_key), atol=3e-6)


def test_one_program_with_two_attentions(backend):
    """Two different mods and masks in one compiled function do not get into each other's way."""
    first = Case("first", score=lambda c: lambda s, b, h, q, k: s * 2.0 + q * 0.1 - k * 0.1)
    second = lambda s, b, h, q, k: s * s

    @jax.jit
    def run(query, key, value):
        once = flex_attention(query, key, value, first.score({}), mask_mod=causal, backend=backend)
        return flex_attention(once, key, value, second, mask_mod=window, backend=backend)

    query, key, value = first.operands
    once = oracle(query, key, value, score_mod=first.score({}), mask_mod=causal).out
    exact = oracle(once, key, value, score_mod=second, mask_mod=window).out
    assert_close("out", run(query, key, value), exact)
