"""Integers divided by constants, in the machine code of a thread."""

import functools

import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu

from flexjax.backends.mosaic_gpu import lanes
from flexjax.backends.mosaic_gpu.lanes import I32, Lane
from tests.mosaic_gpu.mlir_numpy import run_program

LARGEST = 2**31 - 1
DIVISORS = [1, 2, 3, 5, 6, 7, 64, 95, 100, 641, 65537, 2**30, 2**30 + 1, LARGEST - 1, LARGEST, -3, -8]  # fmt: skip


def _edges(divisor):
    """Numbers around multiples of the divisor, the smallest and largest among them."""
    size = abs(divisor)
    random = np.random.default_rng(size).integers(0, LARGEST // size, 4, endpoint=True)
    multiples = size * np.array([0, 1, *random, LARGEST // size])
    near = (multiples[:, None] + np.arange(-1, 2)).ravel()
    return sorted({int(x) for x in [*near, LARGEST] if 0 <= x <= LARGEST})


def _divided(divisor, natural, ctx, *args):
    del ctx
    values = [Lane(x.registers.item(), I32) for x in args]
    results = [lanes.quotient(x, divisor, natural) for x in values]
    results += [lanes.remainder(x, divisor, natural) for x in values]
    return [mgpu.FragmentedArray.splat(x.ir, (), is_signed=True) for x in results]


@pytest.mark.parametrize("natural", [True, False])
@pytest.mark.parametrize("divisor", DIVISORS)
def test_quotients_and_remainders(divisor, natural):
    """Truncated as the hardware's; `natural` numbers are not negative."""
    numbers = _edges(divisor)
    if not natural:
        numbers += [-x for x in numbers] + [-(2**31)]
    found = run_program(functools.partial(_divided, divisor, natural), numbers, None, [])
    quotients, remainders = np.reshape([int(np.ravel(x)[0]) for x in found], (2, -1))
    exact = [int(abs(x) // abs(divisor) * (1 if x * divisor >= 0 else -1)) for x in numbers]
    np.testing.assert_array_equal(quotients, exact)
    np.testing.assert_array_equal(
        remainders, [x - q * divisor for x, q in zip(numbers, exact, strict=True)]
    )
