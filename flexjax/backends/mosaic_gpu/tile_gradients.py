"""What the backward pass computes on one tile of scores: probabilities and cotangents, from the matrix products.

With x = q k^T and s = scale x, y = score_mod(s) and the row's logsumexp and D (see the derivation in
backends/xla.py):

    p  = 2^(log2(e) y - log2(e) lse)         0 where the mask hides the score
    dy = p (dP - D)                          dP = dO V^T
    ds = dy (dy/ds)                          and, for every element a that the mod reads, dy (dy/da)

What a mod yields where p is 0, infinite or NaN even, is dropped by selection: there is no mask in full tiles, but
a score of -inf hides a position as well.

Tiles are [queries, keys], or transposed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu import emit, lanes, placement, registers
from flexjax.backends.mosaic_gpu.lanes import F32, Lane
from flexjax.backends.mosaic_gpu.registers import TILE
from flexjax.backends.mosaic_gpu.schedule import moved_inside
from flexjax.backends.mosaic_gpu.simplify import Scores, simplify
from flexjax.backends.mosaic_gpu.softmax import LOG2_E
from flexjax.mods import graph as graphs
from flexjax.mods.gradient import Gradient
from flexjax.mods.graph import Graph
from flexjax.problem import Problem

# Operations whose result is finite for finite operands, in the range that scores have.
_TAME = frozenset(
    ("input", "const", "add", "sub", "mul", "neg", "square", "tanh", "logistic", "sin", "cos", "convert")
)  # fmt: skip


class Place(NamedTuple):
    """Where a tile lies: batch row, query head, first query and first key."""

    b: Any
    h: Any
    query: Any
    key: Any


class Probabilities(NamedTuple):
    """What is known of a tile before dP is.

    Attributes:
        p: probabilities, float32.
        weight: p (dy/ds) where nothing else needs dy, else dy/ds; None for a derivative of 1.
        scores: scaled scores, for the derivatives of what the mod reads; None if they do not need them.
    """

    p: Any
    weight: Any
    scores: Any


class Cotangents(NamedTuple):
    """Cotangents of a tile.

    Attributes:
        ds: of the scaled scores, float32.
        loads: dy (dy/da) for every load of the score_mod's gradient, float32.
    """

    ds: Any
    loads: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class TileGradients:
    """The backward pass's arithmetic on tiles of one size.

    Attributes:
        problem: the attention.
        q_size, kv_size: size of the tiles.
        padded_queries, padded_keys: numbers of queries and keys that all tiles together reach over.
        transposed: whether tiles are [keys, queries].
        queries_overhang: whether tiles may hold queries past the end. Their logsumexp is +inf.
        keys_overhang: whether masked tiles may hold keys past the end.
        approx_math, interpret: as in the kernel's configuration.
    """

    problem: Problem
    q_size: int
    kv_size: int
    padded_queries: int
    padded_keys: int
    transposed: bool
    queries_overhang: bool
    keys_overhang: bool
    approx_math: bool
    interpret: bool

    @property
    def shape(self) -> tuple[int, int]:
        return (self.kv_size, self.q_size) if self.transposed else (self.q_size, self.kv_size)

    @property
    def query_layout(self) -> Any:
        """Layout of one value a query."""
        return TILE.reduce(0 if self.transposed else 1)

    def by_query(self, values: Any) -> Any:
        """One value a query, over the whole tile."""
        return lax.broadcast_in_dim(values, self.shape, [1 if self.transposed else 0])

    @property
    def gradient(self) -> Gradient | None:
        score = self.problem.score
        return None if score is None else score.gradient

    @functools.cached_property
    def _scores(self) -> Scores:
        """How y comes from x where dy/ds is 1, so that nothing else reads s."""
        score = self.problem.score
        return simplify(None if score is None else score.forward, self.problem.scale)

    @property
    def _unit_derivative(self) -> bool:
        return self.gradient is None or _is_one(self.gradient.graph, 1)

    # -- before dP is known ---------------------------------------------------------------------

    def allowed(self, place: Place, mask_captures: Any) -> Any:
        """What the mask allows in a masked tile; None without a mask."""
        mask = self.problem.mask
        if mask is None:
            return None
        tile = self._inputs(None, place)
        return emit.on_tile(mask, mask_captures, tile)[0]

    def probabilities(
        self,
        raw: Any,
        lse: Any,
        place: Place,
        score_captures: Any,
        allowed: Any,
        masked: bool,
        first_key: Any = None,
    ) -> Probabilities:
        """Probabilities from the products x.

        Args:
            raw: the products.
            lse: the logsumexp, one value a query, in units of log2.
            place: where the tile lies.
            score_captures: what the score_mod reads.
            allowed: what the mask allows, or None.
            masked: whether positions may be hidden.
            first_key: first key for telling which keys are past the end, where it is not that of `place`.
        """
        gradient = self.gradient
        needs_scores = gradient is not None and any(
            "score" in gradient.graph.nodes[gradient.graph.outputs[load.derivative]].depends
            for load in gradient.loads
        )
        scaled = raw * self.problem.scale if needs_scores or not self._unit_derivative else None
        scores = self._scores
        if self._unit_derivative:
            graph, x = scores.graph, raw if scores.before == 1.0 else raw * scores.before
            factor = scores.after * LOG2_E
        else:
            assert gradient is not None, "the identity's derivative is 1"
            graph, x, factor = gradient.graph.with_outputs(0, 1), scaled, LOG2_E
        if graph is None:
            tiles = [self._exponentials(x, lse, factor)]
        elif self.interpret:
            tiles = emit.on_tile(graph, score_captures, self._inputs(x, place))
            tiles[0] = self._exponentials(tiles[0], lse, factor)
            if self._weighted:
                tiles[1] = self._times(tiles[0], tiles[0], tiles[1], graph, 1)
        else:
            tile = self._inputs(x, place)
            tiles = self._elementwise(graph, factor, score_captures, tile, lse)
        hidden = 2 if self._weighted else 1
        tiles = [
            *self._hide(tiles[:hidden], lse, place, allowed, masked, first_key),
            *tiles[hidden:],
        ]
        return Probabilities(
            tiles[0], tiles[1] if len(tiles) > 1 else None, scaled if needs_scores else None
        )

    @property
    def _weighted(self) -> bool:
        """Whether the derivative is multiplied by p at once, because nothing else needs dy."""
        return not self._unit_derivative and self.gradient is not None and not self.gradient.loads

    def _elementwise(
        self, graph: Graph, factor: float, captures: Any, tile: emit.TileInputs, lse: Any
    ) -> list[Any]:
        """p, and the derivative or p times it, from the graph's y and dy/ds; one element after another."""

        def of_element(y: Lane, *rest: Lane) -> tuple[Lane, ...]:
            *derivative, shift = rest
            exponent = lanes.call("fma", y, lanes.const(factor, F32), -shift)
            p = lanes.call("exp2.approx", exponent)
            if not self._weighted:
                return (p, *derivative)
            weight = p * derivative[0]
            if not _is_tame(graph, 1):
                weight = lanes.select(lanes.compare("eq", p, 0.0), 0.0, weight)
            return p, weight

        count = len(graph.outputs)
        return list(emit.map_on_tile(of_element, count, graph, captures, tile, (lse, graphs.ROW)))

    def _hide(
        self, tiles: list[Any], lse: Any, place: Place, allowed: Any, masked: bool, first_key: Any
    ) -> list[Any]:
        """Probabilities, and what has them as a factor, with 0 where a position does not count."""
        conditions = []
        if self.queries_overhang and self.problem.score is not None:
            # Whatever the mod makes of queries that do not exist.
            conditions.append(self.by_query(lse) < jnp.inf)
        if masked and allowed is not None:
            conditions.append(allowed)
        if masked and self.keys_overhang:
            offset = plgpu.broadcasted_iota(
                jnp.int32, self.shape, 0 if self.transposed else 1, layout=TILE
            )
            end = self.problem.kv_len - (place.key if first_key is None else first_key)
            conditions.append(offset < end)
        for condition in conditions:
            if condition is allowed and not self.interpret:
                tiles = [registers.zero_unless_allowed(tile, condition) for tile in tiles]
            else:
                tiles = [jnp.where(condition, tile, 0.0) for tile in tiles]
        return tiles

    def _exponentials(self, y: Any, lse: Any, factor: float) -> Any:
        """2^(factor y - lse)."""
        if self.interpret:
            return jnp.exp2(y * factor - self.by_query(lse))
        axis = 1 if self.transposed else 0

        @plgpu.inline_mgpu(
            arg_types=(TILE, self.query_layout),
            return_type=plgpu.ShapeDtypeStruct(self.shape, jnp.float32, TILE),
        )
        def exponentials(_: Any, y: Any, lse: Any) -> Any:
            scores, shifts = placement.unpack(y, F32), placement.unpack(lse, F32)
            c = lanes.const(factor, F32)

            def value(offsets: placement.Offsets) -> Lane:
                exponent = lanes.call("fma", scores[offsets], c, -shifts[(offsets[axis],)])
                return lanes.call("exp2.approx", exponent)

            return placement.pack(value, y.layout, self.shape, F32)

        return exponentials(y, lse)

    # -- with dP --------------------------------------------------------------------------------

    def cotangents(
        self, known: Probabilities, dp: Any, d: Any, place: Place, score_captures: Any
    ) -> Cotangents:
        """Cotangents from dP and D, which has one value a query."""
        p, weight, scores = known
        gradient = self.gradient
        difference = dp - self.by_query(d)
        if gradient is None or not gradient.loads:
            return Cotangents((p if weight is None else weight) * difference, ())
        dy = p * difference
        ds = dy if weight is None else self._times(p, dy, weight, gradient.graph, 1)
        graph, loads = gradient.graph, []
        for load in gradient.loads:
            if _is_one(graph, load.derivative):
                loads.append(dy)
                continue
            wanted = graph.with_outputs(load.derivative)
            (derivative,) = emit.on_tile(wanted, score_captures, self._inputs(scores, place))
            loads.append(self._times(p, dy, derivative, graph, load.derivative))
        return Cotangents(ds, tuple(loads))

    def _times(self, p: Any, value: Any, derivative: Any, graph: Graph, output: int) -> Any:
        """The product `value * derivative`, 0 where p is."""
        product = value * derivative
        return product if _is_tame(graph, output) else jnp.where(p == 0.0, 0.0, product)

    # -- mods -----------------------------------------------------------------------------------

    def load_indices(self, load: int, place: Place, score_captures: Any) -> list[emit.TileValue]:
        """Indices of the element that a load reads."""
        assert self.gradient is not None, "loads come from a gradient"
        graph = self.gradient.graph
        outputs = tuple(graph.outputs[o] for o in self.gradient.loads[load].indices)
        # With all of the graph's nodes, which show that these are indices, to be kept inside the array.
        wanted = dataclasses.replace(graph, outputs=outputs)
        return emit.evaluate_on_tile(wanted, score_captures, self._inputs(None, place))

    def _inputs(self, scores: Any, place: Place) -> emit.TileInputs:
        # What the mods read lies within arrays for tiles wholly beyond the end, too.
        q_len, kv_len = self.problem.q_len, self.problem.kv_len
        return emit.TileInputs(
            score=scores,
            b=place.b,
            h=place.h,
            q_start=moved_inside(place.query, q_len, self.q_size, self.padded_queries),
            kv_start=moved_inside(place.key, kv_len, self.kv_size, self.padded_keys),
            q_size=self.q_size,
            kv_size=self.kv_size,
            q_limit=q_len,
            kv_limit=kv_len,
            transposed=self.transposed,
            approx_math=self.approx_math,
            interpret=self.interpret,
        )


def _is_one(graph: Graph, output: int) -> bool:
    node = graph.nodes[graph.outputs[output]]
    return node.op == "const" and node["value"].value == 1.0


def _is_tame(graph: Graph, output: int) -> bool:
    """Whether an output is finite wherever the score is."""
    pending = [graph.outputs[output]]
    while pending:
        node = graph.nodes[pending.pop()]
        if node.op not in _TAME or (node.op == "const" and not abs(node["value"].value) < 1e30):
            return False
        pending.extend(node.args)
    return True
