"""Trains a Llama-class decoder on packed documents, with flexjax's attention or JAX's own.

    python -m examples.llama.train                            # tiny, on a CPU, under 40 s
    python -m examples.llama.train --size 110M --length 8192 --batch 8 --remat
    python -m examples.llama.train --help

See examples/llama/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from examples.llama.config import ATTENTIONS, SIZES, STYLES, Config, make_config
from examples.llama.model import Llama
from examples.llama.text import packed_batches
from examples.llama.training import make_optimizer, peak_flops, train_step, visible_pairs


@dataclasses.dataclass(frozen=True)
class Run:
    """What to train, and on what.

    Attributes:
        config: the model.
        steps: of the optimizer, from the very start.
        batch: rows a step.
        length: tokens a row.
        rate: peak learning rate.
        megabytes: of text, at most.
        every: steps between two printed lines.
        seed: of parameters and data.
        checkpoint: folder to save into, and to go on from; None for neither.
    """

    config: Config
    steps: int = 40
    batch: int = 4
    length: int = 512
    rate: float = 3e-3
    megabytes: float = 2.0
    every: int = 10
    seed: int = 0
    checkpoint: Path | None = None


def train(run: Run) -> list[float]:
    """Trains, prints as it goes, and returns the loss of every step taken."""
    model = Llama(run.config, nnx.Rngs(run.seed))
    optimizer = make_optimizer(model, run.rate, run.steps)
    first = 0 if run.checkpoint is None else restore(run.checkpoint, model, optimizer)
    stream = packed_batches(run.length, run.batch, run.megabytes, run.seed)
    for _ in range(first):  # the batches that the earlier run has seen
        next(stream)
    peak, source = peak_flops()
    config, tokens = run.config, run.batch * run.length
    print(
        f"{config.parameters:,} parameters, attention by {config.attention}, {tokens:,} tokens a step, "
        f"model FLOP utilisation of {peak / 1e12:.3g} TFLOP/s ({source})"
    )
    losses: list[float] = []
    seconds: list[float] = []
    for step in range(first, run.steps):
        rows = next(stream)
        start = time.perf_counter()
        losses.append(float(train_step(model, optimizer, rows.tokens, rows.ids)))
        if step == first:
            print(
                f"step {step + 1}: loss {losses[-1]:.3f}, {time.perf_counter() - start:.1f} s with compilation"
            )
            continue
        seconds.append(time.perf_counter() - start)
        if (step + 1) % run.every == 0 or step + 1 == run.steps:
            visible = tuple(visible_pairs(rows.ids, w) for w in (None, config.window))
            took = statistics.median(seconds)
            used = config.flops(tokens, visible) / took / peak
            print(
                f"step {step + 1}: loss {losses[-1]:.3f}, {1e3 * took:.1f} ms a step, "
                f"{tokens / took:,.0f} tokens/s, MFU {used:.1%}"
            )
            seconds.clear()
    if run.checkpoint is not None and losses:
        save(run.checkpoint, run.steps, model, optimizer)
    peak_bytes = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak_bytes:
        print(f"peak memory: {peak_bytes / 2**30:.2f} GiB")
    return losses


# -- checkpoints ------------------------------------------------------------------------------------


def _state(model: Llama, optimizer: nnx.Optimizer) -> Any:
    return nnx.to_pure_dict(nnx.state((model, optimizer)))


def save(folder: Path, step: int, model: Llama, optimizer: nnx.Optimizer) -> None:
    """Saves parameters and the optimizer's state as the checkpoint of a step."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder.resolve()) as manager:
        manager.save(step, args=ocp.args.StandardSave(_state(model, optimizer)))
        manager.wait_until_finished()


def restore(folder: Path, model: Llama, optimizer: nnx.Optimizer) -> int:
    """Puts the last checkpoint into model and optimizer; returns its step, 0 if there is none."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder.resolve()) as manager:
        step = manager.latest_step()
        if step is None:
            return 0
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _state(model, optimizer))
        saved = manager.restore(step, args=ocp.args.StandardRestore(abstract))
    state = nnx.state((model, optimizer))
    nnx.replace_by_pure_dict(state, saved)
    nnx.update((model, optimizer), state)
    return step


# -- the command line -------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> Run:
    """The run that a command line asks for."""
    smoke = os.environ.get("FLEXJAX_SMOKE") == "1"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--style", choices=STYLES, default="llama")
    parser.add_argument("--attention", choices=ATTENTIONS, default="flexjax")
    parser.add_argument("--backend", help="of flexjax, for example xla")
    parser.add_argument("--window", type=int, help="instead of the style's")
    parser.add_argument("--layers", type=int, help="instead of the size's")
    parser.add_argument("--vocabulary", type=int, default=256, help="at least 256, for bytes")
    parser.add_argument(
        "--dtype", default="float32" if jax.default_backend() == "cpu" else "bfloat16"
    )
    parser.add_argument("--remat", action="store_true")
    defaults = {
        field.name: field.default for field in dataclasses.fields(Run) if field.name != "config"
    }
    if smoke:
        defaults |= {"steps": 12, "length": 256, "megabytes": 0.5}
    for name in ("steps", "batch", "length", "rate", "megabytes", "every", "seed"):
        parser.add_argument(f"--{name}", type=type(defaults[name]), default=defaults[name])
    parser.add_argument("--checkpoint", type=Path, help="folder to save into and to go on from")
    arguments = vars(parser.parse_args(argv))
    size, style = arguments.pop("size"), arguments.pop("style")
    names = ("attention", "backend", "window", "layers", "vocabulary", "dtype", "remat")
    changes = {name: arguments.pop(name) for name in names}
    changes = {name: value for name, value in changes.items() if value is not None}
    try:
        return Run(make_config(size, style, **changes), **arguments)
    except ValueError as error:
        parser.error(str(error))


def main() -> None:
    losses = train(parse())
    if losses:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
