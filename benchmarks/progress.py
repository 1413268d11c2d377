"""Progress: a bar on a terminal where tqdm is installed, plain lines everywhere else."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any


class Progress:
    """Counts the cases of a run.

    Args:
        total: how many there are.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.start = time.monotonic()
        self._bar = _bar(total)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    def begin(self, label: str) -> None:
        """A case begins."""
        if self._bar is not None:
            self._bar.set_description(label)

    def end(self, line: str) -> None:
        """A case has ended; `line` says how."""
        self.done += 1
        self.say(f"{self.done:3d}/{self.total} {line}")
        if self._bar is not None:
            self._bar.update()

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        text = f"[{self.seconds:4.0f} s] {line}"
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _bar(total: int) -> Any:
    if not sys.stderr.isatty():
        return None
    try:
        tqdm = importlib.import_module("tqdm")
    except ImportError:
        return None
    return tqdm.tqdm(total=total, unit="case")
