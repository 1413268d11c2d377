"""Ten attention variants in a few lines each: drawn, checked and timed on whatever device is there.

    bash scripts/quickstart             # sets up the environment first
    python examples/quickstart.py       # in an environment that has flexjax, rich and matplotlib

`variants` below is the part to read: attention is described by a mask_mod, a score_mod, or both, and
each is a function of scalars. Everything behind it only measures:

* the block mask, as a thumbnail here and element by element in `out/quickstart.png`;
* how many blocks of the score matrix are skipped;
* the relative error of the output and of the gradients of query, key and value, against flexjax's dense
  float32 reference;
* the time of a forward and backward pass, against `jax.nn.dot_product_attention` with the same mask or bias
  as an array.

The exit code is 1 if an error exceeds its tolerance.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jaxtyping import Array, Bool, Float
from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import flexjax
from flexjax import BlockMask, create_block_mask, create_mask, flex_attention, masks, scores
from flexjax.visualize import FULL, blocks_text, plot_mask, plot_scores, score_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = Path(__file__).resolve().parent.parent / "out" / "quickstart.png"

# -- the variants -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kind of attention.

    Attributes:
        name: how it is called in the report.
        mask_mod: which keys a query may see; None for all.
        score_mod: what happens to a score before the softmax; None for nothing.
        peer: how `jax.nn.dot_product_attention` can be told the same: by a "mask", by a "bias" (and a
            mask), or not at all ("").
    """

    name: str
    mask_mod: masks.MaskMod | None = None
    score_mod: scores.ScoreMod | None = None
    peer: str = "mask"


def variants(heads: int, length: int) -> list[Variant]:
    """The seven variants of the FlexAttention study, two compositions, and a mask of your own."""
    causal = masks.causal()
    window = masks.sliding_window(length // 6)
    # Five documents packed into one row; a token sees the past of its own document.
    document = masks.document_from_lengths(document_lengths(length), causal=True)
    alibi = scores.alibi(heads)
    # Small, so that it shows: the scores of random inputs hardly leave [-4, 4]. Gemma 2 has 50.
    soft_cap = scores.soft_cap(2.0)

    # A mask of your own is a function of four integers. This one lets every token see the recent past
    # and the first tokens of the sequence (StreamingLLM, arXiv:2309.17453).
    def my_mask(b: Array, h: Array, q_idx: Array, kv_idx: Array) -> Array:
        recent = q_idx - kv_idx < 100
        first = kv_idx < 16
        return (kv_idx <= q_idx) & (recent | first)

    return [
        Variant("noop"),
        Variant("causal", causal),
        Variant("ALiBi", causal, alibi, peer="bias"),
        Variant("sliding window", window),
        Variant("prefix LM", masks.prefix_lm(length // 3)),
        Variant("soft cap", causal, soft_cap, peer=""),
        Variant("document", document),
        Variant("window+document", masks.and_masks(window, document)),
        Variant("capped ALiBi", causal, scores.compose(alibi, soft_cap), peer=""),
        Variant("my_mask", my_mask),
    ]


def document_lengths(length: int) -> list[int]:
    """Five documents of different lengths that fill a row of `length` tokens."""
    lengths = [length * share // 100 for share in (30, 11, 25, 8)]
    return [*lengths, length - sum(lengths)]


# -- measuring --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes of the inputs, and what is asked of the results.

    Attributes:
        batch: batch rows B.
        heads: query and key heads H.
        length: queries and keys, L = S.
        dim: head dimension D.
        dtype: of query, key and value.
        tolerance: largest relative error.
        rounds: timed calls of each program, of which the median counts.
        backend: of `flex_attention`; None lets it choose.
    """

    batch: int
    heads: int
    length: int
    dim: int
    dtype: Any
    tolerance: float
    rounds: int
    backend: str | None = None

    def __str__(self) -> str:
        sizes = f"B={self.batch} H={self.heads} L=S={self.length} D={self.dim}"
        return f"{sizes} {jnp.dtype(self.dtype).name}"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found out about one variant; times in seconds, errors relative to the reference."""

    variant: Variant
    block_mask: BlockMask | None
    forward_error: float
    backward_error: float
    time: float
    peer_time: float | None


def measure(variant: Variant, setup: Setup, say: Callable[[str], None]) -> Measured:
    """Checks and times one variant; `say` is told what is going on."""
    n = setup.length
    inputs = random_inputs(setup)
    # The blocks that hold anything visible. B and H are None: all batch rows and heads share one mask.
    block_mask = None
    if variant.mask_mod is not None:
        block_mask = create_block_mask(variant.mask_mod, None, None, n, n)

    def attention(q: Array, k: Array, v: Array, block_mask: BlockMask | None) -> Array:
        return flex_attention(q, k, v, variant.score_mod, block_mask, backend=setup.backend)

    def reference(q: Array, k: Array, v: Array, block_mask: BlockMask | None) -> Array:
        return flex_attention(q, k, v, variant.score_mod, block_mask, backend="reference")

    say("compiling")
    result = forward_backward(attention, *inputs, block_mask)
    say("checking")
    truth = forward_backward(reference, *(x.astype(jnp.float32) for x in inputs), block_mask)
    errors = [relative_error(x, y) for x, y in zip(result, truth, strict=True)]

    programs = [lambda: forward_backward(attention, *inputs, block_mask)]
    if variant.peer:
        mask, bias = mask_and_bias(variant, setup)
        programs.append(lambda: forward_backward(jax_nn_attention, *inputs, mask, bias))
        # What is compared in time must compute the same.
        worst = max(relative_error(x, y) for x, y in zip(programs[1](), truth, strict=True))
        if not worst <= setup.tolerance:
            raise AssertionError(
                f"{variant.name}: jax.nn deviates from the reference by {worst:.1e}."
            )
    say("timing")
    seconds, *peer_seconds = median_times(programs, setup.rounds)
    return Measured(
        variant, block_mask, errors[0], max(errors[1:]), seconds, *(peer_seconds or [None])
    )


@functools.cache
def random_inputs(setup: Setup) -> list[Array]:
    """Query, key, value and the cotangent of the output, standard normal."""
    shape = (setup.batch, setup.heads, setup.length, setup.dim)
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, shape).astype(setup.dtype) for key in keys]


@functools.partial(jax.jit, static_argnums=0)
def forward_backward(
    attention: Callable[..., Array], q: Array, k: Array, v: Array, d_out: Array, *masking: Any
) -> tuple[Array, Array, Array, Array]:
    """The output and the gradients of query, key and value.

    `masking` is handed on to `attention`. A BlockMask is a pytree: it enters jax.jit like any array.
    """
    out, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, *masking), q, k, v)
    return out, *pullback(d_out)


