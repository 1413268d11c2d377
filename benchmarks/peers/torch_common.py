"""What the PyTorch peers share: inputs as tensors with the same bits, results as NumPy arrays."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.peers.base import Case, Contender, no_gpu, no_import


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


def cold() -> bool:
    """Whether compilation really happens, whatever was compiled before."""
    return os.environ.get("TORCHINDUCTOR_FORCE_DISABLE_CACHES") == "1"


def contender(peer: str, attend: Callable[..., Any], case: Case, **details: Any) -> Contender:
    """A contender from a PyTorch function of (query, key, value), which is called once to compile it."""
    import torch

    sets = case.inputs.converted("torch", to_tensor)
    run = lambda index: attend(*sets[index])
    start = time.perf_counter()
    if case.backward:
        sets = [tuple(x.detach().requires_grad_() for x in triple) for triple in sets]
        outs = [attend(*triple) for triple in sets]
        cotangents = [to_tensor(x) for x in case.inputs.cotangents("BHLD")]

        def run(index: int) -> Any:
            return torch.autograd.grad(
                outs[index], sets[index], cotangents[index], retain_graph=True
            )

    def synchronize(result: Any) -> None:
        torch.cuda.synchronize()

    def heads(result: Any, pairs: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        results = result if case.backward else (result,)
        return [x[b, h].detach().float().cpu().numpy() for b, h in pairs for x in results]

    synchronize(run(0))
    compile_s = time.perf_counter() - start
    return Contender(
        peer=peer,
        run=run,
        synchronize=synchronize,
        heads=heads,
        input_sets=len(sets),
        compile_s=compile_s if cold() else None,
        layout="BHLD",
        **details,
    )
