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
# # Decoding from a paged cache
#
# While a model generates, keys and values of all earlier tokens wait in a cache. Sequences grow at
# different paces and end at different times; a paged cache gives each of them pages of a common pool, and
# takes them back. The mods that were used in training serve unchanged: they see positions in the
# sequence, wherever its pages lie.

# %%
# Where flexjax is not installed yet:
# %pip install -q "flexjax[cuda12,viz]"

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from flexjax import KVCache, decode, flex_attention, masks, paged

B, HQ, HKV, D, PAGE = 3, 4, 2, 32, 16
keys = jax.random.split(jax.random.key(0), 3)

# %% [markdown]
# ## A cache in one piece
#
# `KVCache` has the same room for every sequence. `decode` attends from the newest tokens to all that is
# there: query i of a sequence of length n is token n - L + i, and that is the `q_idx` that mods see.

# %%
lengths = [40, 7, 25]
longest = max(lengths)
q = jax.random.normal(keys[0], (B, HQ, longest, D))
k = jax.random.normal(keys[1], (B, HKV, longest, D))
v = jax.random.normal(keys[2], (B, HKV, longest, D))

window = masks.sliding_window(16)
cache = KVCache(k, v, jnp.array(lengths))
newest = jnp.stack([q[b, :, n - 1 : n] for b, n in enumerate(lengths)])
out = decode(newest, cache, mask_mod=window)

# The same from training's point of view: the last row of each sequence's attention.
for b, n in enumerate(lengths):
    whole = flex_attention(
        q[b : b + 1, :, :n], k[b : b + 1, :, :n], v[b : b + 1, :, :n], mask_mod=window
    )
    np.testing.assert_allclose(out[b : b + 1], whole[:, :, -1:], atol=1e-5)

# %% [markdown]
# ## Pages
#
# The pool has fewer tokens than three sequences of full length would need. `allocate` begins sequences,
# `append` stores keys and values and takes pages as they are needed. All of it works inside `jax.jit`,
# with the cache donated.

# %%
pool = paged.PagedCache.create(
    batch=B, pages=8, page_size=PAGE, kv_heads=HKV, head_dim=D, max_length=64, dtype=jnp.float32
)
pool = paged.allocate(pool, jnp.arange(B))
pool = paged.append(pool, k, v, counts=jnp.array(lengths))
print("lengths", pool.lengths, "pages held", pool.held_pages, "free", pool.free_count)

from_pages = decode(newest, pool, mask_mod=window)
np.testing.assert_allclose(from_pages, out, atol=1e-5)


# %% [markdown]
# ## A loop of decoding
#
# One compiled step serves all lengths: they are data. Every step appends one token to each sequence and
# attends.


# %%
@functools.partial(jax.jit, donate_argnums=0)
def step(pool, token):
    q, k, v = token
    pool = paged.append(pool, k, v)
    return pool, decode(q, pool, mask_mod=window)


traces = step._cache_size()
held = []
for i in range(8):
    parts = jax.random.split(jax.random.key(10 + i), 3)
    shapes = (B, HQ, 1, D), (B, HKV, 1, D), (B, HKV, 1, D)
    token = [jax.random.normal(key, shape) for key, shape in zip(parts, shapes, strict=True)]
    pool, out = step(pool, token)
    held.append(np.asarray(pool.held_pages))
assert step._cache_size() == traces + 1
assert bool(pool.ok)
print("lengths", pool.lengths, "pages held", pool.held_pages, "free", pool.free_count)

# %%
plt.step(range(len(held)), held, where="mid")
plt.xlabel("step")
plt.ylabel("pages")
plt.legend([f"sequence {b}" for b in range(B)])
plt.show()

# %% [markdown]
# ## Running out, and giving back
#
# Outside of `jax.jit` a cache without free pages says so and stays as it was. Inside, `ok` turns false.

# %%
try:
    for _ in range(6):
        pool = paged.append(pool, k[:, :, :PAGE], v[:, :, :PAGE])
except paged.PageError as error:
    print("PageError:", error)

before = int(pool.free_count)
pool = paged.free(pool, jnp.array([0]))
print("pages free:", before, "->", pool.free_count)
assert int(pool.free_count) > before

# %% [markdown]
# ## Shared prefixes
#
# `fork` begins a sequence with the pages of another one. Nothing is copied until one of them writes into
# a shared page.

# %%
pool = paged.PagedCache.create(
    batch=B, pages=8, page_size=PAGE, kv_heads=HKV, head_dim=D, dtype=jnp.float32
)
pool = paged.allocate(pool, jnp.array([0]))
pool = paged.append(pool, k[:1], v[:1], rows=jnp.array([0]))  # a prompt of 40 tokens, 3 pages
pool = paged.fork(pool, 0, jnp.array([1, 2]))
print("lengths", pool.lengths, "free", pool.free_count)
assert int(pool.free_count) == 8 - 3

same = jnp.broadcast_to(newest[:1], newest.shape)
out = decode(same, pool, mask_mod=masks.causal())
np.testing.assert_allclose(out[1], out[0], atol=1e-6)
np.testing.assert_allclose(out[2], out[0], atol=1e-6)
