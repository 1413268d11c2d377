"""flexjax itself, by the backend that it chooses or by a named one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import flexjax
from benchmarks.peers.base import Case, Contender, compiled_jax
from benchmarks.variants import Shape, Variant
from flexjax import masks


def backend_in(program: str) -> str:
    """Which backend a compiled program's text shows: its custom call, or xla where there is none."""
    return "mosaic_gpu" if 'custom_call_target="mosaic_gpu' in program else "xla"


class Flexjax:
    """`flexjax.flex_attention` under jit, with the block mask and the captured arrays as arguments.

    Args:
        backend: by which; None for the one that flexjax chooses.
        captures: whether the backward pass also gives the gradients of the captured arrays of floats, which the
            gate does not check (the tests do).
    """

    def __init__(self, backend: str | None = None, captures: bool = False) -> None:
        self.backend, self.captures = backend, captures

    @property
    def name(self) -> str:
        own = "flexjax+captures" if self.captures else "flexjax"
        return own if self.backend is None else f"{own}/{self.backend}"

    def missing(self) -> str | None:
        try:
            self._compile_once()
        except ValueError as error:  # no such backend
            return str(error)
        except Exception:  # each case will say what is wrong
            return None
        return None

    def _compile_once(self) -> None:
        """Compiles a small attention with mods.

        What a process imports and sets up at the first one is not the compile time of any variant.
        """
        tiny, slopes = jnp.ones((1, 1, 128, 64), jnp.bfloat16), jnp.ones(1)
        mask = flexjax.create_block_mask(masks.causal(), None, None, 128, 128)

        def attend(query: Any, slopes: Any, mask: Any) -> Any:
            return flexjax.flex_attention(
                *(query,) * 3,
                score_mod=lambda score, b, h, q, kv: score + slopes[h] * (kv - q),
                block_mask=mask,
                backend=self.backend,
            )

        jax.jit(attend).lower(tiny, slopes, mask).compile()

    def supports(self, shape: Shape, variant: Variant) -> bool:
        arrays = variant.captures(shape.shrunk()).values()
        return not self.captures or any(jnp.issubdtype(x.dtype, jnp.floating) for x in arrays)

    def prepare(self, case: Case) -> Contender:
        shape, variant, options = case.shape, case.variant, case.options
        captures = {name: jnp.asarray(x) for name, x in variant.captures(shape).items()}
        mask_mod = variant.mods(jnp, captures, shape).mask
        block_mask = None
        if mask_mod is not None:
            block_mask = flexjax.create_block_mask(
                mask_mod, None, None, shape.q_len, shape.kv_len, options.block_size
            )

        def attend(query: Any, key: Any, value: Any, captures: Any, block_mask: Any) -> Any:
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
            lambda program: f"{self.name.split('/')[0]}/{self.backend or backend_in(program)}",
            attend,
            case,
            (captures, block_mask),
            layout="BHLD",
            differentiated=4 if self.captures else 3,
            config=dict(options.kernel_options),
            block_size=None if block_mask is None else block_mask.block_size,
            density=None if block_mask is None else 1.0 - block_mask.sparsity() / 100.0,
        )

    def release(self) -> None:
        pass
