"""jax.export: programs that are written down, read back and called."""

import jax
import jax.export
import jax.numpy as jnp
import pytest

from flexjax import create_block_mask, flex_attention
from tests.transforms.reference import (
    BLOCK,
    FLOATS,
    B,
    L,
    S,
    assert_close,
    dense,
    flex,
    masked,
    operands,
    scalar,
    scored,
)

pytest.importorskip("flatbuffers")  # what jax.export writes with


def read_back(function, args, **options):
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    exported = jax.export.export(jax.jit(function), **options)(*shapes)
    return jax.export.deserialize(exported.serialize(vjp_order=1))


@pytest.mark.smoke
def test_forward():
    args = operands()
    assert_close(read_back(flex, args).call(*args), dense(*args))


def test_gradient():
    args = operands()
    exported = read_back(jax.grad(scalar(flex), FLOATS), args)
    assert_close(list(exported.call(*args)), list(jax.grad(scalar(dense), FLOATS)(*args)))


def test_differentiating_what_was_read_back():
    args = operands()
    exported = read_back(flex, args)
    actual = jax.jit(jax.grad(scalar(exported.call), FLOATS))(*args)
    assert_close(actual, jax.grad(scalar(dense), FLOATS)(*args))


def test_block_mask_as_an_operand():
    """The lists and the ids are arguments of the program: new documents need no new export."""
    query, key, value, bias, ids = operands()

    def build(ids):
        return create_block_mask(masked(ids), B, None, L, S, BLOCK)

    structure = jax.tree.structure(build(ids))

    def attend(query, *leaves):
        mask = jax.tree.unflatten(structure, leaves)
        return flex_attention(query, key, value, scored(bias), mask)

    exported = read_back(attend, [query, *jax.tree.leaves(build(ids))])
    for shift in (0, 1):
        moved = jnp.roll(ids, shift, axis=1)
        out = exported.call(query, *jax.tree.leaves(build(moved)))
        assert_close(out, dense(query, key, value, bias, moved))


def test_lowering_for_other_platforms():
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands()]
    exported = jax.export.export(jax.jit(flex), platforms=["cpu", "cuda", "tpu"])(*shapes)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    args = operands()
    assert_close(exported.call(*args), dense(*args))


def test_symbolic_lengths_are_refused():
    """Block lists have static shapes: a length must be a number when the program is traced."""
    (length,) = jax.export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((1, 2, length, 8), jnp.float32)
    with pytest.raises(Exception, match=r"integer|concrete|symbolic|known"):
        jax.export.export(jax.jit(flex_attention))(x, x, x)
