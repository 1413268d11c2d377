"""jax.checkpoint: the same gradients, and policies that keep the named output and logsumexp."""

import re

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import pytest

from tests.transforms.reference import (
    DV,
    FLOATS,
    HQ,
    B,
    L,
    assert_close,
    dense,
    flex,
    operands,
    scalar,
)

policies = jax.checkpoint_policies
NAMED = policies.save_only_these_names("flexjax_out", "flexjax_lse")
POLICIES = {
    "default": None,
    "everything": policies.everything_saveable,
    "dots": policies.dots_with_no_batch_dims_saveable,
    "named": NAMED,
    "only out": policies.save_only_these_names("flexjax_out"),
}


def block(attend):
    """Attention between two nonlinear operations, so that there are residuals besides its own."""
    return lambda query, *rest: jnp.sin(attend(jnp.sin(query), *rest))


@pytest.mark.parametrize(
    "policy", [pytest.param(p, marks=pytest.mark.smoke) if p == "named" else p for p in POLICIES]
)
def test_gradients_are_the_same(policy):
    args = operands()
    rematerialized = jax.checkpoint(block(flex), policy=POLICIES[policy])
    actual = jax.jit(jax.grad(scalar(rematerialized), FLOATS))(*args)
    assert_close(actual, jax.jit(jax.grad(scalar(block(dense)), FLOATS))(*args))


def saved(function, capsys):
    """(shape, "argument" or the name) of every array kept from the forward to the backward pass."""
    jax.ad_checkpoint.print_saved_residuals(function, *operands())
    found = []
    for line in capsys.readouterr().out.splitlines():
        shape = tuple(int(n) for n in re.search(r"\[([\d,]*)\]", line)[1].split(",") if n)
        name = re.search(r"named '(\w+)'", line)
        found.append((shape, name[1] if name else line.split(" from ")[1].split()[1]))
    return found


def test_nothing_but_arguments_is_kept_by_default(capsys):
    residuals = saved(jax.checkpoint(block(flex)), capsys)
    assert sorted(s for s, _ in residuals) == sorted(x.shape for x in operands())
    assert {source for _, source in residuals} == {"argument"}


def test_named_residuals_are_all_that_is_kept(capsys):
    residuals = saved(jax.checkpoint(block(flex), policy=NAMED), capsys)
    named = {name: shape for shape, name in residuals if name != "argument"}
    assert named == {"flexjax_out": (B, HQ, L, DV), "flexjax_lse": (B, HQ, L)}
    arguments = [shape for shape, name in residuals if name == "argument"]
    assert sorted(arguments) == sorted(x.shape for x in operands())


@pytest.mark.parametrize(
    ("policy", "calls"),
    [
        (None, ["Attention", "Attention", "AttentionBackward"]),
        (NAMED, ["Attention", "AttentionBackward"]),
        (policies.everything_saveable, ["Attention", "AttentionBackward"]),
    ],
    ids=["default", "named", "everything"],
)
def test_how_often_attention_runs(policy, calls):
    """With its residuals kept, the backward pass does not compute the forward pass again."""
    rematerialized = jax.checkpoint(block(flex), policy=policy)
    text = str(jax.make_jaxpr(jax.grad(scalar(rematerialized)))(*operands()))
    assert sorted(re.findall(r"\b(Attention\w*)\[", text)) == calls


def test_named_residuals_when_differentiating_twice():
    args = operands()

    def product(attend):
        gradient = jax.grad(scalar(attend))
        return jax.jit(lambda *a: jax.jvp(lambda q: gradient(q, *a[1:]), a[:1], (a[0][::-1],))[1])

    rematerialized = jax.checkpoint(block(flex), policy=NAMED)
    assert_close(product(rematerialized)(*args), product(block(dense))(*args))


def test_forward_mode_and_vmap_under_checkpoint():
    query, *rest = operands()

    def push(attend):
        rematerialized = jax.checkpoint(attend)
        many = jax.vmap(lambda q: jax.jvp(lambda q: rematerialized(q, *rest), (q,), (jnp.cos(q),)))
        return jax.jit(many)(jnp.stack([query, -query]))

    assert_close(push(block(flex)), push(block(dense)))
