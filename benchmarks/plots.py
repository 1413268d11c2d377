"""Pictures of committed rows: TFLOP/s by variant and length, and ratios to the peers with the targets.

Needs the rows and matplotlib only, neither JAX nor a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.panels import Rows, Values, colour, figure_of, legend, ordered, panels_of_bars
from benchmarks.suite_plots import bandwidth_bars, mask_lines, token_bars
from benchmarks.table import ATTENTION, by_case, by_default, case_key, is_ours, last_runs, ours
from benchmarks.targets import shape_name, target
from benchmarks.variants import SHAPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", type=Path, help="rows; those in benchmarks/results")
    parser.add_argument("--out", type=Path, help="folder for the pictures; that of the rows")


def run(arguments: argparse.Namespace) -> int:
    """Draws what the files hold; 1 if there is nothing to draw, else 0."""
    import matplotlib as mpl

    mpl.use("Agg")
    found = (records.RESULTS.glob(f"*/{suite}-*.jsonl") for suite in PICTURES)
    files = arguments.files or sorted(file for files in found for file in files)
    by_device: dict[str, Rows] = {}
    for row in records.read(files):
        by_device.setdefault(row["device"], []).append(row)
    written = []
    for device, rows in by_device.items():
        folder = arguments.out or records.RESULTS / records.device_folder(device)
        written += draw(rows, folder)
    print("\n".join(map(str, written)) or "There are no rows to draw.")
    return 0 if written else 1


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Writes the pictures of one device's rows, of each suite apart; returns their files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for suite, pictures in PICTURES.items():
        chosen = [row for row in rows if row["suite"] == suite]
        for name, picture in pictures.items():
            figure = picture(latest(chosen) if suite in ATTENTION else chosen)
            if figure is not None:
                files.append(folder / f"{suite}-{name}.png")
                figure.savefig(files[-1], dpi=110)
    return files


def latest(rows: Rows) -> Rows:
    """The timed rows of each case's last runs by default."""
    cases: dict[Any, list[Rows]] = {}
    for case in by_case(by_default(rows)):
        cases.setdefault(case_key(case[0]), []).append(case)
    last = (case for runs in cases.values() for case in last_runs(runs))
    return [row for case in last for row in case if "ms" in row]


def tflops_bars(rows: Rows) -> Any:
    """TFLOP/s of every peer, variant by variant, one panel a shape; None without rows."""
    panels = [(shape, _values(shape_rows, _rate)) for shape, shape_rows in _by_shape(rows).items()]
    return panels_of_bars(rows, panels, "TFLOP/s", f"{_pass(rows)}, TFLOP/s (more is better)")


def ratio_bars(rows: Rows) -> Any:
    """Every peer's time over flexjax's, with a bar for what must be reached; None without ratios."""
    panels = []
    for shape, shape_rows in _by_shape(rows).items():
        values = _values(shape_rows, _ratio)
        if values:
            panels.append((shape, values))
    title = f"{_pass(rows)}: peer's time / flexjax's (more is better; black: must, dashed: goal)"
    figure = panels_of_bars(rows, panels, "ratio", title)
    for axes in figure.axes if figure is not None else ():
        axes.axhline(1.0, color="0.4", linewidth=0.8, zorder=0)
    return figure


def _pass(rows: Rows) -> str:
    return f"{rows[0]['suite'].capitalize()} pass" if rows else ""


def length_lines(rows: Rows) -> Any:
    """TFLOP/s against the sequence length, where a variant was measured at several; None if none was."""
    # (variant, what else must be equal) -> peer -> length -> TFLOP/s
    series: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for row in rows:
        if row["L"] == row["S"] and "tflops" in row:
            rest = (row["D"], row["Hq"], row["Hkv"], row.get("window", 0), row["dtype"])
            panel = series.setdefault((row["variant"], *rest), {})
            panel.setdefault(row["peer"], {})[row["L"]] = row["tflops"]
    series = {
        key: panel for key, panel in series.items() if max(map(len, panel.values()), default=0) > 1
    }
    if not series:
        return None
    columns = min(3, len(series))
    lines = -(-len(series) // columns)
    figure = figure_of(4.2 * columns, 3.0 * lines)
    for place, ((variant, dim, *_), panel) in enumerate(sorted(series.items()), 1):
        axes = figure.add_subplot(lines, columns, place)
        for peer in ordered(panel):
            lengths, rates = zip(*sorted(panel[peer].items()), strict=True)
            axes.plot(lengths, rates, "o-", color=colour(peer), label=peer, markersize=3)
        axes.set_xscale("log", base=2)
        ticks = sorted({length for points in panel.values() for length in points})
        axes.set_xticks(ticks, [str(length) for length in ticks], fontsize=7)
        axes.set(title=f"{variant}, D {dim}", xlabel="length", ylabel="TFLOP/s", ylim=(0, None))
        axes.grid(alpha=0.3)
    legend(figure, rows)
    return figure


# -- what the bars show ------------------------------------------------------------------------------


def _rate(row: dict[str, Any], mine: dict[str, Any] | None) -> tuple[float, Any] | None:
    return (row["tflops"], None) if "tflops" in row else None


def _ratio(row: dict[str, Any], mine: dict[str, Any] | None) -> tuple[float, Any] | None:
    if mine is None or is_ours(row):
        return None
    return row["ms"] / mine["ms"], target(row)


def _by_shape(rows: Rows) -> dict[str, Rows]:
    """The rows of each shape that has a name; of all shapes if none has. Other lengths are drawn as lines."""
    shapes: dict[str, Rows] = {}
    for row in rows:
        shapes.setdefault(shape_name(row), []).append(row)
    named = {name: shape_rows for name, shape_rows in shapes.items() if name in SHAPES}
    return named or shapes


def _values(rows: Rows, value: Callable[..., Any]) -> Values:
    cases: dict[str, Rows] = {}
    for row in rows:
        cases.setdefault(row["variant"], []).append(row)
    values: Values = {}
    for variant, case in cases.items():
        # Ratios are taken inside a run only.
        runs = {run: [row for row in case if row["run"] == run] for run in {r["run"] for r in case}}
        mine = {run: ours(found) for run, found in runs.items()}
        case = sorted(case, key=lambda row: row["run"])
        found = {row["peer"]: value(row, mine[row["run"]]) for row in case}
        found = {peer: height for peer, height in found.items() if height is not None}
        if found:
            values[variant] = found
    return values


_ATTENTION = {"tflops": tflops_bars, "ratios": ratio_bars, "lengths": length_lines}
# What is drawn of each suite, and under which name. A suite without rows has no pictures.
PICTURES: dict[str, dict[str, Callable[[Rows], Any]]] = {
    "forward": _ATTENTION,
    "backward": _ATTENTION,
    "mask": {"times": mask_lines},
    "decode": {"bandwidth": bandwidth_bars},
    "train": {"tokens": token_bars},
    "infer": {"bandwidth": bandwidth_bars, "tokens": token_bars},
}
