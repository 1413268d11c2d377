"""PyTorch's scaled_dot_product_attention, by cuDNN or by FlashAttention-2."""

from __future__ import annotations

from typing import Any

from benchmarks.peers import torch_common
from benchmarks.peers.base import Case, Contender
from benchmarks.variants import Shape, Variant

_BACKENDS = {"cudnn": "CUDNN_ATTENTION", "fa2": "FLASH_ATTENTION"}


class TorchSdpa:
    """`torch.nn.functional.scaled_dot_product_attention` with one backend.

    Args:
        backend: "cudnn" or "fa2".
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend

    @property
    def name(self) -> str:
        return f"torch_{self.backend}"

    def missing(self) -> str | None:
        return torch_common.missing()

    def supports(self, shape: Shape, variant: Variant) -> bool:
        return variant.name in ("noop", "causal")

    def prepare(self, case: Case) -> Contender:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        shape, causal = case.shape, case.variant.name == "causal"
        backend = getattr(SDPBackend, _BACKENDS[self.backend])

        def attend(query: Any, key: Any, value: Any) -> Any:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    is_causal=causal,
                    enable_gqa=shape.q_heads != shape.kv_heads,
                )

        return torch_common.contender(self.name, attend, case)

    def release(self) -> None:
        pass
