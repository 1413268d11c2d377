"""The benchmarks' own arithmetic: work, gate, turns, rows, targets, pictures."""

from __future__ import annotations

import dataclasses
import math
import threading
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    peers,
    plots,
    records,
    reference,
    side_by_side,
    table,
    targets,
)
from benchmarks.inputs import Inputs
from benchmarks.peers import fa3, flexjax_peer
from benchmarks.timing import Plan, interleaved
from benchmarks.variants import SHAPES, VARIANTS, Shape, document_ids, visited_blocks, work
from flexjax import create_block_mask, flex_attention
from flexjax.testing import oracle

NAMES = list(VARIANTS)
ODD = Shape("odd", 1, 2, 1, 200, 200, 16, tuple(VARIANTS), window=50)


# -- work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "variant", "density"),
    [
        ("D128", "noop", 1.0),
        ("D128", "causal", 0.5078125),
        ("D128", "sliding_window", 0.1318359375),
        ("D128", "document", 0.110595703125),
        ("D64", "causal", 0.515625),
        ("D64", "sliding_window", 0.24609375),
        ("D64", "document", 0.1103515625),
    ],
)
def test_density_is_that_of_the_published_baselines(shape, variant, density):
    assert work(VARIANTS[variant], SHAPES[shape]).density == density


def test_flops_are_two_products_over_the_visited_blocks():
    dense = 4 * 2 * 16 * 8192**2 * 128
    assert work(VARIANTS["noop"], SHAPES["D128"]).forward_flops == dense
    assert work(VARIANTS["causal"], SHAPES["D128"]).forward_flops == 0.5078125 * dense


def test_blocks_that_stick_out_count_by_what_is_inside():
    positions = 128 * 128 + 72 * 128 + 72 * 72
    assert work(VARIANTS["causal"], ODD).forward_flops == 4 * 1 * 2 * 16 * positions


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [ODD, SHAPES["D64"].shrunk()], ids=["odd", "small"])
def test_visible_ranges_say_what_the_mask_says(name, shape):
    variant = VARIANTS[name]
    q, kv = np.arange(shape.q_len)[:, None], np.arange(shape.kv_len)[None, :]
    mask_mod = variant.mods(np, variant.captures(shape), shape).mask
    allowed = q + kv >= 0 if mask_mod is None else mask_mod(0, 0, q, kv)
    first, stop = variant.visible(shape, q[:, 0])
    np.testing.assert_array_equal(allowed, (first[:, None] <= kv) & (kv < stop[:, None]))


@pytest.mark.parametrize("name", ["causal", "sliding_window", "prefix_lm", "document"])
def test_visited_blocks_are_those_of_the_block_mask(name):
    variant, shape = VARIANTS[name], ODD
    captures = {key: jnp.asarray(x) for key, x in variant.captures(shape).items()}
    mask_mod = variant.mods(jnp, captures, shape).mask
    mask = create_block_mask(mask_mod, None, None, shape.q_len, shape.kv_len, 32)
    np.testing.assert_array_equal(visited_blocks(variant, shape, 32), mask.to_dense()[0, 0])


def test_a_sweep_over_lengths_keeps_the_number_of_tokens():
    short = SHAPES["D128"].with_length(2048)
    assert (short.batch, short.q_len, short.kv_len) == (8, 2048, 2048)
    assert SHAPES["S32768"].with_length(65536).batch == 1


def test_packed_documents_cover_the_batch():
    shape = dataclasses.replace(SHAPES["D64"], batch=3, q_len=300, kv_len=300)
    starts, longest = fa3.document_starts(shape)
    packed = np.concatenate([document_ids(300) + 100 * row for row in range(3)])
    assert starts[0] == 0
    assert starts[-1] == 900
    np.testing.assert_array_equal(starts[1:-1], np.flatnonzero(np.diff(packed)) + 1)
    assert longest == np.bincount(document_ids(300)).max()


# -- gate -------------------------------------------------------------------------------------------


def _reference(name: str, shape: Shape) -> tuple[Any, list[reference.HeadReference]]:
    inputs = Inputs(shape, "bfloat16").sets[0]
    return inputs, reference.reference_heads(VARIANTS[name], shape, inputs)


