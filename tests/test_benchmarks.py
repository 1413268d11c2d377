"""The benchmarks' own arithmetic: work, gate, turns, rows, targets, pictures."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    decode_steps,
    mask,
    mask_memory,
    neighborhood,
    peers,
    plots,
    records,
    reference,
    run,
    settings,
    table,
    targets,
    tune,
)
from benchmarks.decode_steps import DecodeStep
from benchmarks.inputs import Inputs
from benchmarks.peers import fa3, flexjax_peer
from benchmarks.settings import QUICK_PLAN
from benchmarks.timing import Plan, interleaved
from benchmarks.variants import SHAPES, VARIANTS, Shape, document_ids, visited_blocks, work
from flexjax import create_block_mask, flex_attention
from flexjax.backends import mosaic_gpu
from flexjax.testing import oracle, oracle_grads

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
    assert [row["ms"] for row in plots.latest(rows)] == [8.0, 1.0, 2.0]


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


# -- the command ------------------------------------------------------------------------------------


def _parsed(*arguments: str) -> settings.Settings:
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser)
    return settings.from_arguments(parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "cases"),
    [
        ([], {"D128": 9, "D64": 9, "D256": 1, "S32768": 1, "S131072": 1}),
        (["--variants", "causal"], {"D128": 1, "D64": 1, "D256": 1}),
        (["--variants", "noop,causal", "--shapes", "D256"], {"D256": 2}),
        (["--shapes", "D64"], {"D64": 9}),
    ],
    ids=["all", "filtered", "product", "one shape"],
)
def test_shapes_and_variants_of_a_command_line(arguments, cases):
    assert {shape.name: len(shape.variants) for shape in _parsed(*arguments).shapes} == cases


def test_quick_is_small_and_writes_nothing_unless_told(tmp_path):
    quick = _parsed("--quick")
    assert max(shape.q_len for shape in quick.shapes) <= 256
    assert not quick.write
    assert _parsed("--quick", "--out", str(tmp_path)).write
    assert _parsed().write
    assert _parsed("--block-size", "64x128").options.block_size == (64, 128)


def test_peers_say_why_they_cannot_run_here():
    able, reasons = peers.partition(["flexjax", "flexjax/tpu", "fa3", "torch_flex"])
    assert [peer.name for peer in able] == ["flexjax"]
    assert "backend='tpu' does not exist" in reasons.pop("flexjax/tpu")
    assert all("needs a CUDA GPU" in reason for reason in reasons.values())


def test_an_unknown_name_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        _parsed("--peers", "flexjax,fa4")
    assert "There is no peer 'fa4'. Choose from flexjax," in capsys.readouterr().err
    with pytest.raises(SystemExit):
        _parsed("--variants", "casual")
    assert "'casual' is not one of noop, causal," in capsys.readouterr().err


class _Wrong:
    """A peer that forgets the mask."""

    name = "wrong"

    def missing(self) -> None:
        return None

    def supports(self, shape: Shape, variant: Any) -> bool:
        return True

    def prepare(self, case: peers.Case) -> peers.Contender:
        unmasked = dataclasses.replace(case, variant=VARIANTS["noop"])
        return dataclasses.replace(flexjax_peer.Flexjax().prepare(unmasked), peer=self.name)

    def release(self) -> None:
        pass


@pytest.mark.parametrize("suite", ["forward", "backward"])
def test_the_command_measures_writes_and_draws(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, value in run.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(peers._MAKERS, "wrong", _Wrong)
    command = [suite, "--quick", "--shapes", "D64", "--variants", "causal", "--calls", "1"]
    command += ["--peers", "flexjax,jax_xla,wrong,fa3", "--out", str(tmp_path)]
    assert run.main(command) == 0
    (path,) = tmp_path.glob(f"{suite}-*.jsonl")
    rows = {row["peer"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert list(rows) == ["flexjax/xla", "jax_xla", "wrong"]
    for peer in ("flexjax/xla", "jax_xla"):
        assert rows[peer]["ms"] > 0
        assert rows[peer]["tflops"] > 0
        assert 0 < rows[peer]["error"] < 0.01
    assert "ms" not in rows["wrong"]
    assert rows["wrong"]["error"] > 0.1
    assert rows["wrong"]["failure"].startswith("wrong result: relative error")
    ours = rows["flexjax/xla"]
    assert (ours["block_size"], ours["density"], ours["layout"]) == ([128, 128], 0.75, "BHLD")
    wanted = {
        "suite",
        "run",
        "variant",
        "dtype",
        "compile_s",
        "device",
        "jax",
        "commit",
        "B",
        "Hkv",
    }
    assert wanted < ours.keys()
    assert "without fa3: needs a CUDA GPU" in capsys.readouterr().out

    assert run.main([*command, "--peers", "flexjax/tpu"]) == 1  # asked for, and not there

    assert run.main(["plot", str(path), "--out", str(tmp_path / "pictures")]) == 0
    pictures = {file.name for file in Path(tmp_path, "pictures").iterdir()}
    assert pictures == {f"{suite}-tflops.png", f"{suite}-ratios.png"}


def test_another_version_runs_in_a_process_of_its_own():
    root = Path(run.ROOT)
    peer = peers.make_peer(f"flexjax@{root}")
    assert peer.missing() is None
    shape = SHAPES["D64"].shrunk()
    case = peers.Case(shape, VARIANTS["noop"], Inputs(shape, "bfloat16", 3))
    theirs, ours = peer.prepare(case), flexjax_peer.Flexjax().prepare(case)
    assert (theirs.layout, theirs.input_sets) == (ours.layout, ours.input_sets)
    pairs = [(0, 1), (1, 0)]
    for found, expected in zip(*(c.heads(c.call(1), pairs) for c in (theirs, ours)), strict=True):
        np.testing.assert_array_equal(found, expected)
    unknown = dataclasses.replace(case.variant, name="no such variant")
    with pytest.raises(RuntimeError, match="KeyError: 'no such variant'"):
        peer.prepare(dataclasses.replace(case, variant=unknown))
    assert "git cannot bring" in peers.make_peer("flexjax@no/such/revision").missing()


@pytest.mark.parametrize("variant", ["soft_cap", "rel_table", "document"])
def test_reference_gradients_are_those_of_jax(variant):
    shape = SHAPES["D64"].shrunk()
    inputs = Inputs(shape, "float32")
    (cotangent, *_), variant = inputs.cotangents("BHLD"), VARIANTS[variant]
    captures = {name: jnp.asarray(x) for name, x in variant.captures(shape).items()}
    score_mod, mask_mod = variant.mods(jnp, captures, shape)
    exact = oracle_grads(
        *inputs.sets[0],
        cotangent,
        score_mod=score_mod,
        mask_mod=mask_mod,
    )
    references = reference.reference_gradients(variant, shape, inputs.sets[0], cotangent)
    assert len(references) == 3 * len(reference.checked_heads(shape))
    for number, expected in enumerate(references):
        head = exact[number % 3][expected.batch, expected.head]
        assert reference.relative_error(np.asarray(head), expected.out) < 1e-6
        assert expected.limit < 1.1e-3


def test_tuning_combines_options():
    names = [peer.name for peer in tune.candidates(["warpgroups", "persistent"])]
    assert names[0] == "flexjax/mosaic_gpu"
    assert "flexjax/mosaic_gpu warpgroups=3 persistent=False" in names
    assert len(names) == len(set(names)) == 1 + 3 * 2
    assert set(tune.OPTIONS) <= set(mosaic_gpu.OPTIONS)


# -- block masks ------------------------------------------------------------------------------------


def test_mask_suite(tmp_path, capsys):
    options = ["--quick", "--lengths", "200", "--block-sizes", "16,32", "--out", str(tmp_path)]
    assert run.main(["mask", *options]) == 0
    (file,) = tmp_path.iterdir()
    rows = records.read([file])
    assert len(rows) == 2 * (3 + 2)  # the host builds no mask that captures ids
    assert {row["suite"] for row in rows} == {"mask"}
    assert {row["peer"] for row in rows} == {"flexjax", "flexjax/host"}
    for row in rows:
        assert row["ms"] > 0
        assert "failure" not in row
        assert row["peer"] == "flexjax/host" or row["peak_mb"] >= row["result_mb"] > 0
    assert "flexjax/host" in capsys.readouterr().out


def test_mask_suite_gives_no_time_to_a_wrong_mask(monkeypatch, tmp_path):
    monkeypatch.setattr(mask, "visited", lambda case: np.zeros(case.blocks, int))
    options = ["--quick", "--lengths", "64", "--variants", "causal", "--out", str(tmp_path)]
    assert run.main(["mask", *options]) == 1
    (file,) = tmp_path.iterdir()
    for row in records.read([file]):
        assert "ms" not in row
        assert "wrong result" in row["failure"]


def test_neighborhood_suite(monkeypatch):
    """Layouts compute the same gradients, also where queries and keys stand in different orders."""
    shape = neighborhood.Problem((8, 16), (3, 5), 1, 2, 16)
    inputs = Inputs(shape.shape, "bfloat16")
    layouts = {
        "rows": neighborhood.Layout((64, 64)),
        "tiles": neighborhood.Layout((64, 32), (8, 8), (4, 8), (1, 2)),
    }
    monkeypatch.setattr(neighborhood, "LAYOUTS", layouts)
    rows = neighborhood.measure(shape, inputs, list(layouts), QUICK_PLAN, backward=True)
    assert all(row["error"] < 0.02 and row["ms"] > 0 for row in rows)
    assert [row["config"]["keys_a_query"] for row in rows] == [128.0, 192.0]
    assert re.search(r"tiles +[\d.]+ ms +[\d.]+x  blocks 64x32", neighborhood.summary(rows))


def test_mask_memory_counts_the_lists(monkeypatch):
    monkeypatch.setattr(mask_memory, "NAMES", ("causal",))
    rows = list(mask_memory.measure([1024]))
    found = {(r["variant"], r["block_size"][0], r["peer"]): r["result_mb"] for r in rows}
    # Two lists of 4 bytes a block and two counts a row, once by rows and once by columns.
    assert found["causal", 128, "padded"] == round(4 * (4 * 8 * 8 + 4 * 8) / 1e6, 4)
    # One partial block a row, and up to 7 full ones, rounded up to 8.
    assert found["causal", 128, "compact"] == round(2 * 4 * 8 * (2 + 1 + 8) / 1e6, 4)
    assert found["causal", 128, "inference"] == round(4 * 8 * (2 + 1 + 8) / 1e6, 4)
    assert mask_memory.table(rows).count("\n") == 1 + 3


# -- decode -----------------------------------------------------------------------------------------


def test_decode_steps_count_the_bytes_that_some_query_sees():
    step = DecodeStep("causal", 32, 8, 4096, (4096, 100))
    assert step.bytes == 4 * 8 * 128 * 4196
    window = dataclasses.replace(step, variant="sliding_window", q_len=4)
    assert window.bytes == 4 * 8 * 128 * (1027 + 100)


def test_decode_suite(tmp_path, monkeypatch):
    """Rows of a group and of its copy; a step that is computed wrongly gets no time."""
    right = decode_steps.error

    def error(step, result):
        return right(step, result) if step.variant == "noop" else right(step, 1.1 * result)

    monkeypatch.setattr(decode_steps, "error", error)
    arguments = ["decode", "--quick", "--groups", "window", "--out", str(tmp_path)]
    assert run.main(arguments) == 1
    copy, noop, window = records.read(list(tmp_path.iterdir()))
    assert (copy["peer"], noop["variant"], window["variant"]) == ("copy", "noop", "sliding_window")
    assert noop["error"] < 8e-3
    assert noop["of_copy"] > 0
    assert "wrong result" in window["failure"]
    assert "ms" not in window
