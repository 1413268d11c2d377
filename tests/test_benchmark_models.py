"""The suites `train` and `infer`, which measure whole models."""

import jax
import numpy as np
import pytest

from benchmarks import contest, plots, records, run, suite_plots, train
from benchmarks.timing import Plan


def test_documents_fill_the_rows_and_have_the_mean_length():
    ids = train.document_ids(4, 40_000, 500)
    assert ids.shape == (4, 40_000)
    assert (np.diff(ids, axis=1) >= 0).all()
    documents = sum(len(np.unique(row)) for row in ids)
    assert ids.size / documents == 500
    squares = sum((np.bincount(row).astype(float) ** 2).sum() for row in ids)
    assert squares / ids.size == pytest.approx(
        2 * 500, rel=0.1
    )  # as of an exponential distribution


def test_a_contest_times_what_is_right_and_says_why_the_rest_is_not():
    recovered = []

    def entry(result):
        def call():
            if isinstance(result, Exception):
                raise result
            return result

        return lambda: contest.Entry(call, 1.0, 2.0, lambda: recovered.append(result))

    def broken():
        raise NotImplementedError("cannot be compiled")

    full = MemoryError("the device is full")
    rows = contest.contest(
        {"variant": "packed"},
        {
            "right": entry(1.0),
            "wrong": entry(1.1),
            "nan": entry(np.nan),
            "full": entry(full),
            "broken": broken,
        },
        lambda result: contest.judged(contest.relative_error(result, 1.0), 0.05),
        lambda ms: {"tokens_s": 1e3 / ms},
        Plan(rounds=1, calls=1),
    )
    found = {row["peer"]: row for row in rows}
    assert found["right"]["tokens_s"] == pytest.approx(1e3 / found["right"]["ms"], rel=0.01)
    assert (
        found["wrong"]["failure"]
        == "wrong result: relative error 1.00e-01, at most 5.00e-02 is accepted"
    )
    assert "wrong result" in found["nan"]["failure"]
    assert found["full"]["failure"] == "MemoryError: the device is full"
    assert found["broken"]["failure"] == "NotImplementedError: cannot be compiled"
    assert recovered == [full]
    assert all("ms" not in row for peer, row in found.items() if peer != "right")


@pytest.mark.parametrize("suite", ["train", "infer"])
def test_suites_of_models(suite, tmp_path):
    options = ["--quick", "--layers", "1", "--peers", "flexjax", "--out", str(tmp_path)]
    with jax.numpy_rank_promotion("allow"):
        assert run.main([suite, *options, *(["--only", "decode"] if suite == "infer" else [])]) == 0
    row, *copies = records.read(list(tmp_path.iterdir()))
    assert [r["peer"] for r in copies] == (["copy"] if suite == "infer" else [])
    assert all(
        row["of_copy"] == pytest.approx(row["tbs"] / r["tbs"], rel=1e-3, abs=1e-4) for r in copies
    )
    assert (row["suite"], row["peer"], row["config"]["layers"]) == (suite, "flexjax", 1)
    assert 0 < row["error"] < 0.1
    assert row["tokens_s"] > 0
    assert row["peak_mb"] > row["config"]["parameters"] * 2 / 1e6
    assert row["mfu" if suite == "train" else "tbs"] > 0


def test_pictures_of_decoding_and_of_models(tmp_path):
    sizes = {"Hq": 32, "Hkv": 8, "L": 1, "D": 128}
    common = {"suite": "infer", "variant": "decode", "device": "NVIDIA H100 80GB HBM3"}
    rows = [
        {
            **common,
            **sizes,
            "run": name,
            "peer": peer,
            "B": 8,
            "S": size,
            "ms": 1.0,
            "tbs": tbs,
            "tokens_s": 8e3,
        }
        for name, peer, size, tbs in (
            ("1", "flexjax", 1024, 9.0),
            ("2", "flexjax", 1024, 2.5),
            ("2", "jax_xla", 1024, 1.5),
            ("2", "flexjax", 32768, 2.8),
        )
    ]
    rows.append(
        {**common, **sizes, "run": "2", "peer": "jax_cudnn", "B": 8, "S": 1024, "failure": "no"}
    )
    copy = {"suite": "infer", "peer": "copy", "variant": "copy", "run": "2", "ms": 1.0, "tbs": 3.0}
    rows.append(copy | {"device": common["device"]})
    (axes,) = suite_plots.bandwidth_bars(rows).axes
    assert [line.get_ydata()[0] for line in axes.lines] == [3.0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([2.5, 1.5, 2.8])
    uneven = [{**rows[1], "run": "3", "lengths": [1024, least]} for least in (16, 512)]
    (axes,) = suite_plots.bandwidth_bars(uneven).axes
    assert [tick.get_text().splitlines()[-1] for tick in axes.get_xticklabels()] == [
        "to 16",
        "to 512",
    ]
    files = plots.draw(rows, tmp_path)
    assert {file.name for file in files} == {"infer-bandwidth.png", "infer-tokens.png"}
    assert suite_plots.mask_lines([]) is None
    assert suite_plots.token_bars([]) is None
