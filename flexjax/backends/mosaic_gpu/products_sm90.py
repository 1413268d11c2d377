"""The two matrix products of a step, awaited: of decoding, and of the forward pass in the interpreter."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp


def scores(query: Any, key: Any) -> Any:
    """Q K^T of tiles in shared memory, float32."""

    def product(acc: Any) -> Any:
        plgpu.wgmma(acc, query, key.transpose((1, 0)))
        return acc[...]

    shape = query.shape[-2], key.shape[-2]
    return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))


def add_weighted(out: Any, p: Any, value: Any, staged: Any) -> Any:
    """Adds P V to `out`: the product of probabilities in registers and values in shared memory.

    Args:
        out: float32.
        p: in the values' dtype.
        value: the reference.
        staged: in the interpreter, which knows neither operands in registers nor `run_state`, shared memory for
            the probabilities; None on the GPU.
    """
    if staged is None:
        return pl.run_state(lambda acc: plgpu.wgmma(acc, p, value))(plgpu.ACC.init(out))
    staged[...] = p
    plgpu.commit_smem()

    def product(acc: Any) -> Any:
        plgpu.wgmma(acc, staged, value)
        return acc[...]

    return out + pl.run_scoped(product, plgpu.ACC(out.shape, jnp.float32))
