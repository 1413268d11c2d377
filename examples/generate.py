"""Generates text with the model of `packed_lm.py` from a paged cache, many requests at a time.

    python examples/generate.py               # under a minute on two CPU cores
    python examples/generate.py --help        # requests, samples, sizes, backend, seed

A small model is trained first, on the source of Python's standard library. Then come the requests: beginnings of
functions, of different lengths, each to be continued greedily and by a few samples, by different numbers of bytes.
They share a batch of a few rows and one pool of pages, which is smaller than all of them together:

- a request is let in when rows and pages are free, while others are in the middle of their texts;
- its prompt is read once, in chunks, and the samples `fork` from it: they share its pages, and copy the last one
  when they part;
- every step appends one byte to each row, or a chunk where a prompt is read, and takes pages as they are needed;
- what is finished frees its rows, and pages that nobody else holds.

Two programs are compiled, one for steps with chunks and one for steps without, whatever the lengths. At the end
the texts are run through the model without a cache, and the logits compared.
"""

import argparse
import dataclasses
import functools
import os
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from packed_lm import (
    Config,
    Model,
    batches,
    causal_mask,
    cut,
    make_optimizer,
    pack,
    standard_library,
    train_step,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from flexjax import decode, masks, paged
from flexjax.paged import PagedCache

# -- the model, one step at a time ------------------------------------------------------------------


def forward(
    model: Model, cache: PagedCache, tokens: Int[Array, "B T"], counts: Int[Array, "B"]
) -> tuple[PagedCache, Float[Array, "B vocabulary"]]:
    """Appends `counts` tokens to each row of the cache; logits of the byte that follows them.

    With T = 1 a step of decoding, with a larger one also a chunk of prompts: rows may have different counts.
    """
    length = tokens.shape[1]
    cache, counts = paged.extend(cache, counts, most=length)
    positions = (cache.lengths - counts)[:, None] + jnp.arange(length)
    x = model.embed(tokens)
    for layer, block in enumerate(model.blocks):
        attention = block.attention
        q, k, v = attention.project(block.attention_norm(x), positions)
        cache = paged.write(cache, k, v, counts, layer=layer, layout="BLHD")
        here = cache.layer(layer)
        options = {"mask_mod": masks.causal(), "backend": model.config.backend}
        if length == 1:
            y = decode(q, here, layout="BLHD", **options)
        else:
            y = paged.prefill(jnp.swapaxes(q, 1, 2), here, counts=counts, **options)
            y = jnp.swapaxes(y, 1, 2)
        x = x + attention.out(y.reshape(x.shape))
        x = x + block.down(jax.nn.gelu(block.up(block.mlp_norm(x))))
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    return cache, model.head(model.norm(jnp.take_along_axis(x, last, axis=1)))[:, 0]


class Step(NamedTuple):
    """What a step returns beside the cache.

    Attributes:
        token: the next byte of every row.
        logits: what it was drawn from.
    """

    token: Int[Array, "B"]
    logits: Float[Array, "B vocabulary"]


def make_step(model: Model) -> Callable[..., tuple[PagedCache, Step]]:
    """The jitted step; the cache is donated, and so changed in place."""
    graph, state = nnx.split(model)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(state, cache, tokens, counts, temperatures, key):
        cache, logits = forward(nnx.merge(graph, state), cache, tokens, counts)
        safe = jnp.where(temperatures > 0, temperatures, 1.0)[:, None]
        drawn = jax.random.categorical(key, logits / safe, axis=-1)
        token = jnp.where(temperatures > 0, drawn, logits.argmax(-1))
        return cache, Step(token.astype(jnp.int32), logits)

    return functools.partial(step, state)


open_row = jax.jit(paged.allocate, donate_argnums=0)
close_row = jax.jit(paged.free, donate_argnums=0)
fork_rows = jax.jit(paged.fork, donate_argnums=0)

# -- requests ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Request:
    """A prompt, and what is asked for.

    Attributes:
        prompt: bytes.
        new: bytes to generate for every continuation.
        temperatures: of the continuations; 0 is greedy.
    """

    prompt: bytes
    new: int
    temperatures: tuple[float, ...]

    def pages(self, page: int) -> int:
        """The most pages that it can hold at a time: those that the shared part of the prompt fills are shared."""
        shared = (len(self.prompt) - 1) // page
        own = -(-(len(self.prompt) + self.new) // page) - shared
        return shared + own * len(self.temperatures)


@dataclasses.dataclass
class Text:
    """A row at work: a text as far as it goes.

    Attributes:
        request: what it belongs to.
        temperature: of this continuation.
        data: prompt and generated bytes.
        read: how many of them are in the cache.
        forks: rows that fork from this one once the prompt is read.
        logits: those that the generated bytes were drawn from.
    """

    request: Request
    temperature: float
    data: list[int]
    read: int = 0
    forks: list[int] = dataclasses.field(default_factory=list)
    logits: list[np.ndarray] = dataclasses.field(default_factory=list)

    def next(self, width: int) -> list[int]:
        """The bytes that go into the cache next; the prompt's last one each continuation reads for itself."""
        end = len(self.request.prompt) - 1 if self.forks else len(self.data)
        return self.data[self.read : min(self.read + width, end)]


class Server:
    """Rows, the texts in them, and the cache behind them."""

    def __init__(self, model: Model, requests: list[Request], arguments: argparse.Namespace):
        config, self.arguments = model.config, arguments
        self.queue, self.rows, self.finished = deque(requests), {}, []
        self.promised = 0  # pages that the requests at work may come to hold
        self.cache = PagedCache.create(
            arguments.batch,
            arguments.pages,
            arguments.page,
            config.heads,
            config.width // config.heads,
            max_length=max(len(r.prompt) + r.new for r in requests),
            layers=config.layers,
            dtype=jnp.float32,
        )

    def admit(self) -> None:
        """Lets requests in while there are rows and pages for the first one in the queue."""
        while self.queue:
            request = self.queue[0]
            idle = [row for row in range(self.arguments.batch) if row not in self.rows]
            pages = request.pages(self.arguments.page)
            enough = self.promised + pages <= self.arguments.pages
            if len(idle) < len(request.temperatures) or not enough:
                break
            idle = idle[: len(request.temperatures)]
            for row, temperature in zip(idle, request.temperatures, strict=True):
                self.rows[row] = Text(request, temperature, list(request.prompt))
            self.rows[idle[0]].forks = idle[1:]
            self.cache = open_row(self.cache, np.int32(idle[0]))
            self.promised += pages
            self.queue.popleft()
        if not self.rows:
            raise SystemExit(
                "A request needs more rows or pages than there are: see --batch, --pages."
            )

    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, counts, temperatures) of the next step."""
        forks = {row for text in self.rows.values() for row in text.forks}
        chunk = self.arguments.chunk
        new = {row: text.next(chunk) for row, text in self.rows.items() if row not in forks}
        width = chunk if any(len(x) > 1 for x in new.values()) else 1
        tokens = np.zeros((self.arguments.batch, width), np.int32)
        counts, temperatures = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.float32)
        for row, data in new.items():
            tokens[row, : len(data)], counts[row] = data, len(data)
            temperatures[row] = self.rows[row].temperature
        return tokens, counts, temperatures

    def take(self, counts: np.ndarray, token: np.ndarray, logits: np.ndarray) -> int:
        """Books what a step did; returns how many bytes it generated."""
        generated = 0
        for row, text in self.rows.items():
            text.read += int(counts[row])
            if text.forks and text.read == len(text.request.prompt) - 1:
                self.cache = fork_rows(self.cache, np.int32(row), np.array(text.forks, np.int32))
                for other in text.forks:
                    self.rows[other].read = text.read
                text.forks = []
            elif counts[row] and text.read == len(text.data):
                text.data.append(int(token[row]))
                text.logits.append(logits[row])
                generated += 1
        return generated

    def release(self) -> None:
        """Frees the rows of finished texts."""
        for row in [r for r, text in self.rows.items() if len(text.logits) == text.request.new]:
            text = self.rows.pop(row)
            self.finished.append(text)
            self.cache = close_row(self.cache, np.int32(row))
            if all(other.request is not text.request for other in self.rows.values()):
                self.promised -= text.request.pages(self.arguments.page)


def generate(
    model: Model, requests: list[Request], arguments: argparse.Namespace, console: Console
) -> list[Text]:
    """Serves all requests; returns their texts.

    Raises:
        AssertionError: pages were lost.
    """
    server, step = Server(model, requests, arguments), make_step(model)
    key = jax.random.key(arguments.seed)
    seconds, generated, fullest, shared = 0.0, 0, 0, 0
    widths: set[int] = set()
    columns = (
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=console) as progress:
        total = sum(r.new * len(r.temperatures) for r in requests)
        task = progress.add_task("", total=total, rate="")
        while server.queue or server.rows:
            server.admit()
            tokens, counts, temperatures = server.inputs()
            key, draw = jax.random.split(key)
            start = time.perf_counter()
            server.cache, out = step(server.cache, tokens, counts, temperatures, draw)
            new = server.take(counts, np.asarray(out.token), np.asarray(out.logits))
            if tokens.shape[1] in widths:  # the first step of each width compiles
                seconds, generated = seconds + time.perf_counter() - start, generated + new
            widths.add(tokens.shape[1])
            holders = np.asarray(server.cache.reference_counts)
            fullest = max(fullest, int((holders > 0).sum()))
            shared = max(shared, int((holders > 1).sum()))
            server.release()
            rate = f"{generated / seconds:,.0f} bytes/s" if seconds else ""
            progress.update(task, advance=new, rate=rate)
    if int(server.cache.check().free_count) != arguments.pages:
        raise AssertionError("Pages are missing although every sequence was freed.")
    alone = sum(-(-len(text.data) // arguments.page) for text in server.finished)
    console.print(
        f"{len(server.finished)} texts, {rate}; at most {fullest} of {arguments.pages} pages were in use, "
        f"{shared} of them shared (all texts side by side: {alone})."
    )
    return server.finished


# -- the check --------------------------------------------------------------------------------------


def check(model: Model, texts: list[Text], console: Console) -> None:
    """Runs whole texts through the model, without a cache, and compares logits and greedy choices.

    Raises:
        AssertionError: they differ, or are all the same, so that the check would see nothing.
    """
    longest = max(len(t.data) for t in texts)
    graph, state = nnx.split(model)

    @jax.jit
    def whole(state, tokens):
        return nnx.merge(graph, state)(tokens, causal_mask(tokens))

    worst = spread = 0.0
    for text in texts:
        tokens = np.zeros((1, longest), np.int32)
        tokens[0, : len(text.data)] = text.data
        first = len(text.request.prompt) - 1
        expected = np.asarray(whole(state, tokens))[0, first : first + text.request.new]
        worst = max(worst, float(np.abs(np.stack(text.logits) - expected).max()))
        spread = max(spread, float(np.abs(expected - expected[:1]).max()))
        if text.temperature == 0.0 and text.data[first + 1 :] != list(
            np.stack(text.logits).argmax(-1)
        ):
            raise AssertionError("A greedy continuation is not the most likely one.")
    if not worst < 1e-3 < 0.1 < spread:
        raise AssertionError(
            f"Logits from the cache differ by {worst:.2g} from those without one; from one position to another "
            f"they differ by {spread:.2g}."
        )
    console.print(
        f"check: logits differ by at most {worst:.1e} from those of the model without a cache (and by "
        f"{spread:.2g} from one position to another)."
    )


# -- the program ------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    smoke = os.environ.get("FLEXJAX_SMOKE") == "1"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=12 if smoke else 150, help="of training")
    parser.add_argument("--width", type=int, default=32 if smoke else 96)
    parser.add_argument("--layers", type=int, default=1 if smoke else 2)
    parser.add_argument("--requests", type=int, default=3 if smoke else 10)
    parser.add_argument("--samples", type=int, default=2, help="of each, beside the greedy one")
    parser.add_argument("--new", type=int, default=20 if smoke else 120, help="most bytes each")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--batch", type=int, default=6 if smoke else 9, help="rows")
    parser.add_argument("--pages", type=int, default=24 if smoke else 40, help="in the pool")
    parser.add_argument("--page", type=int, default=16, help="bytes in a page")
    parser.add_argument("--chunk", type=int, default=32, help="bytes of a prompt a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default=None, help="of flex_attention, for example xla")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    console = Console(highlight=False)
    rng = np.random.default_rng(arguments.seed)
    documents = standard_library()
    rng.shuffle(documents)
    config = Config(width=arguments.width, layers=arguments.layers, backend=arguments.backend)
    model = Model(config, nnx.Rngs(arguments.seed))
    optimizer = make_optimizer(model, arguments.steps, 4e-3)
    stream = batches(pack(cut(documents[:2000], 256), 256), 2, rng)
    for _ in range(arguments.steps):
        batch = next(stream)
        loss = train_step(model, optimizer, batch.tokens, batch.ids)
    console.print(f"trained for {arguments.steps} steps: {float(loss):.2f} nats a byte")

    functions = [d for d in documents[2000:] if d.startswith(b"def ") and len(d) > 120]
    temperatures = (0.0, *[arguments.temperature] * arguments.samples)
    requests = [
        Request(
            d[: int(rng.integers(6, 100))],
            int(rng.integers(arguments.new // 2, arguments.new + 1)),
            temperatures,
        )
        for d in functions[: arguments.requests]
    ]
    texts = generate(model, requests, arguments, console)
    check(model, texts, console)
    console.rule("a prompt and its continuations")
    for text in [t for t in texts if t.request is requests[0]]:
        console.print(f"temperature {text.temperature}:")
        console.print(bytes(text.data).decode("utf-8", "replace"), markup=False)
    console.rule()


if __name__ == "__main__":
    main()
