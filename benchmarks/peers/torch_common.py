"""What the PyTorch peers share: inputs as tensors with the same bits, results as NumPy arrays."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.peers.base import Contender, no_gpu, no_import


def missing() -> str | None:
    """Why PyTorch cannot run here; None if it can."""
    reason = no_gpu() or no_import("torch")
    if reason is None:
        import torch

        if not torch.cuda.is_available():
            reason = "this PyTorch finds no CUDA GPU"
    return reason


def to_tensor(array: Any, device: str = "cuda") -> Any:
    """A tensor with the values of a JAX or NumPy array, copied through the host."""
    import torch

    host = np.array(array)
    if host.dtype.name == "bfloat16":  # a NumPy dtype that PyTorch does not know
        return torch.from_numpy(host.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(host).to(device)


def heads(result: Any, pairs: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """The [L, D] heads of a result in layout BHLD."""
    return [result[b, h].float().cpu().numpy() for b, h in pairs]


def contender(
    peer: str, attend: Callable[..., Any], sets: Sequence[tuple[Any, ...]], **details: Any
) -> Contender:
    """A contender from a PyTorch function of (query, key, value), which is called once to compile it."""
    import torch

    def synchronize(result: Any) -> None:
        torch.cuda.synchronize()

    start = time.perf_counter()
    synchronize(attend(*sets[0]))
    compile_s = time.perf_counter() - start
    cold = os.environ.get("TORCHINDUCTOR_FORCE_DISABLE_CACHES") == "1"
    return Contender(
        peer=peer,
        run=lambda index: attend(*sets[index]),
        synchronize=synchronize,
        heads=heads,
        input_sets=len(sets),
        compile_s=compile_s if cold else None,
        layout="BHLD",
        **details,
    )
