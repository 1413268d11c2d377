"""The suite `infer`: decoding steps of 8B-sized layers over long caches, and prompts under a sliding window.

A decoding step takes one token of every sequence of a batch through the layers of examples/llama's model:
projections, the write into the cache, attention to it, SwiGLU, logits. Weights and caches are in the model's
dtype, and the caches are the same arrays for all peers. `tbs` counts each weight and each cached key and value
once, which is what a step must read; `of_copy` is its share of what a copy, timed in the same turns, reads and
writes. Logits of the first and the last sequence are held against float32.

Prompts are attention alone: B1, 32/8 heads, a window of 4096.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import models, session, table
from benchmarks import settings as command_line
from benchmarks.contest import Entry, Rows, contest, judged, peak_mb, relative_error
from benchmarks.copying import Copy, copy
from benchmarks.forward import Forward
from benchmarks.progress import Progress
from benchmarks.timing import Plan
from benchmarks.variants import Shape
from examples.llama.serving import decode_step

# (context, batch): first the one that matters most, should time run out.
CASES = (
    (32768, 8),
    (8192, 8),
    (1024, 8),
    (65536, 8),
    (1024, 1),
    (65536, 1),
    (1024, 64),
    (8192, 64),
)
QUICK_CASES = ((64, 2),)
CACHE_BYTES = 40e9  # larger caches do not fit beside a peer's temporaries
FLOOR = 1e-3

_WINDOW = ("sliding_window",)
PROMPTS = tuple(Shape(f"S{n}", 1, 32, 8, n, n, 128, _WINDOW, window=4095) for n in (32768, 8192))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)
    parser.add_argument("--contexts", type=models.integers, help="tokens in the caches")
    parser.add_argument(
        "--batches", type=models.integers, help="sequences; all pairs with --contexts"
    )
    parser.add_argument("--only", choices=("decode", "prompt"), help="one part of the suite")


def run(arguments: argparse.Namespace) -> int:
    """Runs the suite; 1 if flexjax failed in any case, else 0."""
    failed, start = 0, time.monotonic()
    if arguments.only != "prompt":
        failed |= decode(arguments)
    if arguments.only != "decode":
        minutes = arguments.minutes
        left = None if minutes is None else minutes - (time.monotonic() - start) / 60
        failed |= prompts(arguments, left)
    return failed


# -- decoding ---------------------------------------------------------------------------------------


def decode(arguments: argparse.Namespace) -> int:
    """Decoding steps; 1 if flexjax failed in any case, else 0."""
    pairs = list(pairs_of(arguments))
    log, progress = models.Log("infer", arguments), Progress(len(pairs))
    config = models.config(arguments)
    box = Box(config)
    plan = Plan(rounds=3, calls=2, warmup=1) if arguments.quick else Plan(rounds=7, calls=20)
    beside = copy(arguments.quick)
    for context, batch in pairs:
        if log.late(progress):
            break
        progress.begin(f"decode {context} x {batch}")
        log.add(measure(box, models.peers(arguments), context, batch, plan, beside), progress)
    return log.close(progress)


def pairs_of(arguments: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """(context, batch) of each case."""
    cases = QUICK_CASES if arguments.quick else CASES
    if arguments.contexts or arguments.batches:
        contexts, batches = arguments.contexts or (32768,), arguments.batches or (8,)
        cases = tuple((context, batch) for context in contexts for batch in batches)
    for context, batch in cases:
        if cache_bytes(models.config(arguments), context, batch) <= CACHE_BYTES:
            yield context, batch
        else:
            print(
                f"left out: caches of {context} x {batch} take more than {CACHE_BYTES / 1e9:g} GB"
            )


def cache_bytes(config: Any, context: int, batch: int) -> int:
    """Of the keys and values of all layers."""
    numbers = 2 * config.layers * batch * context * config.kv_heads * config.head_dim
    return numbers * jnp.dtype(config.dtype).itemsize


class Box:
    """Parameters, and the caches, which are handed from step to step."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.params = models.parameters(config, config.dtype)
        self.caches: Any = None

    def fill(self, context: int, batch: int) -> None:
        """Random keys and values."""
        config = self.config
        self.caches = None  # the old ones go before the new ones come
        shape = (batch, context, config.kv_heads, config.head_dim)

        def layer(key: Any) -> Any:
            return tuple(jax.random.normal(k, shape, config.dtype) for k in jax.random.split(key))

        keys = jax.random.split(jax.random.key(0), config.layers)
        self.caches = [jax.jit(layer)(key) for key in keys]

    def recover(self) -> None:
        """New caches, should a step that failed have taken the old ones along."""
        batch, context = self.shape
        self.fill(context, batch)

    def reference(self, dtype: str, lengths: Any, tokens: Any) -> Any:
        """Logits of the first and the last sequence, by dense attention in a dtype."""
        config = dataclasses.replace(self.config, attention="xla", dtype=dtype)
        merge = models.merger(config)

        def logits(params: Any, caches: Any, lengths: Any, tokens: Any) -> Any:
            params, caches = jax.tree.map(lambda x: x.astype(dtype), (params, caches))
            return decode_step(merge(params), caches, lengths, tokens)[0]

        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            run = jax.jit(logits)
            rows = []
            for i in (0, len(tokens) - 1):
                one = jax.tree.map(lambda x: x[i : i + 1], (self.caches, lengths, tokens))  # noqa: B023
                rows.append(run(self.params, *one))
        return np.concatenate([np.asarray(row) for row in rows])

    def entry(self, config: Any, lengths: Any, tokens: Any) -> Callable[[], Entry]:
        """A peer's step, once it is compiled."""
        merge = models.merger(config)

        def step(caches: Any, params: Any, lengths: Any, tokens: Any) -> Any:
            logits, caches = decode_step(merge(params), caches, lengths, tokens)
            return caches, (logits.argmax(-1), logits[jnp.array([0, -1])])

        def prepare() -> Entry:
            start = time.perf_counter()
            step_of = jax.jit(step, donate_argnums=0)
            compiled = step_of.lower(self.caches, self.params, lengths, tokens).compile()
            seconds = time.perf_counter() - start

            def call() -> Any:
                self.caches, result = compiled(self.caches, self.params, lengths, tokens)
                return result

            return Entry(call, seconds, peak_mb(compiled), self.recover)

        return prepare

    @property
    def shape(self) -> tuple[int, int]:
        return self.caches[0][0].shape[:2]


