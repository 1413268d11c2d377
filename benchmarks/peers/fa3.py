"""FlashAttention-3 through XLA's FFI, from the folder that FLEXJAX_PEERS names or from an installation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.base import Case, Contender, compiled_jax, no_gpu, no_import
from benchmarks.variants import Shape, Variant, document_ids


class FlashAttention3:
    """`dew_flash_attn.flash_mha`; documents run as packed sequences of different lengths."""

    name = "fa3"

    def missing(self) -> str | None:
        hint = "; put dew_flash_attn into the folder that FLEXJAX_PEERS names"
        return no_gpu() or _not_hopper() or no_import("dew_flash_attn", hint)

    def supports(self, shape: Shape, variant: Variant) -> bool:
        # Its causal mask is aligned to the last key, the variants' to the first.
        square = shape.q_len == shape.kv_len
        return square and variant.name in ("noop", "causal", "sliding_window", "document")

    def prepare(self, case: Case) -> Contender:
        import dew_flash_attn

        variant, shape = case.variant.name, case.shape
        window = {"window_size": (shape.window, 0)} if variant == "sliding_window" else {}
        starts, longest = document_starts(shape)

        def attend(query: Any, key: Any, value: Any) -> Any:
            causal = variant != "noop"
            return dew_flash_attn.flash_mha(query, key, value, is_causal=causal, **window)

        def attend_packed(query: Any, key: Any, value: Any, starts: Any) -> Any:
            packed = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
            out = dew_flash_attn.flash_mha_varlen(*packed, starts, longest, is_causal=True)
            return out.reshape(query.shape)

        if variant != "document":
            return compiled_jax(self.name, attend, case, layout="BLHD")
        config, extra = {"varlen": True}, (jnp.asarray(starts),)
        return compiled_jax(self.name, attend_packed, case, extra, layout="BLHD", config=config)

    def release(self) -> None:
        pass


def _not_hopper() -> str | None:
    capability = jax.devices()[0].compute_capability
    return None if capability == "9.0" else f"is built for compute capability 9.0, not {capability}"


def document_starts(shape: Shape) -> tuple[np.ndarray, int]:
    """(int32 offsets of all batch rows' documents and the end, tokens in the longest) of the packed batch."""
    ids = document_ids(shape.kv_len)
    first = np.flatnonzero(np.diff(ids, prepend=-1))
    rows = shape.kv_len * np.arange(shape.batch)
    starts = np.append((rows[:, None] + first).ravel(), shape.batch * shape.kv_len)
    return starts.astype(np.int32), int(np.diff(starts).max())
