"""Another version of flexjax: a commit, or a folder that holds the package, in a process of its own.

Two versions of one package cannot be imported into one process. The other process prepares the same cases on the
same device and runs a turn whenever it is told to; between turns it leaves the device alone. So the two versions
are timed in turns, as all peers are. Telling it costs some 0.1 ms a turn of 20 calls.
"""

from __future__ import annotations

import atexit
import multiprocessing
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.base_server import serve
from benchmarks.peers.base import Case, Contender
from benchmarks.variants import Shape, Variant

ROOT = Path(__file__).resolve().parents[2]


class FlexjaxBase:
    """flexjax as it was.

    Args:
        base: a revision that git knows here, or a folder with a `flexjax` package in it.
    """

    def __init__(self, base: str) -> None:
        self.base = base
        self._process: Any = None
        self._connection: Any = None

    @property
    def name(self) -> str:
        return f"flexjax@{self.base}"

    def missing(self) -> str | None:
        if Path(self.base, "flexjax", "__init__.py").is_file():
            place = str(Path(self.base).resolve())
        else:
            place = tempfile.mkdtemp(prefix="flexjax-base-")
            atexit.register(shutil.rmtree, place, ignore_errors=True)
            reason = unpack(self.base, place)
            if reason is not None:
                return reason
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, place), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._ask("start")
        except (RuntimeError, EOFError) as error:
            return f"cannot import flexjax of {self.base}: {error}"
        return None

    def supports(self, shape: Shape, variant: Variant) -> bool:
        return True

    def prepare(self, case: Case) -> Contender:
        inputs = case.inputs
        # Inputs are made anew from the seed there, and mods are known by the variant's name.
        inputs_key = (case.shape, inputs.dtype.name, inputs.seed)
        facts = self._ask("prepare", inputs_key, case.variant.name, case.options, case.backward)
        queued: list[int] = []

        def synchronize(result: Any) -> None:
            self._ask("turn", list(queued))
            queued.clear()

        def heads(result: Any, pairs: Sequence[tuple[int, int]]) -> list[np.ndarray]:
            synchronize(result)
            return self._ask("heads", list(pairs))

        return Contender(
            peer=self.name,
            run=queued.append,
            synchronize=synchronize,
            heads=heads,
            **facts,
        )

    def release(self) -> None:
        self._ask("release")

    def _ask(self, *request: Any) -> Any:
        """One request and its answer.

        Raises:
            RuntimeError: the other process raised something.
            EOFError: it is gone.
        """
        self._connection.send(request)
        done, answer = self._connection.recv()
        if not done:
            raise RuntimeError(answer)
        return answer


def unpack(revision: str, folder: str) -> str | None:
    """Writes the package of a revision into `folder`; says why it cannot, if so."""
    command = ["git", "-C", str(ROOT), "archive", revision, "flexjax"]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        return f"there is no git here ({error}); give a folder that holds the other flexjax package"
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip()
        return (
            f"git cannot bring {revision!r} ({reason}); give a revision of this repository, or a folder that "
            "holds the other flexjax package"
        )
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return None
