"""The suite `neighborhood`: 2-D neighbourhood attention, its tokens row by row, in tiles and along Morton's curve.

All layouts compute the same attention of the same inputs, forward and backward; tokens are arranged before
timing, as a model that keeps them so would have them. Every result is put back row by row and held against
float64 before it is timed. Beside each time stands how much faster it is than row by row.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import flexjax
from benchmarks import peers, records, session
from benchmarks.inputs import Inputs
from benchmarks.peers.base import compiled_jax
from benchmarks.peers.flexjax_peer import backend_in
from benchmarks.reference import reference_gradients, reference_heads
from benchmarks.settings import QUICK_PLAN, add_output, writes
from benchmarks.timing import Plan, add_times
from benchmarks.variants import Mods, Shape, Variant, Visible
from flexjax.masks import CanvasOrder, morton_order, neighborhood, neighborhood_2d, tiled_order

BASE = "rows"


class Problem(NamedTuple):
    """A canvas, a window, and the sizes of the attention over it."""

    canvas: tuple[int, int]
    window: tuple[int, int]
    batch: int
    heads: int
    dim: int

    @property
    def shape(self) -> Shape:
        tokens = self.canvas[0] * self.canvas[1]
        name = f"{self.canvas[0]}x{self.canvas[1]} D{self.dim}"
        return Shape(name, self.batch, self.heads, self.heads, tokens, tokens, self.dim, ())


@dataclasses.dataclass(frozen=True)
class Layout:
    """An order of the tokens and the blocks over it; without an order they stand row by row."""

    block: tuple[int, int]
    tile: tuple[int, int] | None = None
    kv_tile: tuple[int, int] | None = None
    kv_shift: tuple[int, int] = (0, 0)
    morton: bool = False

    def orders(self, canvas: tuple[int, int]) -> tuple[CanvasOrder, CanvasOrder] | None:
        """The orders of queries and keys."""
        if self.morton:
            return (morton_order(canvas),) * 2
        if self.tile is None:
            return None
        order = tiled_order(canvas, self.tile)
        if self.kv_tile is None:
            return order, order
        return order, tiled_order(canvas, self.kv_tile, shift=self.kv_shift)


# Shifts put the keys' tiles where the windows of a tile of queries begin: 6 tokens before it.
LAYOUTS = {
    BASE: Layout((128, 128)),
    "tiles": Layout((128, 128), (8, 16)),
    "tiles, keys shifted": Layout((128, 128), (8, 16), (8, 16), (0, 6)),
    "tiles, narrow keys shifted": Layout((128, 64), (8, 16), (4, 16), (2, 6)),
    "squares 128x64": Layout((128, 64), (8, 8)),
    "squares 64x64": Layout((64, 64), (8, 8)),
    "strips 64x64, keys shifted": Layout((64, 64), (4, 16), (4, 16), (2, 6)),
    "morton 64x64": Layout((64, 64), morton=True),
    "morton 128x128": Layout((128, 128), morton=True),
}


class Arranged:
    """Inputs of a shape with their tokens in other orders; see `benchmarks.inputs.Inputs`."""

    def __init__(self, inputs: Inputs, orders: tuple[CanvasOrder, CanvasOrder] | None) -> None:
        self._inputs, self._orders = inputs, orders

    def in_layout(self, layout: str) -> list[tuple[Any, ...]]:
        if self._orders is None:
            return self._inputs.sets
        order, kv_order = self._orders
        put = jax.jit(lambda q, k, v: (order.arrange(q), kv_order.arrange(k), kv_order.arrange(v)))
        return [put(*triple) for triple in self._inputs.sets]

    def cotangents(self, layout: str) -> list[Any]:
        given = self._inputs.cotangents("BHLD")
        if self._orders is None:
            return given
        return [jax.jit(self._orders[0].arrange)(x) for x in given]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dims",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[64, 128],
        help="head dimensions",
    )
    parser.add_argument(
        "--layouts",
        type=lambda text: [part.strip() for part in text.split(";")],
        help=f"separated by semicolons, of {'; '.join(LAYOUTS)}; all, '{BASE}' always",
    )
    add_output(parser, "a small canvas")


def run(arguments: argparse.Namespace) -> int:
    """Runs the suite; 1 if any layout failed, else 0."""
    log = records.Log("neighborhood", arguments.out, writes(arguments))
    plan = QUICK_PLAN if arguments.quick else Plan()
    sizes = ((32, 32), (5, 5), 1, 2) if arguments.quick else ((128, 128), (13, 13), 2, 16)
    chosen = [BASE, *(n for n in arguments.layouts or LAYOUTS if n != BASE)]
    failed = False
    for dim in arguments.dims:
        problem = Problem(*sizes, dim)
        inputs = Inputs(problem.shape, "bfloat16")
        for backward in (False, True):
            rows = log.add(measure(problem, inputs, chosen, plan, backward))
            print(summary(rows), flush=True)
            failed |= any("failure" in row for row in rows)
    log.close()
    return int(failed)


def measure(
    problem: Problem, inputs: Inputs, names: Sequence[str], plan: Plan, backward: bool
) -> list[dict[str, Any]]:
    """A row for each layout."""
    shape, variant = problem.shape, row_variant(problem)
    if backward:
        cotangent = inputs.cotangents("BHLD")[0]
        references = reference_gradients(variant, shape, inputs.sets[0], cotangent)
    else:
        references = reference_heads(variant, shape, inputs.sets[0])
    check = session.gate_check(references)
    rows: dict[str, dict[str, Any]] = {}
    contenders: dict[str, peers.Contender] = {}
    for name in names:
        row = rows[name] = {
            "peer": name,
            "variant": f"{variant.name} {'backward' if backward else 'forward'}",
            **shape.sizes,
            "dtype": "bfloat16",
        }
        try:
            contender = prepare(problem, inputs, LAYOUTS[name], variant, backward)
            row |= {"block_size": contender.block_size, "density": contender.density}
            row |= {"config": contender.config | {"backend": contender.peer}}
            row["compile_s"] = round(contender.compile_s or 0.0, 3)
            row["error"], wrong = check(contender, contender.call(0))
        except Exception as error:
            row["failure"] = records.failure(error)
            continue
        if wrong is None:
            contenders[name] = contender
        else:
            row["failure"] = wrong
    add_times(rows, contenders, plan)
    return list(rows.values())


def row_variant(problem: Problem) -> Variant:
    """The attention row by row, for the reference."""
    mask = neighborhood_2d(problem.canvas, problem.window)
    # The reference applies a mod to whole arrays of indices, which this one takes as well as scalars.
    return Variant(
        f"neighborhood_{problem.window[0]}x{problem.window[1]}",
        lambda xp, captures, shape: Mods(mask=mask),
        lambda shape, q: Visible(np.zeros_like(q), np.full_like(q, shape.kv_len)),
    )


def prepare(
    problem: Problem, inputs: Inputs, layout: Layout, variant: Variant, backward: bool
) -> peers.Contender:
    """Compiles the attention of one layout."""
    orders = layout.orders(problem.canvas)
    if orders is None:
        mask_mod = neighborhood_2d(problem.canvas, problem.window)
        lengths = (problem.shape.q_len,) * 2
    else:
        mask_mod = neighborhood(orders[0], problem.window, kv_order=orders[1])
        lengths = orders[0].length, orders[1].length
    block_mask = jax.jit(
        lambda: flexjax.create_block_mask(mask_mod, None, None, *lengths, layout.block)
    )()

    def attend(query: Any, key: Any, value: Any, block_mask: Any) -> Any:
        return flexjax.flex_attention(query, key, value, block_mask=block_mask)

    visited = float(np.mean(block_mask.kv_num_blocks + block_mask.full_kv_num_blocks))
    case = peers.Case(problem.shape, variant, Arranged(inputs, orders), backward=backward)
    contender = compiled_jax(
        backend_in,
        attend,
        case,
        (block_mask,),
        layout="BHLD",
        block_size=block_mask.block_size,
        density=1.0 - block_mask.sparsity() / 100.0,
        config=dataclasses.asdict(layout) | {"keys_a_query": round(visited * layout.block[1], 1)},
    )
    if orders is None:
        return contender
    return dataclasses.replace(contender, heads=functools.partial(_restored, contender, orders))


def _restored(
    contender: peers.Contender,
    orders: tuple[CanvasOrder, CanvasOrder],
    result: Any,
    pairs: Sequence[tuple[int, int]],
) -> list[np.ndarray]:
    """The checked heads of a result, row by row: outputs, or gradients of query, key and value."""
    heads = contender.heads(result, pairs)
    each = (orders[0], orders[1], orders[1]) if isinstance(result, tuple) else (orders[0],)
    return [
        np.asarray(each[i % len(each)].restore(jnp.asarray(head))) for i, head in enumerate(heads)
    ]


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table; `faster` is against row by row."""
    base = next((row.get("ms") for row in rows if row["peer"] == BASE), None)
    lines = [f"{rows[0]['variant']}, D{rows[0]['D']}"]
    for row in rows:
        start = f"  {row['peer']:<28}"
        if "ms" not in row:
            lines.append(f"{start} {row.get('failure', 'not timed')}")
            continue
        faster = f"{base / row['ms']:6.2f}x" if base else "      -"
        blocks = "x".join(map(str, row["block_size"]))
        keys = row["config"]["keys_a_query"]
        lines.append(
            f"{start} {row['ms']:9.4f} ms {faster}  blocks {blocks:<8} {keys:7.0f} keys a query, "
            f"{row['config']['backend']}"
        )
    return "\n".join(lines)
