"""The rows under results/ as a page of Markdown: a table and the pictures of every suite, device by device.

Needs the rows alone: neither JAX, nor matplotlib, nor a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.table import by_case, by_default, case_key, is_ours, last_runs, ours
from benchmarks.targets import shape_name

Rows = list[dict[str, Any]]

TITLES = {
    "forward": "Forward pass",
    "backward": "Backward pass",
    "decode": "Decoding: attention alone",
    "mask": "Building block masks",
    "train": "A training step",
    "infer": "Inference",
    "cpu": "Against the dense mask on a CPU",
}

INTRODUCTION = """# Performance

Every number here is a row of `benchmarks/results`, measured in one process with the peers beside it, on the
same inputs, after its result was held against a reference. A ratio is the peer's time over flexjax's in the same
run: above 1, flexjax is faster. `benchmarks/README.md` tells how it is measured, `benchmarks/NOTES.md` what was
learned. This page is written from the rows whenever the documentation is built.
"""


def page(results: Path = records.RESULTS) -> tuple[str, dict[str, Path]]:
    """(the page, its pictures by the path under which the page shows them)."""
    parts, pictures = [INTRODUCTION], {}
    # GPUs before CPUs.
    folders = sorted(
        (f for f in results.iterdir() if f.is_dir()), key=lambda f: (f.name == "cpu", f.name)
    )
    for folder in folders:
        rows = {suite: _rows(folder, suite) for suite in TITLES}
        devices = sorted({row["device"] for some in rows.values() for row in some})
        parts.append(f"## {', '.join(devices)}\n")
        for suite, title in TITLES.items():
            if not rows[suite]:
                continue
            parts.append(f"### {title}\n")
            parts += _tables(suite, rows[suite])
            for picture in sorted(folder.glob(f"{suite}-*.png")):
                name = f"results/{folder.name}/{picture.name}"
                pictures[name] = picture
                parts.append(f"![{title}: {picture.stem}]({name})\n")
    return "\n".join(parts), pictures


def _rows(folder: Path, suite: str) -> Rows:
    """The rows of a suite's files that are about a size; where they do not say S, it is L."""
    rows = by_default(records.read(sorted(folder.glob(f"{suite}-*.jsonl"))))
    return [{"S": row["L"], **row} for row in rows if "L" in row]


def _tables(suite: str, rows: Rows) -> list[str]:
    """Tables of the last run of every case."""
    cases = _last(suite, rows)
    # A file may hold several kinds of rows: whole steps and single attentions, times and memory.
    kinds: dict[Any, list[Rows]] = {}
    for case in cases:
        whole = any("tokens_s" in row for row in case)
        kinds.setdefault((case[0]["suite"], whole), []).append(case)
    return [_table(kind) for kind in kinds.values()]


def _last(suite: str, rows: Rows) -> list[Rows]:
    """The rows of each case's last runs."""
    cases: dict[Any, list[Rows]] = {}
    for case in by_case(rows):
        # Masks have a case for each block size; attentions give that of a peer, which differs.
        block = tuple(case[0].get("block_size", ())) if suite == "mask" else ()
        cases.setdefault((case_key(case[0]), block), []).append(case)
    return [case for runs in cases.values() for case in last_runs(runs)]


def _name(row: dict[str, Any]) -> str:
    if "D" not in row:
        return f"S{row['S']}"
    page = f", pages of {row['page']}" if "page" in row else ""
    page += f" {row['placement']}" if "placement" in row else ""
    return shape_name(row) + page + _lengths(row)


def _lengths(row: dict[str, Any]) -> str:
    lengths = row.get("lengths")
    return f", lengths {max(lengths)} to {min(lengths)}" if lengths else ""


def _table(cases: list[Rows]) -> str:
    """A line a case: flexjax's figures, and every peer's time over flexjax's."""
    rows = [row for case in cases for row in case]
    figures: list[tuple[str, str, Callable[[float], str]]] = [
        (head, key, show)
        for head, key, show in (
            ("TFLOP/s", "tflops", "{:.0f}".format),
            ("TB/s", "tbs", "{:.2f}".format),
            ("of a copy", "of_copy", "{:.0%}".format),
            ("tokens/s", "tokens_s", "{:,.0f}".format),
            ("MFU", "mfu", "{:.1%}".format),
            ("peak MB", "peak_mb", "{:,.0f}".format),
            ("compiled in s", "compile_s", "{:.1f}".format),
            ("error", "error", "{:.1e}".format),
        )
        if any(key in row for row in rows)
    ]
    peers = list(dict.fromkeys(row["peer"] for row in rows if not is_ours(row)))
    lines = [["case", "variant", "flexjax, ms", *(head for head, *_ in figures), *peers]]
    for case in cases:
        mine = ours(case) or next((r for r in case if is_ours(r) and "failure" not in r), None)
        found = {row["peer"]: row for row in case}
        line = [_name(case[0]), case[0]["variant"]]
        line.append("failed" if mine is None else f"{mine['ms']:.3f}" if "ms" in mine else "")
        line += [
            "" if mine is None or key not in mine else show(mine[key]) for _, key, show in figures
        ]
        lines.append([*line, *(_ratio(found.get(peer), mine) for peer in peers)])
    text = [f"| {' | '.join(line)} |" for line in lines]
    text.insert(1, "|---" * len(lines[0]) + "|")
    runs = sorted({(row["run"], row["commit"]) for row in rows})
    versions = sorted(
        {f"JAX {row['jax']}" for row in rows}
        | {f"PyTorch {r['torch']}" for r in rows if "torch" in r}
    )
    source = ", ".join(f"{run} (commit {commit})" for run, commit in runs)
    return "\n".join([*text, "", f"Runs {source}; {', '.join(versions)}.", ""])


def _ratio(row: dict[str, Any] | None, mine: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "failure" in row:
        return "failed"
    if mine is not None and "ms" not in row and "peak_mb" in row:
        return f"{row['peak_mb'] / mine['peak_mb']:.0f}x the memory"
    return f"{row['ms']:.3f} ms" if mine is None else f"{row['ms'] / mine['ms']:.2f}x"
