"""Trains a small byte-level language model on packed documents, with attention that stays inside each.

    python examples/packed_lm.py                # a few minutes on two CPU cores
    python examples/packed_lm.py --help         # sizes, steps, backend, seed

The text is the source of Python's own standard library. A document is one top-level function or class of it;
documents of all lengths are packed into rows of a few thousand bytes. Each row has an array of document ids,
and the mask follows from it inside the jitted training step:

    block_mask = create_block_mask(masks.document(ids, causal=True), B, None, L, L)

The ids change with every batch, but they are data: nothing is traced again, and blocks of the score matrix
that no document touches are skipped. On the way the program checks that documents do not see each other. It
prints a sample at the end and draws the loss into `out/packed_lm.png`.
"""

import argparse
import collections
import dataclasses
import math
import os
import re
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flexjax import BlockMask, create_block_mask, flex_attention, masks
from flexjax.visualize import plot_mask

PICTURE = Path(__file__).resolve().parent.parent / "out" / "packed_lm.png"

# -- the model --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model.

    Attributes:
        vocabulary: number of different tokens; bytes here.
        width: of the residual stream.
        layers: number of blocks.
        heads: attention heads; their dimension is width / heads.
        backend: of `flex_attention`; None lets it choose.
    """

    vocabulary: int = 256
    width: int = 192
    layers: int = 4
    heads: int = 4
    backend: str | None = None


def rotate(x: Float[Array, "B L H D"], positions: Int[Array, "*B L"]) -> Float[Array, "B L H D"]:
    """Rotary position embedding (Su et al., arXiv:2104.09864): scores depend on distances alone."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = positions[..., None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def linear(inputs: int, outputs: int, rngs: nnx.Rngs, zero: bool = False) -> nnx.Linear:
    """A matrix without bias, zero at first if asked."""
    init = nnx.initializers.zeros_init() if zero else nnx.initializers.lecun_normal()
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head attention through flexjax; which token sees which is up to the block mask."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.qkv = linear(config.width, 3 * config.width, rngs)
        self.out = linear(config.width, config.width, rngs, zero=True)

    def project(
        self, x: Float[Array, "B L W"], positions: Int[Array, "*B L"]
    ) -> tuple[Float[Array, "B L H D"], Float[Array, "B L H D"], Float[Array, "B L H D"]]:
        """Query, key and value, the first two rotated to their positions."""
        heads = (*x.shape[:2], self.config.heads, self.config.width // self.config.heads)
        q, k, v = (part.reshape(heads) for part in jnp.split(self.qkv(x), 3, axis=-1))
        return rotate(q, positions), rotate(k, positions), v

    def __call__(self, x: Float[Array, "B L W"], block_mask: BlockMask) -> Float[Array, "B L W"]:
        # Rotations only enter as differences, so positions may count through all documents of a row.
        q, k, v = self.project(x, jnp.arange(x.shape[1]))
        # BLHD is the layout that projections produce; nothing is transposed for it.
        y = flex_attention(
            q, k, v, block_mask=block_mask, layout="BLHD", backend=self.config.backend
        )
        return self.out(y.reshape(x.shape))


class Block(nnx.Module):
    """Attention and a two-layer perceptron, each behind a normalisation and beside a skip connection."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width = config.width
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = linear(width, 4 * width, rngs)
        self.down = linear(4 * width, width, rngs, zero=True)

    def __call__(self, x: Float[Array, "B L W"], block_mask: BlockMask) -> Float[Array, "B L W"]:
        x = x + self.attention(self.attention_norm(x), block_mask)
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class Model(nnx.Module):
    """A decoder-only transformer. One block mask serves all layers."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(
            config.vocabulary,
            config.width,
            embedding_init=nnx.initializers.normal(1.0),
            rngs=rngs,
        )
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        # Zeros here and behind every block: the untrained model finds all bytes equally likely.
        self.head = linear(config.width, config.vocabulary, rngs, zero=True)

    def decode(
        self, x: Float[Array, "B L W"], block_mask: BlockMask
    ) -> Float[Array, "B L vocabulary"]:
        """Logits of the next token from embeddings."""
        for block in self.blocks:
            x = block(x, block_mask)
        return self.head(self.norm(x))

    def __call__(
        self, tokens: Int[Array, "B L"], block_mask: BlockMask
    ) -> Float[Array, "B L vocabulary"]:
        """Logits of the next token."""
        return self.decode(self.embed(tokens), block_mask)


