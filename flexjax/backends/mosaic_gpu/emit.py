"""Evaluates a mod graph on one tile of scores, inside a Mosaic GPU kernel.

Every node is computed at its own rank: once for the whole tile, once a query, once a key, or once a score.
Values are broadcast where a row meets a column and not before, so `doc[q] == doc[kv]` loads 64 + 128
elements and compares 64 * 128.

On the GPU the whole graph becomes one inlined program (program.py); Pallas and its layout inference see a
single operation. The interpreter cannot run that, and takes plain JAX operations instead.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from flexjax.backends.mosaic_gpu import lanes, loads, placement, tile_ops
from flexjax.backends.mosaic_gpu.lanes import Lane
from flexjax.backends.mosaic_gpu.program import Program, TileType
from flexjax.backends.mosaic_gpu.row_words import RowWords
from flexjax.mods.graph import COLUMN, ROW, SCALAR, TILE, Graph, Node
from flexjax.mods.ops import OPS


@dataclasses.dataclass(frozen=True)
class TileInputs:
    """One tile of scores, as a kernel knows it.

    Attributes:
        score: float32 scores [q_size, kv_size] in `layout`, [kv_size, q_size] if transposed; None for a
            mask_mod.
        b, h: int32 scalars.
        q_start, kv_start: int32 scalars, indices of the first query and key; multiples of the sizes.
        q_size, kv_size: static size of the tile.
        q_limit, kv_limit: static numbers of queries and keys. Where a tile may stick out of them, because the size
            does not divide them, indices are clamped for loads: nothing is read out of bounds, and what is
            computed out there is to be discarded. A multiple of the size promises that no tile sticks out.
        given: values of the graph's `given` nodes (see keys_ahead.py), float32 [kv_size] each.
        layout: layout of tiles; rows (one value a query) have `layout.reduce(1)`, columns
            `layout.reduce(0)`, and the other way round if transposed.
        transposed: whether the tile's first axis is that of the keys.
        approx_math: approximate transcendental functions and divisions, good enough for bfloat16 inputs.
        interpret: plain JAX operations only, for the Mosaic interpreter on the CPU.
    """

    score: jax.Array | None
    b: Any
    h: Any
    q_start: Any
    kv_start: Any
    q_size: int
    kv_size: int
    q_limit: int
    kv_limit: int
    given: tuple[jax.Array, ...] = ()
    layout: Any = plgpu.Layout.WGMMA
    transposed: bool = False
    approx_math: bool = False
    interpret: bool = False

    @property
    def type(self) -> TileType:
        return TileType(
            self.q_size,
            self.kv_size,
            self.q_limit,
            self.kv_limit,
            self.layout,
            self.approx_math,
            self.transposed,
        )

    def scalar(self, name: str) -> jax.Array:
        return jnp.asarray(getattr(self, name), jnp.int32)


@dataclasses.dataclass(frozen=True)
class TileValue:
    """A value on a tile.

    Attributes:
        value: an array of the rank's shape: () for `scalar`, (q_size,) for `row`, (kv_size,) for `column`,
            (q_size, kv_size) for `tile`, or its transpose. Float16 and bfloat16 values are carried in float32,
            narrow integers in 32 bits.
        rank: one of `scalar`, `row`, `column`, `tile`.
    """

    value: jax.Array
    rank: str


def broadcast(value: TileValue, rank: str, inputs: TileInputs) -> jax.Array:
    """A value as an array of a higher (or its own) rank."""
    if value.rank == rank:
        return value.value
    dims = () if value.rank == SCALAR else (inputs.type.axis_of(value.rank),)
    array = lax.broadcast_in_dim(value.value, inputs.type.shape_of(rank), dims)
    return plgpu.layout_cast(array, inputs.type.layout_of(rank))


def on_tile(graph: Graph, refs: Sequence[Any], inputs: TileInputs) -> list[jax.Array]:
    """A graph's outputs at every position of a tile; arguments as for `evaluate_on_tile`."""
    return [broadcast(x, TILE, inputs) for x in evaluate_on_tile(graph, refs, inputs)]


def unsupported(graph: Graph) -> str | None:
    """What in a graph a kernel cannot do, as a sentence; None if it can do everything."""
    opaque = graph.opaque
    if opaque is not None:
        return f"The mod cannot be expressed in flexjax's mod IR: {opaque.reason}"
    for node in graph.nodes:
        reason = _unsupported_node(graph, node)
        if reason is not None:
            return f"The mod cannot run inside a Mosaic GPU kernel: {reason}."
    return None


