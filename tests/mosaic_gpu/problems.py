"""Problems for a backend that is called directly, without `flex_attention` around it."""

import dataclasses
from typing import Any

from flexjax import BlockMask
from flexjax.attention import _scaled, _shapes, _with_mods
from flexjax.problem import Operands, Problem


def problem_of(
    query: Any,
    key: Any,
    value: Any,
    *,
    score_mod: Any = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    layout: str = "BHLD",
    max_scores: bool = False,
    options: dict | None = None,
) -> tuple[Problem, Operands]:
    """What the front end makes of an attention. The arrays may be `jax.ShapeDtypeStruct`s."""
    problem = _shapes(query, key, value, layout, None)
    score_mod, scale = _scaled(score_mod, scale, problem.qk_dim)
    problem = dataclasses.replace(
        problem,
        scale=scale,
        max_scores=max_scores,
        options=tuple(sorted((options or {}).items())),
    )
    return _with_mods(problem, Operands(query, key, value), score_mod, block_mask)
