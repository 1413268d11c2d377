"""Panels of bars and their parts: the order and the colours of peers, figures, legends."""

from __future__ import annotations

from typing import Any

Rows = list[dict[str, Any]]
Values = dict[str, dict[str, tuple[float, Any]]]  # group -> peer -> (height, target)

# The order and the colours of the bars; flexjax stands out, peers that are one's own GPU library are muted.
_COLOURS = {
    "flexjax": "#c1272d",
    "flexjax/host": "#f2a0a3",
    "flexjax/mosaic_gpu": "#c1272d",
    "flexjax/xla": "#f2b48c",
    "torch_flex": "#1f5a99",
    "torch_flex_autotuned": "#7fb2e0",
    "fa3": "#2b8a3e",
    "tokamax": "#7b4fa3",
    "jax_cudnn": "#5f6b76",
    "torch_cudnn": "#9aa5ae",
    "torch_sdpa": "#9aa5ae",
    "torch_fa2": "#c6ccd1",
    "jax_xla": "#d9c27a",
}
_OTHER = "#000000"


def panels_of_bars(rows: Rows, panels: list[tuple[str, Values]], label: str, title: str) -> Any:
    """A figure with one axes a shape: wide shapes on lines of their own, the others side by side."""
    if not panels:
        return None
    wide = [panel for panel in panels if len(panel[1]) > 3]
    narrow = [panel for panel in panels if len(panel[1]) <= 3]
    lines = [[panel] for panel in wide] + [narrow[i : i + 4] for i in range(0, len(narrow), 4)]
    figure = figure_of(11.0, 3.1 * len(lines) + 0.6)
    grid = figure.add_gridspec(len(lines), 1)
    for line, panels_of_line in enumerate(lines):
        parts = grid[line].subgridspec(1, len(panels_of_line))
        for place, (shape, values) in enumerate(panels_of_line):
            _bars(figure.add_subplot(parts[place]), shape, values, label)
    legend(figure, [row for row in rows if _drawn(row, panels)])
    devices = ", ".join(sorted({row["device"] for row in rows}))
    figure.suptitle(f"{title}; {devices}", fontsize=10)
    return figure


def _drawn(row: dict[str, Any], panels: list[tuple[str, Values]]) -> bool:
    return any(row["peer"] in found for _, values in panels for found in values.values())


def _bars(axes: Any, shape: str, values: Values, label: str) -> None:
    most = max(map(len, values.values()))
    width = min(0.84 / most, 0.2)
    narrow = most > 3 or width / len(values) < 0.02  # narrower than its label
    for place, found in enumerate(values.values()):
        for index, peer in enumerate(ordered(found)):
            height, bar = found[peer]
            x = place + (index - (len(found) - 1) / 2) * width
            axes.bar(x, height, 0.94 * width, color=colour(peer))
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
                rotation=90 if narrow else 0,
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


def figure_of(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def legend(figure: Any, rows: Rows) -> None:
    from matplotlib.patches import Patch

    peers = ordered({row["peer"] for row in rows})
    patches = [Patch(color=colour(peer), label=peer) for peer in peers]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=8)


def ordered(peers: Any) -> list[str]:
    known = list(_COLOURS)
    return sorted(peers, key=lambda peer: (known.index(peer) if peer in known else 99, peer))


def colour(peer: str) -> str:
    return _COLOURS.get(peer, _OTHER)
