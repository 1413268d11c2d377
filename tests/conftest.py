"""Sets JAX up for the tests: four CPU devices, or a GPU under FLEXJAX_TEST_GPU=1."""

import os

import hypothesis
import pytest

ON_GPU = os.environ.get("FLEXJAX_TEST_GPU") == "1"

# XLA reads these when JAX's backend starts, so they come before the import of jax.
# Flags that the environment sets already win.
if ON_GPU:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    _flags = ("--xla_gpu_autotune_level=0",)  # tuning what runs once takes longer than running it
else:
    os.environ["JAX_PLATFORMS"] = "cpu"
    _flags = (
        "--xla_force_host_platform_device_count=4",  # for the sharding tests
        # The tests compile thousands of small programs and run each once: LLVM's last
        # optimization level costs three times the compile time and gains nothing.
        "--xla_backend_optimization_level=1",
    )
os.environ["XLA_FLAGS"] = " ".join([*_flags, os.environ.get("XLA_FLAGS", "")])

import jax  # noqa: E402

# Silent broadcasting between ranks hides mistakes in index arithmetic.
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "flexjax",
    derandomize=True,
    deadline=None,  # an example's first run compiles
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("flexjax")


def pytest_configure(config: pytest.Config) -> None:
    """Checks that the device asked for is there, and keeps compiled programs for the next run.

    They lie in pytest's cache, so that `--cache-clear` drops them.
    """
    if ON_GPU and jax.default_backend() != "gpu":
        raise pytest.UsageError(
            "FLEXJAX_TEST_GPU=1 asks for a GPU, but JAX found none: its default backend is "
            f"{jax.default_backend()!r}. Install a CUDA build (uv sync --extra cuda13), or unset "
            "the variable to run on the CPU."
        )
    workers = config.getoption("numprocesses", None)
    if workers:
        # This process starts the workers of pytest-xdist, which inherit its environment: without
        # a share for each, all of them would start a thread for every core.
        share = str(max(1, (os.cpu_count() or 1) // workers))
        for name in ("PJRT_NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ.setdefault(name, share)
    if config.pluginmanager.hasplugin("cacheprovider"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what was not asked for: interpreted kernels, and what needs a GPU."""
    _deselect_interpreted(config, items)
    if ON_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU: set FLEXJAX_TEST_GPU=1")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def _deselect_interpreted(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes the tests marked `interpreter` out unless `-m` or the name of their file asks for them.

    What is also a smoke test stays: those run everywhere.
    """
    if "interpreter" in config.option.markexpr:
        return
    folder = config.invocation_params.dir
    named = {(folder / argument.split("::")[0]).resolve() for argument in config.args}
    left_out = [
        item
        for item in items
        if item.get_closest_marker("interpreter")
        and not item.get_closest_marker("smoke")
        and item.path not in named
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
