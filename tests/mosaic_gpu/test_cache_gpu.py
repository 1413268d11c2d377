"""JAX's persistent compilation cache serves attention to a second process."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

PROGRAM = """
import collections, json, time
import jax, jax.numpy as jnp
from flexjax import flex_attention, masks, scores

events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
x = jax.random.normal(jax.random.key(0), (1, 2, 512, 64), jnp.bfloat16)
captured = jnp.arange(512) // 100

@jax.jit
def attend(x, captured):
    document = lambda b, h, q, k: (captured[q] == captured[k]) & (q >= k)
    return flex_attention(x, x, x, scores.soft_cap(20.0), mask_mod=document)

start = time.perf_counter()
program = attend.lower(x, captured).compile()
seconds = time.perf_counter() - start
assert "mosaic_gpu" in program.as_text()
program(x, captured).block_until_ready()
names = ("cache_hits", "cache_misses")
print(json.dumps({n: events[f"/jax/compilation_cache/{n}"] for n in names} | {"seconds": seconds}))
"""


def run(folder):
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_process_compiles_nothing(tmp_path):
    first, second = run(tmp_path), run(tmp_path)
    print(first, second)
    assert first["cache_misses"] > 0
    assert second["cache_misses"] == 0
    assert second["cache_hits"] > 0
