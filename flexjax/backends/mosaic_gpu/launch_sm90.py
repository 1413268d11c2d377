"""What the kernels for Hopper share: how operands reach them, their launch, shared memory and barriers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax import _compat
from flexjax.problem import BLHD, Problem


def addressable(x: Any, axis: int, multiple: int, dim: int) -> Any:
    """The array as TMA can read it, in tiles of 8 rows of at least 32 bytes.

    It is filled up with zeros to `dim` columns, and along `axis` to a multiple of `multiple`. The end of the last
    tile TMA fills up by itself, so that 8 will do; the interpreter wants whole tiles.
    """
    padding = [(0, 0)] * 4
    padding[axis] = (0, -x.shape[axis] % multiple)
    padding[3] = (0, dim - x.shape[3])
    return x if not any(high for _, high in padding) else jnp.pad(x, padding)


def capture(x: Any) -> Any:
    """A captured array as kernels read it: bools as int8, and at least one axis."""
    x = x.astype(jnp.int8) if x.dtype == jnp.bool_ else x
    return x.reshape(1) if x.ndim == 0 else x


def launch(
    name: str,
    body: Callable[[Any, Any, Any], None],
    inputs: Any,
    outputs: Any,
    buffers: Any,
    *,
    ctas: int,
    warpgroups: int,
    approx_math: bool,
    interpret: bool,
) -> Any:
    """Runs a kernel and returns its outputs.

    Args:
        name: of the kernel, for profilers.
        body: `(inputs, outputs, buffers)` of references, executed by every warpgroup of every CTA. The axes are
            called "cta" and "warpgroup".
        inputs: a pytree of arrays.
        outputs: a pytree of `jax.ShapeDtypeStruct`s.
        buffers: a named tuple of scratch types.
        ctas: how many there are.
        warpgroups: of a CTA.
        approx_math: approximate transcendental functions outside of mods.
        interpret: run in Pallas' Mosaic GPU interpreter, on the CPU.
    """
    leaves, tree = jax.tree.flatten(inputs)
    out_leaves, out_tree = jax.tree.flatten(outputs)

    def kernel(*refs: Any) -> None:
        if not interpret:
            plgpu.inline_mgpu()(lambda _: _compat.name_dumps(name))()
        n_in, n_out = len(leaves), len(out_leaves)
        body(
            jax.tree.unflatten(tree, refs[:n_in]),
            jax.tree.unflatten(out_tree, refs[n_in : n_in + n_out]),
            type(buffers)(*refs[n_in + n_out :]),
        )

    kernel.__name__ = name
    call = plgpu.kernel(
        kernel,
        out_type=tuple(out_leaves),
        scratch_types=buffers,
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=approx_math,
            # The barriers are all written out.
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return jax.tree.unflatten(out_tree, call(*leaves))


def tiles(dtype: Any, *shape: int, swizzle: int | None = None) -> Any:
    """Shared memory for tiles that TMA and the matrix products understand."""
    swizzle = swizzle or swizzle_of(dtype, shape[-1])
    return plgpu.SMEM(shape, dtype, transforms=transforms_of(dtype, swizzle))


def swizzle_of(dtype: Any, columns: int) -> int:
    """The widest swizzle, in bytes, of rows of so many numbers."""
    return int(plgpu.find_swizzle(columns * 8 * jnp.dtype(dtype).itemsize))


def transforms_of(dtype: Any, swizzle: int) -> tuple[Any, Any]:
    """How tiles lie in shared memory: 8 rows of `swizzle` bytes each."""
    width = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(swizzle)


def barriers(count: int, arrivals: int = 1) -> Any:
    return plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)


def rows(problem: Problem, ref: Any, b: Any, h: Any, first: Any, count: int) -> Any:
    """Rows of one head of a tensor in the problem's layout."""
    span = pl.ds(first, count)
    return ref.at[b, span, h] if problem.layout == BLHD else ref.at[b, h, span]


def unknown_zero(number: Any) -> Any:
    """Zero, as the compiler does not know.

    A tile that all steps of a loop read, numbered by this, has an address that changes from step to step for all
    that LLVM can tell. Otherwise LLVM computes before the loop what products want to know of each 16 columns
    of the tile. That takes two registers apiece, which are not there: they are kept in memory, or at least not
    where matrix products read them. In the loop, they cost one instruction each of a unit that is idle.

    Args:
        number: of the step, at least 0 and below 2^30, but not by what the program says.
    """
    return lax.shift_right_logical(number, jnp.int32(30))
