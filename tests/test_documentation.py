"""What the documentation is written from."""

import importlib.util
import json
from pathlib import Path

from benchmarks.report import page

ROOT = Path(__file__).resolve().parent.parent


def test_the_support_matrix_has_the_cases_and_transformations_that_are_tested():
    spec = importlib.util.spec_from_file_location(
        "support_matrix", ROOT / "scripts" / "support_matrix.py"
    )
    matrix = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matrix)
    text = matrix.PAGE.read_text()
    for title, groups in matrix.groups().items():
        assert f"| **{title}** |" in text, matrix.STALE
        for name, cases in groups.items():
            assert f"| {name} | {len(cases)} |" in text, matrix.STALE
    assert {
        file.stem for file in (ROOT / "tests/transforms").glob("test_*.py")
    } == matrix.LOWERED.keys()
    assert all(f"| {title} |" in text for title, _ in matrix.LOWERED.values()), matrix.STALE


def test_the_performance_page_says_what_rows_say(tmp_path):
    sizes = {"B": 2, "Hq": 16, "Hkv": 16, "L": 8192, "S": 8192, "D": 128}
    common = {"suite": "forward", "variant": "causal", "dtype": "bfloat16", "device": "NVIDIA H100"}
    common |= {"jax": "0.11.2", "commit": "abc", **sizes}
    rows = [
        {**common, "run": "1", "peer": "flexjax/mosaic_gpu", "ms": 9.0},
        {**common, "run": "2", "peer": "flexjax/mosaic_gpu", "ms": 2.0, "tflops": 500.4},
        {**common, "run": "2", "peer": "fa3", "ms": 3.0},
        {**common, "run": "2", "peer": "tokamax", "failure": "crashed"},
        {**common, "run": "3", "peer": "flexjax/mosaic_gpu", "ms": 7.0, "config": {"stages": 2}},
        {**common, "run": "3", "peer": "fa3", "ms": 3.0},
    ]
    folder = tmp_path / "h100"
    folder.mkdir()
    (folder / "forward-20261126.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "forward-ratios.png").touch()
    text, pictures = page(tmp_path)
    assert "| case | variant | flexjax, ms | TFLOP/s | fa3 | tokamax |" in text
    assert "| D128 | causal | 2.000 | 500 | 1.50x | failed |" in text
    assert "9.000" not in text
    assert "7.000" not in text
    assert pictures == {"results/h100/forward-ratios.png": folder / "forward-ratios.png"}
    assert "(results/h100/forward-ratios.png)" in text
    assert "Backward" not in text
