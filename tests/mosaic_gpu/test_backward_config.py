"""What the heuristics choose for the backward kernels, and options that they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import create_block_mask, masks, scores
from flexjax.backends.mosaic_gpu import backward_config
from flexjax.backends.mosaic_gpu.backward_schedule import ColumnSchedule
from tests.mosaic_gpu.problems import problem_of

IDS = np.repeat(np.arange(4, dtype=np.int32), 512)


def document(b, h, q_idx, kv_idx):
    return jnp.asarray(IDS)[q_idx] == jnp.asarray(IDS)[kv_idx]


def choose(dim, mask=None, heads=16, kv_heads=None, score=None, **options):
    query = jax.ShapeDtypeStruct((2, heads, 2048, dim), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((2, kv_heads or heads, 2048, dim), jnp.bfloat16)
    blocks = None if mask is None else create_block_mask(mask, None, None, 2048, 2048)
    problem = problem_of(query, key, key, score_mod=score, block_mask=blocks, options=options)[0]
    return problem, backward_config.choose(problem)


@pytest.mark.parametrize(
    ("dim", "mask", "kinds"),
    [
        (64, masks.causal(), {"persistent", "rounding"}),
        (64, None, {"persistent", "rounding"}),
        (64, document, {"persistent"}),
        (128, masks.causal(), {"rolling"}),
        (128, None, {"rolling"}),
        (256, masks.causal(), set()),
    ],
)
def test_kinds_of_kernels(dim, mask, kinds):
    """Narrow heads get the persistent grid, where dQ may be rounded too; full steps of others roll."""
    problem, config = choose(dim, mask)
    assert {k for k in ("persistent", "rounding", "rolling") if getattr(config, k)} == kinds
    columns = ColumnSchedule(problem, config).columns
    ctas = config.cores if "persistent" in kinds else columns
    assert ColumnSchedule(problem, config).ctas == ctas


def test_derivatives_take_the_registers_of_rounding():
    config = choose(64, masks.causal(), score=scores.soft_cap(20.0))[1]
    assert not config.persistent
    assert not config.rounding
    assert choose(64, score=lambda s, b, h, q, k: s + q - k)[1].rounding
    with pytest.raises(NotImplementedError, match="backward_rounding takes persistent CTAs"):
        choose(128, backward_rounding=True)


def test_steps_do_not_roll_where_a_warpgroup_has_no_share_of_dq():
    """Heads of 16 numbers have one share; that of the other warpgroup is empty."""
    array = lambda dim: jax.ShapeDtypeStruct((1, 1, 512, dim), jnp.bfloat16)
    config = backward_config.choose(problem_of(array(16), array(16), array(128))[0])
    assert config.order == "dq_first"
    assert not config.rolling


def test_steps_do_not_roll_with_one_stage():
    """The queries of the step before are handed back when those of the next one have been read."""
    assert not choose(128, masks.causal(), backward_stages=1)[1].rolling


def test_shares():
    """Few columns are shared out, by what divides the query heads that read them."""
    few, many = (choose(128, masks.causal(), heads=n, kv_heads=k)[1] for n, k in ((8, 1), (64, 32)))
    assert (few.shares, many.shares) == (8, 1)
    assert choose(128, heads=8, kv_heads=1, backward_shares=2)[1].shares == 2
    assert choose(128, heads=8, kv_heads=1, deterministic=True)[1].shares == 1
    for options in ({}, {"deterministic": True}):
        with pytest.raises(NotImplementedError, match="backward_shares divides"):
            choose(128, heads=8, kv_heads=1, backward_shares=3, **options)


def test_persistent_is_an_option():
    assert not choose(64, masks.causal(), backward_persistent=False)[1].persistent
    deferred = {"backward_deferred": False, "backward_persistent": True}
    assert choose(64, masks.causal(), **deferred)[1].persistent
    for dim, options in (
        (64, {"deterministic": True}),
        (64, {"backward_warpgroups": 1}),
        (128, {}),
    ):
        with pytest.raises(NotImplementedError, match="backward_persistent takes two warpgroups"):
            choose(dim, masks.causal(), backward_persistent=True, **options)


def _order(dim, mask, **sizes):
    """Batch row, head, share and tile of each column, in the order of the grid."""
    problem, config = choose(dim, mask, **sizes)
    schedule = ColumnSchedule(problem, config)
    columns = jax.vmap(schedule.column)(jnp.arange(schedule.columns))
    return schedule, list(zip(*(x.tolist() for x in columns[:4]), strict=True))


@pytest.mark.parametrize("sizes", [{"heads": 6}, {"heads": 8, "kv_heads": 2}])
def test_every_column_once(sizes):
    schedule, order = _order(128, document, **sizes)
    assert len(set(order)) == len(order) == 2 * sizes.get("kv_heads", 6) * schedule.shares * 16


def test_heads_alternate_longer_where_lengths_are_data():
    """How many columns pass before a head's second tile of keys."""
    distances = []
    for mask in (masks.causal(), document):
        _, order = _order(128, mask, heads=48)
        distances.append(next(i for i, column in enumerate(order) if column[3] == 1))
    assert distances[1] == 4 * distances[0]