# -- the data ---------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Packed rows.

    Attributes:
        tokens: bytes; 0 in the unused rest of a row.
        ids: the document that each byte belongs to, counted within its row; -1 for the unused rest.
    """

    tokens: Int32[np.ndarray, "N L"]
    ids: Int32[np.ndarray, "N L"]


def standard_library() -> list[bytes]:
    """The top-level functions, classes and module headers of Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    leave_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    documents: list[bytes] = []
    for file in sorted(root.rglob("*.py")):
        if not leave_out & set(file.relative_to(root).parts):
            documents += re.split(rb"\n\n+(?=@|def |class |async def )", file.read_bytes())
    return [document for document in documents if document.strip()]


def cut(documents: list[bytes], limit: int) -> list[bytes]:
    """Cuts documents longer than `limit` bytes at the ends of lines where that is possible."""
    pieces: list[bytes] = []
    for document in documents:
        while len(document) > limit:
            end = document.rfind(b"\n", 0, limit) + 1 or limit
            pieces.append(document[:end])
            document = document[end:]
        pieces.append(document)
    return pieces


def pack(documents: list[bytes], length: int) -> Rows:
    """Packs documents into rows of `length` bytes, each into the first row with room for it."""
    free = np.full(len(documents), length)
    rows: list[list[bytes]] = [[] for _ in documents]
    for document in documents:
        row = int(np.argmax(free >= len(document)))
        rows[row].append(document)
        free[row] -= len(document)
    rows = [row for row in rows if row]
    tokens = np.zeros((len(rows), length), np.int32)
    ids = np.full((len(rows), length), -1, np.int32)
    for i, row in enumerate(rows):
        text = np.frombuffer(b"".join(row), np.uint8)
        tokens[i, : len(text)] = text
        ids[i, : len(text)] = np.repeat(np.arange(len(row)), [len(document) for document in row])
    return Rows(tokens, ids)


def batches(rows: Rows, size: int, rng: np.random.Generator) -> Iterator[Rows]:
    """Batches of rows in random order, epoch after epoch."""
    while True:
        order = rng.permutation(len(rows.tokens))
        for i in range(0, len(order) - size + 1, size):
            yield Rows(rows.tokens[order[i : i + size]], rows.ids[order[i : i + size]])


# -- training ---------------------------------------------------------------------------------------

# How often JAX traced a function, and so had it compiled: its Python body runs at no other time.
traced: collections.Counter[str] = collections.Counter()


def document_mask(ids: Int[Array, "B L"]) -> BlockMask:
    """A token sees itself and the past of its own document; one mask a row, shared by all heads."""
    batch, length = ids.shape
    return create_block_mask(masks.document(ids, causal=True), batch, None, length, length)


def next_byte_loss(model: Model, tokens: Int[Array, "B L"], ids: Int[Array, "B L"]) -> Array:
    """Mean cross-entropy of the next byte, in nats, wherever the next byte is of the same document."""
    logits = model(tokens, document_mask(ids))[:, :-1]
    counts = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.where(counts, losses, 0.0).sum() / counts.sum()


@nnx.jit
def train_step(
    model: Model, optimizer: nnx.Optimizer, tokens: Int[Array, "B L"], ids: Int[Array, "B L"]
) -> Float32[Array, ""]:
    """One step of the optimizer; returns the loss before it."""
    traced["train_step"] += 1
    loss, gradients = nnx.value_and_grad(next_byte_loss)(model, tokens, ids)
    optimizer.update(model, gradients)
    return loss


def make_optimizer(model: Model, steps: int, rate: float) -> nnx.Optimizer:
    """AdamW with clipped gradients, a short warm-up and a cosine decay."""
    warmup = min(20, steps // 5)
    schedule = optax.warmup_cosine_decay_schedule(0.1 * rate, rate, warmup, steps, 0.1 * rate)
    adam = optax.adamw(schedule, b2=0.95, weight_decay=0.01)
    return nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), adam), wrt=nnx.Param)


# -- checks -----------------------------------------------------------------------------------------


