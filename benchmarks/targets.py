"""The ratios to peers that flexjax is built to reach: peer's time / flexjax's, in the same run."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.variants import SHAPES


@dataclasses.dataclass(frozen=True)
class Target:
    """A ratio that must be reached, and one that is aimed at."""

    must: float
    goal: float | None = None


_MASKS = ("causal", "alibi", "sliding_window", "prefix_lm", "document")
_DENSE = ("noop", "rel_bias")
_FA3 = ("noop", "causal", "sliding_window")

# (shape, peer, variant); measured on an H100 in bfloat16.
FORWARD: dict[tuple[str, str, str], Target] = {
    **{("D128", "torch_flex", v): Target(1.5, 1.8) for v in _MASKS},
    **{("D128", "torch_flex", v): Target(1.45, 1.6) for v in _DENSE},
    ("D128", "torch_flex", "soft_cap"): Target(2.6, 3.0),
    ("D128", "torch_flex", "rel_table"): Target(1.4),
    **{("D128", "fa3", v): Target(0.92, 1.0) for v in _FA3},
    ("D128", "tokamax", "soft_cap"): Target(1.0),
    **{("D64", "torch_flex", v): Target(1.3, 1.5) for v in _MASKS},
    **{("D64", "torch_flex", v): Target(1.2, 1.4) for v in _DENSE},
    ("D64", "torch_flex", "soft_cap"): Target(3.1, 3.6),
    ("D64", "torch_flex", "rel_table"): Target(1.3),
    **{("D64", "fa3", v): Target(0.92, 1.0) for v in _FA3},
    ("D64", "tokamax", "soft_cap"): Target(1.0),
    ("D256", "torch_flex", "causal"): Target(1.5),
    ("S131072", "torch_flex", "sliding_window"): Target(1.35),
    ("S32768", "torch_flex", "document"): Target(1.4),
}


_BACKWARD_MASKS = ("noop", "causal", "alibi", "sliding_window", "prefix_lm", "rel_bias")
BACKWARD: dict[tuple[str, str, str], Target] = {
    **{("D128", "torch_flex", v): Target(1.35, 1.6) for v in _BACKWARD_MASKS},
    ("D128", "torch_flex", "document"): Target(1.2, 1.5),
    ("D128", "torch_flex", "soft_cap"): Target(2.3, 2.7),
    **{("D128", "fa3", v): Target(0.95, 1.1) for v in _FA3},
    ("D128", "tokamax", "soft_cap"): Target(1.4),
    ("D128", "tokamax", "sliding_window"): Target(6.0),
    **{("D64", "torch_flex", v): Target(1.45, 1.7) for v in _BACKWARD_MASKS},
    ("D64", "torch_flex", "document"): Target(1.3, 1.6),
    ("D64", "torch_flex", "soft_cap"): Target(2.4, 3.0),
    **{("D64", "fa3", v): Target(1.0, 1.1) for v in _FA3},
    ("D64", "tokamax", "soft_cap"): Target(1.3),
    ("D64", "tokamax", "sliding_window"): Target(5.0),
    ("D256", "torch_flex", "causal"): Target(1.5, 2.5),
}
_SUITES = {"forward": FORWARD, "backward": BACKWARD}


def shape_name(row: dict[str, Any]) -> str:
    """The name of a row's shape; its sizes where it has no name."""
    for name, shape in SHAPES.items():
        same_window = row.get("window", shape.window) == shape.window
        if same_window and all(row[key] == size for key, size in shape.sizes.items()):
            return name
    heads = str(row["Hq"]) if row["Hq"] == row["Hkv"] else f"{row['Hq']}/{row['Hkv']}"
    length = str(row["L"]) if row["L"] == row["S"] else f"{row['L']}x{row['S']}"
    return f"B{row['B']} H{heads} S{length} D{row['D']}"


def target(row: dict[str, Any]) -> Target | None:
    """What flexjax must reach against the peer of this row, if anything."""
    if row["dtype"] != "bfloat16":
        return None
    return _SUITES.get(row["suite"], {}).get((shape_name(row), row["peer"], row["variant"]))
