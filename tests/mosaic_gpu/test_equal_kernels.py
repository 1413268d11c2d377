"""Equal kernels are equal to JAX's caches of compiled ones, whatever program they are in."""

import re

import jax
import jax.numpy as jnp

from flexjax import flex_attention


def _kernels(function) -> list[str]:
    """What the kernels of a program, lowered for a GPU, are known by."""
    x = jax.ShapeDtypeStruct((1, 1, 128, 64), jnp.bfloat16)
    text = jax.jit(function).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', text)


def test_kernels_of_two_programs_are_one(monkeypatch):
    monkeypatch.delenv("MOSAIC_GPU_DUMP_TO", raising=False)

    def attend(x):
        return flex_attention(x, x, x, backend="mosaic_gpu")

    (first,), (second,) = _kernels(attend), _kernels(lambda x: 2 * attend(x))
    assert first == second
