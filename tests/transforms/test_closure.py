"""What a mod may close over: constants, tracers of any enclosing transformation, parameters of a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flexjax import create_block_mask, flex_attention
from tests.transforms.reference import (
    BLOCK,
    HQ,
    B,
    L,
    S,
    assert_close,
    check,
    dense_attention,
    operands,
    scalar,
)

QUERY, KEY, VALUE, BIAS, IDS = operands()


def with_mods(make_score_mod, make_mask_mod=None):
    """transform -> comparison: attention of the module's operands whose mods are made from the arguments."""

    def attend(attention):
        def function(*args):
            mask_mod = None if make_mask_mod is None else make_mask_mod(*args)
            return attention(QUERY, KEY, VALUE, make_score_mod(*args), mask_mod=mask_mod)

        return function

    return {"flex": attend(flex_attention), "dense": attend(dense_attention)}


def by_table(table):
    return lambda score, b, h, q, kv: score * jnp.cos(table[h, kv]) + table[h, q]


TRANSFORMS = {
    "jit": lambda f: f,
    "grad": lambda f: jax.grad(scalar(f)),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (jnp.cos(x),)),
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, -x])),
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, y: (c, f(y)), 0.0, jnp.stack([x, -x]))[1],
    "remat": lambda f: jax.grad(scalar(jax.checkpoint(f))),
    "vmap grad jvp": lambda f: (
        lambda x: jax.vmap(jax.grad(lambda y: jnp.sum(jax.jvp(f, (y,), (y,))[1])))(
            jnp.stack([x, -x])
        )
    ),
}


@pytest.mark.parametrize(
    "transform",
    [pytest.param(t, marks=pytest.mark.smoke) if t == "vmap" else t for t in TRANSFORMS],
)
def test_tracers_of_the_enclosing_transformation(transform):
    check(TRANSFORMS[transform], BIAS, **with_mods(by_table))


def test_tracers_of_several_levels():
    """jit, grad, vmap and scan each give the mod an array of their own."""

    def run(attention):
        def total(outer):
            def row(mapped):
                def step(carry, scanned):
                    def score_mod(score, b, h, q, kv):
                        return score * outer[h] + mapped[kv] * carry[q] - scanned[h, kv]

                    out = attention(QUERY, KEY, VALUE, score_mod)
                    return jnp.tanh(carry + out.mean((0, 1, 3))), out.sum()

                return jax.lax.scan(step, jnp.ones(L), jnp.stack([BIAS, -BIAS]))[1]

            return jnp.sum(jax.vmap(row)(BIAS[:2]) ** 2)

        return jax.jit(jax.grad(total))(jnp.linspace(0.5, 1.5, HQ))

    assert_close(run(flex_attention), run(dense_attention))


def test_mod_that_differentiates_inside():
    """A mod may itself use jax.grad: here the derivative of a polynomial whose coefficients are captured."""

    def slope(coefficients):
        return lambda score, b, h, q, kv: (
            score + jax.grad(lambda s: coefficients[0] * s**2 + coefficients[1] * s**3)(score)
        )

    coefficients = jnp.array([0.5, 0.25])
    check(TRANSFORMS["grad"], coefficients, **with_mods(slope))


def test_integer_and_boolean_tracers():
    def score(shift, keep):
        return lambda score, b, h, q, kv: jnp.where(keep[kv], score, score - (q + shift))

    def mask(shift, keep):
        return lambda b, h, q, kv: (q + shift >= kv) | keep[kv]

    mods = with_mods(score, mask)
    keep = jnp.arange(S) % 3 == 0
    check(lambda f: f, jnp.int32(2), keep, **mods)
    check(lambda f: jax.vmap(f, (0, None)), jnp.arange(3), keep, **mods)


def test_scalar_capture_with_a_gradient():
    check(
        lambda f: jax.value_and_grad(scalar(f)),
        jnp.float32(0.4),
        **with_mods(lambda t: lambda score, b, h, q, kv: t * jnp.tanh(score / t)),
    )


def test_numpy_arrays_and_python_numbers():
    table = np.asarray(BIAS)
    factor = 0.5

    def score_mod(score, b, h, q, kv):
        return score * factor + jnp.asarray(table)[h, kv]

    args = QUERY, KEY, VALUE, score_mod
    assert_close(flex_attention(*args), dense_attention(*args))


