"""Real text that every machine with Python has: sources and documentation of its packages, packed into rows."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from examples.packed_lm import Rows, batches, cut, pack

KINDS = {".py", ".md", ".rst", ".txt"}


def documents(limit: int, seed: int = 0) -> list[bytes]:
    """Whole files, in random order, until there are `limit` bytes of them.

    The standard library's and the installed packages' Python sources and texts.
    """
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")}
    files = sorted({f for root in roots for f in root.rglob("*") if f.suffix in KINDS})
    np.random.default_rng(seed).shuffle(files)
    found: list[bytes] = []
    for file in files:
        if limit <= 0:
            break
        text = file.read_bytes()
        if text.strip():
            found.append(text)
            limit -= len(text)
    return found


def packed_batches(length: int, batch: int, megabytes: float, seed: int) -> Iterator[Rows]:
    """Batches of packed rows, epoch after epoch.

    Raises:
        ValueError: there is too little text for one batch.
    """
    rows = pack(cut(documents(int(megabytes * 1e6), seed), length), length)
    if len(rows.tokens) < batch:
        raise ValueError(
            f"The text fills {len(rows.tokens)} rows of {length} bytes, but a batch has {batch}. Ask for more "
            "text with --megabytes, or for shorter rows."
        )
    return batches(rows, batch, np.random.default_rng(seed))