@pytest.mark.parametrize("name", ["rel_table", "document"])
def test_reference_is_the_oracle_also_in_chunks(name, monkeypatch):
    shape, variant = dataclasses.replace(ODD, batch=2), VARIANTS[name]
    monkeypatch.setattr(reference, "_CHUNK_SCORES", 48 * shape.kv_len)
    inputs, references = _reference(name, shape)
    captures = {key: jnp.asarray(x) for key, x in variant.captures(shape).items()}
    score_mod, mask_mod = variant.mods(jnp, captures, shape)
    exact = np.asarray(oracle(*inputs, score_mod=score_mod, mask_mod=mask_mod).out)
    assert [(r.batch, r.head) for r in references] == [(0, 0), (1, 0), (1, 1)]
    for head in references:
        np.testing.assert_allclose(head.out, exact[head.batch, head.head], rtol=1e-5, atol=1e-6)
        assert reference.FLOOR < head.limit < 0.02


def test_gate_refuses_a_mask_that_is_off_by_one_and_nan():
    inputs, references = _reference("causal", ODD)
    right = flex_attention(*inputs, mask_mod=lambda b, h, q, kv: q >= kv)
    wrong = flex_attention(*inputs, mask_mod=lambda b, h, q, kv: q + 1 >= kv)

    def gate(out: Any) -> tuple[float, bool]:
        heads = [np.asarray(out[r.batch, r.head], np.float32) for r in references]
        return reference.gate(heads, references)

    assert gate(right)[1]
    assert not gate(wrong)[1]
    error, accepted = gate(right.at[0, 1, 7, 3].set(jnp.nan))
    assert math.isnan(error)
    assert not accepted


# -- turns ------------------------------------------------------------------------------------------


