"""A mod graph as the straight-line program that every thread of a warpgroup runs on its elements of a tile.

Nodes are computed at their own rank, on the rows, columns and elements that a thread holds. Equal operands
give one result, so whatever depends on q - kv alone is computed once a diagonal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic import gpu as mgpu

from flexjax.backends.mosaic_gpu import lanes, loads, placement, special, tile_ops
from flexjax.backends.mosaic_gpu.index_forms import Form, Forms
from flexjax.backends.mosaic_gpu.lanes import F32, I32, Lane
from flexjax.backends.mosaic_gpu.placement import Offsets
from flexjax.mods import intervals
from flexjax.mods.graph import COLUMN, ROW, SCALAR, TILE, Graph, Node
from flexjax.mods.intervals import Interval
from flexjax.mods.ops import COMPARISONS, OPS

assert special  # fills tile_ops.TABLE

# Integers of at most this magnitude are exact in float32.
_FLOAT32_EXACT = 2**24

# Bounds of indices are never taken to be lower than this, whatever the limits of the tile say.
_LENGTH_FLOOR = 2**21

Item = Lane | Form
Emitter = Callable[[Sequence[Item]], Item]


@dataclasses.dataclass(frozen=True)
class TileType:
    """What is static about the tiles that a program runs on; see `emit.TileInputs`."""

    q_size: int
    kv_size: int
    q_limit: int
    kv_limit: int
    layout: Any
    approx: bool
    transposed: bool = False

    def axis_of(self, rank: str) -> int:
        """The axis of a tile along which values of rank `row` (one a query) or `column` (one a key) vary."""
        return int((rank == COLUMN) != self.transposed)

    def shape_of(self, rank: str) -> tuple[int, ...]:
        sizes = {SCALAR: (), ROW: (self.q_size,), COLUMN: (self.kv_size,)}
        whole = (self.q_size, self.kv_size)
        return sizes.get(rank, whole[::-1] if self.transposed else whole)

    def layout_of(self, rank: str) -> Any:
        """Layout of values of a rank; scalars have none."""
        if rank == SCALAR:
            return None
        return self.layout if rank == TILE else self.layout.reduce(1 - self.axis_of(rank))


@dataclasses.dataclass(frozen=True)
class Program:
    """What `plgpu.inline_mgpu` inlines: a value rather than a closure, so that equal kernels trace equally.

    Called with the scalars that `scalars` names, the scores if the graph depends on them, the values of the
    `given` nodes (see keys_ahead.py), and the captures.
    """

    graph: Graph
    tile: TileType

    @property
    def scalars(self) -> tuple[str, ...]:
        """The scalar inputs, in order: of `b`, `h`, `q_start`, `kv_start` those that the graph depends on."""
        names = {"b": "b", "h": "h", "q": "q_start", "kv": "kv_start"}
        return tuple(names[i] for i in ("b", "h", "q", "kv") if i in self._inputs)

    @property
    def has_score(self) -> bool:
        return "score" in self._inputs

    @property
    def givens(self) -> int:
        """How many values are given."""
        return sum(node.op == "given" for node in self.graph.nodes)

    @functools.cached_property
    def _inputs(self) -> frozenset[str]:
        return self.graph.depends

    def start(self, args: Sequence[Any], on_demand: bool = False) -> Run:
        """Emits the program on its arguments; `on_demand`, what is computed once a score only when asked for."""
        scalars = {
            name: Lane(array.registers.item(), I32)
            for name, array in zip(self.scalars, args, strict=False)
        }
        rest = args[len(scalars) :]
        score = rest[0] if self.has_score else None
        rest = rest[self.has_score :]
        given, refs = rest[: self.givens], rest[self.givens :]
        return Run(self, scalars, score, given, refs, on_demand)

    def __call__(self, ctx: Any, *args: Any) -> list[mgpu.FragmentedArray]:
        del ctx
        run = self.start(args)
        outputs = []
        for position in self.graph.outputs:
            node = self.graph.nodes[position]
            layout = self.tile.layout_of(node.rank)
            outputs.append(
                placement.pack(
                    functools.partial(run.output, position),
                    layout and layout.to_mgpu(),
                    self.tile.shape_of(node.rank),
                    tile_ops.carrier(node.dtype),
                )
            )
        return outputs


class _OnDemand(dict[Offsets, Item]):
    """Values that are computed when they are first asked for."""

    def __init__(self, compute: Callable[[Offsets], Item]):
        super().__init__()
        self._compute = compute

    def __missing__(self, offsets: Offsets) -> Item:
        self[offsets] = value = self._compute(offsets)
        return value


class Run:
    """One emission of a program."""

    def __init__(
        self,
        program: Program,
        scalars: dict[str, Lane],
        score: mgpu.FragmentedArray | None,
        given: Sequence[mgpu.FragmentedArray],
        refs: Sequence[Any],
        on_demand: bool,
    ):
        self.on_demand = on_demand
        self.graph, self.tile, self.refs = program.graph, program.tile, refs
        self.forms = Forms()
        self.scalars = scalars
        self.score = None if score is None else placement.unpack(score, F32)
        self.given = [placement.unpack(x, F32) for x in given]
        layout, shape = self.tile.layout.to_mgpu(), self.tile.shape_of(TILE)
        places = [o for register in placement.static_offsets(layout, shape) for o in register]
        self.offsets: dict[str, list[Offsets]] = {SCALAR: [()], TILE: sorted(places)}
        for rank in (ROW, COLUMN):
            axis = self.tile.axis_of(rank)
            self.offsets[rank] = [(i,) for i in sorted({o[axis] for o in places})]
        # Pairs of neighbouring columns start at even ones.
        self._alignment = layout.vector_length if (0, 1) in places else 1
        self._origin = placement.origin(layout, shape)
        self._clamped = self._index_cone()
        self._ranges = self._integer_ranges()
        self._moved: dict[tuple[int, int], Form] = {}
        self.values: list[dict[Offsets, Item]] = []
        live = self._live()
        for position, node in enumerate(self.graph.nodes):
            self.values.append(self._node(position, node) if position in live else {})

    def output(self, position: int, offsets: Offsets) -> Lane:
        """The value of an output for one element."""
        return self._lane(self.values[position][offsets])

    def _lane(self, item: Item) -> Lane:
        return self.forms.lane(item) if isinstance(item, Form) else item

    # -- what to compute ------------------------------------------------------------------------

    def cone(self, roots: set[int]) -> set[int]:
        """The nodes that these depend on, and these."""
        cone = set(roots)
        for position in reversed(range(len(self.graph.nodes))):
            if position in cone:
                cone.update(self.graph.nodes[position].args)
        return cone

    def _live(self) -> set[int]:
        return self.cone(set(self.graph.outputs))

    def _index_cone(self) -> set[int]:
        """Nodes that an index of a load depends on: those must see no query or key past the end."""
        return self.cone({a for node in self.graph.nodes if node.op == "load" for a in node.args})

    def _integer_ranges(self) -> list[Interval | None]:
        """What int32 nodes can be, from indices that reach over their limits by a tile at most."""
        ranges: list[Interval | None] = []
        limits = {"q": (self.tile.q_limit, ROW), "kv": (self.tile.kv_limit, COLUMN)}
        for node in self.graph.nodes:
            found = None
            if node.op == "const" and node.dtype == I32:
                found = (int(node["value"].value),) * 2
            elif node.op == "input" and node["name"] in limits:
                limit, rank = limits[node["name"]]
                size = self.tile.shape_of(TILE)[self.tile.axis_of(rank)]
                found = 0, max(limit, _LENGTH_FLOOR) + size
            elif node.op in OPS and node.dtype == I32:
                found = intervals.result_interval(node.op, [ranges[a] for a in node.args])
            wraps = found is not None and max(-found[0] - 1, found[1]) >= 2**31
            ranges.append(None if wraps else found)
        return ranges

    # -- nodes ----------------------------------------------------------------------------------

    def _node(self, position: int, node: Node) -> dict[Offsets, Item]:
        match node.op:
            case "input":
                return self._input(position, node["name"])
            case "const":
                value = node["value"].value
                if node.dtype == I32:
                    return {(): self.forms.constant(int(value))}
                return {(): lanes.const(value, tile_ops.carrier(node.dtype))}
            case "load":
                return self._load(node)
            case "given":
                return dict(self.given[node["number"]])
            case _:
                return self._elementwise(position, node)

    def _input(self, position: int, name: str) -> dict[Offsets, Item]:
        if name == "score":
            assert self.score is not None, "a mask_mod has no score"
            return dict(self.score)
        if name in ("b", "h"):
            return {(): self.forms.base(self.scalars[name])}
        rank, limit = (ROW, self.tile.q_limit) if name == "q" else (COLUMN, self.tile.kv_limit)
        axis = self.tile.axis_of(rank)
        size = self.tile.shape_of(TILE)[axis]
        bound = max(limit, _LENGTH_FLOOR)
        alignment = self._alignment if axis == 1 else 1
        start = self.forms.base(self.scalars[f"{name}_start"], bound, size, natural=True)
        # The thread that begins last holds the last element.
        most = size - 1 - max(o[0] for o in self.offsets[rank])
        origin = self.forms.base(self._origin[axis], most, alignment, natural=True)
        first = self.forms.add(start, origin)
        values: dict[Offsets, Item] = {}
        for offset in self.offsets[rank]:
            form = self.forms.add(first, self.forms.constant(offset[0]))
            if position in self._clamped and limit % size:
                inside = lanes.minimum(self.forms.lane(form), limit - 1)
                form = self.forms.base(inside, bound)
            values[offset] = form
        return values

    def _argument(self, position: int, offsets: Offsets) -> Item:
        """An operand's value for one element of the result, whose rank is the same or higher."""
        rank = self.graph.nodes[position].rank
        if rank == SCALAR:
            return self.values[position][()]
        if len(offsets) == 2 and rank != TILE:
            offsets = (offsets[self.tile.axis_of(rank)],)
        return self.values[position][offsets]

    def _load(self, node: Node) -> dict[Offsets, Item]:
        places = self.offsets[node.rank]
        indices = []
        for argument in node.args:
            items = [self._argument(argument, o) for o in places]
            uniform = self.graph.nodes[argument].rank == SCALAR
            indices.append(loads.Index([self._form(i) for i in items], uniform))
        capture = node["capture"]
        values = loads.load(self.refs[capture], self.graph.captures[capture], indices, self.forms)
        values = values if len(values) == len(places) else values * len(places)
        return dict(zip(places, values, strict=True))

    def _form(self, item: Item) -> Form:
        return item if isinstance(item, Form) else self.forms.base(item)

    def clamped(self, form: Form, most: int) -> Form:
        """A form moved between -most and most; the same for the same form."""
        key = id(form), most
        if key not in self._moved:
            lane = lanes.minimum(lanes.maximum(self.forms.lane(form), -most), most)
            self._moved[key] = self.forms.base(lane, most)
        return self._moved[key]

    def _elementwise(self, position: int, node: Node) -> dict[Offsets, Item]:
        fused = self._fused(node) or self._distance(node)
        sources, emit = fused or (node.args, self._plain(node))
        known = self._ranges[position]
        made: dict[tuple[int, ...], Item] = {}

        def value(offsets: Offsets) -> Item:
            args = [self._argument(a, offsets) for a in sources]
            key = tuple(map(id, args))
            if key not in made:
                result = emit(args)
                if known is not None and isinstance(result, Lane):
                    bound = max(abs(known[0]), abs(known[1]))
                    result = self.forms.base(result, bound, natural=known[0] >= 0)
                made[key] = result
            return made[key]

        if self.on_demand and node.rank == TILE:
            return _OnDemand(value)
        return {offsets: value(offsets) for offsets in self.offsets[node.rank]}

    def _plain(self, node: Node) -> Emitter:
        nodes = [self.graph.nodes[a] for a in node.args]
        operands = tile_ops.Operands(
            dict(node.params),
            nodes[0].dtype,
            tuple(n["value"].value if n.op == "const" else None for n in nodes),
            tuple(n.rank != node.rank for n in nodes),
            self.tile.approx,
            self._natural(node.args[0]),
        )

        def emit(args: Sequence[Item]) -> Item:
            form = self._with_forms(node, args)
            if form is not None:
                return form
            return tile_ops.apply(node.op, operands, node.dtype, *map(self._lane, args))

        return emit

    def _natural(self, position: int) -> bool:
        """Whether a node is an int32 that is known not to be negative."""
        known = self._ranges[position]
        return known is not None and known[0] >= 0

    def _fused(self, node: Node) -> tuple[Sequence[int], Emitter] | None:
        """Computes x y + z and its kin in one instruction, if the node is one of these.

        LLVM would fuse only products that have no other use, as products on diagonals do.
        """
        if node.op not in ("add", "sub") or node.dtype != F32:
            return None
        operands = [self.graph.nodes[a] for a in node.args]
        products = [
            i
            for i, (a, o) in enumerate(zip(node.args, operands, strict=True))
            if o.op == "mul" and (o.rank == node.rank or self._only_added(a, node))
        ]
        if not products:
            return None
        number = products[0]
        negate_product = node.op == "sub" and number == 1
        negate_other = node.op == "sub" and number == 0

        def emit(args: Sequence[Item]) -> Item:
            x, y, z = map(self._lane, args)
            return lanes.call("fma", -x if negate_product else x, y, -z if negate_other else z)

        return (*operands[number].args, node.args[1 - number]), emit

    def _distance(self, node: Node) -> tuple[Sequence[int], Emitter] | None:
        """Computes the float32 of |x| as the size of the float32 of x, which the elements of a diagonal share.

        The size itself costs nothing then where it is an operand.
        """
        if node.op != "convert" or node.dtype != F32:
            return None
        inner = self.graph.nodes[node.args[0]]
        if inner.op != "abs" or inner.dtype != I32:
            return None
        size, convert = self._plain(inner), self._plain(node)

        def emit(args: Sequence[Item]) -> Item:
            real = self._exact(self.forms.as_real(self._form(args[0])))
            if real is None:
                return convert([size(args)])
            return lanes.call("abs", self.forms.lane(real))

        return inner.args, emit

    def _only_added(self, position: int, node: Node) -> bool:
        """Whether a product by key, of which a thread holds half as many as scores, serves this sum alone."""
        uses = [n for n in self.graph.nodes if position in n.args]
        by_key = self.graph.nodes[position].rank == COLUMN and node.rank == TILE
        return by_key and uses == [node] and position not in self.graph.outputs

    # -- arithmetic on forms --------------------------------------------------------------------

    def _with_forms(self, node: Node, args: Sequence[Item]) -> Item | None:
        """The result where static offsets can be told apart from the rest, else None."""
        if node.op in ("add", "sub") and node.dtype == I32:
            x, y = map(self._form, args)
            return self.forms.add(x, y, 1 if node.op == "add" else -1)
        forms = [a for a in args if isinstance(a, Form)]
        if not forms or len(forms) != len(args):
            return None
        x, y = forms[0], forms[-1]
        match node.op:
            case "add" | "sub" if x.real and y.real:
                return self._exact(self.forms.add(x, y, 1 if node.op == "add" else -1))
            case "neg" if not x.real:
                return self.forms.scale(x, -1)
            case "mul" if node.dtype == I32 and not y.terms:
                return self.forms.scale(x, y.offset)
            case "mul" if node.dtype == I32 and not x.terms:
                return self.forms.scale(y, x.offset)
            case "div" | "rem" if node.dtype == I32 and not y.terms and y.offset > 0:
                both = self.forms.divided(x, y.offset)
                return both and both[node.op == "rem"]
            case "convert" if node.dtype == F32 and self.graph.nodes[node.args[0]].dtype == I32:
                return self._exact(self.forms.as_real(x))
            case op if op in COMPARISONS and not x.real:
                return self._compare(op, x, y)
        return None

    def _exact(self, form: Form) -> Form | None:
        """A float32 form, if it and the sum of its terms are integers that float32 holds."""
        bound = self.forms.bound(form)
        return form if bound is not None and bound <= _FLOAT32_EXACT else None

    def _compare(self, op: str, x: Form, y: Form) -> Lane | None:
        difference = self.forms.add(x, y, -1)
        bound = self.forms.bound(difference)
        if bound is None or bound >= 2**31 or not difference.terms:
            return None
        return lanes.compare(op, self.forms.sum_of_terms(difference), -difference.offset)
