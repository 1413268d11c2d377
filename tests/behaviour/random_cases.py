"""Attentions made at random: masks and scores of several parts, odd sizes, any layout and grouping.

A seed makes the same case every time. What a kernel does with one mask or one length is tested elsewhere; here
parts meet that nobody thought of together.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.behaviour.harness import Case

Function = Callable[..., Any]


def seeds(count: int) -> range:
    """Those that FLEXJAX_RANDOM=1000:1500 asks for, or the first few."""
    first, end = os.environ.get("FLEXJAX_RANDOM", f"0:{count}").split(":")
    return range(int(first), int(end))


@dataclasses.dataclass
class Maker:
    """Makes the parts of one case.

    Attributes:
        rng: what everything is drawn from.
        batch, heads, q_len, kv_len: sizes of the attention.
        captures: float arrays that the score reads, by the number of their part.
    """

    rng: np.random.Generator
    batch: int
    heads: int
    q_len: int
    kv_len: int
    captures: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def one_of(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def number(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, max(high, low + 1)))

    def integers(self, high: int, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.integers(0, high, shape), jnp.int32)

    def captured(self, *shape: int) -> str:
        """The name of a new array that the score reads."""
        name = f"part{len(self.captures)}"
        dtype = self.one_of("float32", "bfloat16", "float16")
        self.captures[name] = jnp.asarray(self.rng.standard_normal(shape), dtype)
        return name

    # -- masks ----------------------------------------------------------------------------------

    def mask(self, depth: int) -> Function:
        """A function of (b, h, q, k)."""
        if depth == 0 or self.rng.random() < 0.4:
            return getattr(self, f"_{self.one_of(*_MASKS)}")()
        left, right = self.mask(depth - 1), self.mask(depth - 1)
        every = self.number(2, 5)
        return self.one_of(
            lambda b, h, q, k: left(b, h, q, k) & right(b, h, q, k),
            lambda b, h, q, k: left(b, h, q, k) | right(b, h, q, k),
            lambda b, h, q, k: left(b, h, q, k) ^ right(b, h, q, k),
            lambda b, h, q, k: ~left(b, h, q, k),
            lambda b, h, q, k: jnp.where(h % every == 0, left(b, h, q, k), right(b, h, q, k)),
        )

    def _causal(self) -> Function:
        offset = self.number(-20, abs(self.kv_len - self.q_len) + 20)
        return lambda b, h, q, k: q + offset >= k

    def _window(self) -> Function:
        before, after = self.number(0, self.kv_len), self.number(0, self.kv_len)
        return lambda b, h, q, k: (q - k <= before) & (k - q <= after)

    def _documents(self) -> Function:
        ids = jnp.sort(self.integers(self.number(1, 9), max(self.q_len, self.kv_len)))
        return lambda b, h, q, k: ids[q] == ids[k]

    def _levels(self) -> Function:
        of_q, of_k = (
            self.integers(4, self.batch, self.q_len),
            self.integers(4, self.batch, self.kv_len),
        )
        return lambda b, h, q, k: of_q[b, q] <= of_k[b, k]

    def _lengths(self) -> Function:
        lengths = self.integers(self.kv_len + 1, self.batch, self.heads)
        return lambda b, h, q, k: (k < lengths[b, h]) | (q == k)

    def _prefix(self) -> Function:
        lengths = self.integers(self.kv_len + 1, self.batch)
        return lambda b, h, q, k: (k < lengths[b]) | (q >= k)

    def _reach_of_head(self) -> Function:
        reach = self.integers(self.kv_len, self.heads)
        return lambda b, h, q, k: jnp.abs(q - k) <= reach[h]

    def _dilated(self) -> Function:
        step = self.number(2, 7)
        return lambda b, h, q, k: (q - k) % step == 0

    def _checkered(self) -> Function:
        of_q, of_k = self.number(1, self.q_len), self.number(1, self.kv_len)
        return lambda b, h, q, k: (q // of_q + k // of_k) % 2 == 0

    def _image(self) -> Function:
        width, reach = self.number(2, 40), self.number(0, 9)
        return lambda b, h, q, k: (
            (jnp.abs(q // width - k // width) <= reach) & (jnp.abs(q % width - k % width) <= reach)
        )

    def _arithmetic(self) -> Function:
        a, c, offset = self.number(0, 9), self.number(0, 9), self.number(0, 500)
        by, modulus, below = self.number(1, 120), self.number(2, 12), self.number(1, 8)
        return lambda b, h, q, k: (q * a + k * c + offset) // by % modulus < below

    def _remainders(self) -> Function:
        of_q, of_k = self.number(1, 90), self.number(1, 90)
        return lambda b, h, q, k: q % of_q <= k % of_k

    def _bits(self) -> Function:
        of_q, of_k = self.integers(256, self.q_len), self.integers(256, self.kv_len)
        return lambda b, h, q, k: (of_q[q] & of_k[k]) != 0

    def _table(self) -> Function:
        share = self.rng.uniform(0.02, 0.98)
        table = jnp.asarray(self.rng.random((self.q_len, self.kv_len)) < share)
        return lambda b, h, q, k: table[q, k]

    def _thresholds(self) -> Function:
        values = jnp.asarray(self.rng.standard_normal(self.kv_len), jnp.float32)
        return lambda b, h, q, k: values[k] > q * 0.01 - 1.0

    # -- scores ---------------------------------------------------------------------------------

    def score(self, depth: int) -> Function:
        """A function of (captures, score, b, h, q, k)."""
        inner = self.score(depth - 1) if depth else lambda c, s, b, h, q, k: s
        return getattr(self, f"_{self.one_of(*_SCORES)}")(inner)

    def _plus(self, shape: tuple[int, ...], index: Function, inner: Function) -> Function:
        """The score and an element of an array that it reads."""
        name = self.captured(*shape)
        return lambda c, s, b, h, q, k: (
            inner(c, s, b, h, q, k) + c[name][index(b, h, q, k)].astype(s.dtype)
        )

    def _by_key(self, inner: Function) -> Function:
        return self._plus((self.heads, self.kv_len), lambda b, h, q, k: (h, k), inner)

    def _by_pair(self, inner: Function) -> Function:
        shape = self.batch, self.heads, self.q_len, self.kv_len
        return self._plus(shape, lambda b, h, q, k: (b, h, q, k), inner)

    def _by_distance(self, inner: Function) -> Function:
        last = self.kv_len
        return self._plus((self.q_len + last,), lambda b, h, q, k: (q - k + last,), inner)

    def _by_clipped_distance(self, inner: Function) -> Function:
        shape = self.heads, 33
        return self._plus(shape, lambda b, h, q, k: (h, jnp.clip(q - k, -16, 16) + 16), inner)

    def _by_place_in_image(self, inner: Function) -> Function:
        width = self.number(3, 30)
        rows = max(self.q_len, self.kv_len) // width
        return self._plus(
            (2 * rows + 1, 2 * width),
            lambda b, h, q, k: (q // width - k // width + rows, q % width - k % width + width),
            inner,
        )

    def _by_kind_of_key(self, inner: Function) -> Function:
        kinds = self.integers(40, self.kv_len)
        return self._plus((40, self.heads), lambda b, h, q, k: (kinds[k], h), inner)

    def _factor(self, inner: Function) -> Function:
        name = self.captured(self.heads)
        return lambda c, s, b, h, q, k: inner(c, s, b, h, q, k) * c[name][h].astype(s.dtype)

    def _gate(self, inner: Function) -> Function:
        name = self.captured(self.q_len)
        return lambda c, s, b, h, q, k: inner(c, s, b, h, q, k) * c[name][q].astype(s.dtype)

    def _slope(self, inner: Function) -> Function:
        name = self.captured(self.heads)
        return lambda c, s, b, h, q, k: (
            inner(c, s, b, h, q, k) - 0.02 * jnp.abs(c[name][h].astype(s.dtype)) * (q - k)
        )

    def _symmetric(self, inner: Function) -> Function:
        slope = float(self.rng.uniform(-0.02, 0.1))
        return lambda c, s, b, h, q, k: inner(c, s, b, h, q, k) - slope * jnp.abs(q - k)

    def _cap(self, inner: Function) -> Function:
        cap = float(self.rng.uniform(1, 30))
        return lambda c, s, b, h, q, k: cap * jnp.tanh(inner(c, s, b, h, q, k) / cap)

    def _logarithm(self, inner: Function) -> Function:
        def score(*args: Any) -> Any:
            x = inner(*args)
            return jnp.sign(x) * jnp.log1p(jnp.abs(x))

        return score

    def _square(self, inner: Function) -> Function:
        return lambda *args: 0.5 * inner(*args) + 0.05 * inner(*args) ** 2

    def _bounded(self, inner: Function) -> Function:
        low = float(self.rng.uniform(-1, 1))
        return lambda *args: jnp.clip(inner(*args), low, low + 2.0)

    def _where(self, inner: Function) -> Function:
        condition, other = self.mask(1), float(self.rng.uniform(-1, 1))
        return lambda c, s, b, h, q, k: (
            inner(c, s, b, h, q, k) * jnp.where(condition(b, h, q, k), 1.0, other)
        )

    def _waves(self, inner: Function) -> Function:
        return lambda c, s, b, h, q, k: (
            inner(c, s, b, h, q, k) + jnp.sin(0.1 * (q - k)) * jnp.cos(0.2 * k)
        )


_MASKS = (
    *("causal", "window", "documents", "levels", "lengths", "prefix", "reach_of_head", "dilated"),
    *("checkered", "image", "arithmetic", "remainders", "bits", "table", "thresholds"),
)
_SCORES = (
    *("by_key", "by_pair", "by_distance", "by_clipped_distance", "by_place_in_image"),
    *("by_kind_of_key", "factor", "gate", "slope", "symmetric", "cap", "logarithm", "square"),
    *("bounded", "where", "waves"),
)


def random_case(seed: int, kernels: bool) -> Case:
    """The case of a seed, of sizes for the kernels or for a CPU."""
    rng = np.random.default_rng(seed)
    maker = Maker(rng, batch=1, heads=1, q_len=1, kv_len=1)
    longest = 700 if kernels else 90
    lengths = (1, 2, 7, 16, 63, 64, 65, 127, 128, 129, 192, 256, 257, 384, 512, 640)
    known = [length for length in lengths if length <= longest]

    def length() -> int:
        return int(maker.one_of(maker.one_of(*known), maker.number(1, longest)))

    q_len = length()
    kv_len = q_len if rng.random() < 0.6 else length()
    if rng.random() < 0.1:
        q_len, kv_len = maker.number(1, 17), maker.number(longest, 4 * longest)
    kv_heads, group = maker.one_of((1, 1), (1, 2), (2, 1), (3, 1), (2, 2), (1, 4), (1, 8), (2, 3))
    batch = maker.one_of(1, 1, 2, 3)
    maker = Maker(rng, batch, kv_heads * group, q_len, kv_len)
    mask = maker.mask(2) if rng.random() < 0.8 else None
    score = maker.score(maker.number(0, 2)) if rng.random() < 0.75 else None
    blocks = (128, 64, (64, 128), (128, 64), (256, 128), (128, 256), 256, (192, 128), 512)
    dims = (64, 64, 128, 128, 16, 32, 40, 80, 96, 160, 192, 256)
    dim = maker.one_of(*dims) if kernels else maker.one_of(8, 16)
    return Case(
        f"random_{seed}",
        score=None if score is None else lambda c: functools.partial(score, c),
        captures=maker.captures,
        mask=mask,
        own_mask=mask is not None and rng.random() < 0.3,
        mask_shape=(batch, kv_heads * group),
        block=maker.one_of(*blocks) if kernels else maker.one_of(16, 32, (16, 64)),
        batch=batch,
        kv_batch=1 if rng.random() < 0.1 else None,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        dim=dim,
        v_dim=maker.one_of(*dims) if kernels and rng.random() < 0.2 else None,
        dtype=maker.one_of("bfloat16", "bfloat16", "float16") if kernels else "float32",
        layout=maker.one_of("BHLD", "BLHD"),
        scale=None if rng.random() < 0.8 else float(rng.uniform(0.02, 0.5)),
    )
