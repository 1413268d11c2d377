"""The Flax layers and the attention_fn adapter, against Flax's own attention."""

import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from flexjax import create_block_mask, masks, scores
from flexjax.flax import FlexAttention, attention_fn
from flexjax.flax import adapter as adapter_module
from flexjax.flax import linen as flex_linen

B, L, S, FEATURES, HEADS, KV_HEADS = 2, 12, 10, 16, 4, 2
INPUTS = jax.random.normal(jax.random.key(0), (B, L, FEATURES))
OTHERS = jax.random.normal(jax.random.key(1), (B, S, FEATURES))
causal = masks.causal()


@pytest.fixture(autouse=True)
def _one_warning_a_test():
    """The adapter warns of a dense mask once a process."""
    adapter_module._warn_of_dense_mask.cache_clear()


def assert_close(actual, expected, tolerance=2e-5):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, tolerance, tolerance), actual, expected
    )


def dense_causal(length=L):
    return nn.make_causal_mask(jnp.ones((B, length)))


def plain_nnx(**options):
    """Flax's own layer."""
    options = {"decode": False, "rngs": nnx.Rngs(0)} | options
    return nnx.MultiHeadAttention(HEADS, FEATURES, **options)


def loss_and_grads(layer, *args, **kwargs):
    def loss(layer, *args):
        return jnp.sum(jnp.sin(layer(*args, **kwargs)))

    value, grads = nnx.value_and_grad(loss)(layer, *args)
    return value, nnx.to_pure_dict(grads)


# -- attention_fn in nnx.MultiHeadAttention ----------------------------------------------------------


@pytest.mark.smoke
def test_nnx_layer_with_a_mask_mod():
    flex, plain = plain_nnx(attention_fn=attention_fn(mask_mod=causal)), plain_nnx()
    assert_close(loss_and_grads(flex, INPUTS), loss_and_grads(plain, INPUTS, mask=dense_causal()))


def test_nnx_layer_with_is_causal():
    flex, plain = plain_nnx(attention_fn=attention_fn()), plain_nnx()
    assert_close(flex(INPUTS, is_causal=True), plain(INPUTS, is_causal=True))


def test_nnx_layer_with_a_dense_mask_warns_of_its_memory():
    flex, plain = plain_nnx(attention_fn=attention_fn()), plain_nnx()
    mask = dense_causal()
    with pytest.warns(UserWarning, match="dense mask"):
        out = flex(INPUTS, mask=mask)
    assert_close(out, plain(INPUTS, mask=mask))


def test_nnx_layer_with_a_padding_mask():
    """A mask over keys alone holds no L x S array, and gives no warning."""
    keep = jnp.arange(S)[None, :] < jnp.array([S, 4])[:, None]
    mask = keep[:, None, None, :]
    flex, plain = plain_nnx(attention_fn=attention_fn()), plain_nnx()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = flex(INPUTS, OTHERS, OTHERS, mask=mask)
    assert_close(out, plain(INPUTS, OTHERS, OTHERS, mask=mask))


def test_nnx_decoding_step_by_step():
    """The very mods that the whole sequence used: the query's index is its place in the cache."""
    fn = attention_fn(scores.alibi(HEADS), causal)
    layer = plain_nnx(attention_fn=fn, decode=False)
    whole = layer(INPUTS)
    layer.init_cache(INPUTS.shape)
    steps = [layer(INPUTS[:, i : i + 1], decode=True) for i in range(L)]
    assert_close(jnp.concatenate(steps, axis=1), whole)


def test_nnx_many_batch_axes():
    x = INPUTS.reshape(2, 1, L, FEATURES)
    flex, plain = plain_nnx(attention_fn=attention_fn(mask_mod=causal)), plain_nnx()
    assert_close(flex(x), plain(x, mask=dense_causal()[:, None]))


def test_nnx_block_mask_under_jit():
    block_mask = create_block_mask(causal, None, None, L, L, 4)
    flex, plain = plain_nnx(attention_fn=attention_fn(block_mask=block_mask)), plain_nnx()
    assert_close(nnx.jit(lambda m, x: m(x))(flex, INPUTS), plain(INPUTS, mask=dense_causal()))


def test_nnx_half_precision():
    flex = plain_nnx(attention_fn=attention_fn(mask_mod=causal), dtype=jnp.bfloat16)
    plain = plain_nnx(dtype=jnp.bfloat16)
    out = flex(INPUTS)
    assert out.dtype == jnp.bfloat16
    assert_close(
        out.astype(jnp.float32), plain(INPUTS, mask=dense_causal()).astype(jnp.float32), 3e-2
    )


