"""What the heuristics choose for the forward kernel, and options that they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import create_block_mask, masks
from flexjax.backends.mosaic_gpu import config
from flexjax.backends.mosaic_gpu.schedule import Schedule
from tests.mosaic_gpu.problems import problem_of

IDS = np.repeat(np.arange(4, dtype=np.int32), 128)


def document(b, h, q_idx, kv_idx):
    return jnp.asarray(IDS)[q_idx] == jnp.asarray(IDS)[kv_idx]


def choose(dim, block=128, mask=None, **options):
    query = jax.ShapeDtypeStruct((2, 4, 512, dim), jnp.bfloat16)
    mask = create_block_mask(mask or masks.causal(), None, None, 512, 512, block)
    return config.choose(problem_of(query, query, query, block_mask=mask, options=options)[0])


@pytest.mark.parametrize(
    ("dim", "block", "mask", "self_loading", "workers", "persistent", "counted"),
    [
        (64, 128, None, True, 4, True, False),
        (64, 64, None, True, 4, True, False),
        (64, 128, document, True, 4, True, False),
        (128, 128, None, False, 1, True, True),
        (128, 128, document, False, 1, True, True),
        (32, 64, document, True, 4, True, False),
        (128, 64, None, True, 2, True, False),
        (128, 64, document, True, 1, False, False),
        (256, 64, None, False, 1, True, True),
    ],
)
def test_kinds_of_kernels(dim, block, mask, self_loading, workers, persistent, counted):
    """Narrow heads, or blocks of 64 queries: consumers load by themselves, four to a CTA, or two."""
    chosen = choose(dim, block, mask)
    found = chosen.self_loading, chosen.workers, chosen.persistent, chosen.counted
    assert found == (self_loading, workers, persistent, counted)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"self_loading": False}, (2, False, 1, 4)),
        ({"kv_tile": 128}, (2, False, 1, 4)),
        ({"stages": 3}, (1, True, 1, 3)),
    ],
)
def test_what_options_bring_along(options, found):
    """What four consumers of a CTA have no room for, fewer compute."""
    chosen = choose(64, **options)
    assert (chosen.warpgroups, chosen.self_loading, chosen.workers, chosen.stages) == found


def test_few_tiles_go_to_different_multiprocessors():
    query = jax.ShapeDtypeStruct((1, 2, 512, 64), jnp.bfloat16)
    problem, _ = problem_of(query, query, query)
    assert Schedule(problem, config.choose(problem, cores=132)).ctas == 16
    assert Schedule(problem, config.choose(problem, cores=5)).ctas == 5


@pytest.mark.parametrize("options", [{}, {"persistent": False}, {"counted": False}])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length"), [(2, 16, 16, 4096), (3, 14, 2, 1000), (1, 8, 1, 9000)]
)
def test_every_tile_is_somewhere(options, batch, heads, kv_heads, length):
    """Sections of heads, whose keys and values are in the cache together, divide the tiles."""
    query = jax.ShapeDtypeStruct((batch, heads, length, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((batch, kv_heads, length, 128), jnp.bfloat16)
    mask = create_block_mask(masks.causal(), None, None, length, length)
    problem, _ = problem_of(query, key, key, block_mask=mask, options=options)
    schedule = Schedule(problem, config.choose(problem))
    position = schedule.position(jnp.arange(schedule.tiles, dtype=jnp.int32))
    found = set(zip(*(np.asarray(x).tolist() for x in position), strict=True))
    assert len(found) == schedule.tiles == batch * heads * schedule.q_tiles
    dealt = options == {"counted": False}
    assert schedule.section == (batch * heads if dealt or length == 1000 else 8)


def test_tiles_by_themselves():
    """Without a persistent grid a CTA has one tile, and other CTAs beside it."""
    chosen = choose(64, 64, persistent=False)
    assert (chosen.self_loading, chosen.workers, chosen.stages) == (True, 1, 4)


def test_more_buffers_than_fit():
    """The overlap of tiles is given up before what was asked for is refused."""
    chosen = choose(256)
    assert (chosen.stages, chosen.persistent) == (2, False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 5}, "at most 4 consumers with tiles of their own"),
        ({"workers": 4, "persistent": False}, "workers=4, self_loading=True and persistent=False"),
        ({"workers": 4, "stages": 4}, "327680 bytes of shared memory"),
        ({"self_loading": True, "warpgroups": 2}, "options ask for 2 warpgroups"),
        ({"counted": True}, "Ask for self_loading=False"),
    ],
)
def test_refused(options, words):
    with pytest.raises(NotImplementedError, match=words):
        choose(64, **({"block": 64} | options))