def test_captured_operands():
    """The query itself, read by a mod: both of its gradients are added."""

    def run(attention):
        def loss(query):
            def score_mod(score, b, h, q, kv):
                return score + query[b, h, q, 0]

            return scalar(attention)(query, KEY, VALUE, score_mod)

        return jax.jit(jax.grad(loss))(QUERY)

    # A shift of a whole row leaves the softmax as it is, but not the logsumexp.
    assert_close(run(flex_attention), run(dense_attention))

    def lse(attention):
        def loss(query):
            score_mod = lambda score, b, h, q, kv: score + query[b, h, q, 0]
            return jnp.sum(attention(query, KEY, VALUE, score_mod, return_lse=True)[1])

        return jax.jit(jax.grad(loss))(QUERY)

    assert_close(lse(flex_attention), lse(dense_attention))


def test_partial_and_callable_objects():
    class Slope:
        def __init__(self, slopes):
            self.slopes = slopes

        def __call__(self, score, b, h, q, kv):
            return score - self.slopes[h] * (q - kv)

    def shifted(by, score, b, h, q, kv):
        return score + by[kv]

    slopes = jnp.linspace(0.0, 1.0, HQ)
    for mod in (
        Slope(slopes),
        functools.partial(shifted, BIAS[0]),
        jax.tree_util.Partial(shifted, BIAS[0]),
    ):
        args = QUERY, KEY, VALUE, mod
        assert_close(flex_attention(*args), dense_attention(*args))


def test_block_mask_built_and_used_on_different_levels():
    """Built under grad, used under vmap inside: its captures are tracers of the outer level only."""

    def run(attention, build):
        def loss(bias):
            threshold = bias[0]
            mask_mod = lambda b, h, q, kv: (threshold[q] > threshold[kv]) | (q == kv)
            mask = build(mask_mod)

            def lane(query):
                return attention(query, KEY, VALUE, by_table(bias), **mask)

            return jnp.sum(jax.vmap(lane)(jnp.stack([QUERY, -QUERY])) ** 2)

        return jax.jit(jax.grad(loss))(BIAS)

    def blocks(mask_mod):
        return {"block_mask": create_block_mask(mask_mod, None, None, L, S, BLOCK)}

    actual = run(flex_attention, blocks)
    assert_close(actual, run(dense_attention, lambda mask_mod: {"mask_mod": mask_mod}))


def test_opaque_mods():
    """A mod beyond the intermediate representation, a loop whose length is data, runs as a whole."""

    def halvings(table):
        def score_mod(score, b, h, q, kv):
            steps = jax.lax.while_loop(lambda n: (q >> n) > 0, lambda n: n + 1, jnp.int32(0))
            return score * table[h, kv] + steps

        return score_mod

    mods = with_mods(halvings)
    check(lambda f: jax.value_and_grad(scalar(f)), BIAS, **mods)
    check(lambda f: jax.vmap(jax.grad(scalar(f))), jnp.stack([BIAS, -BIAS]), **mods)


class LearnedBias(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (HQ, S)))
        self.cap = nnx.Param(jnp.float32(2.0))

    def __call__(self, score, b, h, q, kv):
        return self.cap[...] * jnp.tanh(
            (score + self.table[h, kv] - self.table[h, q]) / self.cap[...]
        )


def test_parameters_of_an_nnx_module():
    def run(attention):
        @nnx.jit
        def grads(model):
            def loss(model):
                return scalar(attention)(QUERY, KEY, VALUE, model)

            return nnx.grad(loss)(model)

        return nnx.to_pure_dict(grads(LearnedBias(nnx.Rngs(0))))

    assert_close(run(flex_attention), run(dense_attention))


def test_closing_over_an_nnx_parameter_of_an_enclosing_module():
    def run(attention):
        class Model(nnx.Module):
            def __init__(self, rngs):
                self.slopes = nnx.Param(jax.random.uniform(rngs.params(), (B, HQ)))

            def __call__(self, query):
                score_mod = lambda score, b, h, q, kv: score - self.slopes[b, h] * (q - kv)
                return attention(query, KEY, VALUE, score_mod)

        model = Model(nnx.Rngs(1))
        graph, params = nnx.split(model)
        loss = lambda params: scalar(nnx.merge(graph, params))(QUERY)
        return nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))

    assert_close(run(flex_attention), run(dense_attention))


def test_leaked_tracers_are_reported_by_jax():
    kept = []

    @jax.jit
    def leak(x):
        kept.append(lambda score, b, h, q, kv: score + x[kv])
        return x

    leak(BIAS[0])
    with pytest.raises(jax.errors.UnexpectedTracerError):
        flex_attention(QUERY, KEY, VALUE, kept[0])
