"""The sparse attention systems of the literature, each in a line or two: drawn, and checked.

    python examples/systems.py                      # every system at a small size against dense attention
    python examples/systems.py --sparsity 16384     # blocks that each mask skips at a real size; checks nothing

Most systems are a mask. Those that are more (Longformer's own projections, Reformer, Perceiver, Linformer) are
functions of `flexjax.systems`. Every result is compared with dense attention written out in `jax.numpy`, that of
the Perceiver with the reference backend; the pictures of all masks go to `out/systems.png`. docs/systems.md tells
about each. The exit code is 1 if an error exceeds the tolerance.
"""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jaxtyping import Array
from rich.console import Console
from rich.progress import track
from rich.table import Table

from flexjax import create_block_mask, create_mask, flex_attention, masks, systems
from flexjax.masks import morton_order, neighborhood, tiled_order
from flexjax.visualize import plot_mask

PICTURE = Path(__file__).resolve().parent.parent / "out" / "systems.png"
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class System:
    """A system that is a mask.

    Attributes:
        name: how it is called.
        paper: its number at arXiv.
        mask_mod: the mask.
        q_len, kv_len: queries and keys.
    """

    name: str
    paper: str
    mask_mod: masks.MaskMod
    q_len: int
    kv_len: int


def mask_systems(side: int, block: int) -> list[System]:
    """The masks for about side * side tokens, in blocks of `block`, so that they look alike at any size."""
    length, root = side * side, side
    tile = (2 ** (int(math.log2(block)) // 2), 2 ** -(-int(math.log2(block)) // 2))
    window = (side // 10 * 2 + 1,) * 2
    cube = (side // 4, side // 2, 8)  # the same number of tokens as frames of side // 2 x 8
    small = (max(1, cube[0] // 4 * 2 - 1), max(1, cube[1] // 4 * 2 - 1), 3)
    is_global = jnp.arange(length) < block // 8
    causal = masks.causal()
    documents = [0, *np.cumsum([length * share // 100 for share in (30, 11, 25, 34)])]
    documents[-1] = length
    parents = np.maximum((np.arange(length // 8) - 1) // 2, -1)  # a binary tree

    def system(name: str, paper: str, mask_mod: Any, kv_len: int = length) -> System:
        return System(name, paper, mask_mod, length, kv_len)

    return [
        system("Sparse Transformer, strided", "1904.10509", masks.strided(root)),
        system("Sparse Transformer, fixed", "1904.10509", masks.fixed(root, max(1, root // 16))),
        system("Longformer", "2004.05150", masks.global_window(length // 32, is_global)),
        system("BigBird", "2007.14062", masks.big_bird(length, block, seed=1)),
        system("neighbourhood, row by row", "2204.07143", masks.neighborhood_2d((side, side), window)),
        system("neighbourhood, tiles", "2504.16922", neighborhood(tiled_order((side, side), tile), window)),
        system("neighbourhood, Morton", "2504.16922", neighborhood(morton_order((side, side)), window)),
        system("neighbourhood, 3-D Morton", "2504.16922", neighborhood(morton_order(cube), small)),
        system("sliding tiles", "2502.04507", masks.sliding_tile((side, side), tile, (3, 3))),
        system("video, spatial head", "2502.01776", masks.spatial_head(16, length // 16)),
        system(
            "video, temporal head",
            "2502.01776",
            masks.temporal_head(16, length // 16, frame_major=False, reach=1),
        ),
        system("block diffusion", "2503.09573", masks.block_diffusion(length // 2, block)),
        system("documents, causal", "2107.02027", masks.document_from_offsets(documents, causal=True)),
        system("prefix in each document", "1910.10683", masks.within_documents(masks.prefix_lm(block), documents)),
        system("shared prefix", "2402.03300", masks.shared_prefix(documents)),
        system("images and text", "2204.14198", masks.image_text(images(length), length // 8), length),
        system("token tree", "2305.09781", masks.tree(parents, length - len(parents))),
        system("window and documents", "2310.06825", masks.and_masks(
            masks.sliding_window(length // 8), masks.document_from_offsets(documents), causal)),
    ]  # fmt: skip


def images(length: int) -> np.ndarray:
    """Eight images in a text: each is seen until the next one comes, the last two together."""
    starts = length * np.array([0, 1, 3, 6, 7, 10, 13, 13]) // 16
    stops = length * np.array([1, 3, 6, 7, 10, 13, 16, 16]) // 16
    return np.stack([starts, stops], axis=1)


# -- checking ---------------------------------------------------------------------------------------


def inputs(batch: int, heads: int, length: int, dim: int, seed: int = 0) -> tuple[Array, ...]:
    """Query, key and value, standard normal."""
    return tuple(jax.random.normal(jax.random.key(seed), (3, batch, heads, length, dim)))


def dense(query: Array, key: Array, value: Array, allowed: Array) -> Array:
    """Attention with the whole score matrix; rows without keys give 0."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key) / math.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(allowed, scores, -1e30), axis=-1)
    return jnp.einsum("bhqk,bhkd->bhqd", jnp.where(allowed, weights, 0.0), value)


def relative_error(x: Array, truth: Array) -> float:
    """||x - truth|| / ||truth||."""
    return float(jnp.linalg.norm(x - truth) / jnp.linalg.norm(truth))


def check_mask(system: System, block: int) -> tuple[float, float, float]:
    """(percentage of blocks skipped, percentage of pairs visible, error of the output)."""
    query, key, value = inputs(1, 2, system.q_len, 16)
    block_mask = create_block_mask(system.mask_mod, None, None, system.q_len, system.kv_len, block)
    out = jax.jit(flex_attention)(query, key, value, block_mask=block_mask)
    # The reference takes the mask_mod itself, at every pair.
    allowed = create_mask(system.mask_mod, None, None, system.q_len, system.kv_len)
    error = relative_error(out, dense(query, key, value, allowed))
    return block_mask.sparsity(), 100.0 * float(allowed.mean()), error


def check_functions() -> dict[str, tuple[str, Callable[[], float]]]:
    """Systems that are more than a mask: paper, and a function that returns the error."""
    length = 256
    query, key, value = inputs(1, 2, length, 16)
    near = jnp.abs(jnp.arange(length)[:, None] - jnp.arange(length)[None]) <= 16
    everything = jnp.ones((1, 1), bool)

    def longformer() -> float:
        wide = inputs(1, 2, length, 16, seed=1)
        out = systems.longformer_attention(query, key, value, 16, [0], global_projections=wide)
        local = dense(query, key, value, near | (jnp.arange(length) == 0)[None])
        first = (jnp.arange(length) == 0)[None, None, :, None]
        return relative_error(out, jnp.where(first, dense(*wide, everything), local))

    def reformer() -> float:
        rng = jax.random.key(2)
        out = systems.reformer_attention(query, value, rng, num_buckets=8, chunk=64)
        (bucket,) = systems.lsh_buckets(query, 8, 1, rng)
        place = jnp.argsort(jnp.argsort(bucket, axis=-1), axis=-1) // 64
        behind = place[..., :, None] - place[..., None, :]
        allowed = (bucket[..., :, None] == bucket[..., None, :]) & (behind >= 0) & (behind <= 1)
        alone = allowed.sum(axis=-1, keepdims=True) == 1
        allowed = allowed & (alone | ~jnp.eye(length, dtype=bool)[None, None])
        keys = query / jnp.linalg.norm(query, axis=-1, keepdims=True)
        return relative_error(out, dense(query, keys, value, allowed))

    def perceiver() -> float:
        parameters = systems.init_perceiver(
            jax.random.key(3), latents=32, latent_dim=32, input_dim=16, heads=2, self_layers=0
        )
        read = jax.jit(systems.perceiver, static_argnames="backend")
        return relative_error(
            read(parameters, query[0]), read(parameters, query[0], backend="reference")
        )

    def linformer() -> float:
        projection = jax.random.normal(jax.random.key(4), (32, length)) / math.sqrt(length)
        out = systems.linformer_attention(query, key, value, projection)
        projected = (jnp.einsum("ks,bhsd->bhkd", projection, x) for x in (key, value))
        return relative_error(out, dense(query, *projected, everything))

    return {
        "Longformer, own projections": ("2004.05150", longformer),
        "Reformer": ("2001.04451", reformer),
        "Perceiver": ("2103.03206", perceiver),
        "Linformer": ("2006.04768", linformer),
    }


# -- reporting --------------------------------------------------------------------------------------


def draw(chosen: list[System], file: Path) -> None:
    """Writes a picture of every mask."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    columns = 6
    rows = -(-len(chosen) // columns)
    size = 3 * columns, 3.3 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
    for ax in axes.flat:
        ax.set_visible(False)
    for system, ax in zip(chosen, axes.flat, strict=False):
        ax.set_visible(True)
        plot_mask(system.mask_mod, system.q_len, system.kv_len, ax=ax, title=system.name)
        ax.set(ylabel="")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def print_sparsity(console: Console, tokens: int) -> None:
    """The blocks of 128 x 128 that each mask skips at a real size."""
    side = math.isqrt(tokens)
    if side * side != tokens or side % 16:
        raise SystemExit("--sparsity takes the square of a multiple of 16, such as 4096 or 16384.")
    for system in mask_systems(side, 128):
        block_mask = create_block_mask(system.mask_mod, None, None, system.q_len, system.kv_len)
        console.print(f"{system.name:<30} {block_mask.sparsity():5.1f}% of blocks skipped")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sparsity", type=int, metavar="TOKENS")
    arguments = parser.parse_args()
    console = Console()
    if arguments.sparsity is not None:
        print_sparsity(console, arguments.sparsity)
        return 0
    block = 16
    chosen, functions = mask_systems(16, block), check_functions()
    if os.environ.get("FLEXJAX_SMOKE") == "1":  # every one is tested elsewhere
        chosen, functions = chosen[2::6], {"Reformer": functions["Reformer"]}
    report = Table(title=f"256 tokens in blocks of {block}, float32")
    report.add_column("system", no_wrap=True)
    for title in ("arXiv", "blocks\nskipped", "pairs\nvisible", "error"):
        report.add_column(title, justify="right")
    worst = 0.0
    for system in track(chosen, "masks", console=console, transient=True):
        skipped, visible, error = check_mask(system, block)
        shares = f"{skipped:.0f}%", f"{visible:.0f}%"
        report.add_row(system.name, system.paper, *shares, f"{error:.1e}")
        worst = max(worst, error)
    for name, (paper, check) in functions.items():
        error = check()
        report.add_row(name, paper, "", "", f"{error:.1e}")
        worst = max(worst, error)
    console.print(report)
    draw(chosen, PICTURE)
    console.print(f"Every mask, element by element: {PICTURE}")
    if not worst <= TOLERANCE:
        console.print(f"[bold red]FAILED[/]: an error of {worst:.1e} exceeds {TOLERANCE:g}.")
        return 1
    console.print(f"[bold green]OK[/]: all agree with dense attention (largest error {worst:.1e}).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
