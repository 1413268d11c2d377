"""Who decodes: flexjax, and what other libraries have for it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from benchmarks import decode_steps
from benchmarks.decode_steps import DecodeStep
from benchmarks.peers import add_peers_folder, torch_common
from benchmarks.peers.base import no_gpu, no_import
from flexjax import KVCache, decode


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A peer that is ready to run a step; see `benchmarks.timing.Timed`.

    Attributes:
        run: queues one call.
        synchronize: waits for a result.
        output: from a result to (B, Hq, L, D).
        compile_s: seconds.
        config: what distinguishes this way of running the peer.
    """

    run: Callable[[], Any]
    synchronize: Callable[[Any], Any]
    output: Callable[[Any], Any]
    compile_s: float | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    input_sets: int = 1

    def call(self, index: int) -> Any:
        return self.run()

    def wait(self, result: Any) -> None:
        self.synchronize(result)


class DecodePeer(Protocol):
    """An implementation of decoding."""

    def missing(self) -> str | None:
        """Why this peer cannot run here; None if it can."""

    def supports(self, step: DecodeStep) -> bool:
        """Whether this peer can express the step."""

    def prepare(self, step: DecodeStep, pool: Executor) -> Callable[[], Prepared]:
        """Starts to compile, in the pool if that can be; the result waits for it."""

    def release(self) -> None:
        """Forgets what was compiled."""


def _compiled(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    pool: Executor,
    output: Any,
    config: dict[str, Any] | None = None,
) -> Callable[[], Prepared]:
    """A JAX function, compiled in the pool."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*args)
    traced = time.perf_counter() - start

    def build() -> tuple[Any, float]:
        start = time.perf_counter()
        return lowered.compile(), traced + time.perf_counter() - start

    future = pool.submit(build)

    def finish() -> Prepared:
        program, seconds = future.result()
        return Prepared(
            lambda: program(*args), jax.block_until_ready, output, round(seconds, 3), config or {}
        )

    return finish


@dataclasses.dataclass(frozen=True)
class FlexjaxDecode:
    """`flexjax.decode`; captured arrays and lengths are arguments of the program.

    Attributes:
        options: kernel options.
    """

    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def missing(self) -> str | None:
        return None

    def supports(self, step: DecodeStep) -> bool:
        return True

    def prepare(self, step: DecodeStep, pool: Executor) -> Callable[[], Prepared]:
        captures = {n: jnp.asarray(x) for n, x in decode_steps.captures_of(step).items()}
        cache: Any
        if step.page is None:
            lengths = jnp.asarray(step.lengths, jnp.int32)
            cache = KVCache(*decode_steps.contiguous(step), lengths)
            arrays: Any = cache
        else:
            arrays = tuple(decode_steps.paged(step))

        def attend(query: Any, arrays: Any, captures: Any) -> Any:
            cache = arrays if step.page is None else decode_steps.Pages(*arrays)
            mods = decode_steps.mods(step, jnp, captures)
            return decode(query, cache, *mods, kernel_options=self.options)

        args = decode_steps.query_of(step), arrays, captures
        return _compiled(attend, args, pool, lambda out: out, self.options)

    def release(self) -> None:
        pass


class JaxCudnn:
    """`jax.nn.dot_product_attention` by cuDNN; no mods."""

    def missing(self) -> str | None:
        return no_gpu()

    def supports(self, step: DecodeStep) -> bool:
        return step.variant == "noop" and step.page is None and len(set(step.lengths)) == 1

    def prepare(self, step: DecodeStep, pool: Executor) -> Callable[[], Prepared]:
        arrays = (decode_steps.query_of(step), *decode_steps.contiguous(step))

        def attend(query: Any, key: Any, value: Any) -> Any:
            return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")

        args = tuple(jnp.swapaxes(x, 1, 2) for x in arrays)
        return _compiled(attend, args, pool, lambda out: jnp.swapaxes(out, 1, 2))

    def release(self) -> None:
        pass


class FlashAttention3:
    """FlashAttention-3 through XLA's FFI; no mods."""

    def missing(self) -> str | None:
        add_peers_folder()
        return no_gpu() or no_import("dew_flash_attn")

    def supports(self, step: DecodeStep) -> bool:
        return step.variant == "noop" and step.page is None and len(set(step.lengths)) == 1

    def prepare(self, step: DecodeStep, pool: Executor) -> Callable[[], Prepared]:
        import dew_flash_attn

        arrays = (decode_steps.query_of(step), *decode_steps.contiguous(step))

        def attend(query: Any, key: Any, value: Any) -> Any:
            return dew_flash_attn.flash_mha(query, key, value, is_causal=False)

        args = tuple(jnp.swapaxes(x, 1, 2) for x in arrays)
        return _compiled(attend, args, pool, lambda out: jnp.swapaxes(out, 1, 2))

    def release(self) -> None:
        pass


class TorchDecode:
    """PyTorch: its FlexAttention, which takes a decoding kernel for few queries, or its SDPA.

    Args:
        flex: which of the two.
    """

    def __init__(self, flex: bool) -> None:
        self.flex = flex

    def missing(self) -> str | None:
        return torch_common.missing()

    def supports(self, step: DecodeStep) -> bool:
        even = step.page is None and len(set(step.lengths)) == 1
        return even and (self.flex or step.variant == "noop")

    def prepare(self, step: DecodeStep, pool: Executor) -> Callable[[], Prepared]:
        def finish() -> Prepared:
            import torch

            start = time.perf_counter()
            arrays = (decode_steps.query_of(step), *decode_steps.contiguous(step))
            tensors = tuple(torch.from_dlpack(x) for x in arrays)
            attend = self._flex(step) if self.flex else self._sdpa(step)
            attend(*tensors)
            torch.cuda.synchronize()
            seconds = round(time.perf_counter() - start, 3)

            def synchronize(result: Any) -> None:
                torch.cuda.synchronize()

            def output(result: Any) -> Any:
                return result.detach().float().cpu().numpy()

            return Prepared(lambda: attend(*tensors), synchronize, output, seconds)

        return finish

    def _flex(self, step: DecodeStep) -> Callable[..., Any]:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        captures = {
            name: torch_common.to_tensor(x) for name, x in decode_steps.captures_of(step).items()
        }
        score_mod, mask_mod = decode_steps.mods(step, torch, captures)
        offset, grouped = step.lengths[0] - step.q_len, step.q_heads != step.kv_heads
        block_mask = score = None
        if mask_mod is not None:

            def mask(b: Any, h: Any, q: Any, kv: Any) -> Any:
                return mask_mod(b, h, q + offset, kv)

            block_mask = create_block_mask(
                mask, None, None, step.q_len, step.capacity, device="cuda"
            )
        if score_mod is not None:

            def score(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
                return score_mod(s, b, h, q + offset, kv)

        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: compiled(
            q, k, v, score_mod=score, block_mask=block_mask, enable_gqa=grouped
        )

    def _sdpa(self, step: DecodeStep) -> Callable[..., Any]:
        from torch.nn.functional import scaled_dot_product_attention

        grouped = step.q_heads != step.kv_heads
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

    def release(self) -> None:
        if self.flex and torch_common.missing() is None:
            import torch

            torch._dynamo.reset()


PEERS: dict[str, DecodePeer] = {
    "flexjax": FlexjaxDecode(),
    "torch_flex": TorchDecode(flex=True),
    "torch_sdpa": TorchDecode(flex=False),
    "jax_cudnn": JaxCudnn(),
    "fa3": FlashAttention3(),
}
