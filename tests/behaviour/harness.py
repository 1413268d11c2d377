"""A behavioural case as data, and its check against the oracle: outputs and all gradients."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import AuxRequest, BlockMask, create_block_mask, flex_attention
from flexjax.testing import FLOORS, assert_close, oracle, oracle_grads

Mod = Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One attention, small unless the case is about size.

    Attributes:
        id: name of the test.
        score: makes the score_mod from the captured arrays.
        captures: the arrays that score_mod reads, a dict; float ones have their gradients checked.
        mask: the mask_mod; None for no block mask.
        block_mask: makes the BlockMask, outside of any trace, where `create_block_mask(mask, ...)` within
            the compiled function is not what is tested.
        mask_shape: B and H of the block mask.
        block: block size.
        own_mask: whether the mask_mod is passed as `mask_mod=`.
        true_score, true_mask: what the oracle uses in place of `score` and `mask`.
        edit: changes (query, key, value) in NumPy before they are cast.
        grads: whether gradients are checked.
    """

    id: str
    score: Callable[[dict], Mod] | None = None
    captures: dict = dataclasses.field(default_factory=dict)
    mask: Mod | None = None
    block_mask: Callable[[], BlockMask] | None = None
    mask_shape: tuple[int | None, int | None] = (None, None)
    block: int | tuple[int, int] = 16
    own_mask: bool = False
    true_score: Callable[[dict], Mod] | None = None
    true_mask: Mod | None = None
    edit: Callable[..., tuple] | None = None
    batch: int = 2
    kv_batch: int | None = None
    heads: int = 2
    kv_heads: int | None = None
    q_len: int = 40
    kv_len: int = 40
    dim: int = 8
    v_dim: int | None = None
    dtype: str = "float32"
    kv_dtype: str | None = None
    layout: str = "BHLD"
    scale: Any = None
    sinks: Any = None
    grads: bool = True
    smoke: bool = False

    @functools.cached_property
    def operands(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query, key and value in the case's layout."""
        rng = self._rng("operands")
        kv = (self.kv_batch or self.batch, self.kv_heads or self.heads, self.kv_len)
        shapes = [(self.batch, self.heads, self.q_len, self.dim)]
        shapes += [(*kv, self.dim), (*kv, self.v_dim or self.dim)]
        arrays = [rng.standard_normal(shape) for shape in shapes]
        if self.edit is not None:
            arrays = self.edit(*arrays)
        kv_dtype = self.kv_dtype or self.dtype
        dtypes = (self.dtype, kv_dtype, kv_dtype)
        return tuple(jnp.asarray(self.in_layout(x), d) for x, d in zip(arrays, dtypes, strict=True))

    @functools.cached_property
    def cotangents(self) -> tuple[jax.Array, jax.Array]:
        """Cotangents of the output and of the logsumexp."""
        rng = self._rng("cotangents")
        stats = (self.batch, self.heads, self.q_len)
        d_out = rng.standard_normal((*stats, self.v_dim or self.dim))
        d_lse = rng.standard_normal(stats)
        return jnp.asarray(self.in_layout(d_out), self.dtype), jnp.asarray(d_lse, jnp.float32)

    @property
    def usual_shape(self) -> bool:
        """Whether the shapes are those that most cases have."""
        usual = Case(id="usual")
        fields = (
            "batch",
            "kv_batch",
            "heads",
            "kv_heads",
            "q_len",
            "kv_len",
            "dim",
            "v_dim",
            "dtype",
        )
        return all(getattr(self, f) == getattr(usual, f) for f in fields)

    def in_layout(self, x: np.ndarray) -> np.ndarray:
        return x.swapaxes(1, 2) if self.layout == "BLHD" else x

    def _rng(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(f"{self.id} {purpose}".encode()))


def cases(*items: Case) -> pytest.MarkDecorator:
    """Parametrises a test over cases."""
    assert len({c.id for c in items}) == len(items), "two cases have the same id"
    params = [pytest.param(c, id=c.id, marks=[pytest.mark.smoke] if c.smoke else []) for c in items]
    return pytest.mark.parametrize("case", params)


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> jax.Array:
    """A captured array of normal numbers."""
    rng = np.random.default_rng(seed + 1000)
    return jnp.asarray(rng.standard_normal(shape), dtype)


def adapted(case: Case, backend: str) -> Case:
    """The case in what the kernels compute: bfloat16, and blocks of multiples of 64."""
    if backend != "mosaic_gpu" or case.dtype != "float32":
        return case
    block = np.multiply(case.block, 8).tolist()
    return dataclasses.replace(
        case, dtype="bfloat16", block=block if isinstance(block, int) else tuple(block)
    )


# Relative errors of the kernels' gradients that are accepted in any case. They take D, the sum of P dP over a
# row, from the output as it was rounded to bfloat16, so that a row of dS carries that rounding as a whole: up to
# 2**-8 of the row's terms. Sums over many rows and keys whose terms cancel show it most.
KERNEL_FLOORS = {"operands": 6e-3, "captures": 2.5e-2}


def check(case: Case, backend: str, captures: float | None = None) -> None:
    """Runs a case on a backend and holds output, statistics and gradients against the oracle.

    Args:
        case: the attention.
        backend: the backend's name.
        captures: error of the kernels' gradients of captured arrays that is accepted in any case.
    """
    floors = KERNEL_FLOORS if captures is None else KERNEL_FLOORS | {"captures": captures}
    case = adapted(case, backend)
    actual, exact = attend(case, backend), _oracle(case, exact=True)
    lse = _double(exact["lse"])
    # A backward pass recomputes the probabilities from a float32 logsumexp, whose rounding they inherit.
    rounding = 2.0**-24 * float(np.abs(lse, where=np.isfinite(lse), out=np.zeros_like(lse)).max())
    for name, value in actual.items():
        floor = None
        if name not in ("lse", "max_scores"):  # which are float32 whatever the inputs
            floor = FLOORS[case.dtype] if name == "out" else max(FLOORS[case.dtype], rounding)
            floor = max(floor, FLOORS[value.dtype.name])
            if backend == "mosaic_gpu" and name != "out":
                operand = name in ("query", "key", "value")
                floor = max(floor, floors["operands" if operand else "captures"])
        dense = functools.partial(lambda n: _oracle(case, exact=False)[n], name)
        assert_close(name, value, exact[name], dense, floor=floor)
    dead = lse == -np.inf
    rows = {
        name: case.in_layout(_double(actual[name])) for name in ("out", "query") & actual.keys()
    }
    for name, value in rows.items():
        assert not value[dead].any(), f"{name} is not exactly zero in rows without keys"
    if case.grads:
        unseen = ~_double(exact["value"]).any(-1)
        for name in ("key", "value"):
            wrong = _double(actual[name])[unseen]
            assert not wrong.any(), f"the gradient of {name} is not exactly zero at unseen keys"


def attend(case: Case, backend: str) -> dict[str, Any]:
    """Outputs, statistics and gradients by name, in one compilation."""
    case = adapted(case, backend)
    moving = dict(zip(("query", "key", "value"), case.operands, strict=True))
    moving["captures"] = case.captures
    if isinstance(case.scale, jax.Array):
        moving["scale"] = case.scale
    if case.sinks is not None:
        moving["sinks"] = case.sinks

    given = None if case.block_mask is None else case.block_mask()

    @jax.jit
    def run(moving: dict, blocks: BlockMask | None, cotangents: tuple) -> dict[str, Any]:
        if case.mask is not None and blocks is None and not case.own_mask:
            shape = (*case.mask_shape, case.q_len, case.kv_len)
            blocks = create_block_mask(case.mask, *shape, case.block)

        def forward(moving: dict) -> Any:
            out, aux = flex_attention(
                moving["query"],
                moving["key"],
                moving["value"],
                None if case.score is None else case.score(moving["captures"]),
                blocks,
                moving.get("scale", case.scale),
                return_aux=AuxRequest(lse=True, max_scores=True),
                mask_mod=case.mask if case.own_mask else None,
                sinks=moving.get("sinks"),
                layout=case.layout,
                backend=backend,
            )
            return (out, aux.lse), aux.max_scores

        if not case.grads:
            (out, lse), max_scores = forward(moving)
            return {"out": out, "lse": lse, "max_scores": max_scores}
        (out, lse), pullback, max_scores = jax.vjp(forward, moving, has_aux=True)
        (gradients,) = pullback(cotangents)
        return {"out": out, "lse": lse, "max_scores": max_scores, **_named(gradients)}

    try:
        return run(moving, given, case.cotangents)
    except NotImplementedError as error:
        if backend != "mosaic_gpu":
            raise
        pytest.skip(f"refused with a reason: {error}")


@functools.cache
def _oracle(case: Case, *, exact: bool) -> dict[str, Any]:
    """The same from the oracle: the truth in float64, the yardstick in the case's own dtypes."""
    score = case.true_score or case.score

    def compute(operands: tuple, captures: dict, scale: Any, sinks: Any, cotangents: tuple) -> Any:
        options = {
            "mask_mod": case.true_mask or case.mask,
            "scale": scale,
            "sinks": sinks,
            "layout": case.layout,
            "exact": exact,
        }
        mod = None if score is None else score(captures)
        results = oracle(*operands, score_mod=mod, **options)._asdict()
        if case.grads:
            gradients = oracle_grads(
                *operands, *cotangents, captures=captures, score_mod=score, **options
            )
            results |= _named(gradients._asdict())
        return results

    args = (case.operands, case.captures, case.scale, case.sinks, case.cotangents)
    if case.usual_shape:
        return compute(*args)  # operation by operation, each compiled once for all these cases
    with jax.enable_x64(exact):
        return jax.jit(compute)(*args)


def _named(gradients: dict[str, Any]) -> dict[str, Any]:
    """Gradients by name: those of captured arrays by their own, those of integers left out."""
    captures = gradients.pop("captures")
    gradients |= {f"captures[{name!r}]": d for name, d in captures.items()}
    return {n: d for n, d in gradients.items() if d is not None and d.dtype != jax.dtypes.float0}


def _double(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)
