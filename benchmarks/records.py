"""Measurements as JSON lines: one object a row, the same keys in every suite."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
COMMIT_VARIABLE = "FLEXJAX_COMMIT"

# In the order of the rows. A row has the keys that apply to it and no others.
KEYS = (
    "suite",  # forward, backward, tune, decode, mask, pages, train, infer
    "run",  # one id a run; ratios are taken inside a run only
    "peer",
    "variant",
    *("B", "Hq", "Hkv", "L", "S", "D", "Dv"),
    "window",  # of sliding_window
    "lengths",  # of a cache's sequences, where they do not fill it
    "page",
    "placement",  # of pages in their pool, where it is not random
    "top_k",  # pages attended to beside the first and the newest
    "dtype",
    "layout",
    "ms",  # median over the rounds
    "spread",  # (slowest - fastest) / median of the rounds
    "tflops",  # from the blocks of 128 x 128 that the variant needs, whatever the peer visits
    "tbs",  # of the keys and values that a decoding step needs; of a copy, read and written
    "of_copy",  # that, as a share of a copy in the same turns
    "result_mb",  # of a block mask alone
    "peak_mb",
    "compile_s",
    "tokens_s",  # train, infer
    "mfu",  # of the FLOP that the model asks for; config names the peak
    "error",  # relative, against the float64 reference
    "nats",  # loss a byte above that of full attention
    "full_nats",
    "failure",  # why there is no time
    "block_size",  # of the peer's block mask
    "density",  # of those blocks, what is visited; without a block mask, of the 128 x 128 that are needed
    "config",
    "device",
    "sm_clock",  # MHz under load
    "jax",
    "torch",
    "commit",
)


def make_row(**values: Any) -> dict[str, Any]:
    """A row with its keys in order; values of None are left out.

    Raises:
        ValueError: a key is not one of KEYS.
    """
    unknown = sorted(values.keys() - set(KEYS))
    if unknown:
        raise ValueError(
            f"Rows have no key {', '.join(unknown)}. Add it to benchmarks.records.KEYS."
        )
    return {key: values[key] for key in KEYS if values.get(key) is not None}


def new_run() -> str:
    """The id of a run that starts now: the time in UTC. Runs side by side start in the same second."""
    return dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S.%f")


def provenance() -> dict[str, Any]:
    """Where rows of this process come from: device, versions, commit."""
    import jax

    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        name = f"cpu ({platform.machine()}, {name})"
    return {
        "device": name,
        "jax": jax.__version__,
        "torch": _installed("torch"),
        "commit": _commit(),
    }


def results_file(folder: Path | None, suite: str, run: str, device: str) -> Path:
    """The file of a run's rows: in `folder`, or under the device's name in the committed results."""
    place = RESULTS / device_folder(device) if folder is None else folder
    return place / f"{suite}-{run[:8]}.jsonl"


def device_folder(device: str) -> str:
    """A short folder name: h100 for "NVIDIA H100 80GB HBM3", cpu for a CPU."""
    model = re.search(r"\b[A-Z]+[0-9]+\b", device)
    if device.startswith("cpu"):
        return "cpu"
    return model[0].lower() if model else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


class Log:
    """The rows of a run: written as soon as they are there, so that a run that is cut short keeps what it has.

    Args:
        suite: key of all rows.
        out: folder of the file; None for the committed results.
        write: whether rows are written at all.
    """

    def __init__(self, suite: str, out: Path | None, write: bool = True) -> None:
        self.run, self.origin = new_run(), provenance()
        self._suite, self._write = suite, write
        self.path = results_file(out, suite, self.run, self.origin["device"])
        self.rows: list[dict[str, Any]] = []

    def add(self, measured: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Completes rows with what is the same in all of the run, writes them and returns them."""
        new = [make_row(suite=self._suite, run=self.run, **row, **self.origin) for row in measured]
        self.rows += new
        if self._write:
            append(self.path, new)
        return new

    def close(self) -> None:
        """Says where the rows are."""
        if self._write:
            print(f"rows: {self.path}")


def failure(error: Exception) -> str:
    """What a row says of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of all files, in order."""
    lines = [line for path in paths for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.strip()]


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit that is measured, with "-dirty" if files under version control differ from it.

    A machine that gets a copy of the files without their history is told by FLEXJAX_COMMIT.
    """
    told = os.environ.get(COMMIT_VARIABLE)
    if told:
        return told
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return (commit + ("-dirty" if changed else "")) if commit else "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return ""
