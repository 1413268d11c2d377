"""The suites `train` and `infer`, which measure whole models."""

import jax
import numpy as np
import pytest

import flexjax
from benchmarks import contest, records, run, train
from benchmarks.timing import Plan


def test_documents_fill_the_rows_and_have_the_mean_length():
    ids = train.document_ids(4, 40_000, 500)
    assert ids.shape == (4, 40_000)
    assert (np.diff(ids, axis=1) >= 0).all()
    documents = sum(len(np.unique(row)) for row in ids)
    assert ids.size / documents == pytest.approx(500, rel=0.15)


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
    if suite == "infer" and not hasattr(flexjax, "decode"):
        pytest.skip("there is no flexjax.decode yet")
    options = ["--quick", "--layers", "1", "--peers", "flexjax", "--out", str(tmp_path)]
    with jax.numpy_rank_promotion("allow"):
        assert run.main([suite, *options, *(["--only", "decode"] if suite == "infer" else [])]) == 0
    (row,) = records.read(list(tmp_path.iterdir()))
    assert (row["suite"], row["peer"], row["config"]["layers"]) == (suite, "flexjax", 1)
    assert 0 < row["error"] < 0.1
    assert row["tokens_s"] > 0
    assert row["peak_mb"] > row["config"]["parameters"] * 2 / 1e6
    assert row["mfu" if suite == "train" else "tbs"] > 0
