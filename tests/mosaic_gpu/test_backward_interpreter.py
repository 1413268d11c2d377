"""The backward kernels' numerics on the CPU, in Pallas' Mosaic GPU interpreter.

The `interpret` option replaces what the interpreter lacks: operands of products in registers go through shared
memory, the reduction into dQ becomes one copy for every tile of keys, and sums of captured elements that leave a
tile by atomics are replaced by the tile itself, summed outside (test_reductions.py checks them). Everything else
is the code that runs on the GPU.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import masks, scores
from flexjax.backends import mosaic_gpu
from tests.mosaic_gpu.attention import cases
from tests.mosaic_gpu.gradients import GradientCase, check_gradients

causal = masks.causal()
DOCUMENTS = np.repeat(np.arange(4, dtype=np.int32), [30, 60, 1, 39])
DETERMINISTIC = {"deterministic": True}


def document(b, h, q_idx, kv_idx):
    ids = jnp.asarray(DOCUMENTS)
    return (ids[q_idx] == ids[kv_idx]) & (q_idx >= kv_idx)


def by_batch_and_head(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx + 20 * b + 40 * h


def some_empty_rows(b, h, q_idx, kv_idx):
    """Rows without keys, and keys that no query sees."""
    return (q_idx >= kv_idx) & (q_idx % 7 != 3) & (q_idx >= 64) & (kv_idx < 60)


def not_finite_where_masked(score, b, h, q_idx, kv_idx):
    """NaN where masked, and with an infinite derivative past the last query and key."""
    beyond = 1.0 / (69 - q_idx + 1) + jnp.sqrt(1.0 * (69 - kv_idx))
    bad = jnp.where(kv_idx % 2 == 0, jnp.nan, jnp.inf)
    return score * jnp.where(kv_idx > q_idx, bad, 1.0) + 0.1 * beyond


def finite(score, b, h, q_idx, kv_idx):
    beyond = 1.0 / (69 - q_idx + 1) + jnp.sqrt(1.0 * (69 - kv_idx))
    return score + 0.1 * beyond


def random(*shapes):
    return lambda rng: tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)


def table(captured):
    (values,) = captured
    return lambda s, b, h, q, k: s + values[h, jnp.clip(q - k + 70, 0, 140)]


def gates_and_vectors(captured):
    """A factor a head, vectors by query and by key, one of them read through an index array."""
    gate, by_query, by_key = captured
    order = jnp.asarray(np.arange(70)[::-1] // 2, jnp.int32)
    return lambda s, b, h, q, k: s * gate[h] + by_query[b, h, q] * by_key[order[k]]


def dense_bias(captured):
    (bias,) = captured
    return lambda s, b, h, q, k: jnp.tanh(s + bias[q, k])


CASES = [
    GradientCase("causal_two_warpgroups", q_len=130, mask=causal, dim=32, cotangents_of_lse=True),
    GradientCase("gqa_d128", q_len=70, heads=2, kv_heads=1, mask=causal, dim=128),
    GradientCase("one_kv_batch_blhd", q_len=64, kv_len=70, batch=2, kv_batch=1, layout="BLHD", dim=40,
                 v_dim=24),
    GradientCase("lists_by_batch_and_head", q_len=64, kv_len=130, batch=2, heads=2, mask=by_batch_and_head,
                 mask_shape=(2, 2), block=(64, 64), dim=16),
    GradientCase("wide_blocks", q_len=70, kv_len=140, mask=masks.sliding_window(60), block=(256, 512), dim=32),
    GradientCase("documents_d80", q_len=130, mask=document, dim=80, v_dim=96),
    GradientCase("empty_rows_and_columns", q_len=130, mask=some_empty_rows, dim=16, block=(64, 64),
                 cotangents_of_lse=True),
    GradientCase("self_loading", q_len=140, kv_len=70, heads=2, kv_heads=1, mask=some_empty_rows, dim=16,
                 block=(64, 64), options={"backward_self_loading": True, "backward_stages": 2}),
    GradientCase("soft_cap_float16", q_len=64, dtype="float16", score=scores.soft_cap(2.0), dim=32),
    GradientCase("not_finite_where_masked", q_len=69, mask=causal, score=not_finite_where_masked,
                 exact_score=finite, dim=16, block=(64, 64)),
    GradientCase("table", q_len=70, mask=causal, score=table, captures=random((1, 141)), dim=16, block=(64, 64)),
    GradientCase("gates_and_vectors", q_len=70, heads=2, score=gates_and_vectors, dim=16,
                 captures=random((2,), (1, 2, 70), (70,))),
    GradientCase("dense_bias", q_len=64, kv_len=70, score=dense_bias, captures=random((64, 70)), dim=16),
    GradientCase("wide_heads", q_len=70, kv_len=130, mask=causal, dim=144, v_dim=160, score=gates_and_vectors,
                 captures=random((1,), (1, 1, 70), (70,))),
    GradientCase("deterministic", q_len=70, kv_len=130, heads=2, kv_heads=1, score=gates_and_vectors, dim=32,
                 captures=random((2,), (1, 2, 70), (70,)), mask=causal, options=DETERMINISTIC),
    GradientCase("deterministic_blhd", q_len=70, mask=masks.sliding_window(60), block=(256, 512), dim=40,
                 layout="BLHD", options=DETERMINISTIC, cotangents_of_lse=True),
]  # fmt: skip


@pytest.mark.interpreter
@cases(*CASES)
def test_backward(case):
    check_gradients(case, interpret=True)


def test_refusals():
    """What cannot be computed is refused before anything is traced."""
    blocks = GradientCase("odd_blocks", q_len=64, mask=causal, block=(96, 96))
    with pytest.raises(NotImplementedError, match="multiple of 64"):
        mosaic_gpu.check_backward(blocks.problem()[0])
    unordered = GradientCase(
        "unordered", q_len=64, score=table(random((1, 141))(np.random.default_rng(0)))
    )
    with pytest.raises(NotImplementedError, match="deterministic"):
        mosaic_gpu.check_backward(unordered.problem(**DETERMINISTIC)[0])
    masked = GradientCase("masked", mask=causal, q_len=128)
    with pytest.raises(NotImplementedError, match="without a block mask"):
        mosaic_gpu.check_backward(masked.problem(**DETERMINISTIC, backward_dq="in_order")[0])