class Leak(NamedTuple):
    """How much other documents feel of one document.

    Attributes:
        logits: largest change of another document's logits when this one's bytes are replaced.
        gradient: largest derivative of this one's logits with respect to another's embeddings.
    """

    logits: float
    gradient: float


@nnx.jit(static_argnums=4)
def probe(
    model: Model,
    tokens: Int[Array, "1 L"],
    others: Int[Array, "1 L"],
    ids: Int[Array, "1 L"],
    make_mask: Callable[[Array], BlockMask],
    document: Int[Array, ""],
) -> tuple[Float[Array, "L"], Float[Array, "L"]]:
    """Change of logits and size of gradients at every position, see `Leak`."""
    block_mask, inside = make_mask(ids), ids == document
    replaced = jnp.where(inside, others, tokens)
    change = jnp.abs(model(tokens, block_mask) - model(replaced, block_mask)).max(-1)

    def logits_of_document(x: Float[Array, "1 L W"]) -> Array:
        chosen = jnp.take_along_axis(model.decode(x, block_mask), others[..., None], axis=-1)
        return jnp.where(inside[..., None], chosen, 0.0).sum()

    gradient = jax.grad(logits_of_document)(model.embed(tokens))
    return change[0], jnp.abs(gradient).max(-1)[0]


def causal_mask(ids: Int[Array, "B L"]) -> BlockMask:
    """The usual causal mask, which lets documents of a row see each other."""
    return create_block_mask(masks.causal(), None, None, ids.shape[1], ids.shape[1])


def leak(model: Model, rows: Rows, make_mask: Callable[[Array], BlockMask]) -> Leak:
    """Replaces the document in the middle of the row with the most of them and looks at the others.

    Raises:
        AssertionError: if the document itself feels nothing, so that the check would see nothing.
    """
    row = int(rows.ids.max(axis=1).argmax())
    tokens, ids = rows.tokens[row : row + 1], rows.ids[row : row + 1]
    document = ids.max() // 2
    others = (tokens + 1) % 128
    change, gradient = probe(model, tokens, others, ids, make_mask, jnp.int32(document))
    inside = ids[0] == document
    if not (change[inside].max() > 0 and gradient[inside].max() > 0):
        raise AssertionError("The document whose bytes were replaced does not feel it itself.")
    return Leak(float(change[~inside].max()), float(gradient[~inside].max()))


def check_isolation(model: Model, rows: Rows, console: Console) -> None:
    """Holds the document mask to its promise, and shows that the check would notice a broken one.

    Raises:
        AssertionError: a document feels another one.
    """
    apart, together = (leak(model, rows, mask) for mask in (document_mask, causal_mask))
    if apart.logits != 0.0 or apart.gradient != 0.0:
        raise AssertionError(f"A document feels another one of its row: {apart}.")
    if together.logits == 0.0 or together.gradient == 0.0:
        raise AssertionError(
            "Under a plain causal mask documents must feel each other; the check is blind."
        )
    console.print(
        "check: with other bytes in one document, the logits of the others in its row change by "
        f"{apart.logits:g} (a plain causal mask: {together.logits:.2g})."
    )


# -- a sample ---------------------------------------------------------------------------------------


@nnx.jit
def next_logits(model: Model, tokens: Int[Array, "1 L"], last: Int[Array, ""]) -> Float[Array, "V"]:
    """Logits of the byte behind position `last`; what lies beyond it is not seen."""
    length = tokens.shape[1]
    mask = create_block_mask(masks.causal(), None, None, length, length)
    return model(tokens, mask)[0, last]


