"""How the backward kernels are configured, and the heuristics that choose it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

from flexjax.backends.mosaic_gpu import capture_gradients
from flexjax.backends.mosaic_gpu import config as forward_config
from flexjax.backends.mosaic_gpu.capture_gradients import KEYS, QUERIES
from flexjax.backends.mosaic_gpu.config import (
    HALF_OF_SHARED_MEMORY,
    SHARED_MEMORY,
    WARPGROUP_ROWS,
)
from flexjax.block_lists import cdiv
from flexjax.problem import Problem

Q_TILES = (128, 64)
ORDERS = ("dk_first", "dq_first")

# Who computes dQ, or adds a column's shares of it to the sums in global memory.
CONSUMERS = "consumers"  # those who have computed them
ADDER = "adder"  # a warp beside the producer: see dq_adder_sm90.py
IN_ORDER = "in_order"  # it too, but one column after another
KERNEL = "kernel"  # a kernel of its own computes dQ: see dq_sm90.py
DQ_BY = (CONSUMERS, ADDER, IN_ORDER, KERNEL)

# Registers a thread of the consumers and of the producer, by the number of consumer warpgroups.
REGISTERS = {1: None, 2: (240, 24)}
# The same where a warpgroup more rounds dQ, and its own: see dq_rounder_sm90.py.
ROUNDING_REGISTERS = (232, 24, 24)

# Where fewer columns than this a multiprocessor are left, each is shared out. Measured: from half a column 3.2
# times faster, from one 1.2 to 1.4 times; from four slower by a tenth.
COLUMNS = 2

# Tiles of dS in shared memory: a warpgroup writes one while the other still multiplies the one before.
DS_STAGES = 2


class Part(NamedTuple):
    """A warpgroup's share of a tile of dQ.

    Attributes:
        row, rows: which queries of the step.
        column, columns: which columns of the head dimension; none if `columns` is 0.
    """

    row: int
    rows: int
    column: int
    columns: int


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """Static choices of the kernel that computes dK and dV and, unless `separate_dq`, dQ.

    Attributes:
        warpgroups: consumer warpgroups, of 64 keys each; of the same 64 keys if `wide`.
        q_tile: queries of one step.
        stages: tiles of queries, and of the output's cotangents, in flight.
        order: "dk_first" or "dq_first": which product is issued first once dS is known.
        rolling: a full step begins while the last product of the one before is under way, and the warpgroups
            meet at one barrier a step. Measured 2 to 4% faster.
        deferred: dQ of a step is computed in the next one (see backward_deferred_sm90.py).
        deterministic: nothing is added in an order that changes from run to run. dQ is then by IN_ORDER or KERNEL.
        dq_by: CONSUMERS, ADDER, IN_ORDER or KERNEL.
        approx_math: approximate transcendental functions in the mods.
        interpret: run in Pallas' Mosaic GPU interpreter, on the CPU.
        wide: the warpgroups compute dV and dK of the same keys (see backward_wide_sm90.py).
        dq: configuration of the kernel for dQ, where `separate_dq`.
        shares: parts into which the batch rows and query heads that read a column are divided, each for a CTA of
            its own.
        persistent: one CTA a multiprocessor, which takes one column after the other; otherwise a CTA a column.
        rounding: persistent CTAs round dQ, too: see dq_rounder_sm90.py.
        cores: multiprocessors of the GPU.
        self_loading: the only consumer issues the copies too, without a producer: two CTAs then share a
            multiprocessor.
    """

    warpgroups: int
    q_tile: int
    stages: int
    order: str = "dk_first"
    rolling: bool = False
    deferred: bool = False
    deterministic: bool = False
    dq_by: str = CONSUMERS
    approx_math: bool = True
    interpret: bool = False
    wide: bool = False
    dq: forward_config.Config | None = None
    self_loading: bool = False
    shares: int = 1
    persistent: bool = False
    rounding: bool = False
    cores: int = forward_config.CORES

    @property
    def separate_dq(self) -> bool:
        """Whether dQ comes from a kernel of its own."""
        return self.dq_by == KERNEL

    @property
    def ordered(self) -> bool:
        """Whether columns add to dQ one after another."""
        return self.dq_by == IN_ORDER

    @property
    def handed_over(self) -> bool:
        """Whether the consumers leave their shares of dQ to other warps."""
        return self.dq_by in (ADDER, IN_ORDER)

    @property
    def registers(self) -> tuple[int, ...] | None:
        """Registers a thread of the consumers, the producer and the warpgroup that rounds, if there are these."""
        return ROUNDING_REGISTERS if self.rounding else REGISTERS[self.warpgroups]

    @property
    def key_slots(self) -> int:
        """Groups of 64 keys in one CTA's tile."""
        return 1 if self.wide else self.warpgroups

    @property
    def kv_tile(self) -> int:
        """Keys of one CTA's tile."""
        return self.key_slots * WARPGROUP_ROWS


