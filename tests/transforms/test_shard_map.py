"""jax.shard_map: attention of each device's own batch rows or heads."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from flexjax import create_block_mask, flex_attention, masks
from tests.transforms.reference import FLOATS, assert_close, dense, flex, operands, scalar

P = PartitionSpec
pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")

# Specs of (query, key, value, bias, ids), and of the output. Mods see the shard's own indices, so arrays that
# they read by b or h are split like the operands.
SPLITS = {
    "batch": ((P("data"), P("data"), P("data"), P(), P("data")), P("data")),
    "heads": ((P(None, "model"),) * 3 + (P("model"), P()), P(None, "model")),
    "both": ((P("data", "model"),) * 3 + (P("model"), P("data")), P("data", "model")),
}


def mesh(kind):
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def placed(args, specs, mesh):
    shardings = (jax.NamedSharding(mesh, spec) for spec in specs)
    return tuple(map(jax.device_put, args, shardings))


def mapped(split, mesh, **options):
    in_specs, out_spec = SPLITS[split]
    return jax.shard_map(flex, mesh=mesh, in_specs=in_specs, out_specs=out_spec, **options)


@pytest.mark.parametrize("check_vma", [True, False], ids=["check_vma", "no_check_vma"])
@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("split", SPLITS)
def test_gradients_outside(split, kind, check_vma):
    """The transpose of an operand that all shards share adds their gradients up."""
    args, m = operands(), mesh(kind)
    function = mapped(split, m, check_vma=check_vma)
    grads = jax.jit(jax.value_and_grad(scalar(function), FLOATS))
    expected = jax.jit(jax.value_and_grad(scalar(dense), FLOATS))(*args)
    with jax.set_mesh(m):
        actual = grads(*placed(args, SPLITS[split][0], m))
    assert_close(actual, expected)


@pytest.mark.smoke
def test_gradients_inside():
    """Every shard computes the gradient of its own loss; a shared operand's is the sum of all."""
    args, m = operands(), mesh("auto")
    in_specs, _ = SPLITS["batch"]

    @functools.partial(jax.shard_map, mesh=m, in_specs=in_specs, out_specs=(*in_specs[:3], P()))
    def grads(query, key, value, bias, ids):
        return jax.grad(scalar(flex), FLOATS)(query, key, value, bias, ids)

    actual = jax.jit(grads)(*args)
    assert_close(actual, jax.grad(scalar(dense), FLOATS)(*args))


def test_forward_mode_and_logsumexp():
    args, m = operands(), mesh("auto")
    in_specs, out_spec = SPLITS["both"]

    def run(attend):
        def push(*args):
            *floats, ids = args
            with_lse = lambda *a: jnp.exp(attend(*a, ids, return_lse=True)[1])
            return jax.jvp(with_lse, tuple(floats), tuple(floats))

        return push

    sharded = jax.shard_map(run(flex), mesh=m, in_specs=in_specs, out_specs=(out_spec,) * 2)
    assert_close(jax.jit(sharded)(*args), run(dense)(*args))


def test_vmap_of_shard_map():
    query, *rest = operands()
    queries, m = jnp.stack([query, -query]), mesh("auto")

    def grads(attend):
        many = jax.vmap(attend, (0, None, None, None, None))
        return jax.jit(jax.grad(scalar(many), FLOATS))(queries, *rest)

    assert_close(grads(mapped("both", m)), grads(dense))


def test_second_derivatives():
    args, m = operands(), mesh("auto")

    def product(attend):
        def run(query, *rest):
            gradient = jax.grad(scalar(attend))
            return jax.jvp(lambda q: gradient(q, *rest), (query,), (query[::-1],))[1]

        return jax.jit(run)(*args)

    assert_close(product(mapped("batch", m)), product(dense))


@pytest.mark.parametrize("split", SPLITS)
def test_automatic_partitioning(split):
    """No shard_map: jit splits the program for operands that are placed on several devices."""
    args, m = operands(), mesh("auto")
    grads = jax.jit(jax.value_and_grad(scalar(flex), FLOATS))
    actual = grads(*placed(args, SPLITS[split][0], m))
    assert_close(actual, jax.value_and_grad(scalar(dense), FLOATS)(*args))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("dim", [64, 128])
def test_kernels_lower_for_gpus(kind, dim):
    """Kernels do not say that their results differ between shards; gradients of shared arrays are added up."""
    m = mesh(kind)

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(m, spec))

    x, slopes = array((4, 2, 2048, dim), jnp.bfloat16, P("data")), array((2,), jnp.float32, P())
    block_mask = create_block_mask(masks.causal(), None, None, 2048, 2048)

    def attend(query, key, value, slopes):
        score_mod = lambda s, b, h, q, k: s + slopes[h] * (k - q)
        options = {"score_mod": score_mod, "block_mask": block_mask, "backend": "mosaic_gpu"}
        return flex_attention(query, key, value, **options)

    specs = (P("data"), P("data"), P("data"), P())
    function = jax.shard_map(attend, mesh=m, in_specs=specs, out_specs=P("data"))
    grads = jax.jit(jax.grad(scalar(function), (0, 1, 2, 3)))
    with jax.set_mesh(m):
        lowered = grads.trace(x, x, x, slopes).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("mosaic_gpu") >= 2
    assert "all_reduce" in text
