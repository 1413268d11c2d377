"""flexjax itself, by the backend that it chooses or by a named one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

import flexjax
from benchmarks.peers.base import Case, Contender, compiled_jax
from benchmarks.variants import Shape, Variant


def backend_in(program: str) -> str:
    """Which backend a compiled program's text shows: its custom call, or xla where there is none."""
    return "mosaic_gpu" if 'custom_call_target="mosaic_gpu' in program else "xla"


class Flexjax:
    """`flexjax.flex_attention` under jit, with the block mask and the captured arrays as arguments."""

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend

    @property
    def name(self) -> str:
        return "flexjax" if self.backend is None else f"flexjax/{self.backend}"

    def missing(self) -> str | None:
        # Backends are imported when they are first needed, which is not to count as a variant's compile time.
        tiny = jnp.ones((1, 1, 128, 64), jnp.bfloat16)
        try:
            attend = functools.partial(flexjax.flex_attention, backend=self.backend)
            jax.jit(attend).lower(tiny, tiny, tiny).compile()
        except ValueError as error:  # no such backend
            return str(error)
        except Exception:  # each case will say what is wrong
            return None
        return None

    def supports(self, shape: Shape, variant: Variant) -> bool:
        return True

    def prepare(self, case: Case) -> Contender:
        shape, variant, options = case.shape, case.variant, case.options
        captures = {name: jnp.asarray(x) for name, x in variant.captures(shape).items()}
        mask_mod = variant.mods(jnp, captures, shape).mask
        block_mask = None
        if mask_mod is not None:
            block_mask = flexjax.create_block_mask(
                mask_mod, None, None, shape.q_len, shape.kv_len, options.block_size
            )

        def attend(query: Any, key: Any, value: Any, block_mask: Any, captures: Any) -> Any:
            return flexjax.flex_attention(
                query,
                key,
                value,
                score_mod=variant.mods(jnp, captures, shape).score,
                block_mask=block_mask,
                kernel_options=options.kernel_options or None,
                backend=self.backend,
            )

        return compiled_jax(
            lambda program: f"flexjax/{self.backend or backend_in(program)}",
            attend,
            case,
            (block_mask, captures),
            layout="BHLD",
            config=dict(options.kernel_options),
            block_size=None if block_mask is None else block_mask.block_size,
            density=None if block_mask is None else 1.0 - block_mask.sparsity() / 100.0,
        )

    def release(self) -> None:
        pass