OPTIONS = {
    "deterministic": bool,
    "backward_dq": str,
    "backward_warpgroups": int,
    "backward_q_tile": int,
    "backward_stages": int,
    "backward_order": str,
    "backward_self_loading": bool,
    "backward_deferred": bool,
    "backward_persistent": bool,
    "backward_rounding": bool,
    "backward_shares": int,
}


def padded_dim(dim: int) -> int:
    """Head dimension as the kernels see it: of wide heads, warpgroups share dQ by columns of 32 numbers."""
    unit = 16 if dim <= 64 else 32
    return -(-dim // unit) * unit


def key_swizzle(config: BackwardConfig, dim: int) -> int:
    """Bytes of a swizzled row of the shared memory of keys, queries and dS.

    Warpgroups that share dQ by columns need at least one such row each.
    """
    shared = config.warpgroups > 1 and not by_rows(config)
    for swizzle in (128, 64, 32):
        if dim % (swizzle // 2) == 0 and (not shared or dim >= swizzle or swizzle == 32):
            return swizzle
    raise AssertionError(f"head dimensions are padded to 16, but this one is {dim}")


def by_rows(config: BackwardConfig) -> bool:
    """Whether warpgroups share dQ by queries, which takes 64 of them each, rather than by columns."""
    return config.warpgroups > 1 and config.q_tile == config.warpgroups * WARPGROUP_ROWS


def parts(config: BackwardConfig, dim: int) -> tuple[Part, ...]:
    """The warpgroups' shares of a tile of dQ, [q_tile, dim]."""
    n = config.warpgroups
    if by_rows(config):
        return tuple(Part(w * WARPGROUP_ROWS, WARPGROUP_ROWS, 0, dim) for w in range(n))
    unit = key_swizzle(config, dim) // 2
    ends = [-(-(dim // unit) * w // n) * unit for w in range(n + 1)]
    return tuple(Part(0, config.q_tile, a, b - a) for a, b in itertools.pairwise(ends))


def shared_memory(problem: Problem, config: BackwardConfig) -> int:
    """Bytes of shared memory that the kernel's tiles take."""
    d, dv = padded_dim(problem.qk_dim), padded_dim(problem.v_dim)
    numbers = (config.kv_tile + config.stages * config.q_tile) * (d + dv)
    numbers += (DS_STAGES + config.interpret) * config.kv_tile * config.q_tile
    floats = 2 * config.stages * config.q_tile
    if not config.separate_dq:
        floats += config.q_tile * d
    if config.persistent:
        numbers += config.kv_tile * d
    return 2 * numbers + 4 * floats


def dq_shared_memory(problem: Problem, config: forward_config.Config) -> int:
    """Bytes of shared memory that the tiles of the kernel for dQ take."""
    d, dv = padded_dim(problem.qk_dim), padded_dim(problem.v_dim)
    numbers = (config.q_tile + config.stages * config.kv_tile) * (d + dv)
    if config.interpret:
        numbers += config.q_tile * config.kv_tile
    return 2 * numbers


def choose(problem: Problem, cores: int = forward_config.CORES) -> BackwardConfig:
    """The configuration for a problem; its kernel options override the heuristics.

    Args:
        problem: the problem.
        cores: multiprocessors of the GPU.

    Raises:
        NotImplementedError: no configuration fits the problem, or the options do not.
    """
    if problem.blocks is not None and not problem.blocks.backward:
        raise NotImplementedError(
            "the block mask has no transposed lists. Build it with compute_q_blocks=True, the default."
        )
    blocks = problem.blocks
    odd = blocks is not None and blocks.geometry.kv_block % (2 * WARPGROUP_ROWS) != 0
    narrow = max(padded_dim(problem.qk_dim), padded_dim(problem.v_dim)) <= 64
    wide = max(problem.qk_dim, problem.v_dim) > 128
    warpgroups = problem.option("backward_warpgroups", 1 if odd and not wide else 2)
    roomy = narrow and _few_derivatives(problem)
    roomy &= blocks is None or blocks.geometry.q_block % 128 == 0
    interpret = problem.option("interpret", False)
    deterministic = problem.option("deterministic", False)
    dq_by = problem.option("backward_dq", _choose_dq_by(problem, warpgroups, wide))
    separate = dq_by == KERNEL
    config = BackwardConfig(
        warpgroups=warpgroups,
        q_tile=problem.option("backward_q_tile", 128 if roomy and warpgroups > 1 else 64),
        stages=2,
        order=problem.option("backward_order", ORDERS[0] if narrow or wide else "dq_first"),
        deterministic=deterministic,
        dq_by=dq_by,
        approx_math=problem.option("approx_math", True),
        interpret=interpret,
        wide=wide,
        dq=_choose_dq(problem, interpret) if separate else None,
    )
    alone = warpgroups == 1 and shared_memory(problem, config) <= HALF_OF_SHARED_MEMORY
    config = dataclasses.replace(
        config, self_loading=problem.option("backward_self_loading", alone)
    )
    # Measured: 5 to 10% faster with wide tiles of queries, where exponentials are a larger part of the work. For
    # sums of what the mod reads there are no registers left.
    wide_tiles = by_rows(config) and not (wide or separate) and not _has_sums(problem)
    deferred = problem.option("backward_deferred", wide_tiles)
    config = dataclasses.replace(config, deferred=deferred)
    plain = not (wide or separate or interpret) and warpgroups == 2
    # A warpgroup without a share of dQ hands its queries back by itself.
    rolling = (
        plain and config.order == "dq_first" and not config.deferred and _all_share(problem, config)
    )
    config = dataclasses.replace(config, rolling=rolling)
    # Measured: 7 to 13% faster than a CTA a column; of which 4% are rounding, which loses as much with packed
    # documents. With a soft cap, whose derivative takes the registers, both lose.
    persistent = config.deferred and _can_be_persistent(problem, config)
    persistent = problem.option(
        "backward_persistent", persistent and _has_plain_derivative(problem)
    )
    rounding = persistent and not problem.mask_loads
    rounding = problem.option("backward_rounding", rounding)
    config = dataclasses.replace(config, persistent=persistent, rounding=rounding, cores=cores)
    shares = problem.option("backward_shares", _choose_shares(problem, config))
    config = dataclasses.replace(config, shares=shares)
    stages = problem.option("backward_stages", None)
    if stages is not None:
        config = dataclasses.replace(config, stages=stages)
    elif shared_memory(problem, config) > SHARED_MEMORY:
        config = dataclasses.replace(config, stages=1)
    if config.stages == 1:  # a step that rolls keeps its queries until the next one's are there
        config = dataclasses.replace(config, rolling=False)
    return _checked(problem, config)


def _all_share(problem: Problem, config: BackwardConfig) -> bool:
    """Whether every warpgroup has a share of dQ: heads of 16 numbers leave one without."""
    return all(part.columns for part in parts(config, padded_dim(problem.qk_dim)))


def _rows(problem: Problem) -> int:
    """Batch rows and query heads that read the same keys."""
    return problem.batch // problem.kv_batch * problem.group


def _choose_shares(problem: Problem, config: BackwardConfig) -> int:
    rows, columns = _rows(problem), cdiv(problem.kv_len, config.kv_tile)
    whole = problem.kv_batch * problem.kv_heads * columns
    if config.ordered:
        return 1
    enough = (n for n in range(1, rows) if rows % n == 0 and n * whole >= COLUMNS * config.cores)
    return next(enough, rows)


def _can_be_persistent(problem: Problem, config: BackwardConfig) -> bool:
    # The results of a column have shared memory of their own, one after the other, so they must be alike. Wider
    # ones gain nothing, and leave no registers for a warpgroup that rounds.
    alike = padded_dim(problem.qk_dim) == padded_dim(problem.v_dim) <= 64
    plain = config.warpgroups == 2 and not config.interpret
    config = dataclasses.replace(config, persistent=True)
    fits = shared_memory(problem, config) <= SHARED_MEMORY
    return alike and plain and config.dq_by == CONSUMERS and fits


def _choose_dq_by(problem: Problem, warpgroups: int, wide: bool) -> str:
    interpret = problem.option("interpret", False)
    # Measured, of the time that consumers take who add to dQ themselves: at D256, causal or soft cap, KERNEL 0.73
    # and 0.77, ADDER 0.99 (the kernel that computes dK and dV has few registers left for masks), but without a
    # mask 0.72 and 0.63; at D192 with values of 128 KERNEL 0.90, ADDER 1.00.
    apart = wide and (problem.mask is not None or problem.v_dim <= 128)
    if problem.option("deterministic", False):
        # With a block mask columns would wait for long: they begin at different queries.
        ordered = warpgroups == 2 and not (interpret or apart) and problem.blocks is None
        return IN_ORDER if ordered and _sums_by(problem) <= {KEYS} else KERNEL
    if not wide or interpret:
        return CONSUMERS
    return KERNEL if apart and _sums_by(problem) <= {KEYS, QUERIES} else ADDER


def _sums_by(problem: Problem) -> set[str]:
    """How gradients of what the score_mod reads are summed."""
    return {load.kind for load in capture_gradients.loads_of(problem)}


def _has_sums(problem: Problem) -> bool:
    """Whether what the score_mod reads has gradients."""
    score = problem.score
    return score is not None and score.gradient is not None and bool(score.gradient.loads)


def _few_derivatives(problem: Problem) -> bool:
    """Whether registers suffice for wide tiles: derivatives by what the score_mod reads are whole tiles too."""
    score = problem.score
    if score is None or score.gradient is None:
        return True
    graph, loads = score.gradient.graph, score.gradient.loads
    derivatives = (graph.nodes[graph.outputs[load.derivative]] for load in loads)
    return len(loads) <= 1 and all(d.op == "const" for d in derivatives)


def _has_plain_derivative(problem: Problem) -> bool:
    """Whether the modified score grows with the score, at a constant rate."""
    score = problem.score
    if score is None or score.gradient is None:
        return True
    graph = score.gradient.graph
    return graph.nodes[graph.outputs[1]].op == "const"


def _choose_dq(problem: Problem, interpret: bool) -> forward_config.Config:
    blocks = problem.blocks
    two = blocks is None or blocks.geometry.q_block % (2 * WARPGROUP_ROWS) == 0
    wide = blocks is None or blocks.geometry.kv_block % 128 == 0
    config = forward_config.Config(
        warpgroups=2 if two else 1,
        kv_tile=128 if wide else 64,
        stages=2,
        persistent=False,
        ping_pong=False,
        trust_maximum=False,
        approx_math=problem.option("approx_math", True),
        interpret=interpret,
    )
    # What does not fit gives up first width, then the overlap of tiles.
    fallbacks = [config, *(dataclasses.replace(config, kv_tile=64, stages=n) for n in (2, 1))]
    fitting = (c for c in fallbacks if dq_shared_memory(problem, c) <= SHARED_MEMORY)
    return next(fitting, fallbacks[-1])


def _checked(problem: Problem, config: BackwardConfig) -> BackwardConfig:
    if config.warpgroups not in REGISTERS:
        raise NotImplementedError(
            f"the backward kernel runs 1 or 2 consumer warpgroups, but {config.warpgroups} were asked for."
        )
    if config.wide and (config.warpgroups != 2 or config.q_tile != 64 or config.order != ORDERS[0]):
        raise NotImplementedError(
            "head dimensions above 128 take two warpgroups, 64 queries a step and the order "
            f"{ORDERS[0]!r}, but kernel options ask for {config.warpgroups}, {config.q_tile} and "
            f"{config.order!r}."
        )
    if config.self_loading and config.warpgroups != 1:
        raise NotImplementedError(
            "a backward kernel whose consumer loads by itself has one warpgroup, but kernel options ask for "
            f"{config.warpgroups}."
        )
    _check_dq(problem, config)
    if config.deferred and (config.wide or config.separate_dq or config.warpgroups != 2):
        raise NotImplementedError(
            "backward_deferred takes two warpgroups, head dimensions of at most 128, and dQ from the same kernel; "
            f"the problem or its kernel options ask for {config.warpgroups} warpgroups, a head dimension of "
            f"{max(problem.qk_dim, problem.v_dim)} and dQ by {config.dq_by!r}."
        )
    if config.persistent and not _can_be_persistent(problem, config):
        raise NotImplementedError(
            "backward_persistent takes two warpgroups and a producer, head dimensions of at most 64 that are the "
            "same for keys and values, and consumers who add to dQ; the problem or its kernel options ask for "
            f"{config.warpgroups} warpgroups, head dimensions of {problem.qk_dim} and {problem.v_dim}, dQ by "
            f"{config.dq_by!r} and interpret={config.interpret}, or leave no shared memory for it."
        )
    if config.rounding and not config.persistent:
        raise NotImplementedError(
            "backward_rounding takes persistent CTAs, and these are not. Leave the option out, or see "
            "backward_persistent."
        )
    if config.shares != 1 and (config.ordered or _rows(problem) % config.shares):
        raise NotImplementedError(
            "backward_shares divides the batch rows and query heads that read the same keys, if no column waits "
            f"for another; but {config.shares} of {_rows(problem)} were asked for, with dQ by {config.dq_by!r}."
        )
    if config.q_tile not in Q_TILES:
        raise NotImplementedError(
            f"the backward kernel's tiles have {' or '.join(map(str, Q_TILES))} queries, but "
            f"{config.q_tile} were asked for."
        )
    if config.order not in ORDERS:
        raise NotImplementedError(
            f"backward_order is {' or '.join(map(repr, ORDERS))}, but it is {config.order!r}."
        )
    if problem.blocks is not None:
        geometry = problem.blocks.geometry
        if geometry.q_block % config.q_tile or geometry.kv_block % config.kv_tile:
            raise NotImplementedError(
                f"the block mask has blocks of ({geometry.q_block}, {geometry.kv_block}) positions, which "
                f"the backward kernel's tiles of ({config.q_tile}, {config.kv_tile}) do not divide. Build it "
                "with a block size that is a multiple of 64, best of 128."
            )
    needed = shared_memory(problem, config)
    if needed > SHARED_MEMORY:
        raise NotImplementedError(
            f"the backward kernel's tiles would take {needed} bytes of shared memory of {SHARED_MEMORY}. "
            "Ask for fewer stages or smaller tiles."
        )
    return config


def _check_dq(problem: Problem, config: BackwardConfig) -> None:
    if config.dq_by not in DQ_BY:
        raise NotImplementedError(
            f"backward_dq is one of {', '.join(map(repr, DQ_BY))}, but it is {config.dq_by!r}."
        )
    if config.deterministic and config.dq_by not in (IN_ORDER, KERNEL):
        raise NotImplementedError(
            f"deterministic=True needs backward_dq={IN_ORDER!r} or {KERNEL!r}, but it is {config.dq_by!r}."
        )
    if config.handed_over and (config.self_loading or config.interpret):
        raise NotImplementedError(
            f"backward_dq={config.dq_by!r} takes a kernel with a producer, on a GPU; two consumer warpgroups "
            "have one."
        )
    if config.ordered and problem.blocks is not None:
        raise NotImplementedError(
            f"backward_dq={IN_ORDER!r} takes an attention without a block mask. Ask for {KERNEL!r}."
        )
    summed = {IN_ORDER: {KEYS}, KERNEL: {KEYS, QUERIES}}.get(config.dq_by)
    if summed is not None and not _sums_by(problem) <= summed:
        raise NotImplementedError(
            f"score_mod reads captured arrays whose gradients are summed by {sorted(_sums_by(problem))}, but with "
            f"backward_dq={config.dq_by!r} they can be summed by {sorted(summed)} alone. Leave the option out."
        )