# -- attention_fn in linen.MultiHeadDotProductAttention ----------------------------------------------


def linen_pair(**options):
    flex = nn.MultiHeadDotProductAttention(HEADS, **options)
    plain = nn.MultiHeadDotProductAttention(HEADS)
    return flex, plain, plain.init(jax.random.key(2), INPUTS)


@pytest.mark.smoke
def test_linen_layer():
    flex, plain, params = linen_pair(attention_fn=attention_fn(mask_mod=causal))

    def run(layer, **kwargs):
        return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(layer.apply(p, INPUTS, **kwargs))))(
            params
        )

    assert_close(run(flex), run(plain, mask=dense_causal()))


def test_linen_decoding_step_by_step():
    fn = attention_fn(mask_mod=causal)
    whole, _, params = linen_pair(attention_fn=fn)
    step = nn.MultiHeadDotProductAttention(HEADS, attention_fn=fn, decode=True)
    cache = step.init(jax.random.key(0), INPUTS)["cache"]
    outs = []
    for i in range(L):
        out, state = step.apply({**params, "cache": cache}, INPUTS[:, i : i + 1], mutable=["cache"])
        outs.append(out)
        cache = state["cache"]
    assert_close(jnp.concatenate(outs, axis=1), whole.apply(params, INPUTS))


# -- attention_fn called directly --------------------------------------------------------------------


def heads_of(shape, seed):
    return jax.random.normal(jax.random.key(seed), shape)


QUERY, KEY, VALUE = heads_of((B, L, 4, 8), 3), heads_of((B, S, 2, 8), 4), heads_of((B, S, 2, 8), 5)
BIAS = heads_of((B, 4, L, S), 6)


@pytest.mark.parametrize("shape", [(B, 4, L, S), (1, 4, L, S), (4, 1, S), (L, S), (B, 1, 1, S), ()])
def test_bias_and_its_gradient(shape):
    bias = heads_of(shape, 6)
    key, value = (jnp.repeat(x, 2, axis=2) for x in (KEY, VALUE))

    def flex(bias):
        return attention_fn()(QUERY, KEY, VALUE, bias=bias)

    def plain(bias):
        bias = jnp.broadcast_to(bias.reshape((1,) * (4 - bias.ndim) + bias.shape), BIAS.shape)
        return nn.dot_product_attention(QUERY, key, value, bias=bias)

    def run(attend):
        return jax.value_and_grad(lambda b: jnp.sum(jnp.sin(attend(b))))(bias)

    assert_close(run(flex), run(plain))


def test_bias_comes_after_the_score_mod():
    cap = scores.soft_cap(1.0)
    out = attention_fn(cap)(QUERY, KEY, VALUE, bias=BIAS)
    exact = attention_fn(lambda s, b, h, q, k: cap(s, b, h, q, k) + BIAS[b, h, q, k])
    assert_close(out, exact(QUERY, KEY, VALUE))


@pytest.mark.parametrize(
    ("given", "options", "fragments"),
    [
        ({}, {"dropout_rate": 0.1, "deterministic": False}, ["dropout", "deterministic=True"]),
        ({}, {"module": object()}, ["sown", "sow_weights=False"]),
        ({}, {"qk_attn_weights_einsum": jnp.einsum}, ["qk_attn_weights_einsum_cls"]),
        ({}, {"input_positions": jnp.arange(L)}, ["input_positions", "captures"]),
        ({"block_mask": True}, {"is_causal": True}, ["block_mask", "mask_mod"]),
        ({}, {"mask": jnp.ones((B, 3, L, S), bool)}, ["(2, 3, 12, 10)", "(2, 4, 12, 10)"]),
        ({}, {"bias": jnp.ones((L + 1, S))}, ["(13, 10)", "does not broadcast"]),
    ],
)
def test_what_it_cannot_do_is_an_error(given, options, fragments):
    if given:
        given = {"block_mask": create_block_mask(causal, None, None, L, S, 4)}
    with pytest.raises(ValueError, match=r"^\S.*\.$") as error:
        attention_fn(**given)(QUERY, KEY, VALUE, **options)
    assert all(f in str(error.value) for f in fragments), str(error.value)


def test_mask_mod_and_block_mask_exclude_each_other():
    block_mask = create_block_mask(causal, None, None, L, L, 4)
    with pytest.raises(ValueError, match="Combine them first"):
        attention_fn(mask_mod=causal, block_mask=block_mask)


def test_dropout_is_allowed_where_it_does_nothing():
    out = attention_fn()(QUERY, KEY, VALUE, dropout_rate=0.5, deterministic=True)
    assert_close(out, attention_fn()(QUERY, KEY, VALUE))


