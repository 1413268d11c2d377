"""Tiles wholly beyond the last query or key: what mods read for them must lie within the captured arrays."""

import jax
import jax.numpy as jnp
import pytest

from flexjax import create_block_mask, masks
from flexjax.backends.mosaic_gpu import backward_config, config, dq_sm90
from flexjax.backends.mosaic_gpu.backward_kernel_sm90 import Kernel
from flexjax.backends.mosaic_gpu.backward_schedule import ColumnSchedule
from flexjax.backends.mosaic_gpu.schedule import Schedule
from flexjax.backends.mosaic_gpu.tile_gradients import Place
from tests.mosaic_gpu.problems import problem_of

ENDS = pytest.mark.parametrize(
    ("length", "dim", "masked"),
    [
        (2048, 64, False),  # three warpgroups of 64 queries, of which the last tile fills two
        (1088, 128, False),  # half a tile of 128 is left
        (1088, 128, True),
        (1060, 256, True),
        (1060, 64, True),
    ],
)


def _problem(length, dim, masked):
    array = jax.ShapeDtypeStruct((1, 1, length, dim), jnp.bfloat16)
    mask = create_block_mask(masks.causal(), None, None, length, length) if masked else None
    return problem_of(array, array, array, block_mask=mask)[0]


def _check(starts, moved, length, size):
    """Starts inside stay what they are; all others begin within the length."""
    for start in starts:
        inside = int(moved(start))
        assert inside == start if start < length else 0 <= inside < length
        assert inside % size == 0
    assert max(starts) + size >= length, "all of the length is covered"


@ENDS
def test_forward(length, dim, masked):
    problem = _problem(length, dim, masked)
    schedule = Schedule(problem, config.choose(problem))
    queries = range(0, schedule.q_tiles * schedule.config.q_tile, 64)
    _check(queries, schedule.on_queries, length, 64)
    kv_tile = schedule.config.kv_tile
    _check(range(0, schedule.listed_tiles * kv_tile, kv_tile), schedule.inside, length, kv_tile)


@ENDS
def test_backward(length, dim, masked):
    problem = _problem(length, dim, masked)
    choices = backward_config.choose(problem)
    kernels = [Kernel(ColumnSchedule(problem, choices))]
    if choices.separate_dq:
        kernels.append(dq_sm90.Kernel(Schedule(problem, choices.dq)))
    for kernel in kernels:
        _check_tile(kernel.tile, length)


def _check_tile(tile, length):
    queries = range(0, tile.padded_queries, tile.q_size)
    _check(queries, lambda q: tile._inputs(None, Place(0, 0, q, 0)).q_start, length, tile.q_size)
    keys = range(0, tile.padded_keys, tile.kv_size)
    _check(keys, lambda k: tile._inputs(None, Place(0, 0, 0, k)).kv_start, length, tile.kv_size)
