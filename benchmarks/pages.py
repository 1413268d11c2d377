"""What is lost by attending to a few pages of a paged cache, on a small trained model.

    python benchmarks/run.py pages            # a few minutes on two CPU cores; appends rows to results/cpu/
    python benchmarks/run.py pages --dry-run  # prints only

The model of `examples/packed_lm.py` is trained on rows of 1024 bytes, and reads long functions that it has not
seen from a paged cache. Their last bytes are then predicted one at a time, with attention to all pages and to a
few of them: the first one, the newest one, and k others, chosen by `flexjax.paged.select_pages` or simply the
newest. A row tells the loss in nats a byte above that of full attention (`nats`), and the relative difference of
what the last layer's attention gives (`error`).
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import records
from flexjax import masks, paged
from flexjax.paged import PagedCache

# The examples are programs, not a package.
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
import packed_lm

LENGTH, TAIL, PAGE, ROWS = 1024, 96, 16, 6
WIDTH, LAYERS = 96, 2
TOP_K = (1, 4, 16)
Attend = Callable[[Any, PagedCache], Any]


def full(query: Any, cache: PagedCache) -> Any:
    return paged.prefill(query, cache, mask_mod=masks.causal())


def best(top_k: int) -> Attend:
    def attend(query: Any, cache: PagedCache) -> Any:
        return paged.adaptive_attention(query, cache, top_k, None, masks.causal())

    return attend


def newest(top_k: int) -> Attend:
    def attend(query: Any, cache: PagedCache) -> Any:
        def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            near = kv_idx // PAGE >= q_idx // PAGE - top_k
            return (kv_idx <= q_idx) & (near | (kv_idx < PAGE))

        return paged.prefill(query, cache, mask_mod=mask)

    return attend


def forward(
    model: packed_lm.Model, cache: PagedCache, tokens: Any, attend: Attend
) -> tuple[PagedCache, Any, Any]:
    """Appends tokens (B, T): (cache, logits, what the last layer's attention gives)."""
    length = tokens.shape[1]
    cache, counts = paged.extend(cache, length, most=length)
    positions = (cache.lengths - counts)[:, None] + jnp.arange(length)
    x, y = model.embed(tokens), None
    for layer, block in enumerate(model.blocks):
        q, k, v = block.attention.project(block.attention_norm(x), positions)
        cache = paged.write(cache, k, v, counts, layer=layer, layout="BLHD")
        y = jnp.swapaxes(attend(jnp.swapaxes(q, 1, 2), cache.layer(layer)), 1, 2)
        x = x + block.attention.out(y.reshape(x.shape))
        x = x + block.down(jax.nn.gelu(block.up(block.mlp_norm(x))))
    return cache, model.head(model.norm(x)), y


def trained(steps: int, seed: int) -> tuple[packed_lm.Model, np.ndarray]:
    """The model, and (ROWS, LENGTH + 1) bytes of functions that it was not trained on."""
    documents = packed_lm.standard_library()
    np.random.default_rng(seed).shuffle(documents)
    long = [d for d in documents if len(d) > LENGTH and d.startswith((b"def ", b"class "))][:ROWS]
    held = set(long)
    rest = [d for d in documents if d not in held][:4000]
    rows = packed_lm.pack(packed_lm.cut(rest, LENGTH), LENGTH)
    config = packed_lm.Config(width=WIDTH, layers=LAYERS)
    model = packed_lm.Model(config, nnx.Rngs(seed))
    optimizer = packed_lm.make_optimizer(model, steps, 4e-3)
    stream = packed_lm.batches(rows, 2, np.random.default_rng(seed))
    for _ in track(range(steps), "training"):
        batch = next(stream)
        packed_lm.train_step(model, optimizer, batch.tokens, batch.ids)
    text = np.stack([np.frombuffer(d[: LENGTH + 1], np.uint8) for d in long]).astype(np.int32)
    return model, text


def measure(model: packed_lm.Model, cache: PagedCache, text: np.ndarray, attend: Attend) -> Any:
    """(nats a byte, what the last layer's attention gave) over the tail of each text."""
    graph, state = nnx.split(model)

    @jax.jit
    def predict(state: Any, cache: PagedCache, tail: Any) -> Any:
        model = nnx.merge(graph, state)

        def step(cache: PagedCache, token: Any) -> Any:
            cache, logits, y = forward(model, cache, token[:, None], attend)
            return cache, (logits[:, 0], y[:, 0])

        return jax.lax.scan(step, cache, tail.T)[1]

    logits, y = predict(state, cache, text[:, -TAIL - 1 : -1])
    losses = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(
        logits, text[:, -TAIL:].T[..., None], -1
    ).squeeze(-1)
    return float(losses.mean()), np.asarray(y)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--dry-run", action="store_true", help="do not write results")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints and appends the rows."""
    model, text = trained(arguments.steps, 0)
    heads = model.config.heads
    cache = PagedCache.create(
        ROWS,
        ROWS * LENGTH // PAGE,
        PAGE,
        heads,
        WIDTH // heads,
        max_length=LENGTH,
        layers=LAYERS,
        dtype=jnp.float32,
        bounds=True,
    )
    cache = paged.allocate(cache, np.arange(ROWS))
    read = functools.partial(forward, model, attend=full)
    cache = jax.jit(lambda c, t: read(c, t)[0])(cache, text[:, : LENGTH - TAIL]).check()

    cases = {("full", None): full}
    cases |= {
        (name, k): make(k) for k in TOP_K for name, make in (("bound", best), ("newest", newest))
    }
    log = records.Log("pages", None, not arguments.dry_run)
    base, exact = 0.0, np.zeros(0)
    for (name, k), attend in track(cases.items(), "measuring"):
        loss, y = measure(model, cache, text, attend)
        if name == "full":
            base, exact = loss, y
            continue
        error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
        row = {
            "peer": "flexjax/xla",
            "variant": name,
            "B": ROWS,
            "Hq": heads,
            "Hkv": heads,
            "L": 1,
            "S": LENGTH,
            "D": WIDTH // heads,
            "page": PAGE,
            "top_k": k,
            "dtype": "float32",
            "nats": round(loss - base, 4),
            "full_nats": round(base, 4),
            "error": round(float(error), 4),
        }
        log.add([row])
    table = Table("chosen by", "k", "of pages", "nats a byte above full", "error of the last layer")
    for row in log.rows:
        share = (row["top_k"] + 2) * PAGE / LENGTH
        table.add_row(
            row["variant"],
            str(row["top_k"]),
            f"{share:.0%}",
            f"{row['nats']:.4f}",
            f"{row['error']:.3f}",
        )
    Console().print(table, f"full attention: {base:.3f} nats a byte")
    log.close()
    return 0
