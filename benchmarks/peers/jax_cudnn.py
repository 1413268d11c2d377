"""`jax.nn.dot_product_attention`: cuDNN's kernel, or XLA's dense computation for machines without a GPU."""

from __future__ import annotations

from typing import Any, Literal

import jax

from benchmarks.peers.base import Case, Contender, compiled_jax, no_gpu
from benchmarks.variants import Shape, Variant


class JaxNn:
    """JAX's own attention.

    Args:
        implementation: "cudnn" or "xla".
    """

    def __init__(self, implementation: Literal["cudnn", "xla"]) -> None:
        self.implementation = implementation

    @property
    def name(self) -> str:
        return f"jax_{self.implementation}"

    def missing(self) -> str | None:
        return no_gpu() if self.implementation == "cudnn" else None

    def supports(self, shape: Shape, variant: Variant) -> bool:
        return variant.name in ("noop", "causal", "sliding_window")

    def prepare(self, case: Case) -> Contender:
        variant, window = case.variant.name, case.shape.window

        def attend(query: Any, key: Any, value: Any) -> Any:
            return jax.nn.dot_product_attention(
                query,
                key,
                value,
                is_causal=variant != "noop",
                local_window_size=(window, 0) if variant == "sliding_window" else None,
                implementation=self.implementation,
            )

        return compiled_jax(self.name, attend, case, layout="BLHD")

    def release(self) -> None:
        pass
