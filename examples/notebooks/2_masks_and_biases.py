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
# # Masks and biases of your own
#
# What a mod may be, how to see what it does, and how to learn what it reads.

# %%
# Where flexjax is not installed yet:
# %pip install -q "flexjax[cuda12,viz]"

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from flexjax import create_block_mask, flex_attention, masks
from flexjax.testing import oracle
from flexjax.visualize import plot_mask, plot_scores

B, H, L, D = 2, 4, 256, 32
query, key, value = jax.random.normal(jax.random.key(0), (3, B, H, L, D))

# %% [markdown]
# ## A mask with data in it
#
# A mask for a chat: the prompt is seen by everything, answers are causal, and padding is seen by nothing.
# Lengths differ from row to row of the batch, so the mask reads arrays at `b`.

# %%
prompt_length = jnp.array([60, 100])
total_length = jnp.array([256, 180])


def chat(b, h, q_idx, kv_idx):
    seen = (kv_idx <= q_idx) | (kv_idx < prompt_length[b])
    return seen & (kv_idx < total_length[b])


figure, axes = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
for row, axis in enumerate(axes):
    plot_mask(lambda b, h, q, k, row=row: chat(row, h, q, k), L, L, ax=axis, title=f"row {row}")
plt.show()


# %% [markdown]
# The mask depends on `b`, so it is built for both rows. Built for one, flexjax would refuse it:


# %%
@jax.jit
def attend(query, key, value):
    return flex_attention(query, key, value, block_mask=create_block_mask(chat, B, None, L, L, 64))


np.testing.assert_allclose(
    attend(query, key, value), oracle(query, key, value, mask_mod=chat).out, atol=1e-4
)
try:
    flex_attention(query, key, value, block_mask=create_block_mask(chat, None, None, L, L, 64))
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# ## A bias that is learned
#
# A table of biases by head and distance, read at `q_idx - kv_idx`, and a gate by position, which is read
# twice. Both have gradients.

# %%
parameters = {
    "table": jnp.zeros((H, 2 * L - 1)),
    "gate": jnp.ones((L,)),
}


def learned(parameters):
    def score_mod(score, b, h, q_idx, kv_idx):
        bias = parameters["table"][h, q_idx - kv_idx + L - 1]
        return score * parameters["gate"][q_idx] * parameters["gate"][kv_idx] + bias

    return score_mod


block_mask = create_block_mask(masks.causal(), None, None, L, L, 64)

# A teacher that looks at recent tokens, and whose gates differ.
distance = jnp.arange(2 * L - 1) - (L - 1)
teacher = {
    "table": -jnp.abs(distance) / jnp.array([[4.0], [8.0], [16.0], [32.0]]),
    "gate": 1.0 + 0.5 * jnp.sin(jnp.arange(L) / 20),
}
target = flex_attention(query, key, value, learned(teacher), block_mask)


@jax.jit
def step(parameters, momentum):
    def loss(parameters):
        out = flex_attention(query, key, value, learned(parameters), block_mask)
        return ((out - target) ** 2).mean()

    value_, gradients = jax.value_and_grad(loss)(parameters)
    # Adam without its bias correction.
    first, second = momentum
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
    second = jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g * g, second, gradients)
    update = lambda p, m, v: p - 0.1 * m / (jnp.sqrt(v) + 1e-9)
    return jax.tree.map(update, parameters, first, second), (first, second), value_


momentum = (jax.tree.map(jnp.zeros_like, parameters),) * 2
losses = []
for _ in range(40):
    parameters, momentum, loss = step(parameters, momentum)
    losses.append(float(loss))
print(f"loss {losses[0]:.5f} -> {losses[-1]:.5f}")
assert losses[-1] < 0.2 * losses[0]

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.semilogy(losses)
left.set(xlabel="step", title="loss")
plot_scores(learned(parameters), L, L, ax=right, title="what head 0 has learned")
plt.show()

# %% [markdown]
# ## What a mod may contain
#
# Ordinary JAX on scalars: `jnp.where`, `lax.cond`, small fixed loops, `jax.vmap` over a handful of
# values, any arithmetic. It is traced once, so Python's `if` on an index is an error that says what to
# write instead. What the kernels cannot express still runs in the portable backend.


# %%
def two_sided(score, b, h, q_idx, kv_idx):
    near = jnp.abs(q_idx - kv_idx) < 16
    return jnp.where(near, score, 10 * jnp.tanh(score / 10) - 1.0)


out = flex_attention(query, key, value, two_sided)
np.testing.assert_allclose(out, oracle(query, key, value, score_mod=two_sided).out, atol=1e-4)


def branching(score, b, h, q_idx, kv_idx):
    return score if q_idx > kv_idx else -score


try:
    flex_attention(query, key, value, branching)
except Exception as error:
    print(type(error).__name__, str(error).split("\n")[0])
