"""What the suites `train` and `infer` share: the model, its peers, their command line and their rows."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from benchmarks import records
from benchmarks.contest import Rows
from benchmarks.copying import COPY
from benchmarks.progress import Progress
from benchmarks.settings import add_output, writes
from benchmarks.table import is_ours
from examples.llama.config import make_config
from examples.llama.model import Llama

LAYERS = 2
# A small vocabulary: the embeddings of 128256 tokens would outweigh a few layers, for all peers alike.
VOCABULARY = 4096
PEERS = ("flexjax", "jax_cudnn", "jax_xla")
_QUICK = {"width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "hidden": 96, "vocabulary": 64}


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peers", type=lambda text: tuple(text.split(",")), help=f"of {', '.join(PEERS)}"
    )
    parser.add_argument("--layers", type=int, default=LAYERS, help="of 8B size")
    parser.add_argument("--minutes", type=float, help="begin no case after these")
    add_output(parser, "a tiny model and few repeats")


def config(arguments: argparse.Namespace, **changes: Any) -> Any:
    """The model of a command line."""
    style = changes.pop("style", "llama")
    sizes = _QUICK if arguments.quick else {"vocabulary": VOCABULARY}
    return make_config("8B", style, layers=arguments.layers, **sizes, **changes)


def peers(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The peers that are asked for, or those that can run here.

    Raises:
        SystemExit: there is no such peer.
    """
    on_gpu = jax.default_backend() == "gpu"
    names = arguments.peers or tuple(n for n in PEERS if on_gpu or n != "jax_cudnn")
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise SystemExit(f"There is no peer {unknown[0]!r} here. Choose from {', '.join(PEERS)}.")
    return names


def attention(config: Any, peer: str) -> Any:
    """The model with a peer's attention."""
    return dataclasses.replace(config, attention=peer.removeprefix("jax_"))


def parameters(config: Any, dtype: str) -> Any:
    """Random parameters of the model, as nested dictionaries."""

    @jax.jit
    def make() -> Any:
        params = nnx.to_pure_dict(nnx.state(Llama(config, nnx.Rngs(0)), nnx.Param))
        return jax.tree.map(lambda x: x.astype(dtype), params)

    return make()


def merger(config: Any) -> Callable[[Any], Any]:
    """A function from `parameters` to the model."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))), nnx.Param)

    def merge(params: Any) -> Any:
        state = jax.tree.map(lambda x: x, abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    return merge


def keys(config: Any, variant: str, batch: int, q_len: int, kv_len: int, **facts: Any) -> dict:
    """The keys that all rows of a case share."""
    facts |= {"layers": config.layers, "width": config.width, "hidden": config.hidden}
    facts |= {"vocabulary": config.vocabulary, "parameters": config.parameters}
    return {
        "variant": variant,
        "B": batch,
        "Hq": config.heads,
        "Hkv": config.kv_heads,
        "L": q_len,
        "S": kv_len,
        "D": config.head_dim,
        "window": config.window,
        "dtype": config.dtype,
        "config": facts | ({"remat": True} if config.remat else {}),
    }


class Log:
    """The rows of a run, told in a line each; see `benchmarks.records.Log`."""

    def __init__(self, suite: str, arguments: argparse.Namespace) -> None:
        self.minutes = arguments.minutes
        self.log = records.Log(suite, arguments.out, writes(arguments))

    def late(self, progress: Progress) -> bool:
        """Whether no further case may begin."""
        late = self.minutes is not None and progress.seconds > 60 * self.minutes
        if late:
            progress.say(f"{progress.total - progress.done} cases left out: time is up")
        return late

    def add(self, rows: Rows, progress: Progress) -> None:
        """Adds the rows of one case."""
        new = self.log.add(rows)
        progress.end(f"{new[0]['variant']} B {new[0]['B']} S {new[0]['S']}")
        mine = next((row["ms"] for row in new if is_ours(row) and "ms" in row), None)
        for row in new:
            progress.say(f"    {line(row, mine)}")

    def close(self, progress: Progress) -> int:
        """1 if flexjax failed anywhere, else 0."""
        progress.close()
        self.log.close()
        return int(any("failure" in row for row in self.log.rows if is_ours(row)))


def line(row: dict[str, Any], mine: float | None) -> str:
    """A row as text; `mine` is flexjax's time."""
    start = f"{row['peer']:<10}"
    peak = f"{row['peak_mb'] / 1e3:.2f} GB at peak" if "peak_mb" in row else ""
    if row["variant"] == COPY:
        return (
            f"{start} {row.get('ms', float('nan')):.3f} ms, {row.get('tbs', float('nan')):.2f} TB/s"
        )
    if "ms" not in row:
        return f"{start} FAILED ({row['failure']}) {peak}"
    parts = [f"{row['ms']:.3f} ms", f"{row['tokens_s']:,.0f} tokens/s", peak]
    parts += [f"MFU {row['mfu']:.1%}"] if "mfu" in row else []
    parts += [f"{row['tbs']:.2f} TB/s"] if "tbs" in row else []
    parts += [f"{row['of_copy']:.1%} of a copy"] if "of_copy" in row else []
    parts += [f"error {row['error']:.1e}"]
    parts += [] if mine is None else [f"x{row['ms'] / mine:.2f}"]
    return f"{start} {', '.join(parts)}"
