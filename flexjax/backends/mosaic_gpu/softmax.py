"""The online softmax of a tile of scores, in base 2, on the registers of one warpgroup.

With x = c y the scores y in units of log2 (c = log2 e, times the scale where it was not yet applied), a row keeps
a reference m and the sum l of 2^(x - m); the output's accumulator is relative to the same m. A new tile may
raise m to m', and multiplies l and the accumulator by alpha = 2^(m - m') (Milakov and Gimelshein 2018,
arXiv:1805.02867; FlashAttention-2, arXiv:2307.08691).

m need not be the row's maximum: any m serves for which nothing overflows and the sum does not vanish. So

- a step may leave m alone while the maximum has outgrown it by less than 2^8, which spares most steps the
  rescaling of the accumulator (FlashAttention-4 does so too);
- a step may skip the search for the maximum (`trusting`), take the old m, and look at the sums: only a warp in
  which one of them passes 2^14, or is NaN, or whose m is still -inf, finds the maximum and starts over.

Where the true maxima are asked for, neither is done.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from flexjax.backends.mosaic_gpu import registers
from flexjax.backends.mosaic_gpu.registers import ROW
from flexjax.backends.mosaic_gpu.trusting import Bias, trusting_softmax

LOG2_E = math.log2(math.e)
SLACK = 8.0  # probabilities up to 2^8 stay far below float16's 65504


class State(NamedTuple):
    """A row's running values, [64] each in the row layout.

    Attributes:
        reference: m, in units of log2; -inf until a row has met a score above -inf.
        total: l; lane-partial on the GPU.
    """

    reference: Any
    total: Any


@dataclasses.dataclass(frozen=True)
class Softmax:
    """The online softmax of one kernel.

    Attributes:
        factor: c, from a score to units of log2; positive.
        dtype: of the probabilities, as the matrix product with the values takes them.
        maxima: whether m must be the true maximum in the end.
        trust: whether `trusting` may skip the search for the maximum.
        interpret: whether to do without what the interpreter lacks.
    """

    factor: float
    dtype: Any
    maxima: bool
    trust: bool
    interpret: bool

    def start(self, rows: int) -> State:
        def row(value: float) -> Any:
            return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), ROW)

        return State(row(-jnp.inf), row(0.0))

    def searching(self, scores: Any, state: State) -> tuple[Any, State, Any]:
        """(probabilities, new state, alpha) after finding the rows' maxima. Float32 probabilities."""
        old = state.reference
        new = jnp.maximum(old, scores.max(axis=1) * self.factor)
        if not self.maxima:
            new = jnp.where(new - old > SLACK, new, old)
        # A row of -inf only: anything finite gives exponentials of zero rather than of -inf + inf.
        safe = jnp.where(new == -jnp.inf, 0.0, new)
        alpha = jnp.exp2(old - safe)
        p = jnp.exp2(scores * self.factor - lax.broadcast_in_dim(safe, scores.shape, [0]))
        sums = p.sum(axis=1) if self.interpret else registers.partial_row_sums(p)
        return p, State(new, state.total * alpha + sums), alpha

    @property
    def trusts(self) -> bool:
        """Whether `trusting` does."""
        return self.trust and not self.maxima and not self.interpret

    def trusting(
        self,
        scores: Any,
        state: State,
        words: Any = None,
        bias: Bias | None = None,
        before: float = 1.0,
        first: bool = False,
    ) -> tuple[Any, State, Any]:
        """The same from the old reference wherever that will do. Probabilities in `dtype`.

        Args:
            scores: of the tile.
            state: of the rows.
            words: of a masked tile, the bits of the keys that a thread may see in a row (see row_words.py).
            bias: what the scores still lack, where `trusts`.
            before: a positive factor of the scores that they still lack.
            first: whether no row has a reference yet.
        """
        if not self.trusts:
            return self.searching(scores, state)
        factor = self.factor * before
        p, sums, reference, alpha = trusting_softmax(
            scores, state.reference, state.total, factor, self.dtype, words, bias, first
        )
        return p, State(reference, state.total * alpha + sums), alpha

    def as_operand(self, p: Any) -> Any:
        """Probabilities as operand of the product with the values, after the previous product has ended."""
        if p.dtype == self.dtype:
            return registers.in_fresh_registers(lax.optimization_barrier(p))
        return p.astype(self.dtype)

    def rescaled(self, accumulator: Any, alpha: Any) -> Any:
        if self.interpret:
            return accumulator * lax.broadcast_in_dim(alpha, accumulator.shape, [0])
        return registers.scale_rows(accumulator, alpha)

    def finish(self, state: State) -> tuple[Any, Any, Any]:
        """(1 / l or 0 in rows without keys, lse, maxima) of the rows, in natural units."""
        total = state.total if self.interpret else registers.finish_row_sums(state.total)
        inverse = jnp.where(total == 0.0, 0.0, 1.0 / total)
        maxima = state.reference * (1.0 / LOG2_E)
        return inverse, maxima + jnp.log(total), maxima