def test_dropout_while_training_is_an_error_in_the_layer():
    layer = plain_nnx(attention_fn=attention_fn(), dropout_rate=0.3, rngs=nnx.Rngs(0, dropout=1))
    with pytest.raises(ValueError, match="dropout"):
        layer(INPUTS, deterministic=False)


def test_sown_weights_are_an_error_in_the_layer():
    with pytest.raises(ValueError, match="sown"):
        plain_nnx(attention_fn=attention_fn())(INPUTS, sow_weights=True)


# -- the layers --------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_nnx_flex_attention_is_multi_head_attention():
    layer = FlexAttention(HEADS, FEATURES, mask_mod=causal, rngs=nnx.Rngs(0))
    plain = plain_nnx()
    for name in ("query", "key", "value", "out"):  # the same parameters under the same names
        nnx.update(getattr(plain, name), nnx.state(getattr(layer, name)))
    expected = loss_and_grads(plain, INPUTS, mask=dense_causal())
    assert_close(loss_and_grads(layer, INPUTS), expected)


def test_linen_flex_attention_takes_the_checkpoints_of_multi_head_attention():
    layer = flex_linen.FlexAttention(HEADS, mask_mod=causal)
    plain = nn.MultiHeadDotProductAttention(HEADS)
    params = plain.init(jax.random.key(2), INPUTS)
    shapes = jax.tree.map(jnp.shape, params)
    assert jax.tree.map(jnp.shape, layer.init(jax.random.key(3), INPUTS)) == shapes
    assert_close(layer.apply(params, INPUTS), plain.apply(params, INPUTS, mask=dense_causal()))


def test_both_layers_agree_in_every_option():
    rope = lambda x: x * jnp.cos(jnp.arange(x.shape[-2]))[None, :, None]
    options = {
        "num_kv_heads": KV_HEADS,
        "head_dim": 6,
        "out_features": 5,
        "use_sinks": True,
        "rope": rope,
        "scale": 0.3,
        "use_bias": False,
        "score_mod": scores.soft_cap(1.0),
    }
    window = masks.sliding_window(3, 3)
    one = FlexAttention(HEADS, FEATURES, rngs=nnx.Rngs(0), **options)
    other = flex_linen.FlexAttention(HEADS, **options)
    params = {
        name: {"kernel": getattr(one, name).kernel[...]}
        for name in ("query", "key", "value", "out")
    }
    params["sinks"] = one.sinks[...]
    out = one(INPUTS, OTHERS, mask_mod=window)
    assert out.shape == (B, L, 5)
    assert_close(out, other.apply({"params": params}, INPUTS, OTHERS, mask_mod=window))


def test_the_call_overrides_the_layer():
    layer = FlexAttention(HEADS, FEATURES, mask_mod=causal, rngs=nnx.Rngs(0))
    block_mask = create_block_mask(masks.sliding_window(2), None, None, L, L, 4)
    by_mod = layer(INPUTS, mask_mod=masks.sliding_window(2))
    assert_close(layer(INPUTS, block_mask=block_mask), by_mod)
    assert not np.allclose(by_mod, layer(INPUTS))


def test_a_learned_table_is_trained_through_the_layer():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Param(jnp.zeros((HEADS, 2 * L - 1)))
            self.attention = FlexAttention(HEADS, FEATURES, mask_mod=causal, rngs=rngs)

        def __call__(self, x):
            table = self.table[...]
            return self.attention(x, score_mod=lambda s, b, h, q, k: s + table[h, q - k + L - 1])

    _, grads = loss_and_grads(Model(nnx.Rngs(0)), INPUTS)
    table = grads["table"]
    assert np.abs(table[:, L - 1 :]).min() > 0
    assert not np.asarray(table[:, : L - 1]).any(), "keys behind the query are masked"


def test_sinks_are_trained():
    layer = FlexAttention(HEADS, FEATURES, mask_mod=causal, use_sinks=True, rngs=nnx.Rngs(0))
    _, grads = loss_and_grads(layer, INPUTS)
    assert np.abs(grads["sinks"]).min() > 0


@pytest.mark.parametrize(
    ("options", "fragment"),
    [({"num_kv_heads": 3}, "multiple of num_kv_heads"), ({"qkv_features": 18}, "head_dim")],
)
def test_heads_and_features_must_divide(options, fragment):
    with pytest.raises(ValueError, match=fragment):
        FlexAttention(HEADS, FEATURES, rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match=fragment):
        flex_linen.FlexAttention(HEADS, **options).init(jax.random.key(0), INPUTS)


def test_flexjax_itself_does_not_import_flax():
    code = "import sys, flexjax; assert not {'flax', 'matplotlib', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
