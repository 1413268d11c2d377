"""The benchmarks' commands, and the suites of attention and of block masks from end to end."""

from __future__ import annotations

import argparse
import dataclasses
import json
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
    records,
    reference,
    run,
    settings,
    tune,
)
from benchmarks.decode_steps import DecodeStep
from benchmarks.inputs import Inputs
from benchmarks.peers import flexjax_peer
from benchmarks.settings import QUICK_PLAN
from benchmarks.variants import SHAPES, VARIANTS, Shape
from flexjax.backends import mosaic_gpu
from flexjax.testing import oracle_grads

# -- the command ------------------------------------------------------------------------------------


def _parsed(*arguments: str) -> settings.Settings:
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser)
    return settings.from_arguments(parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "cases"),
    [
        ([], {"D128": 10, "D64": 10, "D256": 1, "S32768": 1, "S131072": 1}),
        (["--variants", "causal"], {"D128": 1, "D64": 1, "D256": 1}),
        (["--variants", "noop,causal", "--shapes", "D256"], {"D256": 2}),
        (["--shapes", "D64"], {"D64": 10}),
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
