"""The process in which another version of flexjax runs; see `benchmarks.peers.flexjax_base`.

Nothing here may import flexjax, or what imports it, before that version is on the path.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from benchmarks.peers.base import Contender, Options
    from benchmarks.variants import Shape


def serve(connection: Any, folder: str) -> None:
    """The other process: answers requests until the connection is closed."""
    sys.path.insert(0, folder)
    worker = None
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            return
        try:
            if worker is None:
                worker = _Worker(folder)
            answer = True, getattr(worker, name)(*arguments)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {' '.join(str(error).split())}"
        connection.send(answer)


class _Worker:
    """The other version, and what was prepared for the case at hand."""

    def __init__(self, folder: str) -> None:
        import flexjax
        from benchmarks.peers.flexjax_peer import Flexjax

        if Path(folder) not in Path(flexjax.__file__).resolve().parents:
            raise RuntimeError(f"flexjax came from {flexjax.__file__}, not from {folder}.")
        self._peer = Flexjax()
        self._contender: Contender | None = None
        self._inputs_key: tuple[Shape, str, int] | None = None
        self._inputs: Any = None
        self._result: Any = None

    def start(self) -> None:
        self._peer.missing()

    def prepare(
        self, inputs_key: tuple[Shape, str, int], variant: str, options: Options, backward: bool
    ) -> dict[str, Any]:
        from benchmarks.inputs import Inputs
        from benchmarks.peers.base import Case
        from benchmarks.variants import VARIANTS

        if self._inputs_key != inputs_key:
            self._inputs_key, self._inputs = inputs_key, Inputs(*inputs_key)
        case = Case(inputs_key[0], VARIANTS[variant], self._inputs, options, backward)
        self._contender = contender = self._peer.prepare(case)
        names = ("input_sets", "compile_s", "layout", "config", "block_size", "density")
        return {name: getattr(contender, name) for name in names}

    def turn(self, indices: list[int]) -> None:
        for index in indices:
            self._result = self._contender.call(index)
        self._contender.wait(self._result)

    def heads(self, pairs: list[tuple[int, int]]) -> list[np.ndarray]:
        return self._contender.heads(self._result, pairs)

    def release(self) -> None:
        self._peer.release()
        self._contender = self._result = None
