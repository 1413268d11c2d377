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
# # Porting from PyTorch, line by line
#
# Each cell has the PyTorch code as a comment and what it becomes. Where PyTorch is installed, results are
# compared with it; elsewhere with the dense reference.

# %%
# Where flexjax is not installed yet:
# %pip install -q "flexjax[cuda12]"

# %%
# from torch.nn.attention.flex_attention import create_block_mask, flex_attention
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flexjax import AuxRequest, create_block_mask, flex_attention, masks, or_masks, scores
from flexjax.testing import oracle

HAS_TORCH = importlib.util.find_spec("torch") is not None
B, H, L, D = 2, 4, 128, 32
rng = np.random.default_rng(0)
arrays = [rng.standard_normal((B, H, L, D)).astype(np.float32) for _ in range(3)]
query, key, value = map(jnp.asarray, arrays)


def check(out, score_mod=None, mask_mod=None):
    """Against the dense reference."""
    expected = oracle(query, key, value, score_mod=score_mod, mask_mod=mask_mod).out
    np.testing.assert_allclose(out, expected, atol=1e-4)


# %% [markdown]
# ## The call
#
# ```python
# flex_attention = torch.compile(flex_attention)
# out = flex_attention(query, key, value)
# ```

# %%
out = jax.jit(flex_attention)(query, key, value)
check(out)
if HAS_TORCH:
    import torch
    from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

    theirs = torch_flex_attention(*map(torch.from_numpy, arrays))
    np.testing.assert_allclose(out, theirs.numpy(), atol=1e-4)


# %% [markdown]
# ## A mask_mod, and its block mask
#
# ```python
# def causal(b, h, q_idx, kv_idx):
#     return q_idx >= kv_idx
# block_mask = create_block_mask(causal, B=None, H=None, Q_LEN=L, KV_LEN=L, device="cuda")
# ```
#
# The same, without the device. It may be built inside `jax.jit`, and costs little there.


# %%
def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


block_mask = create_block_mask(causal, B=None, H=None, Q_LEN=L, KV_LEN=L)
check(flex_attention(query, key, value, block_mask=block_mask), mask_mod=causal)

# %% [markdown]
# ## Captured tensors
#
# ```python
# document_id = torch.tensor(...)
# def document(b, h, q_idx, kv_idx):
#     return document_id[q_idx] == document_id[kv_idx]
# ```
#
# JAX arrays in place of tensors. Inside `jax.jit` they may be traced: new ids do not compile anything.

# %%
document_id = jnp.asarray(np.repeat([0, 1, 2], [50, 60, 18]))


def document(b, h, q_idx, kv_idx):
    return document_id[q_idx] == document_id[kv_idx]


@jax.jit
def packed(query, document_id):
    def mask_mod(b, h, q_idx, kv_idx):
        return document_id[q_idx] == document_id[kv_idx]

    mask = create_block_mask(mask_mod, None, None, L, L)
    return flex_attention(query, key, value, block_mask=mask)


check(packed(query, document_id), mask_mod=document)

# %% [markdown]
# ## A score_mod
#
# ```python
# def soft_cap(score, b, h, q_idx, kv_idx):
#     return 20 * torch.tanh(score / 20)
# ```


# %%
def soft_cap(score, b, h, q_idx, kv_idx):
    return 20 * jnp.tanh(score / 20)


out = flex_attention(query, key, value, soft_cap, block_mask)
check(out, soft_cap, causal)
np.testing.assert_allclose(
    out, flex_attention(query, key, value, scores.soft_cap(20.0), block_mask), atol=1e-6
)

# %% [markdown]
# ## -inf in a score_mod
#
# ```python
# torch.where(q_idx - kv_idx <= 32, score, -float("inf"))
# ```
#
# `jnp.where` does it, but a mask_mod lets blocks be skipped. Masks combine as they do in PyTorch.

# %%
window = masks.sliding_window(32)
sinks = lambda b, h, q_idx, kv_idx: (kv_idx < 4) & (q_idx >= kv_idx)
check(
    flex_attention(query, key, value, mask_mod=or_masks(window, sinks)),
    mask_mod=or_masks(window, sinks),
)

# %% [markdown]
# ## Biases with gradients
#
# ```python
# bias = torch.zeros(H, L, requires_grad=True)
# score + bias[h, q_idx] + bias[h, kv_idx]      # an error in PyTorch's backward pass: read twice
# ```
#
# `jax.grad` of a function of the bias. Reading it twice is nothing special.

