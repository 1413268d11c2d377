"""The decoding kernel's numerics on the CPU, in Pallas' Mosaic GPU interpreter.

The `interpret` option leaves out what the interpreter lacks: products with operands in registers, and stores of
some rows of a tile. Everything else is the code that runs on the GPU. Three CTAs share the steps of all sequences,
so that tiles are cut, and CTAs compute parts of several.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import KVCache, decode, masks, scores
from flexjax.backends.mosaic_gpu import decode_config, decode_sm90
from flexjax.backends.mosaic_gpu.convexity import in_one_piece
from flexjax.backends.mosaic_gpu.decode_plan import ALL, LISTS, RANGE, Plan
from flexjax.block_creation import create_block_mask
from flexjax.mods.trace import index_ranges, trace_mask_mod
from tests.mosaic_gpu.decoding import DecodeCase, cases, check
from tests.mosaic_gpu.problems import problem_of

causal = masks.causal()


def by_head(b, h, q_idx, kv_idx):
    """Live keys in two pieces."""
    return (q_idx >= kv_idx) & ((kv_idx < 4) | (q_idx - kv_idx < 20 * (h + 1)))


def listed(b, h, q_idx, kv_idx):
    return (kv_idx < 60 + h) | (kv_idx >= 192)


def listed_blocks():
    return create_block_mask(listed, None, 2, 2, 256, (128, 64))


@pytest.mark.interpreter
@cases(
    DecodeCase("ragged_paged_64_alibi", (130, 0, 3), 192, score=scores.alibi(4), heads=4, kv_heads=2, q_len=4,
               dim=16, page=64, options={"kv_tile": 64, "stages": 1}),
    DecodeCase("two_pieces_by_head_paged_16", (190, 70), 192, mask=by_head, score=scores.soft_cap(5.0), page=16,
               options={"kv_tile": 64, "stages": 2}),
    DecodeCase("window_blhd_many_rows", (190,), mask=masks.sliding_window(60), heads=5, q_len=17, layout="BLHD",
               dim=16, v_dim=32),
    DecodeCase("listed_blocks_by_head", (230,), blocks=listed_blocks, listed=listed, q_len=2, dim=16),
)  # fmt: skip
def test_decode(case):
    check(case, "mosaic_gpu", interpret=True)


@pytest.mark.parametrize(
    ("mask", "one_piece"),
    [
        (causal, True),
        (masks.sliding_window(100), True),
        (masks.sliding_window(100, 20), True),
        (masks.chunked(64), True),
        (lambda b, h, q, k: abs(q - k) < 10 * h, True),
        (by_head, False),
        (masks.prefix_lm(10), False),
        (masks.dilated_window(4, 2), False),
        (lambda b, h, q, k: k % 2 == 0, False),
    ],
)
def test_live_keys_in_one_piece(mask, one_piece):
    """Masks that leave an interval of keys get by with its two ends."""
    graph, _ = trace_mask_mod(mask, index_ranges(1, 2, 1000, 1000))
    assert in_one_piece(graph) == one_piece


@pytest.mark.parametrize(
    ("mask", "q_len", "kind"),
    [
        (None, 1, ALL),
        (causal, 1, ALL),
        (causal, 16, ALL),
        (masks.sliding_window(100), 1, RANGE),
        (lambda b, h, q, k: k < 100, 1, RANGE),
        (lambda b, h, q, k: (q >= k) & (k > jnp.asarray(np.array([5, 900, 7]))[b]), 1, RANGE),
        (by_head, 1, LISTS),
    ],
)
def test_how_live_tiles_are_found(monkeypatch, mask, q_len, kind):
    """A mask that leaves all tiles alive, like a causal one, needs no kernel before the decoding kernel."""
    plans = []
    monkeypatch.setattr(decode_sm90, "Plan", lambda *args: plans.append(Plan(*args)) or plans[-1])
    query, key = (jax.ShapeDtypeStruct((3, 4, n, 64), "bfloat16") for n in (q_len, 2000))
    cache = KVCache(key, key, jax.ShapeDtypeStruct((3,), "int32"))
    jax.eval_shape(lambda q, c: decode(q, c, None, mask, backend="mosaic_gpu"), query, cache)
    assert {plan.kind for plan in plans} == {kind}


@pytest.mark.parametrize(
    ("dim", "kv_tile", "stages", "ctas"),
    [(32, 128, 2, 264), (64, 128, 1, 264), (96, 64, 2, 264), (128, 64, 1, 264), (256, 64, 3, 132)],
)
def test_as_little_is_on_its_way_as_keeps_memory_busy(dim, kv_tile, stages, ctas):
    """At least 32 KB of each of two CTAs, or what a multiprocessor has room for."""
    query, key = (jax.ShapeDtypeStruct((1, 8, n, dim), "bfloat16") for n in (1, 4096))
    config = decode_config.choose(problem_of(query, key, key)[0])
    assert (config.kv_tile, config.stages, config.ctas) == (kv_tile, stages, ctas)


@pytest.mark.parametrize(
    ("batch", "ctas", "tiles", "each", "parts"),
    [
        (32, 264, (64,) * 32, 64, 1),  # whole tiles: 8 of the CTAs have none, which costs a 64th
        (32, 132, (32,) * 32, 64, 1),  # two whole tiles
        (32, 264, (64,) * 31 + (63,), 63, 2),
        (8, 264, (512,) * 8, 128, 4),  # quarters of tiles
        (8, 132, (256,) * 7 + (255,), 125, 4),
        (1, 132, (1000,), 63, 16),
        (1, 132, (17,), 2, 9),  # of the 16 CTAs of a tile 7 have none
        (10, 132, (100,) * 10, 61, 3),  # a tile each would leave 52 CTAs idle
        (2, 264, (1, 0), 1, 1),
        (2, 264, (0, 0), 1, 0),
    ],
)
def test_steps_are_dealt_out(batch, ctas, tiles, each, parts):
    """In equal parts, or by tiles if that is nearly as even; and every CTA's segments have their numbers."""
    query = jax.ShapeDtypeStruct((batch, 32, 1, 128), "bfloat16")
    key = jax.ShapeDtypeStruct((batch, 8, max(*tiles, 1) * 128, 128), "bfloat16")
    problem, _ = problem_of(query, key, key, options={"ctas": ctas})
    plan = Plan(problem, decode_config.choose(problem))
    steps = np.repeat(tiles, 8)
    total, of_first = sum(steps), 8 * tiles[0]
    deal = plan.deal(total, of_first)
    assert deal.each == each
    begin, end = (np.asarray(x) for x in plan.share(np.arange(ctas), total, of_first, deal))
    cta = np.repeat(np.arange(ctas), end - begin)
    assert (np.concatenate([[0], end]) == np.append(begin, total)).all()
    ends = np.cumsum(steps)
    tile = np.searchsorted(ends, np.arange(total), side="right")
    first, number = plan.segments(np.arange(len(steps)), ends - steps, steps, deal)
    assert max(number) == parts
    segments = {(int(t), int(c + t)) for t, c in zip(tile, cta, strict=True)}
    expected = {(t, int(first[t]) + i) for t in range(len(steps)) for i in range(int(number[t]))}
    assert segments == expected
    assert len({number for _, number in segments}) == len(segments)
    assert max((number for _, number in segments), default=0) < ctas + len(steps)
