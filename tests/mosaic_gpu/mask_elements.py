"""What a mask allows in a tile, from its elements and its words together."""

from typing import Any

from jax.experimental.mosaic import gpu as mgpu

from flexjax.backends.mosaic_gpu import emit, lanes, placement
from flexjax.backends.mosaic_gpu.program import Program
from flexjax.mods.graph import TILE


def mask_elements(program: Program, ctx: Any, *args: Any) -> list[mgpu.FragmentedArray]:
    """What `emit.emit_mask` allows, element by element; for `run_program`."""
    allowed, words = emit.emit_mask(program, ctx, *args)
    layout, shape = program.tile.layout.to_mgpu(), program.tile.shape_of(TILE)
    elements = placement.unpack(allowed, lanes.BOOL)
    of_row = placement.unpack(words, lanes.U32)
    columns = sorted({column for _, column in elements})

    def value(offsets: tuple[int, ...]) -> lanes.Lane:
        word = lanes.shift_right(of_row[offsets[:1]], columns.index(offsets[1]))
        return elements[offsets] & lanes.compare("ne", word & 1, 0)

    return [placement.pack(value, layout, shape, lanes.BOOL)]