def measure(
    box: Box, names: tuple[str, ...], context: int, batch: int, plan: Plan, beside: Copy
) -> Rows:
    """The rows of one context and batch, and those of a copy of memory in the same turns."""
    config = box.config
    box.fill(context, batch)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, config.vocabulary, batch), jnp.int32)
    # The newest token is written into the last place of the cache, in every call.
    lengths = jnp.full(batch, context - 1, jnp.int32)
    exact, yardstick = (
        box.reference(dtype, lengths, tokens) for dtype in ("float32", config.dtype)
    )
    limit = 2.0 * relative_error(yardstick, exact) + FLOOR
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(box.params))
    # Of the embedding a step reads a row a sequence.
    weights -= (config.vocabulary - batch) * config.width * jnp.dtype(config.dtype).itemsize
    size = cache_bytes(config, context, batch) + weights

    def figures(ms: float) -> dict[str, Any]:
        return {"tokens_s": round(1e3 * batch / ms, 1), "tbs": round(size / ms / 1e9, 6)}

    return contest(
        models.keys(config, "decode", batch, 1, context, step_mb=round(size / 1e6, 3)),
        {name: box.entry(models.attention(config, name), lengths, tokens) for name in names},
        lambda result: judged(relative_error(result[1], exact), limit),
        figures,
        plan,
        beside,
    )


# -- prompts ----------------------------------------------------------------------------------------


class Prompts(Forward):
    """See `benchmarks.session.Suite`."""

    name = "infer"


def prompts(arguments: argparse.Namespace, minutes: float | None) -> int:
    """Attention of prompts under a window; 1 if flexjax failed in any case, else 0."""
    parser = argparse.ArgumentParser()
    command_line.add_arguments(parser)
    settings = command_line.from_arguments(
        parser.parse_args(["--quick"] if arguments.quick else [])
    )
    shapes = tuple(shape.shrunk() for shape in PROMPTS[:1]) if arguments.quick else PROMPTS
    settings = dataclasses.replace(
        settings,
        shapes=shapes,
        peers=models.peers(arguments),
        minutes=minutes,
        out=arguments.out,
        write=command_line.writes(arguments),
    )
    rows = session.run(Prompts(), settings)
    print(table.summary(rows))
    return int(any("failure" in row for row in rows if table.is_ours(row)))
