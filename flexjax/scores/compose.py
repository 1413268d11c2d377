"""Composition of score_mods."""

from typing import Any

from flexjax.masks._arguments import check_mods, name_of, named
from flexjax.scores._types import ScoreMod

_ARGUMENTS = ("score", "b", "h", "q_idx", "kv_idx")


def compose(*score_mods: ScoreMod) -> ScoreMod:
    """Applies score_mods from left to right, each to the score that the one before returned.

    `compose(alibi(8), soft_cap(30.0))` adds the bias, then caps the sum.

    Args:
        *score_mods: functions `(score, b, h, q_idx, kv_idx) -> score`. None at all gives the
            identity.

    Returns:
        A score_mod named after its parts, for example `alibi_then_soft_cap_30`.

    Raises:
        TypeError: if an argument is not a function of five arguments.
    """
    check_mods("compose()", score_mods, "score_mod", _ARGUMENTS)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        for mod in score_mods:
            score = mod(score, b, h, q_idx, kv_idx)
        return score

    return named(score_mod, "_then_".join(name_of(mod) for mod in score_mods) or "identity")


if __name__ == "__main__":
    from flexjax.masks._draw import draw_score
    from flexjax.scores import alibi, soft_cap

    draw_score(compose(alibi(4), soft_cap(6.0)))
