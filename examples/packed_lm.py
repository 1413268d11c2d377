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
from typing import Any, NamedTuple

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


def rotate(x: Float[Array, "B L H D"], positions: Int[Array, "L"]) -> Float[Array, "B L H D"]:
    """Rotary position embedding (Su et al., arXiv:2104.09864): scores depend on distances alone."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = positions[:, None, None] * frequencies
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
        self, x: Float[Array, "B L W"], positions: Int[Array, "L"]
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
    """Replaces the document in the middle of the first row and looks at the others.

    Raises:
        AssertionError: if the document itself feels nothing, so that the check would see nothing.
    """
    tokens, ids = rows.tokens[:1], rows.ids[:1]
    document = ids.max() // 2
    others = (tokens + 1) % 128
    change, gradient = probe(model, tokens, others, ids, make_mask, jnp.int32(document))
    inside = ids[0] == document
    if not (change[inside].max() > 0 and gradient[inside].max() > 0):
        raise AssertionError("The document whose bytes were replaced does not feel it itself.")
    return Leak(float(change[~inside].max()), float(gradient[~inside].max()))
