"""Boolean algebra of mask_mods: intersection, union, complement, and the mask of everything."""

from typing import Any

import jax.numpy as jnp

from flexjax.masks._arguments import check_mods, describe, name_of, named
from flexjax.masks._types import MaskMod

_ARGUMENTS = ("b", "h", "q_idx", "kv_idx")


def noop_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """The mask_mod that allows everything: `True`. It is a mask_mod itself, not a factory."""
    return True


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    """The intersection: a query may attend a key where every mask_mod allows it.

    Args:
        *mask_mods: functions `(b, h, q_idx, kv_idx) -> bool`. None at all gives the mask that
            allows everything, the neutral element of the intersection.

    Returns:
        A mask_mod named after its parts, for example `causal_and_document`.

    Raises:
        TypeError: if an argument is not a function of four arguments, or, when the mask is
            evaluated, if it does not return a boolean.
    """
    check_mods("and_masks()", mask_mods, "mask_mod", _ARGUMENTS)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        allowed = True
        for mod in mask_mods:
            allowed = allowed & _boolean("and_masks()", mod, mod(b, h, q_idx, kv_idx))
        return allowed

    return named(mask, "_and_".join(_enclosed(mod, "_or_") for mod in mask_mods) or "all_true")


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """The union: a query may attend a key where at least one mask_mod allows it.

    Args:
        *mask_mods: functions `(b, h, q_idx, kv_idx) -> bool`. None at all gives the mask that
            allows nothing, the neutral element of the union.

    Returns:
        A mask_mod named after its parts, for example `sliding_window_256_or_prefix_lm_64`.

    Raises:
        TypeError: if an argument is not a function of four arguments, or, when the mask is
            evaluated, if it does not return a boolean.
    """
    check_mods("or_masks()", mask_mods, "mask_mod", _ARGUMENTS)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        allowed = False
        for mod in mask_mods:
            allowed = allowed | _boolean("or_masks()", mod, mod(b, h, q_idx, kv_idx))
        return allowed

    return named(mask, "_or_".join(_enclosed(mod, "_and_") for mod in mask_mods) or "all_false")


def not_mask(mask_mod: MaskMod) -> MaskMod:
    """The complement: a query may attend a key where `mask_mod` does not allow it.

    Args:
        mask_mod: a function `(b, h, q_idx, kv_idx) -> bool`.

    Returns:
        A mask_mod named after its part, for example `not_causal`.

    Raises:
        TypeError: if the argument is not a function of four arguments, or, when the mask is
            evaluated, if it does not return a boolean.
    """
    check_mods("not_mask()", (mask_mod,), "mask_mod", _ARGUMENTS)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        allowed = _boolean("not_mask()", mask_mod, mask_mod(b, h, q_idx, kv_idx))
        # `~` of a Python bool is an integer: ~True == -2.
        return not allowed if isinstance(allowed, bool) else ~allowed

    return named(mask, f"not_{_enclosed(mask_mod, '_and_', '_or_')}")


def _enclosed(mod: MaskMod, *operators: str) -> str:
    """The name of `mod`, in parentheses if one of `operators` would otherwise read ambiguously."""
    name = name_of(mod)
    return f"({name})" if any(operator in name for operator in operators) else name


def _boolean(where: str, mod: MaskMod, result: Any) -> Any:
    """`result` if it is a boolean: `&` and `|` of integers would silently be bitwise."""
    if isinstance(result, bool) or getattr(result, "dtype", None) == jnp.bool_:
        return result
    raise TypeError(
        f"{where}: the mask_mod {name_of(mod)} must return a boolean, but it returned "
        f"{describe(result)}. Compare to make one, for example `value != 0`."
    )


if __name__ == "__main__":
    from flexjax.masks import document_from_lengths, prefix_lm
    from flexjax.masks._draw import draw_mask

    draw_mask(and_masks(prefix_lm(12), document_from_lengths([24, 16, 24])))
