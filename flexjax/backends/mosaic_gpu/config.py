"""How the forward kernel is configured, and the heuristics that choose it."""

from __future__ import annotations

import dataclasses

from flexjax.problem import Problem

# A consumer warpgroup computes this many query rows: the M of Hopper's matrix instruction.
WARPGROUP_ROWS = 64
# Shared memory of a Hopper CTA, less what the barriers take.
SHARED_MEMORY = 227 * 1024 - 1024
# Shared memory of each of two CTAs that share a multiprocessor, less what the barriers take.
HALF_OF_SHARED_MEMORY = 228 * 1024 // 2 - 2 * 1024
# Streaming multiprocessors of an H100 SXM; used where the device is not at hand.
CORES = 132

KV_TILES = (128, 64)

# Consumers with tiles of their own in a CTA, at most: they have 128 registers a thread.
WORKERS = 4

# Registers a thread of the consumers and of the producer, by the number of consumer warpgroups. A CTA of one
# consumer and the producer gets 255 for everybody without asking.
REGISTERS = {1: None, 2: (240, 24), 3: (160, 32)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices of the forward kernel.

    Attributes:
        warpgroups: consumer warpgroups, of 64 query rows each.
        kv_tile: keys of one step.
        stages: tiles of keys, and of values, in flight.
        persistent: one CTA a multiprocessor, walking over the tiles; otherwise one CTA a tile.
        ping_pong: warpgroups take turns on the tensor cores, so that one's softmax hides behind the other's
            matrix products.
        trust_maximum: full steps skip the search for the row maxima (see softmax.py).
        approx_math: approximate transcendental functions in the mods.
        cores: CTAs of a persistent grid.
        interpret: run in Pallas' Mosaic GPU interpreter, on the CPU.
        self_loading: consumers issue their own copies, without a producer, for tiles of their own: several then
            share a multiprocessor, and one computes while another starts, waits or stores.
        workers: such consumers in a CTA. With one, CTAs share the multiprocessor, as many as the registers that
            the compiler likes to have allow; four of a persistent CTA make it do with a quarter of them.
        counted: the producer of a persistent grid takes tiles from a counter, rather than those that were dealt
            out in advance.
    """

    warpgroups: int
    kv_tile: int
    stages: int
    persistent: bool
    ping_pong: bool
    trust_maximum: bool
    approx_math: bool
    cores: int = CORES
    interpret: bool = False
    self_loading: bool = False
    workers: int = 1
    counted: bool = False

    @property
    def q_tile(self) -> int:
        """Queries of one CTA's tile."""
        return self.warpgroups * WARPGROUP_ROWS


OPTIONS = {
    "warpgroups": int,
    "kv_tile": int,
    "stages": int,
    "persistent": bool,
    "ping_pong": bool,
    "trust_maximum": bool,
    "approx_math": bool,
    "interpret": bool,
    "self_loading": bool,
    "workers": int,
    "counted": bool,
}


def padded_dim(dim: int) -> int:
    """Head dimension as the kernel sees it: 16 numbers are the narrowest swizzled row of shared memory."""
    return -(-dim // 16) * 16


def own_output_buffer(problem: Problem, persistent: bool) -> bool:
    """Whether the output has its own shared memory rather than the queries'.

    A persistent CTA loads the next queries while it stores the output.
    """
    return persistent or padded_dim(problem.qk_dim) != padded_dim(problem.v_dim)


def shared_memory(problem: Problem, config: Config) -> int:
    """Bytes of shared memory that the kernel's tiles take."""
    d, dv = padded_dim(problem.qk_dim), padded_dim(problem.v_dim)
    numbers = config.q_tile * d + config.stages * config.kv_tile * (d + dv)
    if own_output_buffer(problem, config.persistent):
        numbers += config.q_tile * dv
    if config.interpret:  # probabilities, see forward_sm90.py
        numbers += config.q_tile * config.kv_tile
    return 2 * numbers * config.workers


def values_ahead(problem: Problem, config: Config) -> int:
    """How many values by key there are registers for while the scores are being computed; see keys_ahead.py."""
    if config.interpret or not _medium(problem):
        return 0
    return 1


def choose(problem: Problem, cores: int = CORES) -> Config:
    """The configuration for a problem; its kernel options override the heuristics.

    Raises:
        NotImplementedError: no configuration fits the block sizes, or the options do not fit the problem.
    """
    interpret = problem.option("interpret", False)
    warpgroups = problem.option("warpgroups", _warpgroups(problem))
    self_loading = problem.option("self_loading", _self_loading(problem, warpgroups))
    workers = problem.option("workers", _workers(problem, self_loading))
    config = Config(
        warpgroups=warpgroups,
        kv_tile=problem.option("kv_tile", _kv_tile(problem, warpgroups, self_loading)),
        stages=problem.option("stages", 4 if _narrow(problem) and workers == 1 else 2),
        persistent=problem.option("persistent", workers > 1 if self_loading else True),
        ping_pong=problem.option("ping_pong", True) and not interpret,
        trust_maximum=problem.option("trust_maximum", True),
        approx_math=problem.option("approx_math", True),
        cores=cores,
        interpret=interpret,
        self_loading=self_loading,
        workers=workers,
    )
    config = dataclasses.replace(
        config, counted=problem.option("counted", _counted(problem, self_loading))
    )
    # What does not fit gives up first the overlap of tiles, then a stage.
    fallbacks = [config]
    asked = dict(problem.options)
    if "persistent" not in asked and asked.get("workers", 1) == 1:
        fallbacks.append(dataclasses.replace(config, persistent=False, workers=1))
    if "stages" not in asked:
        fallbacks += [dataclasses.replace(c, stages=n) for n in (2, 1) for c in fallbacks[:2]]
    fitting = [c for c in fallbacks if shared_memory(problem, c) <= SHARED_MEMORY]
    return _checked(problem, fitting[0] if fitting else fallbacks[-1])


def _narrow(problem: Problem) -> bool:
    return max(problem.qk_dim, problem.v_dim) <= 64


def _medium(problem: Problem) -> bool:
    return max(problem.qk_dim, problem.v_dim) <= 128


def _warpgroups(problem: Problem) -> int:
    """Consumers of a tile. Narrow heads take one, of which several share a multiprocessor: see `_workers`."""
    if problem.blocks is None:
        if problem.q_len <= WARPGROUP_ROWS:
            return 1
    elif problem.blocks.geometry.q_block % (2 * WARPGROUP_ROWS):
        return 1
    if not _narrow(problem):
        return 2
    return 1 if problem.option("self_loading", problem.option("kv_tile", 64) == 64) else 2


def _kv_tile(problem: Problem, warpgroups: int, self_loading: bool) -> int:
    """The widest tile that the registers hold and that divides the mask's blocks; narrow where CTAs share them."""
    roomy = _medium(problem) and warpgroups < 3 and not self_loading
    widest = 128 if roomy else 64
    block = widest if problem.blocks is None else problem.blocks.geometry.kv_block
    return next((n for n in KV_TILES if n <= widest and block % n == 0), KV_TILES[-1])


def _self_loading(problem: Problem, warpgroups: int) -> bool:
    """Whether the only consumer loads by itself: where several such tiles fit in a multiprocessor.

    With up to 128 numbers a head two do, which was measured 1.29 times faster than one and a producer.
    """
    return warpgroups == 1 and _medium(problem) and (problem.blocks is not None or _narrow(problem))


def _workers(problem: Problem, self_loading: bool) -> int:
    """Consumers with tiles of their own in a CTA: as many as a multiprocessor has room for.

    They walk over tiles that are dealt out in advance. Masks that read captured arrays, such as documents, make
    rows of very uneven length. With heads wider than 64 the hardware's own scheduler, which gives a free
    multiprocessor the next tile, then does better; but it leaves start and end of every tile uncovered.
    """
    dealt = _narrow(problem) or (_medium(problem) and not problem.mask_loads)
    if not self_loading or not problem.option("persistent", dealt):
        return 1
    return WORKERS if _narrow(problem) else WORKERS // 2


def _counted(problem: Problem, self_loading: bool) -> bool:
    """Whether tiles are taken from a counter, where they may differ in length.

    A producer asks for them ahead of time. Four consumers that load by themselves did so, too, in a trial, which
    was slower.
    """
    interpret = problem.option("interpret", False)
    return problem.blocks is not None and not self_loading and not interpret


def _checked(problem: Problem, config: Config) -> Config:
    if config.warpgroups not in REGISTERS:
        raise NotImplementedError(
            f"The kernel runs 1, 2 or 3 consumer warpgroups, but {config.warpgroups} were asked for."
        )
    if config.self_loading and config.warpgroups != 1:
        raise NotImplementedError(
            "Consumers that load by themselves have one warpgroup for each tile, but kernel options ask for "
            f"{config.warpgroups} warpgroups."
        )
    if not 1 <= config.workers <= WORKERS or (
        config.workers > 1 and not (config.self_loading and config.persistent)
    ):
        raise NotImplementedError(
            f"A CTA has at most {WORKERS} consumers with tiles of their own, which load by themselves and walk "
            f"over many tiles, but kernel options ask for workers={config.workers}, "
            f"self_loading={config.self_loading} and persistent={config.persistent}."
        )
    if config.counted and config.self_loading:
        raise NotImplementedError(
            "A producer takes tiles from a counter, but kernel options ask for counted=True with consumers that "
            "load by themselves. Ask for self_loading=False as well."
        )
    if config.kv_tile not in KV_TILES:
        raise NotImplementedError(
            f"The kernel's tiles have {' or '.join(map(str, KV_TILES))} keys, but {config.kv_tile} were "
            "asked for."
        )
    if problem.blocks is not None:
        geometry = problem.blocks.geometry
        if geometry.q_block % config.q_tile or geometry.kv_block % config.kv_tile:
            raise NotImplementedError(
                f"The block mask has blocks of ({geometry.q_block}, {geometry.kv_block}) positions, which "
                f"tiles of ({config.q_tile}, {config.kv_tile}) do not divide. Build it with a block size "
                "that is a multiple of 64, best of 128."
            )
    needed = shared_memory(problem, config)
    if needed > SHARED_MEMORY:
        raise NotImplementedError(
            f"The kernel's tiles would take {needed} bytes of shared memory of {SHARED_MEMORY}: "
            f"{config.stages} stages of {config.kv_tile} keys. Ask for fewer stages or smaller tiles."
        )
    return config
