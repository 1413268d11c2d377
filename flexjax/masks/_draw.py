"""What `python -m flexjax.masks.causal` and its siblings do: draw the file's own examples."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexjax.masks._arguments import name_of
from flexjax.visualize import mask_text, plot_mask, plot_scores, require_matplotlib, score_text

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Float


def draw_mask(*mask_mods: Callable[..., Any], q_len: int = 64, kv_len: int = 64) -> None:
    """Prints masks as text, and with `--save FILE` on the command line writes a picture of them."""
    file = _parse("mask", mask_mods)
    for mod in mask_mods:
        print(mask_text(mod, q_len, kv_len))
    if file is not None:
        _save(file, mask_mods, lambda mod, ax: plot_mask(mod, q_len, kv_len, ax=ax))


def draw_score(
    *score_mods: Callable[..., Any],
    scores: "Float[ArrayLike, 'Q KV'] | None" = None,
    q_len: int = 64,
    kv_len: int = 64,
) -> None:
    """Prints what score_mods make of `scores`, zeros by default; `--save FILE` writes a picture."""
    file = _parse("score", score_mods)
    for mod in score_mods:
        print(score_text(mod, q_len, kv_len, scores=scores))
    if file is not None:
        _save(
            file, score_mods, lambda mod, ax: plot_scores(mod, q_len, kv_len, scores=scores, ax=ax)
        )


def _parse(kind: str, mods: tuple[Callable[..., Any], ...]) -> Path | None:
    names = ", ".join(name_of(mod) for mod in mods)
    parser = argparse.ArgumentParser(description=f"Draws an example of the {kind}: {names}.")
    parser.add_argument(
        "--save", metavar="FILE", type=Path, help="also write a picture (PNG, SVG, PDF)"
    )
    return parser.parse_args().save


def _save(
    file: Path, mods: tuple[Callable[..., Any], ...], plot: Callable[[Callable[..., Any], Any], Any]
) -> None:
    pyplot = require_matplotlib()
    figure, axes = pyplot.subplots(
        1, len(mods), figsize=(4.4 * len(mods), 4.4), squeeze=False, layout="constrained"
    )
    for mod, ax in zip(mods, axes[0], strict=True):
        plot(mod, ax)
    figure.savefig(file, dpi=160)
    pyplot.close(figure)
    print(f"wrote {file}")
