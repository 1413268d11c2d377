"""tokamax's Mosaic GPU attention, from the folder that FLEXJAX_PEERS names or from an installation."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.base import Case, Contender, compiled_jax, no_gpu, no_import
from benchmarks.variants import SOFT_CAP, Shape, Variant


class Tokamax:
    """`tokamax.dot_product_attention(implementation="mosaic")`, untuned."""

    name = "tokamax"

    def missing(self) -> str | None:
        hint = "; install it, or put it into the folder that FLEXJAX_PEERS names"
        return no_gpu() or no_import("tokamax", hint)

    def supports(self, shape: Shape, variant: Variant) -> bool:
        return variant.name in ("noop", "causal", "sliding_window", "soft_cap")

    def prepare(self, case: Case) -> Contender:
        import tokamax

        variant, window = case.variant.name, case.shape.window

        def attend(query: Any, key: Any, value: Any) -> Any:
            return tokamax.dot_product_attention(
                query,
                key,
                value,
                is_causal=variant != "noop",
                local_window_size=(window, 0) if variant == "sliding_window" else None,
                logits_soft_cap=SOFT_CAP if variant == "soft_cap" else None,
                implementation="mosaic",
            )

        return compiled_jax(self.name, attend, case, layout="BLHD")

    def release(self) -> None:
        pass
