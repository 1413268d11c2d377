"""Measures flexjax beside its peers, and draws what was measured.

    python benchmarks/run.py forward                      # everything that runs here
    python benchmarks/run.py forward --quick              # seconds, on a CPU too
    python benchmarks/run.py forward --shapes D128 --variants causal,soft_cap --peers flexjax,torch_flex
    python benchmarks/run.py mask                         # building block masks
    python benchmarks/run.py neighborhood                 # tokens row by row, in tiles, along Morton's curve
    python benchmarks/run.py plot                         # from the committed rows

benchmarks/README.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

FOLDER = str(Path(__file__).resolve().parent)
ROOT = str(Path(FOLDER).parent)

# Module and one line of help of each subcommand; a module has add_arguments(parser) and run(arguments).
COMMANDS = {
    "forward": ("benchmarks.forward", "the forward pass of every variant"),
    "backward": ("benchmarks.backward", "the backward pass alone of every variant"),
    "train": ("benchmarks.train", "a training step of 8B-sized layers on packed documents"),
    "infer": ("benchmarks.infer", "decoding steps of 8B-sized layers, and prompts with a window"),
    "tune": ("benchmarks.tune", "configurations of flexjax's own kernels beside each other"),
    "decode": ("benchmarks.decode", "one step of decoding, beside the bandwidth of memory"),
    "mask": ("benchmarks.mask", "building block masks: time and memory"),
    "pages": ("benchmarks.pages", "the quality of attention to a few pages of a cache"),
    "mask_memory": ("benchmarks.mask_memory", "bytes of block masks"),
    "neighborhood": ("benchmarks.neighborhood", "2-D neighbourhoods by the order of their tokens"),
    "plot": ("benchmarks.plots", "pictures from committed rows"),
}

# What the libraries read when they are imported.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # PyTorch needs a part of the device's memory
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",  # compile times from a warm cache would not be any
}


def main(argv: list[str] | None = None) -> int:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # The working tree is measured, installed or not. Python puts a script's own folder on the path, where
    # names such as `table` and `settings` would stand for modules of this folder.
    sys.path[:] = [ROOT, *(entry for entry in sys.path if entry not in (ROOT, FOLDER))]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    arguments = sys.argv[1:] if argv is None else argv
    modules = {}
    for name, (module, help_text) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text)
        # Only the command that runs is imported: drawing needs no JAX and measuring no matplotlib.
        if name in arguments[:1]:
            modules[name] = importlib.import_module(module)
            modules[name].add_arguments(command)
    parsed = parser.parse_args(arguments)
    return modules[parsed.command].run(parsed)


if __name__ == "__main__":
    sys.exit(main())
