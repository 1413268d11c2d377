"""The softmax that starts over, as the machine code of one warpgroup interpreted with NumPy."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
import pytest
from jaxlib.mlir import ir

from flexjax.backends.mosaic_gpu import placement, registers, trusting
from flexjax.backends.mosaic_gpu.lanes import F32, Lane
from tests.mosaic_gpu.mlir_numpy import run_program

ROW = plgpu.Layout.WGMMA.reduce(1).to_mgpu()
FACTOR, SLOPE, CORNER = 0.18, 1.4427, 100


def _started_over(
    scores, dtype, of_q, of_kv, references, totals, slope=SLOPE, corner=CORNER, above=0.0
):
    """(row sums, references, alphas) of rows that find their maxima; all have one reference and sum before.

    Without a bias if the slope is None.
    """

    def program(ctx, corner, tile):
        linear = None
        if slope is not None:
            bias = trusting.Bias(None, None, of_q, of_kv)
            linear = trusting._Linear.of(tile, bias, registers.f32(slope), corner.registers.item())
        given = [[registers.f32(value)] * 2 for value in (references, totals)]
        rows = registers.registers_by_row(tile)
        step = trusting._Step(rows, *given, FACTOR, np.dtype(dtype), linear)
        values = step.anew(above)
        assert values[0].type == ir.IntegerType.get_signless(32)
        sums = [trusting._whole(total) for total in values[-6:-4]]
        results = (sums, values[-4:-2], values[-2:])
        return [
            placement.pack(lambda o, v=v: Lane(v[o[0] // 8], F32), ROW, (64,), F32) for v in results
        ]

    return run_program(program, [corner], scores, [])


def _logsumexp(exponents):
    most = exponents.max(axis=1)
    return most + np.log2(np.exp2(exponents - most[:, None]).sum(axis=1))


@pytest.mark.parametrize(("of_q", "of_kv"), [(1, -1), (-1, 1), (0, 3), (2, 0)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kv_tile", [64, 128])
def test_starts_over(of_q, of_kv, dtype, kv_tile):
    """Rows 8 apart share the level of their references above their biases, if near and in bfloat16."""
    scores = 8 * np.random.default_rng(0).standard_normal((64, kv_tile))
    scores[40:48] += 2000.0
    scores = scores.astype(np.float32)
    q, kv = np.arange(64)[:, None], np.arange(kv_tile)[None, :]
    bias = SLOPE * (of_q * q + of_kv * kv + CORNER)
    exponents = FACTOR * scores.astype(np.float64) + bias
    sums, references, alphas = _started_over(scores, dtype, of_q, of_kv, -np.inf, 0.0)
    assert (alphas == 0.0).all()
    found = references + np.log2(sums)
    np.testing.assert_allclose(found, _logsumexp(exponents), atol=2e-4)
    # The thread's two rows are r and r + 8.
    level = (references - bias[:, 0]).reshape(4, 2, 8)
    maxima = (exponents.max(axis=1) - bias[:, 0]).reshape(4, 2, 8)
    near = np.abs(maxima[:, 0] - maxima[:, 1]) < 60
    assert set(near.ravel()) == {False, True}
    expected = maxima.copy()
    if dtype == "bfloat16":
        shared = np.broadcast_to(maxima.max(axis=1, keepdims=True), maxima.shape)
        expected = np.where(near[:, None], shared, maxima)
    np.testing.assert_allclose(level, expected, atol=2e-4)


@pytest.mark.parametrize(("above", "shares"), [(50.0, True), (180.0, False)])
def test_earlier_sums_do_not_vanish(above, shares):
    """A row whose keys so far count, and whose keys in this tile do not, beside one whose maximum rises."""
    scores = np.full((64, 64), -1e4, np.float32)
    scores[8:16] = above / FACTOR
    reference = SLOPE * CORNER  # at the level 0
    _, references, alphas = _started_over(scores, "bfloat16", 0, -1, reference, 1.0)
    np.testing.assert_allclose(references[:8] - reference, above if shares else 0.0, atol=2e-4)
    np.testing.assert_allclose(references[8:16] - reference, above, atol=2e-4)
    np.testing.assert_allclose(alphas[:8], 2.0**-above if shares else 1.0, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("slope", [1e30, -1e30, 1e12, -1e12])
def test_references_coarser_than_any_exponent(slope, dtype):
    """One key outweighs all others by far, and the rounding of the reference by more than float32 holds."""
    scores = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    sums, references, _ = _started_over(scores, dtype, -1, 1, -np.inf, 0.0, slope)
    assert ((sums >= 2.0**-7) & (sums <= 2.0**7)).all()
    q, last = np.arange(64), 63 if slope > 0 else 0
    np.testing.assert_allclose(references, slope * (last - q + CORNER), rtol=1e-6)


@pytest.mark.parametrize("slope", [1e30, 3.7e29, 1.1e12])
def test_references_that_are_not_raised_stay_to_the_bit(slope):
    scores = np.zeros((64, 64), np.float32)
    earlier = float(np.float32(slope * 1234.5))  # of keys far behind this tile
    sums, references, alphas = _started_over(scores, "bfloat16", -1, 1, earlier, 1.0, slope, -3001)
    assert (references == np.float32(earlier)).all()
    assert (alphas == 1.0).all()
    assert (sums == 0.0).all()


@pytest.mark.parametrize("before", [-np.inf, 3.0, 1e4])
def test_raised_references_come_to_lie_above(before):
    """Only those that were there and were too low."""
    scores = 8 * np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    scores[5] = -np.inf
    found = _started_over(scores, "bfloat16", 0, 0, before, 1.0, slope=None, above=64.0)
    sums, references, alphas = found
    tops = FACTOR * scores.astype(np.float64).max(axis=1)
    expected = np.where(tops <= before, before, tops if before == -np.inf else tops + 64.0)
    np.testing.assert_allclose(references, expected, rtol=1e-5)
    finite = np.isfinite(tops)
    np.testing.assert_allclose(alphas[finite], np.exp2(before - references[finite]), rtol=1e-4)
    if before < 1e4:
        total = references[finite] + np.log2(sums[finite])
        np.testing.assert_allclose(total, _logsumexp(FACTOR * scores[finite]), atol=1e-3)
