"""Biases of nodes of a graph: by distance along the graph, and by the edges of a shortest path."""

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from flexjax.masks._arguments import float_array, integer_array, known_values, named
from flexjax.scores._types import ScoreMod


def graph_distance_bias(
    table: Float[ArrayLike, "H distances"],
    distance: Int[ArrayLike, "N N"] | Int[ArrayLike, "B N N"],
) -> ScoreMod:
    """Spatial encoding: `score + table[h, distance[b, q_idx, kv_idx]]`.

    Args:
        table: a learned bias for every head and distance, shape (H, distances); possibly traced, and
            differentiable. Longer distances share its last entry.
        distance: hops of the shortest path between two nodes, shape (N, N), or (B, N, N); possibly
            traced. Give unreachable pairs a number of their own, such as the last one of the table, or hide
            them by a mask. Negative numbers count as 0.

    Returns:
        A score_mod named `graph_distance_bias`.

    Raises:
        TypeError: if `table` is not floating point or `distance` not made of integers.
        ValueError: if one of them has another rank.

    Source: Ying et al., "Do Transformers Really Perform Bad for Graph Representation?" (Graphormer),
    arXiv 2106.05234, section 3.1.2.
    """
    where = "graph_distance_bias()"
    weights = float_array(where, "table", table, {2: "(H, distances)"})
    hops = integer_array(where, "distance", distance, {2: "(N, N)", 3: "(B, N, N)"})
    last = weights.shape[1] - 1

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        found = hops[q_idx, kv_idx] if hops.ndim == 2 else hops[b, q_idx, kv_idx]
        entry = jnp.clip(found.astype(jnp.int32), 0, last)
        return score + weights[h, entry].astype(score.dtype)

    return named(score_mod, "graph_distance_bias")


def graph_edge_bias(
    table: Float[ArrayLike, "H places types"],
    edges: Int[ArrayLike, "N N places"] | Int[ArrayLike, "B N N places"],
) -> ScoreMod:
    """Edge encoding: the mean of `table[h, i, edges[b, q_idx, kv_idx, i]]` over a path's edges i.

    Args:
        table: a learned bias for every head, place along the path and type of edge, shape
            (H, places, types): the products of edge features and weights, summed beforehand. Possibly
            traced, and differentiable.
        edges: the type of each edge of the shortest path between two nodes, shape (N, N, places), or
            (B, N, N, places); -1 behind the path's end. A pair without a path has a bias of 0. Possibly
            traced: then types that the table lacks count as its last one.

    Returns:
        A score_mod named `graph_edge_bias`.

    Raises:
        TypeError: if `table` is not floating point or `edges` not made of integers.
        ValueError: if one of them has another rank, they differ in places, or an edge has a type that the
            table lacks.

    Source: Ying et al., Graphormer, arXiv 2106.05234, section 3.1.3.
    """
    where = "graph_edge_bias()"
    weights = float_array(where, "table", table, {3: "(H, places, types)"})
    shapes = {3: "(N, N, places)", 4: "(B, N, N, places)"}
    types = integer_array(where, "edges", edges, shapes).astype(jnp.int32)
    places = types.shape[-1]
    if weights.shape[1] != places:
        raise ValueError(
            f"{where}: table and edges must agree in the number of places along a path, but their shapes are "
            f"{weights.shape} and {types.shape}."
        )
    known = known_values(edges)
    if known is not None and known.size and known.max() >= weights.shape[2]:
        raise ValueError(
            f"{where}: types of edges must be less than {weights.shape[2]}, the number that table has, but one "
            f"is {known.max()}."
        )

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        total, count = jnp.zeros_like(score), jnp.zeros_like(score)
        for i in range(places):
            kind = types[q_idx, kv_idx, i] if types.ndim == 3 else types[b, q_idx, kv_idx, i]
            there = kind >= 0
            bias = weights[h, i, jnp.maximum(kind, 0)].astype(score.dtype)
            total = total + jnp.where(there, bias, 0)
            count = count + there.astype(score.dtype)
        return score + total / jnp.maximum(count, 1)

    return named(score_mod, "graph_edge_bias")


if __name__ == "__main__":
    import numpy as np

    from flexjax.masks._draw import draw_score

    ahead = np.subtract.outer(np.arange(64), np.arange(64)) % 64
    draw_score(graph_distance_bias(-np.arange(20.0)[None], np.minimum(ahead, 64 - ahead)))
