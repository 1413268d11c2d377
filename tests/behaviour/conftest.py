"""The backends that the suite runs against."""

import os

import pytest

BACKENDS = ("xla", "reference")
SELECTED = os.environ.get("FLEXJAX_TEST_BACKENDS", ",".join(BACKENDS)).split(",")


@pytest.fixture(params=SELECTED)
def backend(request: pytest.FixtureRequest) -> str:
    """The backend under test; FLEXJAX_TEST_BACKENDS=xla,mosaic_gpu selects others, the latter on a GPU."""
    if request.param == "mosaic_gpu" and "case" not in request.fixturenames:
        pytest.skip("written for float32, which the kernels refuse; cases are adapted to bfloat16")
    return request.param
