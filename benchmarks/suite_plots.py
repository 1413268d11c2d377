"""Pictures of the suites that do not measure one attention alone: masks, decoding, whole models."""

from __future__ import annotations

from typing import Any

from benchmarks.panels import Rows, Values, colour, figure_of, legend, ordered, panels_of_bars


def mask_lines(rows: Rows) -> Any:
    """Milliseconds to build a mask against the sequence length, one panel a variant; None without rows."""
    # (variant, block size) -> peer -> length -> ms; later runs replace earlier ones
    series: dict[tuple[str, tuple[int, ...]], dict[str, dict[int, float]]] = {}
    for row in sorted((row for row in rows if "ms" in row), key=lambda row: row["run"]):
        panel = series.setdefault((row["variant"], tuple(row["block_size"])), {})
        panel.setdefault(row["peer"], {})[row["S"]] = row["ms"]
    if not series:
        return None
    columns = min(3, len(series))
    lines = -(-len(series) // columns)
    figure = figure_of(4.2 * columns, 3.2 * lines + 0.6)
    for place, ((variant, block), panel) in enumerate(sorted(series.items()), 1):
        axes = figure.add_subplot(lines, columns, place)
        for peer in ordered(panel):
            lengths, times = zip(*sorted(panel[peer].items()), strict=True)
            axes.plot(lengths, times, "o-", color=colour(peer), label=peer, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({length for points in panel.values() for length in points})
        axes.set_xticks(ticks, [f"{length:,}" for length in ticks], fontsize=7)
        size = " x ".join(map(str, block))
        axes.set(title=f"{variant}, blocks of {size}", xlabel="length", ylabel="ms")
        axes.grid(alpha=0.3)
    legend(figure, rows)
    devices = ", ".join(sorted({row["device"] for row in rows}))
    figure.suptitle(f"Building a block mask (less is better); {devices}", fontsize=10)
    return figure


def bandwidth_bars(rows: Rows) -> Any:
    """TB/s of weights and caches read while decoding, by context and batch; None without rows."""
    sized = [row for row in rows if "Hq" in row]
    title = "Decoding, TB/s of what must be read (more is better; dashed: a copy)"
    figure = _bars(sized, "tbs", "TB/s", title)
    copies = [row["tbs"] for row in rows if "Hq" not in row and "tbs" in row]
    for axes in figure.axes if figure is not None and copies else ():
        axes.axhline(max(copies), color="0.4", linewidth=0.8, linestyle="--")
    return figure


def token_bars(rows: Rows) -> Any:
    """Tokens per second by length and batch; None without rows."""
    title = f"{rows[0]['suite'].capitalize()}, tokens/s (more is better)" if rows else ""
    return _bars(rows, "tokens_s", "tokens/s", title)


def _bars(rows: Rows, key: str, label: str, title: str) -> Any:
    """One panel a variant, a group of bars for each size; of every size's last run."""
    last: dict[tuple[Any, ...], str] = {}
    chosen = [row for row in rows if key in row]
    for row in chosen:
        last[_size(row)] = max(last.get(_size(row), ""), row["run"])
    chosen = [row for row in chosen if row["run"] == last[_size(row)]]
    panels: dict[str, Values] = {}
    for row in sorted(chosen, key=_size):
        page = f"\npage {row['page']}" if "page" in row else ""
        page += f"\n{row['placement']}" if "placement" in row else ""
        more = f"\nL{row['L']}" if row["L"] > 1 and row["L"] != row["S"] else ""
        more += f"\nto {min(row['lengths'])}" if "lengths" in row else ""
        more += f"\n{_layers(row)} layers" if _layers(row) else ""
        group = f"B{row['B']} {row['Hq']}/{row['Hkv']}\nS{row['S']}{page}{more}"
        panel = f"{row['variant']}, from pages" if page else row["variant"]
        panels.setdefault(panel, {}).setdefault(group, {})[row["peer"]] = row[key], None
    return panels_of_bars(chosen, list(panels.items()), label, title)


def _size(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("variant", "S", "B", "Hq", "Hkv", "L", "D", "page", "window")
    texts = row.get("placement", ""), tuple(row.get("lengths", ()))
    return *(row.get(name) or 0 for name in names), _layers(row), *texts


def _layers(row: dict[str, Any]) -> int:
    """Layers of the model; 0 where an attention alone was measured."""
    return row.get("config", {}).get("layers", 0)
