"""Consumers of the forward kernel that issue their own copies, without a producer.

Each has tiles, stages and queries of its own. What it has read it replaces once a step, when the product with the
values of the step before has ended: those values and the keys of this step, each by what comes as many steps
later as there are stages. So the warps of a consumer wait for each other once a step. The keys, whose product
ended before the softmax, are replaced late but not too late: they have a whole step to arrive.

Four such consumers share a multiprocessor where heads are narrow, with at most 128 registers a thread. They are
four warpgroups of one CTA, since the compiler keeps to so few registers only if a CTA has 512 threads. The CTA is
therefore persistent, and a consumer loads the start of its next tile before it stores the last one.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp

from flexjax.backends.mosaic_gpu import registers
from flexjax.backends.mosaic_gpu.copies_sm90 import Copies
from flexjax.backends.mosaic_gpu.kernel_sm90 import Kernel
from flexjax.backends.mosaic_gpu.schedule import Work


class Start(NamedTuple):
    """The first copies of a tile.

    Attributes:
        work: the tile.
        first_keys: of the steps that the stages hold at first.
        wanted: whether there is such a tile.
    """

    work: Work
    first_keys: list[Any]
    wanted: Any


class Following(NamedTuple):
    """What takes over a stage.

    Attributes:
        first_key: of the step.
        wanted: whether there is such a step.
    """

    first_key: Any
    wanted: Any


@dataclasses.dataclass(frozen=True)
class SelfLoading:
    """The copies of one consumer.

    Attributes:
        kernel: what it is part of.
        copies: issues copies.
        consumer: its number.
    """

    kernel: Kernel
    copies: Copies
    consumer: Any

    def start_of(self, work: Work, wanted: Any = True) -> Start:
        """What to load for a tile. Asked early, the lists have answered when it is loaded."""
        stages = range(self.kernel.config.stages)
        return Start(work, [work.steps.first_key(i) for i in stages], wanted)

    def load(self, start: Start) -> None:
        """Issues the first copies of a tile, all of whose stages are free."""
        work, copies = start.work, self.copies
        pl.when(start.wanted)(lambda: copies.query(work.position, self.consumer))
        for i, first_key in enumerate(start.first_keys):
            stage = self._stage(work, i)

            @pl.when(start.wanted & (i < work.steps.computed))
            def _(stage: Any = stage, first_key: Any = first_key) -> None:
                copies.key(work.position, first_key, stage)
                copies.value(work.position, first_key, stage)

    def following(self, work: Work, number: Any) -> Following:
        """What takes over the stage of the keys of a step. Asked early, the lists have answered then."""
        number = number + self.kernel.config.stages
        return Following(work.steps.first_key(number), number < work.steps.computed)

    def replace_first_keys(self, work: Work, following: Following) -> None:
        """Replaces the keys of the first step, which has no product with values."""

        @pl.when(following.wanted)
        def _() -> None:
            self.wait_for_warps()
            self.copies.key(work.position, following.first_key, self._stage(work, 0))

    def replace(self, work: Work, number: Any, following: Following) -> None:
        """Replaces the keys of a step, and the values of the step before."""
        later = number - 1 + self.kernel.config.stages

        @pl.when(later < work.steps.computed)
        def _() -> None:
            self.wait_for_warps()
            stage = self._stage(work, number - 1)
            # Their keys are on their way or have come, so that the stage knows which they are.
            first_key = self.copies.first_key(work.steps, later, stage)
            self.copies.value(work.position, first_key, stage)

            @pl.when(following.wanted)
            def _() -> None:
                self.copies.key(work.position, following.first_key, self._stage(work, number))

    def wait_for_warps(self) -> None:
        """What is read is free when all warps of the consumer have read it."""
        if not self.kernel.config.interpret:  # whose warpgroups are single threads
            registers.wait_for_own_warps(self.consumer)

    def _stage(self, work: Work, number: Any) -> Any:
        return self.kernel.stage(work.begin + jnp.int32(number), self.consumer)
