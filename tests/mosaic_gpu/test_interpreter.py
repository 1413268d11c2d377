"""The forward kernel's numerics on the CPU, in Pallas' Mosaic GPU interpreter.

The `interpret` option leaves out what the interpreter lacks: the warpgroups' turns, products with operands in
registers, the trusting softmax. Everything else is the code that runs on the GPU.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import masks, scores
from flexjax.backends import mosaic_gpu
from tests.mosaic_gpu.attention import Case, cases, check

causal = masks.causal()
DOCUMENTS = np.repeat(np.arange(4, dtype=np.int32), [30, 100, 1, 72])


def document(b, h, q_idx, kv_idx):
    ids = jnp.asarray(DOCUMENTS)
    return (ids[q_idx] == ids[kv_idx]) & (q_idx >= kv_idx)


def document_like(b, h, q_idx, kv_idx):
    """Rows of one to five blocks, and one without any."""
    return (kv_idx <= 3 * q_idx) & (q_idx < 128)


def by_batch_and_head(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx + 20 * b + 40 * h


def some_empty_rows(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx % 7 != 3) & (q_idx >= 128)


def relative(score, b, h, q_idx, kv_idx):
    return score + (q_idx - kv_idx)


def table(score, b, h, q_idx, kv_idx):
    values = jnp.asarray(np.random.default_rng(0).standard_normal(300), jnp.float32)
    return score + values[q_idx - kv_idx + 150]


def by_indices(score, b, h, q_idx, kv_idx):
    scale = jnp.asarray([[0.5, 1.0], [2.0, -1.0]])
    return score * scale[b, h] + 0.01 * q_idx


ONE = {"warpgroups": 1, "self_loading": False}
ALONE = {"warpgroups": 1, "self_loading": True, "stages": 2}

CASES = [
    Case("noop_two_warpgroups", q_len=128, options={"warpgroups": 2}),
    Case("causal_two_warpgroups", q_len=130, mask=causal, dim=32, options={"warpgroups": 2}),
    Case("odd_lengths", q_len=37, kv_len=201, options=ONE),
    Case("one_query_one_key", q_len=1, kv_len=1, dim=16, options=ONE),
    Case("gqa_by_indices", q_len=64, batch=2, heads=2, kv_heads=1, score=by_indices, dim=16, options=ONE),
    Case("lists_by_batch_and_head", q_len=64, kv_len=130, batch=2, heads=2, mask=by_batch_and_head,
         mask_shape=(2, 2), block=(64, 64), dim=16),
    Case("one_kv_batch", q_len=64, kv_len=64, batch=2, kv_batch=1, mask=causal, block=(64, 64), dim=16),
    Case("documents", q_len=203, mask=document, dim=32),
    Case("empty_rows", q_len=200, mask=some_empty_rows, dim=32, max_scores=True),
    Case("wide_blocks", q_len=130, mask=masks.sliding_window(60), block=(256, 512), dim=32),
    Case("blhd_head_dims", q_len=70, mask=causal, block=(64, 64), dim=40, v_dim=24, layout="BLHD"),
    Case("float16", q_len=64, kv_len=130, dtype="float16", score=scores.soft_cap(2.0), options=ONE),
    Case("relative", q_len=64, kv_len=140, score=relative, options=ONE),
    Case("table", q_len=100, mask=causal, block=(64, 64), score=table, dim=32),
    Case("self_loading_one_stage", q_len=64, kv_len=201, dim=16, mask=document_like, block=(64, 64),
         options=ALONE | {"stages": 1}),
    Case("negative_scale", q_len=64, scale=-0.3, mask=causal, block=(64, 64), dim=32),
]  # fmt: skip


@pytest.mark.interpreter
@cases(*CASES)
def test_forward(case):
    check(case, interpret=True)


@pytest.mark.interpreter
def test_self_loading(monkeypatch):
    """Two consumers with tiles of their own, one of which has two."""
    monkeypatch.setattr(mosaic_gpu, "_cores", lambda: 1)
    options = ALONE | {"workers": 2}
    case = Case(
        "self_loading",
        q_len=130,
        kv_len=330,
        mask=document_like,
        block=(64, 64),
        dim=16,
        options=options,
    )
    check(case, interpret=True)
