"""Which backend computes an attention, and for which platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import FallbackWarning, create_block_mask, flex_attention, masks
from flexjax.backends import registry

SHAPE = (1, 2, 256, 64)
HALF = jax.random.normal(jax.random.key(0), SHAPE, jnp.bfloat16)
causal = masks.causal()


def attend(x, **options):
    return flex_attention(x, x, x, mask_mod=causal, **options)


def loss(x, **options):
    return attend(x, **options).astype(jnp.float32).sum()


def program(function, x, platform):
    """The program that a function becomes on a platform, which need not be here."""
    return jax.jit(function).trace(x).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.smoke
@pytest.mark.parametrize("function", [attend, jax.grad(loss)], ids=["forward", "gradient"])
def test_a_program_for_cuda_gets_the_kernels_wherever_it_is_traced(function):
    assert "mosaic_gpu" in program(function, HALF, "cuda")
    assert "mosaic_gpu" not in program(function, HALF, "cpu")


def test_float32_goes_to_xla_on_cuda():
    assert "mosaic_gpu" not in program(attend, HALF.astype(jnp.float32), "cuda")


@pytest.mark.parametrize("block", [32, (64, 96)])
def test_blocks_that_the_kernels_cannot_tile_go_to_xla(block):
    def masked(x):
        return flex_attention(
            x, x, x, block_mask=create_block_mask(causal, None, None, 256, 256, block)
        )

    assert "mosaic_gpu" not in program(masked, HALF, "cuda")
    with pytest.raises(NotImplementedError, match="multiple of 64"):
        flex_attention(
            HALF,
            HALF,
            HALF,
            block_mask=create_block_mask(causal, None, None, 256, 256, block),
            backend="mosaic_gpu",
        )


def test_an_exported_program_holds_both():
    exported = jax.export.export(jax.jit(attend), platforms=["cpu", "cuda"])(HALF)
    assert "mosaic_gpu" in exported.mlir_module()
    np.testing.assert_array_equal(
        np.asarray(exported.call(HALF), np.float32), np.asarray(attend(HALF), np.float32)
    )


@pytest.mark.parametrize("function", [attend, jax.grad(loss)], ids=["forward", "gradient"])
def test_a_named_backend_is_not_replaced_on_a_platform_that_it_does_not_run_on(function):
    def named(x):
        return function(x, backend="mosaic_gpu")

    with pytest.raises(
        NotImplementedError, match=r"NVIDIA GPUs.*another platform.*Leave backend out"
    ):
        jax.jit(named)(HALF)


def test_a_named_backend_says_what_it_cannot_do():
    with pytest.raises(NotImplementedError, match="bfloat16 and float16, but the query is float32"):
        attend(HALF.astype(jnp.float32), backend="mosaic_gpu")

    def gathered(score, b, h, q_idx, kv_idx):
        return score + jnp.sort(jnp.stack([score] * 300))[0]

    with pytest.raises(NotImplementedError, match="sort"):
        flex_attention(HALF, HALF, HALF, gathered, backend="mosaic_gpu")


def test_deterministic_gradients_of_what_is_read_at_q_and_kv_are_refused():
    table = jnp.zeros((511,))

    def biased(x, table):
        bias = lambda s, b, h, q, k: s + table[q - k + 255]
        options = {"backend": "mosaic_gpu", "kernel_options": {"deterministic": True}}
        return flex_attention(x, x, x, bias, **options).astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="deterministic"):
        jax.jit(jax.grad(biased, (0, 1))).trace(HALF, table).lower(lowering_platforms=("cuda",))
    # Nobody asks for the table's gradient here.
    lowered = jax.jit(jax.grad(biased)).trace(HALF, table).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.slow
def test_the_kernels_run_in_the_interpreter_through_the_front_door():
    """Forward and backward pass, by flex_attention itself."""
    x = HALF[:, :, :130, :32]
    options = {"backend": "mosaic_gpu", "kernel_options": {"interpret": True}}

    def out_and_gradient(**options):
        def run(x):
            out = attend(x, **options).astype(jnp.float32)
            return out.sum(), out

        gradient, out = jax.jit(jax.grad(run, has_aux=True))(x)
        return np.asarray(out), np.asarray(gradient, np.float32)

    for found, exact in zip(
        out_and_gradient(**options), out_and_gradient(backend="xla"), strict=True
    ):
        assert np.linalg.norm(found - exact) < 1e-2 * np.linalg.norm(exact)


def test_a_missing_kernel_language_is_a_reason_and_not_an_error(monkeypatch):
    def broken(problem):
        raise ImportError("no such module")

    module = registry.load("mosaic_gpu")
    monkeypatch.setattr(module, "check", broken)
    assert "mosaic_gpu" not in program(attend, HALF[:, :1], "cuda")
    with pytest.raises(NotImplementedError, match=r"cannot be imported here \(no such module\)"):
        attend(HALF, backend="mosaic_gpu")


def test_a_fallback_on_a_gpu_is_told_once(monkeypatch):
    registry.warn_about_fallback.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    reason = "Something is missing."
    with pytest.warns(FallbackWarning, match=r"missing\. The xla backend computes it instead"):
        registry.warn_about_fallback(reason)
    registry.warn_about_fallback(reason)  # a second warning would be an error
    registry.warn_about_fallback.cache_clear()