class _Clock:
    """A device that works through a queue: time passes when somebody waits."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.events: list[tuple[str, Any]] = []


class _Fake:
    """A contender whose calls take the given seconds, one after the other, the last for ever."""

    def __init__(self, name: str, clock: _Clock, seconds: list[float], sets: int = 3) -> None:
        self.name, self.clock, self.seconds, self.input_sets = name, clock, seconds, sets
        self.queued, self.calls = 0.0, 0

    def call(self, index: int) -> int:
        self.queued += self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1
        self.clock.events.append((self.name, index))
        return self.calls

    def wait(self, result: int) -> None:
        assert result == self.calls
        self.clock.seconds += self.queued
        self.queued = 0.0
        self.clock.events.append((self.name, "wait"))


def test_a_turn_is_warm_up_wait_queued_calls_wait():
    clock = _Clock()
    plan = Plan(rounds=2, calls=4, warmup=2)
    timings, failures = interleaved(
        {"a": _Fake("a", clock, [0.5, 0.001])}, plan, now=lambda: clock.seconds
    )
    assert not failures
    assert timings["a"].ms == pytest.approx(1.0)
    assert timings["a"].rounds == pytest.approx((1.0, 1.0))
    # Inputs rotate over the turns too: 2 + 4 calls leave the rotation over three sets where it was.
    turn = [0, 1, "wait", 2, 0, 1, 2, "wait"]
    assert [event for _, event in clock.events] == [0, "wait", 0, "wait", *turn, *turn]


def test_order_is_drawn_in_every_round_and_everyone_has_one_turn():
    clock = _Clock()
    fakes = {name: _Fake(name, clock, [0.001]) for name in "abcd"}
    interleaved(fakes, Plan(rounds=8, calls=2, warmup=1), now=lambda: clock.seconds)
    # Four events of each contender come before the rounds, and a turn waits twice.
    order = [name for name, event in clock.events[16:] if event == "wait"][::2]
    rounds = ["".join(order[i : i + 4]) for i in range(0, len(order), 4)]
    assert len(rounds) == 8
    assert all(sorted(r) == list("abcd") for r in rounds)
    assert len(set(rounds)) > 3


def test_median_and_spread_over_the_rounds():
    clock = _Clock()
    # Two first calls, then in each of three rounds one to warm up and one that is timed.
    seconds = [0.0, 0.001, 0.0, 0.002, 0.0, 0.006, 0.0, 0.004]
    plan = Plan(rounds=3, calls=1, warmup=1)
    timings, _ = interleaved({"a": _Fake("a", clock, seconds)}, plan, now=lambda: clock.seconds)
    assert timings["a"].ms == pytest.approx(4.0)
    assert timings["a"].spread == pytest.approx(1.0)


def test_device_clock_is_read_while_calls_are_queued():
    clock = _Clock()
    fake = _Fake("a", clock, [0.001])
    readings = iter([1500.0, 1400.0, 1600.0])

    def read() -> float:
        assert fake.queued > 0
        return next(readings)

    plan = Plan(rounds=3, calls=2, warmup=2)
    timings, _ = interleaved({"a": fake}, plan, now=lambda: clock.seconds, clock=read)
    assert timings["a"].sm_clock == 1500.0


def test_a_slow_contender_has_fewer_calls():
    clock = _Clock()
    plan = Plan(rounds=1, calls=20, warmup=4, turn_seconds=2.0)
    slow, fast = _Fake("slow", clock, [0.5]), _Fake("fast", clock, [0.001])
    timings, _ = interleaved({"slow": slow, "fast": fast}, plan, now=lambda: clock.seconds)
    assert slow.calls == 2 + 4 + 4
    assert fast.calls == 2 + 4 + 20
    assert timings["slow"].ms == pytest.approx(500.0)


def test_runs_side_by_side_prepare_together_and_time_alone(tmp_path):
    file, done = tmp_path / "lock", []

    def times():
        with side_by_side.timing(file):
            done.append("timed")

    with side_by_side.preparing(file), side_by_side.preparing(file):
        thread = threading.Thread(target=times)
        thread.start()
        thread.join(0.2)
        done.append("prepared")
    thread.join(10)
    assert done == ["prepared", "timed"]


def test_who_fails_is_left_out_and_the_others_go_on():
    clock = _Clock()

    class Broken(_Fake):
        def call(self, index: int) -> int:
            if self.calls == self.input_sets:
                raise RuntimeError("out of memory")
            return super().call(index)

    contenders = {
        "at once": Broken("at once", clock, [0.001], sets=0),
        "later": Broken("later", clock, [0.001], sets=4),
        "never": _Fake("never", clock, [0.001]),
    }
    timings, failures = interleaved(contenders, Plan(rounds=3), now=lambda: clock.seconds)
    assert list(timings) == ["never"]
    assert {name: str(error) for name, error in failures.items()} == dict.fromkeys(
        ("at once", "later"), "out of memory"
    )


# -- rows -------------------------------------------------------------------------------------------


def _row(peer: str, ms: float | None, shape: str = "D128", variant: str = "causal", **more: Any):
    sizes, window = SHAPES[shape].sizes, SHAPES[shape].window
    values = {
        "suite": "forward",
        "run": "20261122T100000",
        "peer": peer,
        "variant": variant,
        **sizes,
        "window": window if variant == "sliding_window" else None,
        "dtype": "bfloat16",
        "ms": ms,
        "tflops": None if ms is None else 500.0 / ms,
        "error": 2e-3,
        "device": "NVIDIA H100 80GB HBM3",
    }
    return records.make_row(**(values | more))


def test_rows_have_known_keys_in_order_and_no_empty_ones():
    row = records.make_row(ms=1.0, suite="forward", tflops=None, commit="abc")
    assert list(row.items()) == [("suite", "forward"), ("ms", 1.0), ("commit", "abc")]
    with pytest.raises(ValueError, match=r"Rows have no key milliseconds\."):
        records.make_row(suite="forward", milliseconds=1.0)


def test_rows_are_appended_and_read_back(tmp_path):
    path = records.results_file(tmp_path / "new", "forward", "20261122T100000", "x")
    records.append(path, [_row("fa3", 1.0)])
    records.append(path, [_row("tokamax", 2.0)])
    assert path.name == "forward-20261122.jsonl"
    assert [row["peer"] for row in records.read([path])] == ["fa3", "tokamax"]


@pytest.mark.parametrize(
    ("device", "folder"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("cpu (x86_64, cpu)", "cpu"),
    ],
)
def test_device_folder(device, folder):
    assert records.device_folder(device) == folder


def test_provenance_takes_the_commit_that_it_is_told(monkeypatch):
    monkeypatch.setenv(records.COMMIT_VARIABLE, "abc1234")
    origin = records.provenance()
    assert origin["commit"] == "abc1234"
    assert origin["device"].startswith("cpu (")
    assert origin["jax"]


@pytest.mark.parametrize(
    ("program", "backend"),
    [
        ('%a = f32[2] custom-call(%b), custom_call_target="mosaic_gpu_v2"', "mosaic_gpu"),
        ('%a = f32[2] custom-call(%b), custom_call_target="__cublas$gemm"', "xla"),
        ('%mosaic_gpu = f32[2] add(%b, %c), metadata={op_name="mosaic_gpu"}', "xla"),
    ],
)
def test_the_backend_is_read_from_the_compiled_program(program, backend):
    assert flexjax_peer.backend_in(program) == backend


# -- targets and tables -----------------------------------------------------------------------------


def test_targets_name_shapes_variants_and_peers_that_exist():
    for shape, peer, variant in targets.FORWARD:
        assert variant in SHAPES[shape].variants
        assert peers.make_peer(peer).name == peer
    assert len(targets.FORWARD) == 2 * (9 + 3 + 1) + 3


def test_a_target_holds_for_its_shape_and_dtype_only():
    assert targets.target(_row("torch_flex", 1.0)) == targets.Target(1.5, 1.8)
    assert targets.target(_row("torch_flex", 1.0, L=4096, S=4096)) is None
    assert targets.target(_row("torch_flex", 1.0, dtype="float16")) is None
    window = _row("torch_flex", 1.0, "S131072", "sliding_window")
    assert window["window"] == 4096
    assert targets.target(window) == targets.Target(1.35)
    assert targets.target(window | {"window": 1024}) is None


def test_summary_names_what_was_missed_and_what_failed():
    rows = [
        _row("flexjax/mosaic_gpu", 1.0),
        _row("torch_flex", 1.4),
        _row("fa3", 0.95),
        _row("tokamax", None, failure="wrong result"),
    ]
    text = table.summary(rows)
    assert "1.40 (>= 1.5) !" in text
    assert "0.95 (>= 0.92)" in text
    assert "D128 causal: torch_flex 1.400 of 1.5" in text
    assert "D128 causal: tokamax: wrong result" in text


# -- pictures ---------------------------------------------------------------------------------------


def test_ratios_are_taken_inside_the_last_run_of_a_case():
    old = {"run": "20261121T100000"}
    rows = [
        _row("flexjax/mosaic_gpu", 9.0, **old),
        _row("fa3", 9.0, **old),
        _row("flexjax/mosaic_gpu", 8.0, variant="noop", **old),
        _row("flexjax/mosaic_gpu", 1.0),
        _row("torch_flex", 2.0),
        _row("fa3", None, failure="crashed"),
    ]
    assert sorted(row["ms"] for row in plots.latest(rows)) == [1.0, 2.0, 8.0]


def test_other_peers_of_the_same_commit_are_kept_with_the_run_that_they_are_of():
    first, second = ({"commit": "new", "run": f"20261123T10000{n}"} for n in range(2))
    rows = [
        _row("flexjax/mosaic_gpu", 9.0, commit="old"),
        _row("fa3", 9.0, commit="old"),
        _row("flexjax/mosaic_gpu", 4.0, **first),
        _row("torch_flex", 8.0, **first),
        _row("flexjax/mosaic_gpu", 2.0, **second),
        _row("tokamax", 6.0, **second),
    ]
    assert plots.latest(rows) == rows[2:]
    found = plots._values(rows[2:], plots._ratio)["causal"]
    assert {peer: ratio for peer, (ratio, _) in found.items()} == {
        "torch_flex": 2.0,
        "tokamax": 3.0,
    }


def test_a_run_with_kernel_options_takes_no_default_rows_place():
    run = {"run": "20261123T100000"}
    default = [_row("flexjax/mosaic_gpu", 1.0, config={}), _row("torch_flex", 2.0, config={})]
    varlen = _row("fa3", 3.0, variant="document", config={"varlen": True})
    later = [
        _row("flexjax/mosaic_gpu", 1.5, config={"deterministic": True}, **run),
        _row("torch_flex", 2.5, config={}, **run),
    ]
    rows = [*default, varlen, *later]
    assert plots.latest(rows) == table.by_default(rows) == [*default, varlen]
    model = _row("flexjax", 1.0, suite="infer", config={"layers": 2}, **run)
    assert table.by_default([model]) == [model]


def test_ratio_bars_and_targets_are_drawn():
    rows = [
        _row("flexjax/mosaic_gpu", 1.0),
        _row("torch_flex", 1.7),
        _row("fa3", 0.9),
        _row("jax_cudnn", 1.1),
    ]
    (axes,) = plots.ratio_bars(rows).axes
    assert axes.get_title() == "D128"
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([1.7, 0.9, 1.1])
    lines = [c.get_segments()[0][0][1] for c in axes.collections]
    assert lines == pytest.approx([1.5, 1.8, 0.92, 1.0])  # must and goal, of torch_flex and of fa3


def test_tflops_bars_have_a_panel_for_each_shape():
    rows = [_row("fa3", 1.0, shape, variant) for shape in ("D128", "D64") for variant in NAMES]
    figure = plots.tflops_bars([*rows, _row("fa3", 1.0, L=1024, S=1024)])
    assert [axes.get_title() for axes in figure.axes] == ["D128", "D64"]
    assert all(len(axes.patches) == len(NAMES) for axes in figure.axes)


def test_lengths_are_drawn_where_there_are_several():
    rows = [_row("fa3", 1.0, variant=variant) for variant in ("noop", "causal")]
    assert plots.length_lines(rows) is None
    figure = plots.length_lines([*rows, _row("fa3", 1.0, L=4096, S=4096)])
    (axes,) = figure.axes
    assert axes.get_title() == "causal, D 128"
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [4096, 8192])
