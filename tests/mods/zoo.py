"""Mods as users write them, with the arrays that they capture.

An entry is a factory: its parameters name arrays of `ARRAYS`, and it returns a mod that closes over them.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

B, H, Q, K = 2, 4, 33, 40

_rng = np.random.default_rng(7)


def _normal(*shape, dtype=np.float32):
    return jnp.asarray(_rng.normal(size=shape), jnp.bfloat16).astype(dtype)


ARRAYS: dict[str, Any] = {
    "slopes": jnp.asarray(2.0 ** -np.arange(1, H + 1), jnp.float32),
    "gates": _normal(H),
    "half_gates": _normal(H, dtype=jnp.float16),
    "bias_qk": _normal(Q, K),
    "bias_hqk": _normal(H, Q, K, dtype=jnp.bfloat16),
    "bias_bhk": _normal(B, H, K),
    "table": _normal(H, 24),
    "left": _normal(H, Q, 3),
    "right": _normal(K, 3),
    "cap": jnp.float32(7.5),
    "row_docs": jnp.asarray(np.sort(_rng.integers(0, 4, Q)), jnp.int32),
    "key_docs": jnp.asarray(np.sort(_rng.integers(0, 4, K)), jnp.int32),
    "batch_docs": jnp.asarray(np.sort(_rng.integers(0, 4, (B, K)), axis=1), jnp.int32),
    "ends": jnp.asarray([5, 11, 30], jnp.int32),
    "lengths": jnp.asarray([17, 40], jnp.int32),
    "order": jnp.asarray(_rng.permutation(K), jnp.int32),
    "width": jnp.int32(9),
    "valid": jnp.asarray(_rng.integers(0, 2, (B, K)), bool),
    "bytes_qk": jnp.asarray(_rng.integers(0, 2, (Q, K)), jnp.uint8),
    "bits": jnp.asarray(_rng.integers(0, 2**31, Q), jnp.uint32),
    "short": jnp.asarray(_rng.integers(-60, 60, K), jnp.int8),
}

MASKS: dict[str, Callable[..., Any]] = {}
SCORES: dict[str, Callable[..., Any]] = {}
OPAQUE_MASKS: dict[str, Callable[..., Any]] = {}
OPAQUE_SCORES: dict[str, Callable[..., Any]] = {}


def _in(registry):
    def register(factory):
        registry[factory.__name__] = factory
        return factory

    return register


mask, score = _in(MASKS), _in(SCORES)
opaque_mask, opaque_score = _in(OPAQUE_MASKS), _in(OPAQUE_SCORES)


def params(registry, smoke=()):
    return [
        pytest.param(f, id=name, marks=[pytest.mark.smoke] if name in smoke else [])
        for name, f in registry.items()
    ]


def captured(factory):
    """The arrays that a factory asks for, by name."""
    return {name: ARRAYS[name] for name in inspect.signature(factory).parameters}


def everywhere(mod, scored):
    """A mod of scalars as a function of (scores [B, H, Q, K],) or of nothing, by four-fold vmap."""
    over = mod
    for axis in (3, 2, 1, 0):  # kv innermost
        in_axes = [0 if i == axis else None for i in range(4)]
        over = jax.vmap(over, [0, *in_axes] if scored else in_axes)
    indices = [jnp.arange(n, dtype=jnp.int32) for n in (B, H, Q, K)]
    if scored:
        return lambda scores: over(scores, *indices)
    return lambda: jnp.broadcast_to(over(*indices), (B, H, Q, K))


def grid(xp=jnp):
    """The index inputs of `evaluate`, of rank 4."""
    return {
        name: xp.arange(n, dtype=np.int32).reshape([n if i == axis else 1 for i in range(4)])
        for axis, (name, n) in enumerate({"b": B, "h": H, "q": Q, "kv": K}.items())
    }


# -- masks ------------------------------------------------------------------------------------------


@mask
def causal():
    return lambda b, h, q, k: q >= k


@mask
def causal_from_the_end():
    return lambda b, h, q, k: q + (K - Q) >= k


@mask
def sliding_window():
    return lambda b, h, q, k: (q >= k) & (q - k <= 8)


@mask
def captured_window(width):
    return lambda b, h, q, k: abs(q - k) <= width


@mask
def prefix_by_batch(lengths):
    return lambda b, h, q, k: (k < lengths[b]) | (q >= k)


@mask
def document(key_docs):
    return lambda b, h, q, k: key_docs[q] == key_docs[k]


@mask
def document_of_two_arrays(row_docs, key_docs):
    return lambda b, h, q, k: row_docs[q] == key_docs[k]


@mask
def causal_document_by_batch(batch_docs):
    return lambda b, h, q, k: (batch_docs[b, q] == batch_docs[b, k]) & (k <= q)


@mask
def padding(valid):
    return lambda b, h, q, k: valid[b, k]


@mask
def dilated():
    return lambda b, h, q, k: ((q - k) % 3 == 0) & (jnp.abs(q - k) < 12)


@mask
def chunked():
    return lambda b, h, q, k: q // 8 == k // 8


@mask
def neighbourhood():
    def mod(b, h, q, k):
        row, column = jnp.clip(q // 6, 1, 4), jnp.clip(q % 6, 1, 4)
        return (abs(k // 6 - row) <= 1) & (abs(k % 6 - column) <= 1)

    return mod


@mask
def by_random_order(order):
    return lambda b, h, q, k: order[q] >= order[k]


@mask
def lookup_of_a_lookup(order, key_docs):
    return lambda b, h, q, k: key_docs[order[q]] == key_docs[order[k]]


@mask
def document_of_offsets(ends):
    def segment(i):
        return jnp.searchsorted(ends, i, side="right")

    return lambda b, h, q, k: segment(q) == segment(k)


@mask
def any_segment(ends):
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    return lambda b, h, q, k: jnp.any((starts <= q) & (q < ends) & (starts <= k) & (k < ends))


@mask
def inner_vmap(ends):
    return lambda b, h, q, k: jnp.all(jax.vmap(lambda e: (q < e) == (k < e))(ends))


@mask
def branch_by_head(key_docs):
    return lambda b, h, q, k: lax.cond(h < 2, lambda: q >= k, lambda: key_docs[q] == key_docs[k])


@mask
def switch_by_head():
    return lambda b, h, q, k: lax.switch(h, [lambda: q >= k, lambda: q <= k, lambda: k < q + 7])


@mask
def always():
    return lambda b, h, q, k: True


@mask
def never():
    return lambda b, h, q, k: k < 0


@mask
def exclusive_or():
    return lambda b, h, q, k: jnp.logical_xor(q % 2 == 0, jnp.logical_not(k % 2 == 0))


@mask
def one_bit_a_key(bits):
    return lambda b, h, q, k: ((bits[q] >> (k % 32).astype(jnp.uint32)) & 1) == 1


@mask
def last_document(key_docs):
    return lambda b, h, q, k: key_docs[k] == key_docs[-1]


@mask
def stride_by_head():
    return lambda b, h, q, k: (k - q) % (h + 2) == 1


@mask
def dense_bytes(bytes_qk):
    return lambda b, h, q, k: bytes_qk[q, k] != 0


@mask
def small_integers(short):
    return lambda b, h, q, k: short[k] * 2 < short[q]


@mask
def python_loop(ends):
    def mod(b, h, q, k):
        same = False
        for i in range(3):
            same = same | ((q < ends[i]) & (k < ends[i]))
        return same

    return mod


@mask
def counted_loop(ends):
    def mod(b, h, q, k):
        count = lax.fori_loop(0, 3, lambda i, n: n + (k >= ends[i]), jnp.int32(0))
        return count <= h

    return mod


@mask
def nested_where():
    return lambda b, h, q, k: jnp.where(q < 10, jnp.where(k < 5, q > 3, False), k > q)


@mask
def fractional():
    return lambda b, h, q, k: q * 0.75 >= k - 0.5


@mask
def listed_keys():
    return lambda b, h, q, k: jnp.isin(k, jnp.array([0, 3, 17])) | (q == k)


@mask
def out_of_range_row(row_docs):
    return lambda b, h, q, k: row_docs[k] == row_docs[q]  # k may lie past the end: clamped


@opaque_mask
def sorted_pair(ends):
    return lambda b, h, q, k: jnp.sort(jnp.stack([q, k]))[0] < ends[1]


@opaque_mask
def open_ended_loop(ends):
    return lambda b, h, q, k: lax.while_loop(lambda x: x > ends[0], lambda x: x // 2, q) < k


@opaque_mask
def random_keys():
    def mod(b, h, q, k):
        return jax.random.bernoulli(jax.random.fold_in(jax.random.key(3), q * K + k))

    return mod


# -- scores -----------------------------------------------------------------------------------------


@score
def identity():
    return lambda s, b, h, q, k: s


@score
def constant_factor():
    return lambda s, b, h, q, k: 0.25 * s - 1


@score
def alibi(slopes):
    return lambda s, b, h, q, k: s + slopes[h] * (k - q)


@score
def soft_cap():
    return lambda s, b, h, q, k: 20.0 * jnp.tanh(s / 20.0)


@score
def captured_cap(cap):
    return lambda s, b, h, q, k: cap * jnp.tanh(s / cap)


@score
def alibi_then_cap(slopes):
    return lambda s, b, h, q, k: 9.0 * jnp.tanh((s + slopes[h] * abs(q - k)) / 9.0)


@score
def dense_bias(bias_qk):
    return lambda s, b, h, q, k: s + bias_qk[q, k]


@score
def dense_bias_by_head(bias_hqk):
    return lambda s, b, h, q, k: s + bias_hqk[h, q, k]


@score
def bias_one_index_at_a_time(bias_hqk):
    return lambda s, b, h, q, k: s + bias_hqk[h][q][k]


@score
def key_bias(bias_bhk):
    return lambda s, b, h, q, k: s + bias_bhk[b, h, k]


@score
def relative_table(table):
    return lambda s, b, h, q, k: s + table[h, jnp.clip(q - k + 12, 0, 23)]


@score
def relative_table_unclipped(table):
    return lambda s, b, h, q, k: s + table[h, q - k + 12]  # clamped, or counted from the end


@score
def t5_buckets(table):
    def mod(s, b, h, q, k):
        distance = jnp.abs(k - q)
        far = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / 6) / np.log(50 / 6) * 6
        near = jnp.where(distance < 6, distance, jnp.minimum(6 + far.astype(jnp.int32), 11))
        return s + table[h, near + jnp.where(k > q, 12, 0)]

    return mod


@score
def two_reads_of_one_table(table):
    return lambda s, b, h, q, k: s * table[h, q % 24] + table[h, k % 24] ** 2


@score
def reads_that_coincide(table):
    return lambda s, b, h, q, k: s + table[h, 3] * table[h, jnp.minimum(k, 3)]


@score
def counted_from_the_end(slopes):
    return lambda s, b, h, q, k: s + slopes[-1] * slopes[h - H]


@score
def past_the_end(slopes):
    return lambda s, b, h, q, k: s + slopes[k]


@score
def filled_past_the_end(slopes):
    return lambda s, b, h, q, k: s + slopes.at[k].get(mode="fill", fill_value=-3.0)


@score
def take_filled(gates):
    return lambda s, b, h, q, k: jnp.where(k < 4, s + jnp.take(gates, k, mode="fill"), s)


@score
def take_clipped(gates):
    return lambda s, b, h, q, k: s + jnp.take(gates, k, mode="clip")


@score
def take_wrapped(gates):
    return lambda s, b, h, q, k: s + jnp.take(gates, k, mode="wrap")


@score
def promised(gates):
    return lambda s, b, h, q, k: s + gates.at[h].get(mode="promise_in_bounds")


@score
def dynamic_index(gates):
    return lambda s, b, h, q, k: s + lax.dynamic_index_in_dim(gates, h, keepdims=False)


@score
def dynamic_slice(bias_qk):
    return lambda s, b, h, q, k: s + lax.dynamic_slice(bias_qk, (q, k), (1, 1))[0, 0]


@score
def gathered_by_a_vector(table):
    return lambda s, b, h, q, k: s + table[h, jnp.stack([q, k]) % 24].sum()


@score
def transposed(bias_qk):
    return lambda s, b, h, q, k: s + bias_qk.T[k, q]


@score
def part_of_a_bias(bias_qk):
    return lambda s, b, h, q, k: s + bias_qk[1:, ::-1][q - 1, k]


@score
def head_gate(gates):
    return lambda s, b, h, q, k: jax.nn.sigmoid(gates[h]) * s


@score
def half_precision_gate(half_gates):
    return lambda s, b, h, q, k: s * half_gates[h]


@score
def bfloat16_arithmetic(slopes):
    return lambda s, b, h, q, k: s * slopes.astype(jnp.bfloat16)[h]


@score
def hidden_by_infinity(row_docs, key_docs):
    return lambda s, b, h, q, k: jnp.where(row_docs[q] == key_docs[k], s * 2, -jnp.inf)


@score
def branch(bias_qk):
    return lambda s, b, h, q, k: lax.cond(q >= k, lambda x: x * 2, lambda x: x + bias_qk[q, k], s)


@score
def branches_that_read_differently(gates, slopes):
    return lambda s, b, h, q, k: jnp.where(k < lax.rem(q, 7), s * gates[h], s - slopes[h])


@score
def switch(gates):
    return lambda s, b, h, q, k: lax.switch(
        (q + k) % 5, [jnp.sin, lambda x: x * gates[h], jnp.square], s
    )


@score
def inner_sum(gates):
    def mod(s, b, h, q, k):
        distance = (q - k).astype(jnp.float32)
        return s + jax.vmap(lambda g: jnp.exp(-jnp.abs(g * distance)))(gates).sum()

    return mod


@score
def low_rank_bias(left, right):
    return lambda s, b, h, q, k: s + jnp.dot(left[h, q], right[k])


@score
def logarithmic_distance(slopes, gates):
    return lambda s, b, h, q, k: s - slopes[h] * jnp.log1p(jnp.exp(gates[h]) * abs(q - k))


@score
def rotation(gates):
    return lambda s, b, h, q, k: s * jnp.cos((q - k) * gates[h]) + jnp.sin(gates[0] * k)


@score
def jitted(bias_qk):
    return lambda s, b, h, q, k: jax.jit(lambda x: x + jax.nn.relu(bias_qk[q, k]))(s)


@score
def rematerialised(gates):
    return lambda s, b, h, q, k: jax.checkpoint(lambda x: jnp.tanh(x) * gates[h])(s)


@score
def activations():
    return lambda s, b, h, q, k: jax.nn.silu(s) + jax.nn.gelu(s) + jax.nn.softplus(s)


@score
def special_functions(gates):
    return lambda s, b, h, q, k: lax.erf(s) + jnp.logaddexp(s, gates[h]) + jnp.exp2(-abs(s))


@score
def powers():
    return lambda s, b, h, q, k: s**3 - 0.5 * s**2 + jnp.sqrt(1 + s * s) + lax.rsqrt(2 + s * s)


@score
def rounding(gates):
    return lambda s, b, h, q, k: s + jnp.floor(2 * s) * gates[h] + jnp.round(s) - jnp.ceil(s / 3)


@score
def bounds():
    return lambda s, b, h, q, k: jnp.clip(s, -0.7, 0.9) + jnp.maximum(s, 0) * jnp.sign(s - 0.3)


@score
def loop_over_a_table(gates):
    return lambda s, b, h, q, k: lax.fori_loop(0, H, lambda i, x: 0.5 * x + gates[i], s)


@score
def scan_over_an_array(right):
    def mod(s, b, h, q, k):
        last, partial = lax.scan(lambda c, x: (c + x[0] * x[1], c), s, right[:5])
        return last + partial.sum()

    return mod


@score
def other_gradient(gates):
    @jax.custom_vjp
    def f(x, g):
        return jnp.tanh(x) * g

    f.defvjp(lambda x, g: (f(x, g), (x, g)), lambda r, ct: (2 * ct * r[1], ct * r[0]))
    return lambda s, b, h, q, k: f(s, gates[h]) + f(s, 2 * gates[0])


@score
def other_tangent(gates):
    @jax.custom_jvp
    def f(x, g):
        return x * g

    f.defjvp(lambda p, t: (f(*p), 3 * t[0] * p[1] + t[1]))
    return lambda s, b, h, q, k: f(s, gates[h])


@score
def gradient_without_a_read(gates):
    """A straight-through estimator: the forward pass does not need what the gradient goes to."""

    @jax.custom_vjp
    def f(x, g):
        return x

    f.defvjp(lambda x, g: (x, None), lambda _, ct: (ct, 2 * ct))
    return lambda s, b, h, q, k: f(s, gates[h])


@score
def stopped(gates, slopes):
    return lambda s, b, h, q, k: s * lax.stop_gradient(gates[h]) + slopes[h]


@score
def only_compared(gates):
    return lambda s, b, h, q, k: jnp.where(s > gates[h], s, 0.5 * s)


@score
def one_hot(slopes):
    return lambda s, b, h, q, k: s + jnp.sum(jax.nn.one_hot(h, H) * slopes)


@score
def computed_before_the_kernel(gates, left, right):
    rates = jax.nn.softplus(gates) * 2
    bias = left @ right.T
    return lambda s, b, h, q, k: s * rates[h] + bias[h, q, k] + jnp.mean(left)


@score
def computed_inside_the_mod(gates, left, right):
    return lambda s, b, h, q, k: s * jnp.exp(gates)[h] + (left @ right.T)[h, q, k]


@score
def numpy_constants():
    table = np.linspace(-1, 1, K, dtype=np.float32)
    return lambda s, b, h, q, k: s * np.float32(1.5) + jnp.asarray(table)[k]


@score
def dictionary_of_arrays(slopes, bias_qk):
    weights = {"slope": slopes, "bias": {"qk": bias_qk}}
    return lambda s, b, h, q, k: s + weights["slope"][h] * weights["bias"]["qk"][q, k]


@score
def indexed_by_documents(table, key_docs):
    return lambda s, b, h, q, k: s + table[key_docs[q], key_docs[k]]


@score
def positions_only(gates):
    return lambda s, b, h, q, k: gates[h] * (q - k) / 8


@opaque_score
def median_of_three(gates):
    return lambda s, b, h, q, k: jnp.sort(jnp.stack([s, gates[h], gates[0]]))[1]


@opaque_score
def whole_matrix(bias_qk):
    return lambda s, b, h, q, k: s + (bias_qk * s).sum() * 1e-3


@opaque_score
def cumulative(table):
    return lambda s, b, h, q, k: jnp.cumsum(table[h] * s)[k % 24]
