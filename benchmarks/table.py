"""Rows as text: a line a case, and a table of ratios with the targets."""

from __future__ import annotations

from typing import Any

from benchmarks.targets import shape_name, target

Rows = list[dict[str, Any]]

ATTENTION = ("forward", "backward")  # suites of single attentions


def is_ours(row: dict[str, Any]) -> bool:
    """Whether flexjax made this row."""
    return row["peer"].split("/")[0] == "flexjax"


def case_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What rows of the same attention share."""
    names = ("dtype", "B", "Hq", "Hkv", "L", "S", "D", "window", "page", "placement")
    lengths = tuple(row.get("lengths", ()))  # of sequences in caches, where they differ
    return row["suite"], row["variant"], *(row.get(name) for name in names), lengths


def by_default(rows: Rows) -> Rows:
    """The rows without those runs of single attentions in which flexjax was given kernel options.

    Their peers go with them, for the ratios of such a run are not those of the default configuration, of which
    pictures and tables tell. Other suites keep facts of the case in `config`.
    """
    given = {
        (row["suite"], row["run"])
        for row in rows
        if row["suite"] in ATTENTION and is_ours(row) and row.get("config")
    }
    return [row for row in rows if (row["suite"], row["run"]) not in given]


def by_case(rows: Rows) -> list[Rows]:
    """The rows of each case, in order of appearance."""
    cases: dict[Any, Rows] = {}
    for row in rows:
        cases.setdefault((row["run"], *case_key(row)), []).append(row)
    return list(cases.values())


def last_runs(runs: list[Rows]) -> list[Rows]:
    """Of several runs of a case the last one, and those of the same commit with peers that no later one has."""
    chosen: list[Rows] = []
    seen: set[str] = set()
    for case in sorted(runs, key=lambda case: case[0]["run"], reverse=True):
        peers = {row["peer"] for row in case}
        same = not chosen or case[0].get("commit") == chosen[0][0].get("commit")
        if same and peers - seen:
            chosen.append(case)
            seen |= peers
    return chosen[::-1]


def ours(case: Rows) -> dict[str, Any] | None:
    """flexjax's timed row of a case, the fastest if there are several."""
    timed = [row for row in case if is_ours(row) and "ms" in row]
    return min(timed, key=lambda row: row["ms"], default=None)


def case_line(case: Rows) -> str:
    """One case in one line: times, and how many times longer than flexjax each peer takes."""
    mine = ours(case)
    return ", ".join(_cell(row, mine) for row in case) or "no peer supports it"


def summary(rows: Rows) -> str:
    """A table: a line for each case, flexjax's time and the ratio to each peer, and what was missed."""
    peers = list(dict.fromkeys(row["peer"] for row in rows if not is_ours(row)))
    header = ["shape", "variant", "backend", "ms", "TFLOP/s", "error", *peers]
    lines, missed = [header], []
    for case in by_case(rows):
        mine = ours(case)
        start = [shape_name(case[0]), case[0]["variant"]]
        if mine is None:
            lines.append([*start, "-", "-", "-", "-", *("-" for _ in peers)])
            continue
        start.append(mine["peer"].partition("/")[2])
        start += [f"{mine['ms']:.4f}", f"{mine['tflops']:.3g}", f"{mine['error']:.1e}"]
        found = {row["peer"]: row for row in case if "ms" in row}
        cells = []
        for peer in peers:
            cell, miss = _ratio(found.get(peer), mine)
            cells.append(cell)
            if miss:
                missed.append(f"{start[0]} {start[1]}: {peer} {miss}")
        lines.append([*start, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    failures = [
        f"{shape_name(row)} {row['variant']}: {row['peer']}: {row['failure']}"
        for row in rows
        if "failure" in row
    ]
    notes = ["Ratios are peer's time / flexjax's; (>= what must be reached)."]
    notes += ["Missed:", *(f"  {line}" for line in missed)] if missed else []
    notes += ["Failed:", *(f"  {line}" for line in failures)] if failures else []
    return "\n".join([*text, *notes])


def _cell(row: dict[str, Any], mine: dict[str, Any] | None) -> str:
    if "ms" not in row:
        return f"{row['peer']} FAILED ({row['failure']})"
    cell = f"{row['peer']} {row['ms']:.4f} ms {row['tflops']:.3g} TFLOP/s"
    return cell if mine is None or is_ours(row) else f"{cell} x{row['ms'] / mine['ms']:.2f}"


def _ratio(row: dict[str, Any] | None, mine: dict[str, Any]) -> tuple[str, str | None]:
    """(cell, how a target was missed)."""
    if row is None:
        return "-", None
    ratio, bar = row["ms"] / mine["ms"], target(row)
    if bar is None:
        return f"{ratio:.2f}", None
    cell = f"{ratio:.2f} (>= {bar.must:g})"
    return (cell, None) if ratio >= bar.must else (f"{cell} !", f"{ratio:.3f} of {bar.must:g}")
