"""A step of training, and how much of the machine it uses."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int

from examples.llama.model import Llama

# Dense bfloat16 FLOP/s that the makers promise.
_PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def next_token_loss(
    model: Llama, tokens: Int[Array, "B L"], ids: Int[Array, "B L"]
) -> Float32[Array, ""]:
    """Mean cross-entropy of the next token, in nats, wherever it is of the same document."""
    logits = model(tokens, ids)[:, :-1]
    counts = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.where(counts, losses, 0.0).sum() / jnp.maximum(counts.sum(), 1)


def make_optimizer(model: Llama, rate: float, steps: int) -> nnx.Optimizer:
    """AdamW with clipped gradients, a short warm-up and a cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, rate, max(1, steps // 20), max(2, steps), 0.1 * rate
    )
    adam = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1)
    return nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), adam), wrt=nnx.Param)


@nnx.jit(donate_argnums=(0, 1))
def train_step(
    model: Llama, optimizer: nnx.Optimizer, tokens: Int[Array, "B L"], ids: Int[Array, "B L"]
) -> Float32[Array, ""]:
    """One step of the optimizer; returns the loss before it."""
    loss, gradients = nnx.value_and_grad(next_token_loss)(model, tokens, ids)
    optimizer.update(model, gradients)
    return loss


def visible_pairs(ids: np.ndarray, window: int | None) -> int:
    """Pairs of a token and one that it sees: itself and the past of its document, as far as `window` reaches.

    Args:
        ids: (B, L), the document of each token, -1 where there is none; equal ids of a row lie side by side.
        window: how many tokens a token sees, itself included; None for no bound.
    """
    total = 0
    for row in ids:
        for count in np.unique(row[row >= 0], return_counts=True)[1]:
            reach = int(count if window is None else min(count, window))
            # The first `reach` tokens see 1, 2, ..., reach tokens, all later ones `reach`.
            total += reach * (reach + 1) // 2 + (int(count) - reach) * reach
    return total


def peak_flops() -> tuple[float, str]:
    """(FLOP/s of one device that model FLOP utilisation refers to, where the number comes from).

    On a device that is not in the list, that of a large float32 product, measured now.
    """
    kind = jax.devices()[0].device_kind
    for name, peak in _PEAKS.items():
        if name in kind:
            return peak, f"{name}, dense bfloat16"
    size = 1024
    x = jnp.ones((size, size))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds), f"a float32 product of {size} x {size} here"
