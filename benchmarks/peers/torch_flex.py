"""PyTorch's FlexAttention, compiled with its default options or with autotuning."""

from __future__ import annotations

from typing import Any

from benchmarks.peers import torch_common
from benchmarks.peers.base import Case, Contender
from benchmarks.variants import Shape, Variant

# From here on the uncompiled mask builder would hold several L x S arrays that do not fit.
_COMPILED_MASK_LENGTH = 65536


class TorchFlex:
    """`torch.nn.attention.flex_attention` under torch.compile.

    Args:
        autotuned: whether to compile with mode="max-autotune-no-cudagraphs", which takes a minute a variant.
    """

    def __init__(self, autotuned: bool = False) -> None:
        self.autotuned = autotuned

    @property
    def name(self) -> str:
        return "torch_flex_autotuned" if self.autotuned else "torch_flex"

    def missing(self) -> str | None:
        reason = torch_common.missing()
        if reason is None and torch_common.cold():
            _compile_once()
        return reason

    def supports(self, shape: Shape, variant: Variant) -> bool:
        return True

    def prepare(self, case: Case) -> Contender:
        import torch
        from torch.nn.attention.flex_attention import flex_attention

        shape = case.shape
        score_mod, block_mask = mods(case.variant, shape, "cuda")
        options = {"mode": "max-autotune-no-cudagraphs"} if self.autotuned else {}
        compiled = torch.compile(flex_attention, dynamic=False, **options)

        def attend(query: Any, key: Any, value: Any) -> Any:
            return compiled(
                query,
                key,
                value,
                score_mod=score_mod,
                block_mask=block_mask,
                enable_gqa=shape.q_heads != shape.kv_heads,
            )

        return torch_common.contender(
            self.name,
            attend,
            case,
            config=options,
            block_size=None if block_mask is None else tuple(block_mask.BLOCK_SIZE),
            density=None if block_mask is None else 1.0 - float(block_mask.sparsity()) / 100.0,
        )

    def release(self) -> None:
        import torch

        # Else the variants would pile up behind one function, up to the compiler's limit of eight.
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def _compile_once() -> None:
    """Compiles a small attention, as flexjax does: the compiler's start is not any variant's compile time."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tiny = torch.ones(1, 1, 128, 64, dtype=torch.bfloat16, device="cuda")
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 128, 128)
    torch.compile(flex_attention, dynamic=False)(
        tiny, tiny, tiny, score_mod=lambda score, b, h, q, kv: score + (kv - q), block_mask=mask
    )
    torch.cuda.synchronize()
    torch._dynamo.reset()


def mods(variant: Variant, shape: Shape, device: str) -> tuple[Any, Any]:
    """(score_mod, BlockMask), None where the variant has none."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    captures = {
        name: torch_common.to_tensor(x, device) for name, x in variant.captures(shape).items()
    }
    score_mod, mask_mod = variant.mods(torch, captures, shape)
    if mask_mod is None:
        return score_mod, None
    compiled = {"_compile": True} if shape.kv_len >= _COMPILED_MASK_LENGTH else {}
    block_mask = create_block_mask(
        mask_mod, None, None, shape.q_len, shape.kv_len, device=device, **compiled
    )
    return score_mod, block_mask
