"""What a score_mod or mask_mod may be written in: JAX's control flow, calls, arithmetic, and opaque code."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from flexjax import masks
from tests.behaviour.harness import Case, cases, check, normal


def scored(name, score, mask=masks.causal(), **options):
    """A case with `score(captures, s, b, h, q, k)`."""
    return Case(name, score=lambda c: functools.partial(score, c), mask=mask, **options)


# -- arithmetic ---------------------------------------------------------------------------------------

ARITHMETIC = [
    scored("identity", lambda c, s, b, h, q, k: s, smoke=True),
    scored("doubled", lambda c, s, b, h, q, k: s * 2),
    scored("squared", lambda c, s, b, h, q, k: s * s),
    scored("cubed", lambda c, s, b, h, q, k: s**3 / 4),
    scored("trigonometric", lambda c, s, b, h, q, k: jnp.sin(s) * jnp.cos(s + q)),
    scored("arctan_and_exp", lambda c, s, b, h, q, k: jnp.arctan(s) + jnp.exp(-s * s)),
    scored("logaddexp", lambda c, s, b, h, q, k: jnp.logaddexp(s, 0.1 * k)),
    scored("relative_distance", lambda c, s, b, h, q, k: s + (q - k)),
    scored("distance_decay", lambda c, s, b, h, q, k: s * jnp.exp(-0.1 * jnp.abs(q - k))),
    scored("clipped", lambda c, s, b, h, q, k: jnp.clip(s, -0.5, 0.5) + 0.01 * s),
    scored("maximum_and_sign", lambda c, s, b, h, q, k: jnp.maximum(s, 0.2) + jnp.sign(s) * s),
    scored("integers", lambda c, s, b, h, q, k: s * ((q * 7 + k // 3) % 5 - (k & 3) + (q ^ 1) % 2)),
    scored("negative_floor_division", lambda c, s, b, h, q, k: s + (k - q) // 7 + (k - q) % 7),
    scored("causal_by_score", lambda c, s, b, h, q, k: jnp.where(q >= k, s, -jnp.inf), mask=None),
    scored("inverse_causal_by_score", lambda c, s, b, h, q, k: jnp.where(q <= k, s, -jnp.inf), mask=None),
    scored("skips_odd_keys", lambda c, s, b, h, q, k: jnp.where(k % 2 == 0, s, -jnp.inf), mask=None),
    scored("constant", lambda c, s, b, h, q, k: 0.5, mask=None),
    scored("only_positions", lambda c, s, b, h, q, k: jnp.float32(0.1) * (q - k)),
    scored("float16_result", lambda c, s, b, h, q, k: (0.25 * (q - k)).astype(jnp.float16)),
]  # fmt: skip

# -- control flow ---------------------------------------------------------------------------------------


def with_cond(c, s, b, h, q, k):
    return lax.cond(q > k + 4, lambda x: x * c["a"][q], lambda x: x + c["a"][k], s)


def with_switch(c, s, b, h, q, k):
    branches = [lambda x: x, lambda x: 2.0 * x, lambda x: x * c["a"][q]]
    return lax.switch((q + k) % 5, branches, s)  # 3 and 4 clamp to the last


def with_select(c, s, b, h, q, k):
    return lax.select(q == k, s * 3.0, s)


def with_fori(c, s, b, h, q, k):
    return lax.fori_loop(0, 3, lambda i, x: x * 0.5 + c["a"][(q + i) % 40], s)


def with_scan(c, s, b, h, q, k):
    step = lambda x, w: (jnp.tanh(x) * w, x)
    total, history = lax.scan(step, s, c["w"])
    return total + history.sum()


def with_inner_vmap(c, s, b, h, q, k):
    return s + jax.vmap(lambda i: c["w"][i] * jnp.cos(0.1 * (q - k) * i))(jnp.arange(4)).sum()


def with_reductions(c, s, b, h, q, k):
    row = c["m"][h]
    return s * row.max() + row[q % 4] - row.min() + jnp.linalg.norm(row) + row.mean() * k * 0.1


def with_dot(c, s, b, h, q, k):
    """Position features through one hidden layer: a learned continuous bias."""
    features = jnp.stack([0.1 * (q - k), 0.05 * q, 0.05 * k])
    hidden = jax.nn.relu(jnp.stack([jnp.dot(w, features.astype(s.dtype)) for w in c["first"]]))
    return s + jnp.dot(c["second"], hidden)


def with_concatenate(c, s, b, h, q, k):
    parts = jnp.concatenate([jnp.stack([s, 2.0 * s]), c["w"] * s])
    return parts[:3].sum() + parts[::-1][0] * parts.reshape(2, 3)[1, 2]


def with_argmax(c, s, b, h, q, k):
    return s * (1.0 + jnp.argmax(jnp.stack([q % 3, k % 5, 1 + 0 * q])))


CONTROL = [
    scored("cond", with_cond, captures={"a": normal(40)}),
    scored("switch", with_switch, captures={"a": normal(40)}),
    scored("select", with_select),
    scored("fori_loop", with_fori, captures={"a": normal(40)}),
    scored("scan", with_scan, captures={"w": normal(4)}),
    scored("inner_vmap", with_inner_vmap, captures={"w": normal(4)}),
    scored("reductions", with_reductions, captures={"m": normal(2, 4)}),
    scored("small_network", with_dot, captures={"first": normal(4, 3), "second": normal(4)}),
    scored("concatenate_and_reshape", with_concatenate, captures={"w": normal(4)}),
    scored("argmax", with_argmax),
    scored("python_loop", lambda c, s, b, h, q, k: sum(c["w"][i] * s**i for i in range(3)), captures={"w": normal(3)}),
    scored("jitted_inside", lambda c, s, b, h, q, k: jax.jit(jax.nn.silu)(s) + jax.jit(jnp.take)(c["w"], h), captures={"w": normal(2)}),
    scored("checkpointed_inside", lambda c, s, b, h, q, k: jax.checkpoint(jnp.sin)(s) * c["w"][h], captures={"w": normal(2)}),
]  # fmt: skip


# -- derivative rules of the user -----------------------------------------------------------------------


@jax.custom_vjp
def straight_through(x, w):
    return jnp.round(x) * w


straight_through.defvjp(
    lambda x, w: (straight_through(x, w), (x, w)),
    lambda residuals, d: (d * residuals[1], d * residuals[0] * 10.0),
)


@jax.custom_jvp
def clipped_slope(x):
    return x * x


clipped_slope.defjvp(lambda primals, tangents: (clipped_slope(*primals), tangents[0] * 0.5))


def gradient_inside(c, s, b, h, q, k):
    return s + jax.grad(lambda x: jnp.sin(x) * x)(s) * c["w"][h]


RULES = [
    # Away from the places where rounding jumps, so that float32 and float64 agree.
    scored("custom_vjp", lambda c, s, b, h, q, k: straight_through(s * 1e-3 + 0.31 * (q - k), c["w"][h]), captures={"w": normal(2)}),
    scored("custom_jvp", lambda c, s, b, h, q, k: clipped_slope(s) * c["w"][h], captures={"w": normal(2)}),
    scored("relu", lambda c, s, b, h, q, k: jax.nn.relu(s) - 0.1 * jax.nn.gelu(s)),
    scored("gradient_inside", gradient_inside, captures={"w": normal(2)}),
    scored("stop_gradient", lambda c, s, b, h, q, k: s * lax.stop_gradient(jax.nn.sigmoid(s))),
]  # fmt: skip


# -- what the IR cannot express stays opaque ------------------------------------------------------------


def traced_trip_count(c, s, b, h, q, k):
    """Doubles a small number until it exceeds the distance."""
    steps = lax.while_loop(lambda n: n[0] < jnp.abs(q - k), lambda n: (n[0] * 2, n[1] + 1), (1, 0))
    return s * (1.0 + 0.25 * steps[1]) + c["a"][h, k]


def long_dot(c, s, b, h, q, k):
    return s + jnp.dot(c["u"][q], c["v"][k])


def powers_of_two(b, h, q_idx, kv_idx):
    """Keys at distances 0, 1, 2, 4, 8, ... before the query, found by a loop."""
    power = lax.while_loop(lambda n: n < q_idx - kv_idx, lambda n: n * 2, 1)
    return (kv_idx <= q_idx) & ((power == q_idx - kv_idx) | (q_idx == kv_idx))


OPAQUE = [
    scored("traced_trip_count", traced_trip_count, captures={"a": normal(2, 40)}, smoke=True),
    scored("dot_of_300_elements", long_dot, captures={"u": normal(40, 300) * 0.1, "v": normal(40, 300, seed=1) * 0.1}),
    scored("opaque_mask", lambda c, s, b, h, q, k: s * c["a"][h, k], mask=powers_of_two, captures={"a": normal(2, 40)}),
    scored("opaque_mask_and_score", traced_trip_count, mask=powers_of_two, captures={"a": normal(2, 40)}),
]  # fmt: skip


def network_mask(b, h, q_idx, kv_idx):
    """A mask with a switch, a loop and a reduction in it."""
    near = lax.switch(h, [lambda: 4, lambda: 12])
    loop = lax.fori_loop(0, 3, lambda i, x: x + (q_idx + i) % 2, 0)
    flags = jnp.stack([q_idx % 5 == 0, kv_idx % 7 == 0, loop == 2])
    return (jnp.abs(q_idx - kv_idx) <= near) | flags.all()


MASKS = [
    Case("mask_with_control_flow", mask=network_mask, mask_shape=(None, 2)),
    Case("mask_from_partial", mask=functools.partial(lambda w, b, h, q, k: q - k <= w, 9)),
    Case("mask_of_python_bool", mask=lambda b, h, q, k: True),
    Case("mask_per_head_table", mask=lambda b, h, q, k: jnp.asarray([3, 30])[h] >= jnp.abs(q - k), mask_shape=(None, 2)),
]  # fmt: skip


@cases(*ARITHMETIC)
def test_arithmetic(case, backend):
    check(case, backend)


@cases(*CONTROL)
def test_control_flow(case, backend):
    check(case, backend)


@cases(*RULES)
def test_derivative_rule(case, backend):
    check(case, backend)


@cases(*OPAQUE)
def test_opaque(case, backend):
    check(case, backend)


@cases(*MASKS)
def test_mask(case, backend):
    check(case, backend)