def jax_nn_attention(q: Array, k: Array, v: Array, mask: Array | None, bias: Array | None) -> Array:
    """`jax.nn.dot_product_attention`, which takes (B, L, H, D), on arrays (B, H, L, D)."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, bias, mask).swapaxes(1, 2)


def mask_and_bias(
    variant: Variant, setup: Setup
) -> tuple[Bool[Array, "1 1 L S"] | None, Float[Array, "1 H L S"] | None]:
    """A variant as `jax.nn` wants it: as arrays with an entry for every query and key."""
    n, mask, bias = setup.length, None, None
    if variant.mask_mod is not None:
        mask = create_mask(variant.mask_mod, None, None, n, n)
    if variant.peer == "bias":
        grids = [score_grid(variant.score_mod, n, n, h=h) for h in range(setup.heads)]
        bias = jnp.asarray(np.stack(grids)[None], setup.dtype)
    return mask, bias


def relative_error(x: Array, truth: Array) -> float:
    """||x - truth|| / ||truth||."""
    difference = jnp.linalg.norm(x.astype(jnp.float32) - truth)
    return float(difference / jnp.linalg.norm(truth))


def median_times(programs: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each program, taking turns, so that a busy moment hits all of them."""
    times: list[list[float]] = [[] for _ in programs]
    for _ in range(rounds):
        for program, seconds in zip(programs, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program())
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


# -- reporting --------------------------------------------------------------------------------------


def thumbnails(results: list[Measured]) -> Columns:
    """The block masks side by side."""

    def thumbnail(result: Measured) -> Panel:
        states = np.full((8, 8), FULL)
        if result.block_mask is not None:
            states = np.asarray(result.block_mask.block_states())[0, 0]
        picture = blocks_text(states, rows=8, cols=8)
        return Panel(picture, title=result.variant.name, box=box.SQUARE, padding=0, width=18)

    return Columns([thumbnail(result) for result in results])


def table(results: list[Measured], setup: Setup) -> Table:
    """One line a variant."""
    report = Table(box=box.SIMPLE_HEAD)
    report.add_column("variant")
    for title in (
        "blocks\nskipped",
        "error\nforward",
        "error\nbackward",
        "flexjax\nms",
        "jax.nn\nms",
        "speed-up",
    ):
        report.add_column(title, justify="right")
    for result in results:
        errors = result.forward_error, result.backward_error
        colours = ["green" if error <= setup.tolerance else "bold red" for error in errors]
        shown = [f"[{c}]{error:.1e}[/]" for c, error in zip(colours, errors, strict=True)]
        peer, ratio = "n/a", "n/a"
        if result.peer_time is not None:
            peer = f"{result.peer_time * 1e3:.1f}"
            ratio = f"{result.peer_time / result.time:.1f}x"
        report.add_row(
            result.variant.name,
            f"{sparsity(result):.0f}%",
            *shown,
            f"{result.time * 1e3:.1f}",
            peer,
            ratio,
        )
    return report


def sparsity(result: Measured) -> float:
    """Percentage of blocks that are not computed."""
    return 0.0 if result.block_mask is None else result.block_mask.sparsity()


