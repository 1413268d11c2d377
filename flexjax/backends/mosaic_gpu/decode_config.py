"""How the decoding kernel is configured, and which attentions it computes."""

from __future__ import annotations

import dataclasses

from flexjax.backends.mosaic_gpu.config import CORES, SHARED_MEMORY, WARPGROUP_ROWS, padded_dim
from flexjax.block_lists import cdiv
from flexjax.problem import Problem

KV_TILES = (64, 128)
# An attention without a cache is computed as a decoding step if it has at most this many queries, and at least so
# many keys.
MOST_QUERIES, LEAST_KEYS = 64, 1024
# Shared memory of each of two CTAs that share a multiprocessor, less what the barriers take.
_HALF = 113 * 1024 - 512
_MOST_STAGES = 6
# Such a CTA has at least so many bytes of keys and values on their way, which keeps memory busy. With more of them
# memory serves CTAs less evenly, and what is asked for behind them comes later.
_ENOUGH = 32 * 1024
_INTERPRETED_CTAS = 3


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Static choices of the decoding kernel.

    Attributes:
        kv_tile: keys of one step.
        stages: tiles of keys, and of values, in flight.
        ctas: among which the steps are dealt out.
        packed: whether the query heads that share a key head go together.
        approx_math: approximate transcendental functions in the mods.
        interpret: run in Pallas' Mosaic GPU interpreter, on the CPU.
    """

    kv_tile: int
    stages: int
    ctas: int
    packed: bool
    approx_math: bool
    interpret: bool


OPTIONS = {"decode": bool, "ctas": int}


def applies(problem: Problem) -> bool:
    """Whether the decoding kernel computes the forward pass, rather than the usual one."""
    if problem.decoding is not None:
        return True
    short = problem.q_len <= MOST_QUERIES and problem.kv_len >= LEAST_KEYS
    usual = {"warpgroups", "persistent", "ping_pong", "trust_maximum"} & dict(
        problem.options
    ).keys()
    blocks = problem.blocks
    listed = blocks is None or (blocks.geometry.rows == 1 and blocks.geometry.kv_block % 64 == 0)
    return problem.option("decode", short and listed and not usual)


def choose(problem: Problem, cores: int = CORES) -> DecodeConfig:
    """The configuration for a problem; its kernel options override the heuristics.

    Raises:
        NotImplementedError: the kernel's tiles do not fit the pages, the blocks, or what the options ask for.
    """
    kv_tile = problem.option("kv_tile", _kv_tile(problem))
    _check(problem, kv_tile)
    dim, v_dim = padded_dim(problem.qk_dim), padded_dim(problem.v_dim)
    interpret = problem.option("interpret", False)
    fixed = 2 * WARPGROUP_ROWS * (dim + (kv_tile if interpret else 0))
    stage = 2 * kv_tile * (dim + v_dim)
    two = fixed + 2 * stage <= _HALF
    room = _HALF if two else SHARED_MEMORY
    most = (room - fixed) // stage
    enough = cdiv(_ENOUGH, stage) if two else most
    stages = problem.option("stages", min(most, enough, _MOST_STAGES))
    if stages < 1 or fixed + stages * stage > SHARED_MEMORY:
        raise NotImplementedError(
            f"{stages} stages of {kv_tile} keys take {fixed + stages * stage} bytes of shared memory of "
            f"{SHARED_MEMORY}. Ask for fewer stages or a smaller kv_tile."
        )
    ctas = _INTERPRETED_CTAS if interpret else (2 if two else 1) * cores
    return DecodeConfig(
        kv_tile=kv_tile,
        stages=stages,
        ctas=problem.option("ctas", ctas),
        packed=problem.blocks is None or problem.blocks.heads == 1,
        approx_math=problem.option("approx_math", True),
        interpret=interpret,
    )


def _kv_tile(problem: Problem) -> int:
    """128 keys of narrow heads, else 64: about 16 KB a copy; less where blocks or pages want it."""
    widest = 128 if max(problem.qk_dim, problem.v_dim) <= 64 else 64
    return next((n for n in (widest, 64) if _misfit(problem, n) is None), 64)


def _misfit(problem: Problem, kv_tile: int) -> str | None:
    decoding, blocks = problem.decoding, problem.blocks
    page = None if decoding is None else decoding.page_size
    if page is not None and page % kv_tile and kv_tile % page:
        return (
            f"The kernel reads {kv_tile} keys at a time, which pages of {page} tokens neither divide nor are "
            "divided by. Use pages of 16, 32, 64, 128 or 256 tokens."
        )
    if page is not None and page % 8:
        return f"Pages of {page} tokens are too small: the kernel copies 8 keys at least."
    if blocks is None:
        return None
    geometry = blocks.geometry
    if geometry.rows > 1:
        return (
            f"The block mask has {geometry.rows} rows of blocks of {geometry.q_block} queries, and the decoding "
            "kernel takes one. Build it with a larger q_block."
        )
    if geometry.kv_block % kv_tile:
        return (
            f"The block mask has blocks of {geometry.kv_block} keys, which tiles of {kv_tile} do not divide. "
            "Build it with a kv_block that is a multiple of 64."
        )
    return None


def _check(problem: Problem, kv_tile: int) -> None:
    reason = _misfit(problem, kv_tile)
    if kv_tile not in KV_TILES:
        reason = f"The decoding kernel's tiles have 64 or 128 keys, but {kv_tile} were asked for."
    if reason is not None:
        raise NotImplementedError(reason)


@dataclasses.dataclass(frozen=True)
class Rows:
    """How queries and heads share tiles of 64 rows.

    A row of tiles is a batch row and, if packed, a key head, else a query head: row g * L + t of it is query t of
    the g-th of its heads.

    Attributes:
        problem: the attention.
        packed: see `DecodeConfig`.
    """

    problem: Problem
    packed: bool

    @property
    def heads(self) -> int:
        """Rows of tiles that a batch row has."""
        return self.problem.kv_heads if self.packed else self.problem.q_heads

    @property
    def group(self) -> int:
        """Query heads in a row of tiles."""
        return self.problem.group if self.packed else 1

    @property
    def count(self) -> int:
        """Query rows in a row of tiles."""
        return self.group * self.problem.q_len

    @property
    def tiles(self) -> int:
        """Tiles in a row of them."""
        return cdiv(self.count, WARPGROUP_ROWS)

    @property
    def all_tiles(self) -> int:
        return self.problem.batch * self.heads * self.tiles