def sample(model: Model, prompt: bytes, count: int, temperature: float, seed: int) -> bytes:
    """Continues a prompt by `count` bytes."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((1, len(prompt) + count), np.int32)
    tokens[0, : len(prompt)] = np.frombuffer(prompt, np.uint8)
    for last in range(len(prompt) - 1, tokens.shape[1] - 1):
        logits = np.asarray(next_logits(model, tokens, jnp.int32(last)), np.float64) / temperature
        weights = np.exp(logits - logits.max())
        tokens[0, last + 1] = rng.choice(len(weights), p=weights / weights.sum())
    return tokens[0].astype(np.uint8).tobytes()


# -- the program ------------------------------------------------------------------------------------


def train(model: Model, rows: Rows, arguments: argparse.Namespace, console: Console) -> list[float]:
    """Trains and returns the loss of every step."""
    optimizer = make_optimizer(model, arguments.steps, arguments.rate)
    stream = batches(rows, arguments.batch, np.random.default_rng(arguments.seed))
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    losses: list[float] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=arguments.steps, loss=math.nan)
        seconds = 0.0
        for step in range(arguments.steps):
            batch = next(stream)
            start = time.perf_counter()
            losses.append(float(train_step(model, optimizer, batch.tokens, batch.ids)))
            if step > 0:  # the first one compiles
                seconds += time.perf_counter() - start
            progress.update(task, advance=1, loss=losses[-1])
            if step in (0, arguments.steps - 1):
                # An untrained model's blocks are zero, and nothing could leak.
                progress.console.print(f"step {step + 1}: loss {losses[-1]:.3f}")
            if step + 1 in (min(10, arguments.steps), arguments.steps):
                check_isolation(model, rows, progress.console)
    if traced["train_step"] != 1:
        raise AssertionError(
            f"The training step was traced {traced['train_step']} times, not once."
        )
    if arguments.steps > 1:
        rate = (arguments.steps - 1) * arguments.batch * arguments.length / seconds
        console.print(
            f"{rate:,.0f} bytes/s; the step was compiled once for all batches of documents."
        )
    return losses


def draw(losses: list[float], rows: Rows, file: Path) -> None:
    """Writes the loss, and the mask of the first row, as a picture."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    left.plot(
        np.arange(1, len(losses) + 1), losses, color="tab:blue", alpha=0.35, label="of a batch"
    )
    window = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    left.plot(
        np.arange(window, len(losses) + 1), smooth, color="tab:blue", label=f"mean of {window}"
    )
    left.axhline(math.log(256), color="gray", linestyle=":", label="all bytes equally likely")
    left.set(xlabel="step", ylabel="nats a byte", title="Loss", ylim=(0, None))
    left.legend()
    plot_mask(
        masks.document(jnp.asarray(rows.ids[0]), causal=True),
        rows.ids.shape[1],
        rows.ids.shape[1],
        ax=right,
        title=f"The mask of one row: {rows.ids[0].max() + 1} documents",
    )
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def parse() -> argparse.Namespace:
    smoke = os.environ.get("FLEXJAX_SMOKE") == "1"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=12 if smoke else 400)
    parser.add_argument("--batch", type=int, default=2, help="rows a step")
    parser.add_argument("--length", type=int, default=256 if smoke else 1024, help="bytes a row")
    parser.add_argument("--width", type=int, default=32 if smoke else Config.width)
    parser.add_argument("--layers", type=int, default=2 if smoke else Config.layers)
    parser.add_argument("--heads", type=int, default=Config.heads)
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--sample", type=int, default=8 if smoke else 300, help="bytes to print")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default=None, help="of flex_attention, for example xla")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    console = Console(highlight=False)
    documents = standard_library()
    np.random.default_rng(arguments.seed).shuffle(documents)
    rows = pack(cut(documents, arguments.length), arguments.length)
    used = float((rows.ids >= 0).mean())
    console.print(
        f"{len(documents):,} documents of the standard library, packed into {len(rows.tokens):,} rows of "
        f"{arguments.length} bytes; {used:.1%} of them used."
    )
    sizes = {name: getattr(arguments, name) for name in ("width", "layers", "heads", "backend")}
    model = Model(Config(**sizes), nnx.Rngs(arguments.seed))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    blocks = document_mask(jnp.asarray(rows.ids[: arguments.batch]))
    console.print(
        f"{count:,} parameters; the first batch's mask leaves out {blocks.sparsity():.0f}% of the score blocks."
    )
    losses = train(model, rows, arguments, console)
    tail = losses[-min(20, len(losses)) :]
    console.print(
        f"loss {losses[0]:.2f} -> {sum(tail) / len(tail):.2f} (mean of the last {len(tail)})"
    )
    text = sample(model, b"def ", arguments.sample, temperature=0.7, seed=arguments.seed)
    console.rule("a sample")
    console.print(text.decode("utf-8", "replace"), markup=False)
    console.rule()
    draw(losses, rows, PICTURE)
    console.print(f"loss and mask: {PICTURE}")


if __name__ == "__main__":
    main()
