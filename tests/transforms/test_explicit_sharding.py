"""Meshes with explicit axes: operands whose type says how they are sharded, and no shard_map in sight."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flexjax import KVCache, decode, flex_attention, masks
from tests.mosaic_gpu.paged import Paged
from tests.transforms.reference import FLOATS, assert_close, dense, flex, operands, scalar

P = PartitionSpec
WHOLE = P()
pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")

SPLITS = {
    "batch": P("data"),
    "heads": P(None, "model"),
    "both": P("data", "model"),
}


@pytest.fixture
def mesh():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def placed(spec, mesh, bias=WHOLE, ids=WHOLE):
    """Query, key and value sharded by `spec`; the captured arrays replicated unless their specs say more."""
    specs = (spec, spec, spec, bias, ids)
    args = zip(operands(), specs, strict=True)
    return tuple(jax.device_put(x, NamedSharding(mesh, s)) for x, s in args)


@pytest.mark.parametrize("split", SPLITS)
def test_output_and_gradients(mesh, split):
    """Mods see global indices, and every result is sharded like what it belongs to."""
    spec = SPLITS[split]
    args = placed(spec, mesh)
    out, lse = jax.jit(flex, static_argnames="return_lse")(*args, return_lse=True)
    assert_close(
        (out, lse), jax.jit(dense, static_argnames="return_lse")(*operands(), return_lse=True)
    )
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, spec), out.ndim)
    grads = jax.jit(jax.grad(scalar(flex), FLOATS))(*args)
    assert_close(grads, jax.jit(jax.grad(scalar(dense), FLOATS))(*operands()))
    for grad, x in zip(grads, args, strict=False):
        assert grad.sharding.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.smoke
def test_eager(mesh):
    assert_close(flex(*placed(P("data", "model"), mesh)), dense(*operands()))


def test_sharded_captures(mesh):
    args = placed(P("data", "model"), mesh, bias=P("model"), ids=P("data"))
    grads = jax.jit(jax.grad(scalar(flex), FLOATS))(*args)
    assert_close(grads, jax.jit(jax.grad(scalar(dense), FLOATS))(*operands()))


def test_length_first_layout(mesh):
    spec = P("data", None, "model")
    args = [jax.device_put(x.swapaxes(1, 2), NamedSharding(mesh, spec)) for x in operands()[:3]]
    out = jax.jit(lambda *a: flex_attention(*a, mask_mod=masks.causal(), layout="BLHD"))(*args)
    expected = flex_attention(*operands()[:3], mask_mod=masks.causal(), backend="reference")
    assert_close(out, expected.swapaxes(1, 2))


def test_forward_mode(mesh):
    def push(attend, args):
        *floats, ids = args
        moved = lambda *f: jax.jvp(lambda *a: attend(*a, ids), f, f)
        return jax.jit(moved)(*floats)

    assert_close(push(flex, placed(P("data", "model"), mesh)), push(dense, operands()))


def test_vmap(mesh):
    axes = (0, None, None, None, None)
    query, *rest = placed(P("data", "model"), mesh)
    queries = jnp.stack([query, -query])
    actual = jax.jit(jax.vmap(flex, axes))(queries, *rest)
    query, *rest = operands()
    assert_close(actual, jax.jit(jax.vmap(dense, axes))(jnp.stack([query, -query]), *rest))


def test_vmap_of_gradients(mesh):
    axes = (None, 0, None, None, None)

    def grads(attend, query, key, *rest):
        many = jax.vmap(jax.grad(scalar(attend), FLOATS), axes)
        return jax.jit(many)(query, jnp.stack([key, -key]), *rest)

    assert_close(grads(flex, *placed(P("data", "model"), mesh)), grads(dense, *operands()))


def test_second_derivatives(mesh):
    def product(attend, query, *rest):
        gradient = jax.grad(scalar(attend))
        push = lambda q: jax.jvp(lambda q: gradient(q, *rest), (q,), (jnp.cos(q),))[1]
        return jax.jit(push)(query)

    assert_close(product(flex, *placed(P("data"), mesh)), product(dense, *operands()))


def test_remat_and_scan(mesh):
    def loss(attend):
        def body(query, _):
            out = jax.checkpoint(attend)(query, *rest)
            return query + jnp.sum(out, axis=-1, keepdims=True), None

        rest = ()

        def value(query, *others):
            nonlocal rest
            rest = others
            return jnp.sum(jax.lax.scan(body, query, length=2)[0] ** 2)

        return jax.jit(jax.grad(value, FLOATS))

    actual = loss(flex)(*placed(P("data", "model"), mesh))
    assert_close(actual, loss(dense)(*operands()))


@pytest.mark.parametrize("spec", [P(None, None, "data"), P(None, None, None, "data")], ids=str)
def test_sharded_sequences_are_refused(mesh, spec):
    query, key, value, *_ = placed(P(), mesh)
    query = jax.device_put(query, NamedSharding(mesh, spec))
    with pytest.raises(ValueError, match="sequence or head dimension"):
        flex_attention(query, key, value)


def test_unlike_shardings_are_refused(mesh):
    query, key, value, *_ = placed(P("data"), mesh)
    key = jax.device_put(key, NamedSharding(mesh, P("model")))
    with pytest.raises(ValueError, match="sharded alike"):
        flex_attention(query, key, value)


def test_replicated_keys_are_refused(mesh):
    query, key, value, *_ = placed(P("data"), mesh)
    key, value = (jax.device_put(x, NamedSharding(mesh, P())) for x in (key, value))
    with pytest.raises(ValueError, match="reshard"):
        flex_attention(query, key, value)


def test_decoding(mesh):
    """A cache in one piece is split over batch and heads; pages are split by hand."""
    query = jax.random.normal(jax.random.key(0), (2, 4, 1, 8))
    key = jax.random.normal(jax.random.key(1), (2, 2, 16, 8))
    lengths = jnp.asarray([16, 5], jnp.int32)
    step = jax.jit(lambda q, k, n: decode(q, KVCache(k, k, n)))
    whole = [jax.device_put(x, NamedSharding(mesh, WHOLE)) for x in (query, key, lengths)]
    split = [
        jax.device_put(x, NamedSharding(mesh, s))
        for x, s in ((query, SPLITS["both"]), (key, SPLITS["both"]), (lengths, P("data")))
    ]
    out = step(*split)
    assert_close((out,), (step(*whole),))
    assert out.sharding.is_equivalent_to(split[0].sharding, out.ndim)
    pool = jnp.zeros((2, 4, 16, 8))
    pages = Paged(pool, pool, jnp.zeros((2, 1), jnp.int32), lengths)
    with pytest.raises(ValueError, match="split over a mesh by hand"):
        decode(split[0], pages)
