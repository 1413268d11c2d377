"""Which score_mods are linear biases, and that they are what the bias says."""

import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import scores
from flexjax.backends.mosaic_gpu.linear_bias import linear_bias
from flexjax.backends.mosaic_gpu.simplify import simplify
from flexjax.mods.evaluate import evaluate
from flexjax.mods.trace import index_ranges, trace_score_mod

LENGTH, HEADS, B, H = 4096, 3, 1, 2
RANGES = index_ranges(2, HEADS, LENGTH, LENGTH)


def per_batch_and_head(score, b, h, q_idx, kv_idx):
    slopes = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)), jnp.float32)
    return score * 0.7 - (slopes[b, h] * 0.3) * (3 * q_idx - 2 * (kv_idx + 5))


LINEAR = {
    "relative": lambda s, b, h, q, k: s + (q - k),
    "alibi": scores.alibi(HEADS),
    "per_batch_and_head": per_batch_and_head,
    "keys_only": lambda s, b, h, q, k: s - k / 37.0,
    "queries_only": lambda s, b, h, q, k: 0.25 * q + s,
    "negative": lambda s, b, h, q, k: s + -(k - q) * 0.5,
    "constant": lambda s, b, h, q, k: s + 3.0,
}

OTHERS = {
    "symmetric_alibi": scores.alibi(HEADS, symmetric=True),
    "capped_afterwards": lambda s, b, h, q, k: jnp.tanh(s + (q - k)),
    "subtracted": lambda s, b, h, q, k: (q - k) - s,
    "product": lambda s, b, h, q, k: s + 0.01 * (q * k),
    "beyond_float32": lambda s, b, h, q, k: s + (q - k) * 5000,
    "rounded": lambda s, b, h, q, k: s + (q - k).astype(jnp.bfloat16).astype(jnp.float32),
    "divided": lambda s, b, h, q, k: s + (q - k) // 2,
    "by_head": lambda s, b, h, q, k: s + h * q,
}


@pytest.mark.parametrize("scale", [0.125, -0.5])
@pytest.mark.parametrize("name", LINEAR)
def test_linear(name, scale):
    score, captures = trace_score_mod(LINEAR[name], RANGES)
    simple = simplify(score.forward, scale)
    bias = linear_bias(simple, LENGTH, LENGTH)
    if simple.before <= 0:
        assert bias is None
        return
    assert bias is not None
    q, kv = np.array([[0], [17], [4095]], np.int32), np.array([[0, 3, 1024, 4095]], np.int32)
    indices = {"b": np.int32(B), "h": np.int32(H)}
    (slope,) = evaluate(bias.slope, captures, indices)
    x = np.float32(1.5)
    (expected,) = evaluate(
        score.forward, captures, indices | {"q": q, "kv": kv, "score": x * scale}
    )
    found = simple.after * (simple.before * x + float(slope) * bias.index.at(q, kv))
    np.testing.assert_allclose(*np.broadcast_arrays(found, expected), rtol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_not_linear(name):
    score, _ = trace_score_mod(OTHERS[name], RANGES)
    assert linear_bias(simplify(score.forward, 0.125), LENGTH, LENGTH) is None
