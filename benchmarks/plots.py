"""Pictures of committed rows: TFLOP/s by variant and length, and ratios to the peers with the targets.

Needs the rows and matplotlib only, neither JAX nor a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.table import case_key, is_ours, ours
from benchmarks.targets import shape_name, target
from benchmarks.variants import SHAPES

Rows = list[dict[str, Any]]

# The order and the colours of the bars; flexjax stands out, peers that are one's own GPU library are muted.
_COLOURS = {
    "flexjax/mosaic_gpu": "#c1272d",
    "flexjax/triton": "#e8743b",
    "flexjax/xla": "#f2b48c",
    "torch_flex": "#1f5a99",
    "torch_flex_autotuned": "#7fb2e0",
    "fa3": "#2b8a3e",
    "tokamax": "#7b4fa3",
    "jax_cudnn": "#5f6b76",
    "torch_cudnn": "#9aa5ae",
    "torch_fa2": "#c6ccd1",
    "jax_xla": "#d9c27a",
}
_OTHER = "#000000"


SUITES = ("forward", "backward")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="*", type=Path, help="rows; benchmarks/results/*/{forward,backward}-*.jsonl"
    )
    parser.add_argument("--out", type=Path, help="folder for the pictures; that of the rows")


def run(arguments: argparse.Namespace) -> int:
    """Draws what the files hold; 1 if there is nothing to draw, else 0."""
    import matplotlib as mpl

    mpl.use("Agg")
    found = (records.RESULTS.glob(f"*/{suite}-*.jsonl") for suite in SUITES)
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
    pictures: dict[str, Callable[[Rows], Any]] = {
        "tflops": tflops_bars,
        "ratios": ratio_bars,
        "lengths": length_lines,
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for suite in SUITES:
        chosen = latest([row for row in rows if row["suite"] == suite])
        for name, picture in pictures.items():
            figure = picture(chosen)
            if figure is not None:
                files.append(folder / f"{suite}-{name}.png")
                figure.savefig(files[-1], dpi=110)
    return files


def latest(rows: Rows) -> Rows:
    """The timed rows of each case's last run, for ratios are taken inside a run only."""
    timed = [row for row in rows if "ms" in row]
    last: dict[Any, str] = {}
    for row in timed:
        key = case_key(row)
        last[key] = max(last.get(key, ""), row["run"])
    return [row for row in timed if row["run"] == last[case_key(row)]]


def tflops_bars(rows: Rows) -> Any:
    """TFLOP/s of every peer, variant by variant, one panel a shape; None without rows."""
    panels = [(shape, _values(shape_rows, _rate)) for shape, shape_rows in _by_shape(rows).items()]
    return _panels(rows, panels, "TFLOP/s", f"{_pass(rows)}, TFLOP/s (more is better)")


def ratio_bars(rows: Rows) -> Any:
    """Every peer's time over flexjax's, with a bar for what must be reached; None without ratios."""
    panels = []
    for shape, shape_rows in _by_shape(rows).items():
        values = _values(shape_rows, _ratio)
        if values:
            panels.append((shape, values))
    title = f"{_pass(rows)}: peer's time / flexjax's (more is better; black: must, dashed: goal)"
    figure = _panels(rows, panels, "ratio", title)
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
    figure = _figure(4.2 * columns, 3.0 * lines)
    for place, ((variant, dim, *_), panel) in enumerate(sorted(series.items()), 1):
        axes = figure.add_subplot(lines, columns, place)
        for peer in _ordered(panel):
            lengths, rates = zip(*sorted(panel[peer].items()), strict=True)
            axes.plot(lengths, rates, "o-", color=_colour(peer), label=peer, markersize=3)
        axes.set_xscale("log", base=2)
        ticks = sorted({length for points in panel.values() for length in points})
        axes.set_xticks(ticks, [str(length) for length in ticks], fontsize=7)
        axes.set(title=f"{variant}, D {dim}", xlabel="length", ylabel="TFLOP/s", ylim=(0, None))
        axes.grid(alpha=0.3)
    _legend(figure, rows)
    return figure


# -- panels of bars ---------------------------------------------------------------------------------

Values = dict[str, dict[str, tuple[float, Any]]]  # variant -> peer -> (height, target)


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
        mine = ours(case)
        found = {row["peer"]: value(row, mine) for row in case}
        found = {peer: height for peer, height in found.items() if height is not None}
        if found:
            values[variant] = found
    return values


def _panels(rows: Rows, panels: list[tuple[str, Values]], label: str, title: str) -> Any:
    """A figure with one axes a shape: wide shapes on lines of their own, the others side by side."""
    if not panels:
        return None
    wide = [panel for panel in panels if len(panel[1]) > 3]
    narrow = [panel for panel in panels if len(panel[1]) <= 3]
    lines = [[panel] for panel in wide] + [narrow[i : i + 4] for i in range(0, len(narrow), 4)]
    figure = _figure(11.0, 3.1 * len(lines) + 0.6)
    grid = figure.add_gridspec(len(lines), 1)
    for line, panels_of_line in enumerate(lines):
        parts = grid[line].subgridspec(1, len(panels_of_line))
        for place, (shape, values) in enumerate(panels_of_line):
            _bars(figure.add_subplot(parts[place]), shape, values, label)
    _legend(figure, [row for row in rows if _drawn(row, panels)])
    devices = ", ".join(sorted({row["device"] for row in rows}))
    figure.suptitle(f"{title}; {devices}", fontsize=10)
    return figure


def _drawn(row: dict[str, Any], panels: list[tuple[str, Values]]) -> bool:
    return any(row["peer"] in found for _, values in panels for found in values.values())


def _bars(axes: Any, shape: str, values: Values, label: str) -> None:
    most = max(map(len, values.values()))
    width = min(0.84 / most, 0.2)
    for place, found in enumerate(values.values()):
        for index, peer in enumerate(_ordered(found)):
            height, bar = found[peer]
            x = place + (index - (len(found) - 1) / 2) * width
            axes.bar(x, height, 0.94 * width, color=_colour(peer))
            # At the foot of the bar, where no line of a target crosses it.
            axes.annotate(
                f"{height:.0f}" if height >= 10 else f"{height:.2f}",
                (x, 0),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color="white",
                fontsize=7,
                rotation=90 if most > 3 else 0,
            )
            if bar is not None:
                _mark(axes, x, width, bar)
    axes.set_xticks(range(len(values)), list(values), fontsize=8)
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_title(shape, fontsize=9)
    axes.set_ylabel(label, fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _mark(axes: Any, x: float, width: float, bar: Any) -> None:
    """What must be reached and what is aimed at, as lines across the bar."""
    half = 0.55 * width
    axes.hlines(bar.must, x - half, x + half, color="black", linewidth=1.6)
    if bar.goal is not None:
        axes.hlines(bar.goal, x - half, x + half, color="black", linewidth=1.0, linestyle="--")


# -- figures ----------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _legend(figure: Any, rows: Rows) -> None:
    from matplotlib.patches import Patch

    peers = _ordered({row["peer"] for row in rows})
    patches = [Patch(color=_colour(peer), label=peer) for peer in peers]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=8)


def _ordered(peers: Any) -> list[str]:
    known = list(_COLOURS)
    return sorted(peers, key=lambda peer: (known.index(peer) if peer in known else 99, peer))


def _colour(peer: str) -> str:
    return _COLOURS.get(peer, _OTHER)