def _unsupported_node(graph: Graph, node: Node) -> str | None:
    if not tile_ops.supported_dtype(node.dtype):
        return f"it computes values of dtype {node.dtype}"
    if node.op in ("input", "const"):
        return None
    if node.op == "load":
        return loads.unsupported(graph.captures[node["capture"]])
    dtype = graph.nodes[node.args[0]].dtype
    return tile_ops.unsupported_node(node.op, dict(node.params), dtype)


def evaluate_on_tile(graph: Graph, refs: Sequence[Any], inputs: TileInputs) -> list[TileValue]:
    """Values of the graph's outputs on one tile.

    Args:
        graph: the mod; `unsupported(graph)` is None.
        refs: refs of `graph.captures` in global memory, in order; bool arrays arrive as int8, 0-d arrays with
            shape (1,). Nothing may write them while the kernel runs.
        inputs: the tile.

    Returns:
        One value an output, at the output's own rank; `broadcast` expands it.
    """
    run = _interpreted if inputs.interpret else _inlined
    ranks = [graph.nodes[o].rank for o in graph.outputs]
    return [TileValue(v, r) for v, r in zip(run(graph, refs, inputs), ranks, strict=True)]


def _inlined(graph: Graph, refs: Sequence[Any], inputs: TileInputs) -> Sequence[jax.Array]:
    tile = inputs.type
    program = Program(graph, tile)
    args, arg_types, used = _arguments(program, refs, inputs)
    results = []
    for position in graph.outputs:
        node = graph.nodes[position]
        layout = tile.layout_of(node.rank) or plgpu.Layout.WG_SPLAT
        dtype = tile_ops.carrier(node.dtype)
        results.append(plgpu.ShapeDtypeStruct(tile.shape_of(node.rank), dtype, layout))
    call = plgpu.inline_mgpu(arg_types=arg_types, return_type=tuple(results))
    return call(program)(*args, *used)


def _arguments(
    program: Program, refs: Sequence[Any], inputs: TileInputs
) -> tuple[list[Any], tuple[Any, ...], Sequence[Any]]:
    """A program's scalars and scores, the types of all its arguments, and the captures that it reads."""
    args: list[Any] = [inputs.scalar(name) for name in program.scalars]
    types: list[Any] = [plgpu.Layout.WG_SPLAT] * len(args)
    if program.has_score:
        args.append(plgpu.layout_cast(inputs.score, inputs.layout))
        types.append(inputs.layout)
    args += inputs.given
    types += [inputs.type.layout_of(COLUMN)] * len(inputs.given)
    used = refs[: len(program.graph.captures)]
    return args, (*types, *(plgpu.RefType() for _ in used)), used


def mask_on_tile(
    graph: Graph, refs: Sequence[Any], inputs: TileInputs
) -> tuple[jax.Array, jax.Array | None]:
    """What a mask allows in a tile: bool elements, and words of bits (row_words.py); both must allow.

    Arguments as for `evaluate_on_tile`. Words are uint32, [q_size] in the layout of rows but different in each of
    a row's four lanes; in the interpreter there are none.
    """
    if inputs.interpret:
        return on_tile(graph, refs, inputs)[0], None
    tile, program = inputs.type, Program(graph, inputs.type)
    args, arg_types, used = _arguments(program, refs, inputs)
    results = (
        plgpu.ShapeDtypeStruct(tile.shape_of(TILE), jnp.bool_, tile.layout),
        plgpu.ShapeDtypeStruct(tile.shape_of(ROW), jnp.uint32, tile.layout_of(ROW)),
    )
    call = plgpu.inline_mgpu(arg_types=arg_types, return_type=results)
    allowed, words = call(functools.partial(emit_mask, program))(*args, *used)
    return allowed, words


def emit_mask(program: Program, ctx: Any, *args: Any) -> Sequence[Any]:
    """What `mask_on_tile` inlines."""
    del ctx
    tile = program.tile
    started = program.start(args, on_demand=True)
    (output,) = program.graph.outputs
    words, others = RowWords(started).terms(output)

    def element(offsets: placement.Offsets) -> Lane:
        allowed = lanes.const(True, lanes.BOOL)
        for position in others:
            rank = program.graph.nodes[position].rank
            allowed = allowed & started.output(position, _projected(tile, rank, offsets))
        return allowed

    def word(offsets: placement.Offsets) -> Lane:
        if words is None:
            return lanes.const(-1, lanes.U32)
        return words[started.offsets[ROW].index(offsets)]

    layouts = tile.layout.to_mgpu(), tile.layout_of(ROW).to_mgpu()
    return (
        placement.pack(element, layouts[0], tile.shape_of(TILE), lanes.BOOL),
        placement.pack(word, layouts[1], tile.shape_of(ROW), lanes.U32),
    )


