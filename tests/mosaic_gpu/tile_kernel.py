"""A kernel that does nothing but evaluate a mod graph on every tile of a score matrix."""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu import emit, tile_ops
from flexjax.mods.graph import TILE, Graph


def tile_kernel(
    graph: Graph,
    heads: int,
    q_len: int,
    kv_len: int,
    *,
    kv_tile: int = 16,
    approx: bool = False,
    interpret: bool = False,
) -> Callable[..., Any]:
    """`(scores [heads, q_len, kv_len] padded to tiles, *captures) -> one padded array an output`."""
    q_tile = 64
    q_tiles, kv_tiles = -(-q_len // q_tile), -(-kv_len // kv_tile)
    padded = (heads, q_tiles * q_tile, kv_tiles * kv_tile)

    def body(*refs: Any) -> None:
        scores, captures = refs[0], refs[1 : 1 + len(graph.captures)]
        outs = refs[1 + len(graph.captures) :]
        h = lax.axis_index("h")
        q_start, kv_start = lax.axis_index("q") * q_tile, lax.axis_index("kv") * kv_tile
        here = (h, pl.ds(q_start, q_tile), pl.ds(kv_start, kv_tile))
        score = None
        if "score" in graph.depends:
            score = plgpu.load(scores.at[here], layout=plgpu.Layout.WGMMA, optimized=False)
        tile = emit.TileInputs(
            score=score,
            b=jnp.int32(0),
            h=h,
            q_start=q_start,
            kv_start=kv_start,
            q_size=q_tile,
            kv_size=kv_tile,
            q_limit=q_len,
            kv_limit=kv_len,
            approx_math=approx,
            interpret=interpret,
        )
        for out, value in zip(outs, emit.evaluate_on_tile(graph, captures, tile), strict=True):
            array = emit.broadcast(value, TILE, tile)
            if array.dtype == jnp.bool_:
                array = array.astype(jnp.int32)
            out[here] = plgpu.layout_cast(array, plgpu.Layout.WGMMA)

    def result(output: int) -> jax.ShapeDtypeStruct:
        dtype = tile_ops.carrier(graph.nodes[output].dtype)
        return jax.ShapeDtypeStruct(padded, jnp.int32 if dtype == jnp.bool_ else dtype)

    kernel = plgpu.kernel(
        body,
        out_type=tuple(result(o) for o in graph.outputs),
        grid=(heads, q_tiles, kv_tiles),
        grid_names=("h", "q", "kv"),
        # As the attention kernels are compiled: what an operation computes must not depend on it.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )

    def call(scores: jax.Array, *captures: jax.Array) -> Any:
        return kernel(scores, *map(capture_operand, captures))

    return call


def capture_operand(array: Any) -> Any:
    """A captured array as kernels read it."""
    array = array.astype(jnp.int8) if array.dtype == jnp.bool_ else array
    return array.reshape(1) if array.ndim == 0 else array


def padded_scores(
    heads: int, q_len: int, kv_len: int, kv_tile: int = 16, sharding: Any = None
) -> jax.ShapeDtypeStruct:
    shape = (heads, -(-q_len // 64) * 64, -(-kv_len // kv_tile) * kv_tile)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def capture_types(graph: Graph, sharding: Any = None) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(c.shape, c.dtype, sharding=sharding) for c in graph.captures]
