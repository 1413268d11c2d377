"""Attentions made at random; see random_cases.py.

A few in CI. On a GPU, as many as there is time for, also side by side:

    FLEXJAX_TEST_GPU=1 FLEXJAX_TEST_BACKENDS=mosaic_gpu FLEXJAX_RANDOM=1000:1500 \
        bash scripts/test -n 12 tests/behaviour/test_random.py
"""

import pytest

from tests.behaviour.harness import check
from tests.behaviour.random_cases import random_case, seeds


@pytest.mark.parametrize("seed", seeds(6))
def test_random_attention(seed, backend):
    """Outputs, statistics and gradients; those of captured arrays, whose terms may cancel, roughly."""
    check(random_case(seed, kernels=backend == "mosaic_gpu"), backend, captures=0.2)
