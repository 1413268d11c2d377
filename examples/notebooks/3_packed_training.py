# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Training on packed documents
#
# Documents of all lengths are packed into rows, and attention stays inside each of them. The mask changes
# with every batch; the compiled step does not.

# %%
# Where flexjax is not installed yet:
# %pip install -q "flexjax[cuda12,flax,viz]" optax

# %%
import inspect
import json
import textwrap

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from flexjax import create_block_mask, masks
from flexjax.flax import FlexAttention
from flexjax.visualize import plot_mask

BATCH, LENGTH, WIDTH, HEADS, LAYERS, STEPS = 2, 256, 64, 4, 2, 40

# %% [markdown]
# ## The data
#
# Sources of Python modules: a document is the beginning of a paragraph. First fit packs them into rows of
# bytes, with the document's number beside each byte and -1 where a row ends early.

# %%
modules = (json, textwrap, jax.tree_util)
documents = []
for module in modules:
    source = inspect.getsource(module)
    documents += [part.encode()[:100] for part in source.split("\n\n") if len(part) > 20]
rng = np.random.default_rng(0)
rng.shuffle(documents)


def pack(documents):
    rows = []
    for document in documents:
        for row in rows:
            if sum(map(len, row)) + len(document) <= LENGTH:
                row.append(document)
                break
        else:
            rows.append([document])
    tokens = np.zeros((len(rows), LENGTH), np.int32)
    ids = np.full((len(rows), LENGTH), -1, np.int32)
    for i, row in enumerate(rows):
        text = b"".join(row)
        tokens[i, : len(text)] = list(text)
        ids[i, : len(text)] = np.repeat(range(len(row)), [len(d) for d in row])
    return tokens, ids


tokens, ids = pack(documents)
print(f"{len(documents)} documents in {len(tokens)} rows, {(ids >= 0).mean():.0%} of them used")

figure, axes = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
for row, axis in enumerate(axes):
    mask = masks.document(jnp.asarray(ids[row]), causal=True)
    plot_mask(mask, LENGTH, LENGTH, ax=axis, title=f"row {row}: {ids[row].max() + 1} documents")
plt.show()

# %% [markdown]
# ## The model
#
# A small transformer around `flexjax.flax.FlexAttention`. One block mask serves all layers.


# %%
class Block(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = FlexAttention(
            HEADS, WIDTH, rope=nnx.RoPE(WIDTH // HEADS), use_bias=False, rngs=rngs
        )
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, block_mask):
        x = x + self.attention(self.norms[0](x), block_mask=block_mask)
        return x + self.down(jax.nn.gelu(self.up(self.norms[1](x))))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(256, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, tokens, ids):
        # Inside the compiled step: ids are data, so new documents do not compile anything.
        mask = masks.document(ids, causal=True)
        block_mask = create_block_mask(mask, len(tokens), None, LENGTH, LENGTH, 64)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, block_mask)
        return self.head(x)


traces = []


@nnx.jit
def train_step(model, optimizer, tokens, ids):
    traces.append("train_step")

    def loss(model):
        logits = model(tokens, ids)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        counts = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
        return jnp.where(counts, losses, 0.0).sum() / counts.sum()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


model = Model(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
losses = []
for _ in range(STEPS):
    rows = rng.choice(len(tokens), BATCH, replace=False)
    losses.append(float(train_step(model, optimizer, tokens[rows], ids[rows])))
print(f"loss {losses[0]:.2f} -> {np.mean(losses[-5:]):.2f}, traced {len(traces)} time")
assert len(traces) == 1
assert np.mean(losses[-5:]) < losses[0] - 1.0

# %% [markdown]
# ## No document sees another
#
# Other bytes in one document leave the logits of all others exactly as they were.

# %%
row = int(ids.max(axis=1).argmax())
one, one_ids = tokens[row : row + 1], ids[row : row + 1]
changed = np.where(one_ids == 1, (one + 1) % 256, one)
forward = nnx.jit(Model.__call__)
difference = np.abs(forward(model, one, one_ids) - forward(model, changed, one_ids)).max(-1)[0]
inside = one_ids[0] == 1
print(f"change inside {difference[inside].max():.3g}, outside {difference[~inside].max():.3g}")
assert difference[inside].max() > 0
assert difference[~inside].max() == 0

# %%
plt.plot(losses)
plt.xlabel("step")
plt.ylabel("nats a byte")
plt.show()
