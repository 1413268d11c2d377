"""Several runs on one device: they compile side by side, but whoever times is alone.

Compilation takes ten times as long as timing, and a device may be there for minutes only. Runs that name the same
file share its lock while they prepare and try their contenders; to time them, a run has it for itself, so that
nothing else happens on the device.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def preparing(file: Path | None) -> Iterator[None]:
    """Beside other runs that prepare; waits while one of them times."""
    with _locked(file, fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def timing(file: Path | None) -> Iterator[None]:
    """Alone; waits for those who prepare or time."""
    with _locked(file, fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def _locked(file: Path | None, kind: int) -> Iterator[None]:
    if file is None:
        yield
        return
    with file.open("a") as handle:
        fcntl.flock(handle, kind)
        yield
