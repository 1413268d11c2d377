"""The Llama example: flexjax and jax.nn give the same model, and its bookkeeping is right."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llama import serving, train, training
from examples.llama.config import SIZES, Config, make_config
from examples.llama.model import Llama
from tests.transforms.reference import TOLERANCE

LENGTH = 40
SMALL = {"width": 32, "head_dim": 8, "hidden": 48, "dtype": "float32"}
TOKENS = np.random.default_rng(0).integers(0, 256, (2, LENGTH)).astype(np.int32)
IDS = np.repeat([[0, 1, 2, -1], [0, 0, 1, 1]], LENGTH // 4, axis=1).astype(np.int32)


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """Examples are written for JAX's own defaults, not for the strict ones of the tests."""
    with jax.numpy_rank_promotion("allow"):
        yield


def small(style: str, **changes) -> Config:
    window = {} if style == "llama" else {"window": 7}
    return make_config("tiny", style, **SMALL, **window, **changes)


def logits_and_gradients(config: Config, ids):
    model = Llama(config, nnx.Rngs(0))
    if config.sinks:
        for number, block in enumerate(model.blocks):
            block.attention.sinks[...] = jnp.linspace(-1.0, 1.0 + number, config.heads)

    weights = np.random.default_rng(1).standard_normal((*TOKENS.shape, config.vocabulary))

    @nnx.jit
    def both(model):
        def weighted(model):
            logits = model(TOKENS, ids)
            return (logits * weights.astype(np.float32)).mean(), logits

        (_, logits), gradients = nnx.value_and_grad(weighted, has_aux=True)(model)
        return logits, nnx.to_pure_dict(gradients)

    return both(model)


def test_flexjax_and_the_dense_mask_give_the_same_model():
    """Windows in every other layer, sinks and both soft caps at once: logits and all gradients."""
    style = {"style": "gpt_oss", "score_cap": 5.0, "logit_cap": 10.0}
    ours = logits_and_gradients(small(**style, remat=True), IDS)
    dense = logits_and_gradients(small(**style, attention="xla"), IDS)
    for part, expected in zip(ours, dense, strict=True):
        scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=5 * TOLERANCE * scale)
        jax.tree.map(close, part, expected)
    assert np.abs(ours[1]["blocks"][0]["attention"]["sinks"]).min() > 0


def test_rows_that_are_one_document_need_no_ids():
    dense, ours = (
        Llama(small("llama", window=7, attention=name), nnx.Rngs(0)) for name in ("xla", "flexjax")
    )
    forward = nnx.jit(Llama.__call__)
    mask = forward(dense, TOKENS, np.zeros_like(IDS))
    for model in (dense, ours):
        np.testing.assert_allclose(forward(model, TOKENS), mask, 0, 1e-4)


def test_losses_fall_together(capsys):
    config = small("llama", layers=1)
    run = train.Run(config, steps=12, batch=2, length=64, rate=1e-2, megabytes=0.05)
    ours, dense = (
        train.train(dataclasses.replace(run, config=dataclasses.replace(config, attention=name)))
        for name in ("flexjax", "xla")
    )
    assert ours[-1] < ours[0] - 0.5
    np.testing.assert_allclose(ours, dense, 1e-3)
    assert "tokens/s, MFU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("attention", "style"), [("xla", "gpt_oss"), ("xla", "gemma2"), ("flexjax", "gpt_oss")]
)
def test_decoding_step_by_step_gives_the_logits_of_the_whole(attention, style):
    config = small(style, attention=attention)
    model = Llama(config, nnx.Rngs(0))
    if config.sinks:
        model.blocks[1].attention.sinks[...] = jnp.linspace(-1.0, 2.0, config.heads)
    steps = 12  # beyond the window
    caches = serving.empty_caches(config, 2, steps + 3)
    step, found = nnx.jit(serving.decode_step), []
    for i in range(steps):
        logits, caches = step(model, caches, jnp.full(2, i), TOKENS[:, i])
        found.append(logits)
    whole = nnx.jit(Llama.__call__)(model, TOKENS[:, :steps])
    np.testing.assert_allclose(jnp.stack(found, 1), whole, 0, 1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_parameters_that_they_are_named_for(size):
    config = make_config(size, "gpt_oss")
    model = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == config.parameters
    if size != "tiny":
        named = float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
        assert count == pytest.approx(named, rel=0.25)


@pytest.mark.parametrize("window", [None, 3, 100])
def test_visible_pairs_are_those_of_the_mask(window):
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    seen = (distance >= 0) & (distance < (window or LENGTH)) & (IDS[:, :, None] == IDS[:, None])
    assert training.visible_pairs(IDS, window) == (seen & (IDS >= 0)[:, :, None]).sum()


def test_a_checkpoint_brings_back_model_and_optimizer(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    config = small("llama", layers=1)
    model, other = (Llama(config, nnx.Rngs(seed)) for seed in (0, 1))
    optimizer, fresh = (training.make_optimizer(x, 1e-2, 10) for x in (model, other))
    trained = jax.tree.map(lambda x: x + jnp.ones_like(x), nnx.state((model, optimizer)))
    nnx.update((model, optimizer), trained)
    assert train.restore(tmp_path / "none", other, fresh) == 0
    train.save(tmp_path / "run", 1, model, optimizer)
    assert train.restore(tmp_path / "run", other, fresh) == 1
    jax.tree.map(np.testing.assert_array_equal, nnx.state((other, fresh)), trained)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attention", "cudnn", "--style", "gemma2"], "neither sinks nor a soft cap"),
        (["--window", "0"], "A token sees itself at least"),
        (["--size", "9B"], "invalid choice"),
    ],
)
def test_what_cannot_be_trained_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train.parse(arguments)
    assert message in capsys.readouterr().err