def verdict(results: list[Measured], setup: Setup) -> tuple[bool, str]:
    """Whether everything is as exact as it should be, and that in words."""
    wrong = [
        result.variant.name
        for result in results
        if not max(result.forward_error, result.backward_error) <= setup.tolerance
    ]
    if wrong:
        text = (
            f"{len(wrong)} of {len(results)} variants are wrong (error above {setup.tolerance:g})"
        )
        return False, f"[bold red]FAILED[/]: {text}: {', '.join(wrong)}."
    largest = max(max(result.forward_error, result.backward_error) for result in results)
    ratios = [result.peer_time / result.time for result in results if result.peer_time is not None]
    faster = sum(ratio > 1 for ratio in ratios)
    return True, (
        f"[bold green]OK[/]: all {len(results)} variants agree with the dense reference (largest error "
        f"{largest:.1e}, tolerance {setup.tolerance:g}); faster than jax.nn in {faster} of {len(ratios)} "
        f"({min(ratios):.1f}x to {max(ratios):.1f}x)."
    )


def draw_gallery(results: list[Measured], setup: Setup, file: Path) -> None:
    """Writes a picture of every variant: its mask, or its scores where a score_mod changes them."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 5, figsize=(15, 7.2), layout="constrained")
    for result, ax in zip(results, axes.flat, strict=True):
        draw_variant(result.variant, setup, ax)
        ax.set(xlabel=f"{sparsity(result):.0f}% of blocks skipped", ylabel="")
    for ax in axes[:, 1:].flat:
        ax.tick_params(labelleft=False)
    for ax in axes[:, 0]:
        ax.set_ylabel("query", fontsize=9)
    figure.suptitle(
        f"Rows are queries, columns are keys, {setup.length} of each. Blue: may attend; with a score "
        "function, what it makes of a score.",
        fontsize=11,
    )
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def draw_variant(variant: Variant, setup: Setup, ax: "Axes") -> None:
    """Draws the mask, or the scores of the last head, into `ax`."""
    n, head = setup.length, setup.heads - 1
    mask_mod, score_mod = variant.mask_mod or flexjax.noop_mask, variant.score_mod
    if score_mod is None:
        plot_mask(mask_mod, n, n, ax=ax, title=variant.name)
        return
    # A bias shows itself on scores of zero. A soft cap needs something to cap: scores that grow.
    growing = np.broadcast_to(np.linspace(-6, 6, n, dtype=np.float32), (n, n))
    given = None if score_grid(score_mod, n, n, h=head).any() else growing
    plot_scores(score_mod, n, n, h=head, scores=given, mask_mod=mask_mod, ax=ax, title=variant.name)
    # The colour bar goes inside, where nothing is attended, so that all panels have one size.
    image = ax.images[0]
    image.colorbar.remove()
    place = ax.inset_axes((0.52, 0.88, 0.42, 0.04))
    bar = ax.figure.colorbar(image, cax=place, orientation="horizontal")
    bar.outline.set_visible(False)
    place.set_xlim(
        min(float(image.get_array().min()), 0.0), max(float(image.get_array().max()), 0.0)
    )
    place.tick_params(labelsize=7, length=2)


# -- the program ------------------------------------------------------------------------------------


def default_setup() -> Setup:
    """Sizes that a device gets through in seconds; FLEXJAX_SMOKE=1 makes them tiny."""
    if os.environ.get("FLEXJAX_SMOKE") == "1":
        return Setup(1, 2, 256, 32, jnp.float32, tolerance=1e-5, rounds=1)
    if jax.default_backend() == "gpu":
        return Setup(1, 16, 4096, 64, jnp.bfloat16, tolerance=2e-2, rounds=9)
    return Setup(1, 4, 1024, 64, jnp.float32, tolerance=1e-5, rounds=5)


def main() -> int:
    """Runs everything; returns the exit code."""
    setup = default_setup()
    parser = argparse.ArgumentParser(description="Draws, checks and times ten attention variants.")
    parser.add_argument("--length", type=int, default=setup.length, help="of the sequence, L = S")
    parser.add_argument("--heads", type=int, default=setup.heads)
    parser.add_argument("--rounds", type=int, default=setup.rounds, help="timed calls, of each")
    parser.add_argument("--backend", default=None, help="of flex_attention, for example xla")
    setup = dataclasses.replace(setup, **vars(parser.parse_args()))

    # A pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    device = jax.devices()[0]
    console.print(
        f"[bold]flexjax {flexjax.__version__}[/], jax {jax.__version__}, {device.device_kind}: {setup}"
    )
    chosen = variants(setup.heads, setup.length)
    columns = (
        TextColumn("{task.description:36}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    results = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen) + 1)

        for variant in chosen:

            def say(activity: str, name: str = variant.name) -> None:
                progress.update(task, description=f"{name}: {activity}")

            results.append(measure(variant, setup, say))
            progress.advance(task)
        progress.update(task, description="drawing")
        draw_gallery(results, setup, PICTURE)

    console.print(
        "\nBlocks of 128 x 128 scores: █ computed whole, ░ computed and masked, blank skipped"
    )
    console.print(thumbnails(results))
    console.print(table(results, setup))
    console.print(
        f"Forward and backward pass together, {setup}; medians of {setup.rounds} calls. jax.nn is\n"
        "jax.nn.dot_product_attention with the mask or bias as an array; n/a: it has no soft cap.\n"
        f"Every mask, element by element: {PICTURE}"
    )
    passed, text = verdict(results, setup)
    console.print(text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
