"""The suite `train`: a step of training of layers as large as those of an 8B model, on packed documents.

The model is that of examples/llama, the same for all peers but for its attention. A step is forward pass,
backward pass and AdamW, with a learning rate so small that all steps, of all peers, are of the same parameters.
Gradients of the first layer's projections, into which everything else enters, are held against those in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import models
from benchmarks.contest import Entry, Rows, contest, judged, peak_mb, relative_error
from benchmarks.progress import Progress
from benchmarks.reference import UNTUNED
from benchmarks.timing import Plan
from examples.llama.training import next_token_loss, peak_flops, visible_pairs

LENGTHS = (8192, 32768)
MEAN_DOCUMENT = 2048
RATE = 1e-12
FLOOR = 6e-3  # that of the kernels' gradients; see tests/behaviour/harness.py


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)
    parser.add_argument("--batch", type=int, default=1, help="rows a step")
    parser.add_argument("--lengths", type=models.integers, help=f"tokens a row; {LENGTHS}")
    parser.add_argument(
        "--mean", type=int, default=MEAN_DOCUMENT, help="tokens of a document, on average"
    )
    parser.add_argument("--style", default="llama", choices=("llama", "gemma2", "gpt_oss"))
    parser.add_argument("--remat", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Runs the suite; 1 if flexjax failed in any case, else 0."""
    lengths = arguments.lengths or ((256,) if arguments.quick else LENGTHS)
    mean = 64 if arguments.quick else arguments.mean
    log, progress = models.Log("train", arguments), Progress(len(lengths))
    plan = (
        Plan(rounds=3, calls=1, warmup=1) if arguments.quick else Plan(rounds=5, calls=4, warmup=1)
    )
    for length in lengths:
        if log.late(progress):
            break
        config = models.config(arguments, style=arguments.style, remat=arguments.remat)
        ids = document_ids(arguments.batch, length, mean)
        progress.begin(f"S {length}")
        log.add(measure(config, models.peers(arguments), ids, plan), progress)
    return log.close(progress)


def document_ids(batch: int, length: int, mean: int, seed: int = 0) -> np.ndarray:
    """int32 (B, L): rows of documents whose lengths are exponentially distributed and have a mean.

    Time goes by the sum of their squares, which differs by half between random draws of so few. So the lengths of
    a row are the quantiles of the distribution; their order is random.
    """
    rng = np.random.default_rng(seed)
    count, places = max(1, round(length / mean)), np.arange(length)
    quantiles = -np.log1p(-(np.arange(count) + 0.5) / count)
    sizes = np.stack([rng.permutation(quantiles) for _ in range(batch)])
    ends = np.ceil(np.cumsum(sizes, axis=1) * length / quantiles.sum())
    return np.stack([np.searchsorted(row[:-1], places, side="right") for row in ends]).astype(
        np.int32
    )


def measure(config: Any, names: tuple[str, ...], ids: np.ndarray, plan: Plan) -> Rows:
    """The rows of one length."""
    batch, length = ids.shape
    tokens = jnp.asarray(
        np.random.default_rng(1).integers(0, config.vocabulary, ids.shape), jnp.int32
    )
    box = Box(config)
    exact, yardstick = (box.reference(dtype, tokens, ids) for dtype in ("float32", config.dtype))
    limit = 2.0 * relative_error(yardstick, exact) + FLOOR
    flops = config.flops(ids.size, tuple(visible_pairs(ids, w) for w in (None, config.window)))
    peak, source = peak_flops()

    def figures(ms: float) -> dict[str, Any]:
        return {
            "tokens_s": round(1e3 * ids.size / ms, 1),
            "tflops": round(flops / ms / 1e9, 3),
            "mfu": round(1e3 * flops / ms / peak, 4),
        }

    documents = int(sum(len(np.unique(row)) for row in ids))
    facts = {"documents": documents, "peak_tflops": round(peak / 1e12, 3), "peak_of": source}
    return contest(
        models.keys(config, "packed", batch, length, length, **facts),
        {name: box.entry(models.attention(config, name), tokens, ids) for name in names},
        lambda result: judged(relative_error(result[1], exact), limit),
        figures,
        plan,
    )


class Box:
    """Parameters and optimizer state, handed from step to step: there is memory for one of them."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.optimizer = optax.adamw(RATE, b2=0.95, weight_decay=0.1)
        self.renew()

    def renew(self) -> None:
        """The state anew, should a step that failed have taken it along."""
        self.state: Any = None  # the old one goes before the new one comes
        params = models.parameters(self.config, "float32")
        self.state = params, self.optimizer.init(params)

    def gradients(self, config: Any) -> Callable[..., Any]:
        """(params, tokens, ids) -> (loss, gradients, those of the first layer's projections)."""
        merge = models.merger(config)

        def run(params: Any, tokens: Any, ids: Any) -> Any:
            loss = lambda p: next_token_loss(merge(p), tokens, ids)
            value, gradients = jax.value_and_grad(loss)(params)
            first = gradients["blocks"][0]["attention"]
            return value, gradients, {n: first[n]["kernel"] for n in ("query", "key", "value")}

        return run

    def reference(self, dtype: str, tokens: Any, ids: Any) -> Any:
        """The gradients that are checked, by flexjax's portable backend in a dtype.

        Layers are computed anew in the backward pass: in float32 there is no memory to keep as many as peers do.
        """
        config = dataclasses.replace(
            self.config, attention="flexjax", backend="xla", dtype=dtype, remat=True
        )
        run = self.gradients(config)
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            shown = jax.jit(lambda *x: run(*x)[2], compiler_options=UNTUNED)
            return jax.device_get(shown(self.state[0], tokens, ids))

    def entry(self, config: Any, tokens: Any, ids: Any) -> Callable[[], Entry]:
        """A peer's step, once it is compiled."""
        gradients, optimizer = self.gradients(config), self.optimizer

        def step(state: Any, tokens: Any, ids: Any) -> Any:
            params, momenta = state
            loss, grads, shown = gradients(params, tokens, ids)
            updates, momenta = optimizer.update(grads, momenta, params)
            return (optax.apply_updates(params, updates), momenta), (loss, shown)

        def prepare() -> Entry:
            start = time.perf_counter()
            step_of = jax.jit(step, donate_argnums=0)
            compiled = step_of.lower(self.state, tokens, ids).compile()
            seconds = time.perf_counter() - start

            def call() -> Any:
                self.state, result = compiled(self.state, tokens, ids)
                return result

            return Entry(call, seconds, peak_mb(compiled), self.renew)

        return prepare
