"""Mods on tiles whose rows are queries of several heads, and small programs that read arrays into such tiles."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from flexjax.backends.mosaic_gpu.decode_config import Rows
from flexjax.mods.builder import INT32, Builder, Ref
from flexjax.mods.graph import CaptureType, Graph
from flexjax.mods.transform import Rewrite, rewrite_graph


def packed(graph: Graph, rows: Rows) -> Graph:
    """The mod as a function of b, of the number of a row of tiles as h, and of the row in it as q."""
    problem = rows.problem
    sizes = problem.batch, rows.heads, rows.count, problem.kv_len
    return _packed(graph, sizes, rows.group, problem.q_len)


@functools.cache
def _packed(graph: Graph, sizes: tuple[int, ...], group: int, q_len: int) -> Graph:
    ranges: Any = {n: (0, size - 1) for n, size in zip(("b", "h", "q", "kv"), sizes, strict=True)}

    def head(builder: Builder, h: Ref, extra: Sequence[int]) -> Ref:
        if group == 1:
            return h
        inside = builder.apply("div", (builder.input("q"), builder.const(q_len, INT32)))
        return builder.apply(
            "add", (builder.apply("mul", (h, builder.const(group, INT32))), inside)
        )

    def query(builder: Builder, q: Ref, extra: Sequence[int]) -> Ref:
        if q_len == 1:
            return builder.const(0, INT32)
        return builder.apply("rem", (q, builder.const(q_len, INT32)))

    return rewrite_graph(graph, Rewrite(ranges, inputs={"h": head, "q": query}))


@functools.cache
def reader(shape: tuple[int, ...], dtype: np.dtype) -> Graph:
    """array[h, q, kv] of an array of rank 3, or array[h, q] of one of rank 2."""
    names = ("h", "q", "kv")[: len(shape)]
    builder = Builder({name: (0, n - 1) for name, n in zip(names, shape, strict=True)})
    capture = builder.capture(CaptureType(shape, dtype))
    output = builder.load(capture, [builder.input(name) for name in names], dtype)
    return builder.finish([output])[0]


@functools.cache
def row_exists(batch: int, q_len: int) -> Graph:
    """Whether a row's query lies in its sequence, whose length is lengths[b]."""
    builder = Builder({"b": (0, batch - 1), "q": None})
    length = builder.load(
        builder.capture(CaptureType((batch,), INT32)), [builder.input("b")], INT32
    )
    query = builder.apply("rem", (builder.input("q"), builder.const(q_len, INT32)))
    exists = builder.apply(
        "ge", (builder.apply("add", (query, length)), builder.const(q_len, INT32))
    )
    return builder.finish([exists])[0]
