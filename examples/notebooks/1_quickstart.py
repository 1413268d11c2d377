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
# # flexjax in ten minutes
#
# An attention is described by two small functions of scalars: which keys a query sees (`mask_mod`), and
# what a pair's score is (`score_mod`). Everything here runs on a CPU in seconds; on a Hopper GPU the same
# code becomes fused kernels.

# %%
# Where flexjax is not installed yet:
# %pip install -q "flexjax[cuda12,viz]"

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import flexjax
from flexjax import create_block_mask, flex_attention, masks, scores
from flexjax.visualize import plot_mask

B, H, L, D = 1, 4, 512, 64
query, key, value = jax.random.normal(jax.random.key(0), (3, B, H, L, D))
print(f"flexjax {flexjax.__version__} on {jax.devices()[0].device_kind}")

# %% [markdown]
# ## A mask
#
# A causal mask in one line. `create_block_mask` finds out which blocks of the score matrix it leaves
# anything in, and `flex_attention` visits those alone.


# %%
def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


block_mask = create_block_mask(causal, B=None, H=None, Q_LEN=L, KV_LEN=L)
print(block_mask)

# %%
out = jax.jit(flex_attention)(query, key, value, block_mask=block_mask)

# JAX's own attention has (B, L, H, D).
swapped = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
expected = jnp.swapaxes(jax.nn.dot_product_attention(*swapped, is_causal=True), 1, 2)
np.testing.assert_allclose(out, expected, atol=1e-4)
print("largest difference to jax.nn:", float(jnp.abs(out - expected).max()))

# %% [markdown]
# ## A score
#
# ALiBi adds a penalty for distance, a number a head. A score_mod sees the scaled score and the indices.

# %%
slopes = 2.0 ** (-8 * jnp.arange(1, H + 1) / H)


def alibi(score, b, h, q_idx, kv_idx):
    return score - slopes[h] * (q_idx - kv_idx)


@jax.jit
def with_alibi(query, key, value):
    return flex_attention(query, key, value, alibi, block_mask)


@jax.jit
def ready_made(query, key, value):
    return flex_attention(query, key, value, scores.alibi(H), block_mask)


np.testing.assert_allclose(with_alibi(query, key, value), ready_made(query, key, value), atol=1e-4)

# %% [markdown]
# ## Ready-made masks, and their combinations

# %%
documents = jnp.repeat(jnp.arange(4), L // 4)
gallery = {
    "causal": masks.causal(),
    "sliding window": masks.sliding_window(64),
    "prefix LM": masks.prefix_lm(100),
    "documents": masks.document(documents, causal=True),
    "window or first 32": masks.or_masks(
        masks.sliding_window(64), masks.and_masks(masks.causal(), lambda b, h, q, k: k < 32)
    ),
}
figure, axes = plt.subplots(1, len(gallery), figsize=(15, 3.4), layout="constrained")
for axis, (name, mask) in zip(axes, gallery.items(), strict=True):
    plot_mask(mask, L, L, ax=axis, title=name)
    sparsity = create_block_mask(mask, None, None, L, L, 64).sparsity()
    print(f"{name:20} leaves out {sparsity:.0f}% of the blocks of 64 x 64")
plt.show()

# %% [markdown]
# ## Gradients
#
# `jax.grad` works in query, key and value, and in what score_mod reads. Here the slopes are learnable.


# %%
@jax.jit
def loss(slopes, query):
    penalised = lambda score, b, h, q, k: score - slopes[h] * (q - k)
    return (flex_attention(query, key, value, penalised, block_mask) ** 2).mean()


d_slopes, d_query = jax.grad(loss, (0, 1))(slopes, query)
print("gradient of the slopes:", d_slopes)

# Against a difference quotient of the first slope.
step = jnp.zeros(H).at[0].set(1e-2)
quotient = (loss(slopes + step, query) - loss(slopes - step, query)) / 2e-2
np.testing.assert_allclose(d_slopes[0], quotient, rtol=0.05)

# %% [markdown]
# Next: masks and biases of your own, packed training, paged decoding, and a model ported from PyTorch.
