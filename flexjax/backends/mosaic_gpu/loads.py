"""Reads of captured arrays in global memory, by one thread, for the elements that it holds.

Arrays are read through the read-only path, so nobody may write them while the kernel runs. An address is a
base pointer, plus what the indices have in common, plus an immediate: `table[h, q - kv + n]` takes one
address computation a thread, and neighbouring elements are read in one go where they are aligned.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from flexjax.backends.mosaic_gpu import lanes, tile_ops
from flexjax.backends.mosaic_gpu.index_forms import Form, Forms
from flexjax.backends.mosaic_gpu.lanes import Lane
from flexjax.mods.graph import CaptureType

# Offsets into an array are 32 bits wide; half of that keeps every intermediate sum in range, see `_Reader`.
_MAX_ELEMENTS = 2**30
# One integer register pair: LLVM keeps vectors out of the read-only path.
_MAX_VECTOR_BYTES = 8


def unsupported(capture: CaptureType) -> str | None:
    """Why a kernel cannot read a captured array; None if it can."""
    if not tile_ops.supported_dtype(capture.dtype):
        return f"it reads a captured array of dtype {capture.dtype}"
    if math.prod(capture.shape) > _MAX_ELEMENTS:
        return (
            f"it reads a captured array of shape {capture.shape}, which has more than the {_MAX_ELEMENTS} "
            "elements that 32-bit offsets reach"
        )
    return None


@dataclasses.dataclass(frozen=True)
class Index:
    """One index of a load, inside the array, for every element that is read.

    Attributes:
        forms: one form an element.
        uniform: whether all threads have the same value, which does not differ between elements.
    """

    forms: Sequence[Form]
    uniform: bool


def load(ref: ir.Value, capture: CaptureType, indices: Sequence[Index], forms: Forms) -> list[Lane]:
    """`array[indices]` for every element.

    Args:
        ref: the array; int8 for a bool array, shape (1,) for a 0-d array.
        capture: the array's type.
        indices: one a dimension, none for a 0-d array.
        forms: the program's forms.
    """
    memref = ir.MemRefType(ref.type)
    strides, _ = memref.get_strides_and_offset()
    pointer = mgpu.utils.memref_ptr(ref)
    if pointer.type.address_space == 0:  # a global address is what makes the load a read-only one
        pointer = llvm.addrspacecast(llvm.PointerType.get(address_space=1), pointer)
    reader = _Reader(pointer, memref.element_type, capture.dtype, forms)
    count = max((len(i.forms) for i in indices), default=1)
    offsets = [forms.constant(0)] * count
    for index, stride in zip(indices, strides, strict=False):
        if index.uniform:
            reader.advance(forms.scale(index.forms[0], stride))
        else:
            offsets = [
                forms.add(total, forms.scale(form, stride))
                for total, form in zip(offsets, index.forms, strict=True)
            ]
    values = reader.read(offsets)
    return [values[id(offset)] for offset in offsets]


class _Reader:
    """Reads elements at offsets from a pointer.

    Sums of indices are taken modulo 2**32 and then sign-extended, without the immediate part. The true offset
    lies in [0, 2**30), so that this is right for immediates up to 2**30 in size.
    """

    def __init__(self, pointer: ir.Value, element: ir.Type, dtype: np.dtype, forms: Forms):
        self.pointer, self.element, self.dtype, self.forms = pointer, element, dtype, forms
        self.divisor = 0  # of the offset that the pointer has been advanced by; 0 stands for none

    def _moved(self, pointer: ir.Value, offset: Lane) -> ir.Value:
        wide = arith.extsi(ir.IntegerType.get_signless(64), offset.ir)
        return mgpu.utils.getelementptr(pointer, [wide], self.element)

    def advance(self, offset: Form) -> None:
        self.divisor = math.gcd(self.divisor, offset.offset, self.forms.divisor(offset))
        if offset.terms or offset.offset:
            self.pointer = self._moved(self.pointer, self.forms.lane(offset))

    def read(self, offsets: Sequence[Form]) -> dict[int, Lane]:
        """The element at every offset, by the form's identity."""
        groups: dict[tuple, dict[int, Form]] = defaultdict(dict)
        for form in offsets:
            if abs(form.offset) >= 2**30:
                alone = self.forms.base(self.forms.lane(form))
                groups[alone.terms][0] = form
            else:
                groups[form.terms][form.offset] = form
        values = {}
        for terms, members in groups.items():
            values |= self._read_group(terms, members)
        return values

    def _read_group(self, terms: tuple, members: dict[int, Form]) -> dict[int, Lane]:
        """Reads elements whose offsets differ by constants."""
        common = self.forms.of_terms(terms)
        divisor = math.gcd(self.divisor, self.forms.divisor(common))
        pointer = self.pointer
        if terms:
            pointer = self._moved(pointer, self.forms.lane(common))
        values, left = {}, set(members)
        for start in sorted(members):
            if start not in left:
                continue
            width = _MAX_VECTOR_BYTES // self.dtype.itemsize
            while width > 1 and not (
                divisor % width == start % width == 0
                and all(start + i in left for i in range(width))
            ):
                width //= 2
            for i, value in enumerate(self._load(pointer, start, width)):
                left.remove(start + i)
                values[id(members[start + i])] = value
        return values

    def _load(self, pointer: ir.Value, offset: int, width: int) -> list[Lane]:
        if offset:
            pointer = mgpu.utils.getelementptr(pointer, [offset], self.element)
        if width == 1:
            return [lanes.widened(llvm.load(self.element, pointer, invariant=True), self.dtype)]
        word = ir.IntegerType.get_signless(8 * width * self.dtype.itemsize)
        alignment = width * self.dtype.itemsize
        loaded = llvm.load(word, pointer, alignment=alignment, invariant=True)
        single = vector.from_elements(ir.VectorType.get((1,), word), [loaded])
        pairs = self.dtype.name == "bfloat16"
        kind = ir.IntegerType.get_signless(32) if pairs else self.element
        count = width // 2 if pairs else width
        unpacked = vector.bitcast(ir.VectorType.get((count,), kind), single)
        parts = [
            vector.extract(unpacked, dynamic_position=[], static_position=[i]) for i in range(count)
        ]
        if pairs:
            return [lane for part in parts for lane in lanes.bfloat16_pair(part)]
        return [lanes.widened(part, self.dtype) for part in parts]
