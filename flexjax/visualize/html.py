"""Block masks as HTML, for notebooks: an inline SVG that needs neither matplotlib nor a script."""

import html
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Integer

from flexjax.block_lists import EMPTY
from flexjax.visualize.pictures import COLOURS, STATE_NAMES, merged_states

if TYPE_CHECKING:
    from flexjax.block_mask import BlockMask

_SIDE = 192  # pixels of a picture's longer side
_MOST_CELLS = 64
_MOST_PICTURES = 4


def blocks_html(block_mask: "BlockMask") -> str:
    """A concrete BlockMask as HTML: its sizes, a picture of its first heads, and what the colours mean.

    Blocks beyond 64 in a direction are merged as in `blocks_text`.
    """
    states = np.asarray(block_mask.block_states())
    pairs = list(np.ndindex(*states.shape[:2]))
    pictures = [
        f'<figure style="display:inline-block;margin:0 12px 0 0">{_svg(states[b, h])}'
        f'<figcaption style="font-size:80%">batch {b}, head {h}</figcaption></figure>'
        for b, h in pairs[:_MOST_PICTURES]
    ]
    rest = len(pairs) - len(pictures)
    title = (
        f"BlockMask {block_mask.shape}, blocks of {block_mask.block_size[0]} x "
        f"{block_mask.block_size[1]}, {block_mask.sparsity():.2f}% skipped"
    )
    legend = " ".join(
        f'<span style="color:{COLOURS[state]};-webkit-text-stroke:1px #bbbbbb">&#9632;</span> {name}'
        for state, name in STATE_NAMES.items()
        if (states == state).any()
    )
    more = f"<div>and {rest} more</div>" if rest > 0 else ""
    return (
        f'<div><div style="margin-bottom:4px">{html.escape(title)}</div>{"".join(pictures)}{more}'
        f'<div style="font-size:80%">{legend}</div></div>'
    )


def _svg(states: Integer[np.ndarray, "R C"]) -> str:
    """One head's blocks; neighbours of one state in a row are one rectangle."""
    cells = merged_states(states, _MOST_CELLS, _MOST_CELLS)
    rows, columns = cells.shape
    longer = max(rows, columns)
    shapes = []
    for row, line in enumerate(cells):
        starts = np.flatnonzero(np.r_[True, line[1:] != line[:-1]])
        for start, stop in zip(starts, np.r_[starts[1:], columns], strict=True):
            if line[start] != EMPTY:
                colour = COLOURS[line[start]]
                shapes.append(
                    f'<rect x="{start}" y="{row}" width="{stop - start}" height="1" fill="{colour}"/>'
                )
    width, height = (max(8, round(_SIDE * n / longer)) for n in (columns, rows))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" shape-rendering="crispEdges">'
        f'<rect width="{columns}" height="{rows}" fill="{COLOURS[EMPTY]}"/>{"".join(shapes)}</svg>'
    )