def map_on_tile(
    function: Callable[..., Sequence[Lane]],
    count: int,
    graph: Graph,
    refs: Sequence[Any],
    inputs: TileInputs,
    others: tuple[jax.Array, str],
) -> Sequence[jax.Array]:
    """Float32 tiles of a function of the graph's outputs, element by element, on the GPU.

    Every element is finished before the next is begun. Where few registers are left, this is what keeps
    intermediate values of a whole tile from being alive at a time.

    Args:
        function: from the outputs' lanes and one of `others` to `count` lanes.
        count: how many tiles are wanted.
        graph: as for `evaluate_on_tile`, like refs and inputs.
        refs: see `evaluate_on_tile`.
        inputs: see `evaluate_on_tile`.
        others: another array of float32, and its rank.
    """
    tile, (array, rank) = inputs.type, others
    program = Program(graph, tile)
    used = refs[: len(graph.captures)]
    scalars = [inputs.scalar(name) for name in program.scalars]
    scores = [inputs.score] if program.has_score else []
    types = [plgpu.Layout.WG_SPLAT] * len(scalars) + [tile.layout] * len(scores)
    result = plgpu.ShapeDtypeStruct(tile.shape_of(TILE), jnp.float32, tile.layout)

    call = plgpu.inline_mgpu(
        arg_types=(tile.layout_of(rank), *types, *(plgpu.RefType() for _ in used)),
        return_type=(result,) * count,
    )
    emitted = functools.partial(emit_mapped, function, count, program, rank)
    return call(emitted)(array, *scalars, *scores, *used)


def emit_mapped(
    function: Callable[..., Sequence[Lane]],
    count: int,
    program: Program,
    rank: str,
    ctx: Any,
    other: Any,
    *args: Any,
) -> Sequence[Any]:
    """What `map_on_tile` inlines."""
    del ctx
    graph, tile = program.graph, program.tile
    started, shape = program.start(args, on_demand=True), tile.shape_of(TILE)
    others, layout = placement.unpack(other, lanes.F32), tile.layout.to_mgpu()
    made: dict[placement.Offsets, Sequence[Lane]] = {}
    for register in placement.static_offsets(layout, shape):
        for offsets in register:
            values = (
                started.output(o, _projected(tile, graph.nodes[o].rank, offsets))
                for o in graph.outputs
            )
            made[offsets] = function(*values, others[_projected(tile, rank, offsets)])
    return tuple(
        placement.pack(lambda offsets, i=i: made[offsets][i], layout, shape, lanes.F32)
        for i in range(count)
    )


def _projected(tile: TileType, rank: str, offsets: placement.Offsets) -> placement.Offsets:
    """Offsets of an element for a value of a rank."""
    if rank in (SCALAR, TILE):
        return offsets if rank == TILE else ()
    return (offsets[tile.axis_of(rank)],)


# -- the interpreter --------------------------------------------------------------------------------


def _interpreted(graph: Graph, refs: Sequence[Any], inputs: TileInputs) -> Sequence[jax.Array]:
    values: list[TileValue] = []
    for node in graph.nodes:
        args = [values[a] for a in node.args]
        values.append(TileValue(_interpret_node(graph, node, args, refs, inputs), node.rank))
    return [values[o].value for o in graph.outputs]


def _interpret_node(
    graph: Graph, node: Node, args: list[TileValue], refs: Sequence[Any], inputs: TileInputs
) -> jax.Array:
    carrier = tile_ops.carrier(node.dtype)
    if node.op == "const":
        return jnp.asarray(node["value"].value, carrier)
    if node.op == "input":
        return _interpret_input(node["name"], inputs)
    arrays = [broadcast(a, node.rank, inputs) for a in args]
    if node.op == "load":
        # The interpreter reads whole refs only.
        value = refs[node["capture"]][...][tuple(arrays) or 0]
        return value != 0 if carrier == np.bool_ else value.astype(carrier)
    dtypes = [graph.nodes[a].dtype for a in node.args]
    arrays = [a.astype(d) for a, d in zip(arrays, dtypes, strict=True)]
    return OPS[node.op].jax(dict(node.params), *arrays).astype(carrier)


def _interpret_input(name: str, inputs: TileInputs) -> jax.Array:
    if name == "score":
        assert inputs.score is not None, "a mask_mod has no score"
        return inputs.score
    if name in ("b", "h"):
        return inputs.scalar(name)
    rank, limit = (ROW, inputs.q_limit) if name == "q" else (COLUMN, inputs.kv_limit)
    shape = inputs.type.shape_of(rank)
    iota = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=inputs.type.layout_of(rank))
    index = iota + inputs.scalar(f"{name}_start")
    return index if limit % shape[0] == 0 else jnp.minimum(index, limit - 1)
