"""Checks of the arguments of mask and score factories, each failure a full sentence.

Nothing here asks for the value of a traced array: only types, dtypes and shapes are looked at,
except through `known_values`, which gives None under a trace.
"""

import inspect
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def named[F: Callable[..., Any]](mod: F, name: str) -> F:
    """Gives a mod the name under which pictures, reprs and error messages show it."""
    mod.__name__ = name
    mod.__qualname__ = name
    return mod


def name_of(mod: Callable[..., Any]) -> str:
    """The name of a mod, also of a lambda, a partial or a callable object."""
    inner = getattr(mod, "func", mod)  # functools.partial keeps the function it wraps here
    name = getattr(inner, "__name__", type(inner).__name__)
    return "lambda" if name == "<lambda>" else name


def describe(value: Any) -> str:
    """A short noun phrase for an error message: shape and dtype of an array, else the type."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{value!r} of type {type(value).__name__}"


def check_integer(where: str, name: str, value: Any, *, at_least: int | None = None) -> int:
    """A static Python integer, at least `at_least`.

    Raises:
        TypeError: if the value is not an integer.
        ValueError: if it is too small.
    """
    if isinstance(value, bool | np.bool_ | jax.core.Tracer) or not hasattr(value, "__index__"):
        raise TypeError(
            f"{where}: {name} must be a Python integer, but it is {describe(value)}. It shapes the "
            f"mask itself, so it must be known while tracing: pass an int."
        )
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(
            f"{where}: {name} must be a Python integer, but it is {describe(value)}."
        ) from error
    if at_least is not None and number < at_least:
        raise ValueError(f"{where}: {name} must be at least {at_least}, but it is {number}.")
    return number


def as_array(where: str, name: str, value: Any) -> Array:
    """`jnp.asarray` with an error that names the argument."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{where}: {name} must be an array of numbers, but it is {describe(value)}. Pass "
            f"numbers of one type in a regular array, or nested lists of them."
        ) from error


def check_rank(where: str, name: str, array: Array, shapes: dict[int, str]) -> None:
    """Raises ValueError unless `array` has a rank in `shapes`, which says how each is written."""
    if array.ndim not in shapes:
        allowed = " or ".join(shapes.values())
        raise ValueError(
            f"{where}: {name} must have shape {allowed}, but it has shape {tuple(array.shape)}."
        )


def integer_array(where: str, name: str, value: Any, shapes: dict[int, str]) -> Array:
    """A jnp integer array of an allowed rank; tracers pass through.

    Raises:
        TypeError: if the dtype is not an integer type.
        ValueError: if the rank is not a key of `shapes`.
    """
    array = as_array(where, name, value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{where}: {name} must be integers, but it is {describe(array)}. "
            f"Convert it first, for example with {name}.astype(jnp.int32)."
        )
    check_rank(where, name, array, shapes)
    return array


def float_array(where: str, name: str, value: Any, shapes: dict[int, str]) -> Array:
    """A jnp floating-point array of an allowed rank; tracers pass through.

    Raises:
        TypeError: if the dtype is not a floating-point type.
        ValueError: if the rank is not a key of `shapes`.
    """
    array = as_array(where, name, value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        way_out = (
            "A boolean array is a mask: use it in a mask_mod instead."
            if array.dtype == jnp.bool_
            else f"Convert it first, for example with {name}.astype(jnp.float32)."
        )
        raise TypeError(
            f"{where}: {name} must be floating point, but it is {describe(array)}. {way_out}"
        )
    check_rank(where, name, array, shapes)
    return array


def known_values(value: Any) -> np.ndarray | None:
    """The values of a concrete array-like, or None if they are only known when the program runs."""
    leaves = jax.tree.leaves(value)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    return np.asarray(value)


def batch_integer(
    where: str, name: str, value: Any, *, at_least: int | None = None
) -> tuple[Callable[[Any], Any], str]:
    """A length or an offset that is static, one traced scalar, or one number a batch entry.

    Only a static number is held against `at_least`.

    Returns:
        `read`, where `read(b)` is the number for batch entry `b`, and a label for the mod's name:
        the number itself, "dynamic" for a scalar array or "per_batch" for an array of shape (B,).
    """
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        number = check_integer(where, name, value, at_least=at_least)
        return lambda b: number, str(number)
    array = integer_array(where, name, value, {0: "()", 1: "(B,)"}).astype(jnp.int32)
    if array.ndim == 0:
        return lambda b: array, "dynamic"
    return lambda b: array[b], "per_batch"


def batch_row(array: Array) -> Callable[[Any, Any], Array]:
    """`read(b, i)` for an array of shape (S,), shared by the batch, or (B, S), one row each."""
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 1:
        return lambda b, i: array[i]
    return lambda b, i: array[b, i]


def check_mods(where: str, mods: tuple[Any, ...], kind: str, arguments: tuple[str, ...]) -> None:
    """Checks that each of `mods` is a function that can be called with `arguments`.

    Raises:
        TypeError: naming the first argument that is not, and what to pass instead.
    """
    signature = f"({', '.join(arguments)})"
    for position, mod in enumerate(mods):
        if not callable(mod):
            raise TypeError(
                f"{where} combines {kind}s, functions of {signature}, but argument {position} is "
                f"{describe(mod)}. Wrap an array in a function that indexes it; combine {kind}s "
                f"before building a BlockMask from the result."
            )
        try:
            parameters = inspect.signature(mod)
        except (TypeError, ValueError):
            continue  # some builtins have no signature: the call itself will tell
        try:
            parameters.bind(*arguments)
        except TypeError as error:
            raise TypeError(
                f"{where} combines {kind}s, functions of {signature}, but argument {position}, "
                f"{name_of(mod)}{parameters}, cannot be called so: {error}. If it is a factory, "
                f"call it first and pass what it returns, for example {name_of(mod)}(...)."
            ) from error
