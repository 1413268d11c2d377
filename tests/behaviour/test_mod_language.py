"""What a score_mod or mask_mod may be written in: JAX's control flow, calls, arithmetic, and opaque code.

Most mods put several constructs together, to save compilations.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from flexjax import masks
from tests.behaviour.harness import Case, cases, check, normal

causal = masks.causal()


def scored(score, *, name=None, mask=causal, smoke=False, **captures):
    """The score_mod `score(captures, s, b, h, q, k)`."""
    return Case(
        name or score.__name__,
        score=lambda c: functools.partial(score, c),
        mask=mask,
        captures=captures,
        smoke=smoke,
    )


# -- arithmetic -----------------------------------------------------------------------------------


def identity(c, s, b, h, q, k):
    return s


def polynomial(c, s, b, h, q, k):
    return 2 * s - s * s / 8 + s**3 / 40 + s / (2 + k)


def transcendental(c, s, b, h, q, k):
    waves = jnp.sin(s) * jnp.cos(s + q) + jnp.arctan(s)
    return waves + jnp.exp(-s * s) + jnp.logaddexp(s, 0.1 * k) + jnp.log1p(s * s) + jnp.cbrt(s + 9)


def piecewise(c, s, b, h, q, k):
    return jnp.clip(s, -0.5, 0.5) + jnp.maximum(s, 0.2) + jnp.sign(s) * s - jnp.abs(s - 0.7)


def relative_distance(c, s, b, h, q, k):
    return s * jnp.exp(-0.1 * jnp.abs(q - k)) + (q - k)


def integers(c, s, b, h, q, k):
    bits = (k & 3) ^ (q >> 1) % 2
    rounded_down = (k - q) // 7 - (k - q) % 7 + jnp.minimum(h, q // 8)
    return s * ((q * 7 + k // 3) % 5 - bits) + 0.2 * rounded_down


def causal_by_score(c, s, b, h, q, k):
    return jnp.where(q >= k, s, -jnp.inf)


def skips_odd_keys_and_the_past(c, s, b, h, q, k):
    return jnp.where((k % 2 == 0) & (q <= k), s, -jnp.inf)


def constant(c, s, b, h, q, k):
    return 0.5


def only_positions_in_float16(c, s, b, h, q, k):
    return (0.25 * (q - k)).astype(jnp.float16)


ARITHMETIC = [
    scored(identity, smoke=True),
    scored(polynomial),
    scored(transcendental),
    scored(piecewise),
    scored(relative_distance),
    scored(integers),
    scored(causal_by_score, mask=None),
    scored(skips_odd_keys_and_the_past, mask=None),
    scored(constant, mask=None),
    scored(only_positions_in_float16),
]

# -- control flow ---------------------------------------------------------------------------------


def branches(c, s, b, h, q, k):
    s = lax.cond(q > k + 4, lambda x: x * c["a"][q], lambda x: x + c["a"][k], s)
    ways = [lambda x: x, lambda x: 2.0 * x, lambda x: x * c["a"][q]]
    s = lax.switch((q + k) % 5, ways, s)  # 3 and 4 clamp to the last
    return lax.select(q == k, s * 3.0, s)


def loops(c, s, b, h, q, k):
    s = lax.fori_loop(0, 3, lambda i, x: x * 0.5 + c["a"][(q + i) % 40], s)
    total, history = lax.scan(lambda x, w: (jnp.tanh(x) * w, x), s, c["w"])
    return total + history.sum() + sum(c["w"][i] * s**i for i in range(3))


def vectors(c, s, b, h, q, k):
    waves = jax.vmap(lambda i: c["w"][i] * jnp.cos(0.1 * (q - k) * i))(jnp.arange(4))
    row = c["rows"][h]
    reduced = row.max() * s + row[q % 4] - row.min() + jnp.linalg.norm(row) + row.mean() * k * 0.1
    parts = jnp.concatenate([jnp.stack([s, 2.0 * s]), c["w"] * s]).reshape(2, 3)
    largest = jnp.argmax(jnp.stack([q % 3, k % 5, 1 + 0 * q]))
    return waves.sum() + reduced + parts[1, 2] + parts[:, ::-1][0, 0] + 0.1 * largest


def small_network(c, s, b, h, q, k):
    """Position features through one hidden layer: a learned continuous bias."""
    features = jnp.stack([0.1 * (q - k), 0.05 * q, 0.05 * k]).astype(s.dtype)
    hidden = jax.nn.relu(jnp.stack([jnp.dot(w, features) for w in c["first"]]))
    return s + jnp.dot(c["second"], hidden)


def calls(c, s, b, h, q, k):
    taken = jax.jit(lambda a, i: jnp.take(a, i))(c["w"], h)
    return jax.jit(jax.nn.silu)(s) * taken + jax.checkpoint(jnp.sin)(s * c["w"][h])


CONTROL_FLOW = [
    scored(branches, a=normal(40)),
    scored(loops, a=normal(40), w=normal(4)),
    scored(vectors, w=normal(4), rows=normal(2, 4)),
    scored(small_network, first=normal(4, 3), second=normal(4)),
    scored(calls, w=normal(2)),
]


# -- derivative rules -----------------------------------------------------------------------------


@jax.custom_vjp
def straight_through(x, w):
    return jnp.round(x) * w


straight_through.defvjp(
    lambda x, w: (straight_through(x, w), (x, w)),
    lambda residuals, d: (d * residuals[1], d * residuals[0] * 10.0),
)


@jax.custom_jvp
def half_slope(x):
    return x * x


half_slope.defjvp(lambda primals, tangents: (half_slope(*primals), tangents[0] * 0.5))


def custom_rules(c, s, b, h, q, k):
    # 0.31 (q - k) stays away from where rounding jumps, so that float32 and float64 agree.
    return straight_through(s * 1e-3 + 0.31 * (q - k), c["w"][h]) + half_slope(s) * c["w"][h]


def rules_of_jax(c, s, b, h, q, k):
    gate = lax.stop_gradient(jax.nn.sigmoid(s))
    return jax.nn.relu(s) - 0.1 * jax.nn.gelu(s) + s * gate


def gradient_inside(c, s, b, h, q, k):
    return s + jax.grad(lambda x: jnp.sin(x) * x)(s) * c["w"][h]


DERIVATIVES = [
    scored(custom_rules, w=normal(2)),
    scored(rules_of_jax),
    scored(gradient_inside, w=normal(2)),
]

# -- what the IR cannot express stays opaque ------------------------------------------------------


def traced_trip_count(c, s, b, h, q, k):
    """Doubles a small number until it exceeds the distance."""
    steps = lax.while_loop(lambda n: n[0] < jnp.abs(q - k), lambda n: (n[0] * 2, n[1] + 1), (1, 0))
    return s * (1.0 + 0.25 * steps[1]) + c["a"][h, k]


def dot_of_300_elements(c, s, b, h, q, k):
    return s + jnp.dot(c["u"][q], c["v"][k]) * 0.01


def powers_of_two(b, h, q_idx, kv_idx):
    """Keys at distances 0, 1, 2, 4, 8, ... before the query, found by a loop."""
    power = lax.while_loop(lambda n: n < q_idx - kv_idx, lambda n: n * 2, 1)
    return (kv_idx <= q_idx) & ((power == q_idx - kv_idx) | (q_idx == kv_idx))


OPAQUE = [
    scored(traced_trip_count, a=normal(2, 40), smoke=True),
    scored(dot_of_300_elements, u=normal(40, 300), v=normal(40, 300, seed=1)),
    scored(traced_trip_count, name="opaque_mask_and_score", mask=powers_of_two, a=normal(2, 40)),
]

# -- masks ----------------------------------------------------------------------------------------


def control_flow_in_a_mask(b, h, q_idx, kv_idx):
    near = lax.switch(h, [lambda: 4, lambda: 12])
    loop = lax.fori_loop(0, 3, lambda i, x: x + (q_idx + i) % 2, 0)
    flags = jnp.stack([q_idx % 5 == 0, kv_idx % 7 == 0, loop == 2])
    return (jnp.abs(q_idx - kv_idx) <= near) | flags.all()


def width_of_head(widths, b, h, q_idx, kv_idx):
    return jnp.asarray(widths)[h] >= jnp.abs(q_idx - kv_idx)


MASKS = [
    Case("control_flow_in_a_mask", mask=control_flow_in_a_mask, mask_shape=(None, 2)),
    Case("partial", mask=functools.partial(width_of_head, [3, 30]), mask_shape=(None, 2)),
    Case("python_bool", mask=lambda b, h, q, k: True),
]


@cases(*ARITHMETIC)
def test_arithmetic(case, backend):
    check(case, backend)


@cases(*CONTROL_FLOW)
def test_control_flow(case, backend):
    check(case, backend)


@cases(*DERIVATIVES)
def test_derivative_rule(case, backend):
    check(case, backend)


@cases(*OPAQUE)
def test_opaque(case, backend):
    check(case, backend)


@cases(*MASKS)
def test_mask(case, backend):
    check(case, backend)