# %%
bias = jnp.asarray(rng.standard_normal((H, L)), jnp.float32)


def biased(bias):
    return lambda score, b, h, q_idx, kv_idx: score + bias[h, q_idx] + bias[h, kv_idx]


def loss(bias, attend):
    return (attend(bias) ** 2).sum()


ours = jax.grad(loss)(bias, lambda b: flex_attention(query, key, value, biased(b), block_mask))


def dense(bias):
    s = jnp.einsum("bhld,bhsd->bhls", query, key) / D**0.5 + bias[:, :, None] + bias[:, None, :]
    s = jnp.where(jnp.tril(jnp.ones((L, L), bool)), s, -jnp.inf)
    return jnp.einsum("bhls,bhsd->bhld", jax.nn.softmax(s), value)


np.testing.assert_allclose(ours, jax.grad(loss)(bias, dense), atol=1e-3)

# %% [markdown]
# ## Grouped heads and statistics
#
# ```python
# flex_attention(q, k, v, enable_gqa=True, return_aux=AuxRequest(lse=True, max_scores=True))
# ```
#
# Groups are inferred from the shapes; the rest is the same.

# %%
out, aux = flex_attention(
    query, key[:, :2], value[:, :2], return_aux=AuxRequest(lse=True, max_scores=True)
)
assert aux.lse.shape == aux.max_scores.shape == (B, H, L)

# %% [markdown]
# ## Decoding with a sliced mask
#
# ```python
# block_mask._adjust(...)   # or a mask_mod with an offset, for every step
# ```
#
# A slice of the block mask remembers where its queries begin.

# %%
rows = create_block_mask(causal, None, None, L, L, 32)[:, :, 2:3]  # queries 64 to 95
part = flex_attention(query[:, :, 64:96], key, value, block_mask=rows)
np.testing.assert_allclose(
    part, flex_attention(query, key, value, block_mask=block_mask)[:, :, 64:96], atol=1e-5
)

# %% [markdown]
# ## A module
#
# ```python
# class Attention(nn.Module):
#     def __init__(self, width, heads, kv_heads):
#         super().__init__()
#         self.q = nn.Linear(width, heads * D, bias=False)
#         self.k = nn.Linear(width, kv_heads * D, bias=False)
#         self.v = nn.Linear(width, kv_heads * D, bias=False)
#         self.o = nn.Linear(heads * D, width, bias=False)
#     def forward(self, x, block_mask):
#         B, L, _ = x.shape
#         q, k, v = (p(x).view(B, L, -1, D).transpose(1, 2) for p in (self.q, self.k, self.v))
#         y = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
#         return self.o(y.transpose(1, 2).reshape(B, L, -1))
# ```
#
# With `layout="BLHD"` nothing is transposed. Weights are transposed once: a PyTorch `weight` is (out,
# in), a Flax `kernel` (in, out).


# %%
class Attention(nnx.Module):
    def __init__(self, width, heads, kv_heads, rngs):
        linear = lambda i, o: nnx.Linear(i, o, use_bias=False, rngs=rngs)
        self.q, self.k = linear(width, heads * D), linear(width, kv_heads * D)
        self.v, self.o = linear(width, kv_heads * D), linear(heads * D, width)

    def __call__(self, x, block_mask):
        B, L, _ = x.shape
        q, k, v = (p(x).reshape(B, L, -1, D) for p in (self.q, self.k, self.v))
        y = flex_attention(q, k, v, block_mask=block_mask, layout="BLHD")
        return self.o(y.reshape(B, L, -1))


def load(layer, state_dict):
    """PyTorch's weights into the layer."""
    for name in ("q", "k", "v", "o"):
        getattr(layer, name).kernel[...] = jnp.asarray(state_dict[f"{name}.weight"]).T


layer = Attention(64, H, 2, nnx.Rngs(0))
weights = {
    f"{name}.weight": rng.standard_normal(np.shape(getattr(layer, name).kernel)[::-1]) * 0.1
    for name in ("q", "k", "v", "o")
}
load(layer, weights)
x = jnp.asarray(rng.standard_normal((B, L, 64)), jnp.float32)
out = nnx.jit(Attention.__call__)(layer, x, block_mask)
assert out.shape == x.shape
assert bool(jnp.isfinite(out).all())
np.testing.assert_allclose(layer.q(x), x @ weights["q.weight"].T, atol=1e-4)
