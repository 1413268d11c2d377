"""The IR's operations: NumPy's meaning is JAX's, special values included."""

import itertools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from flexjax.mods.ops import COMPARISONS, OPS, is_bool, is_float, is_integer

INTEGERS = np.array([0, 1, -1, 2, -2, 3, -7, 8, 100, 2**31 - 1, -(2**31)], np.int32)
_ROUNDED = [0.0, 0.3, 0.5, 1.0, 1.5, 2.5, 7.0, 0.49999997, 8388609.0, 1e30, np.inf]
FLOATS = np.array([*_ROUNDED, *(-x for x in _ROUNDED), np.nan], np.float32)
BOOLS = np.array([False, True])
PARAMS = {
    "integer_pow": [{"y": 2}, {"y": 3}],
    "round": [{"rounding_method": int(m)} for m in lax.RoundingMethod],
    "convert": [{"dtype": d} for d in ("int32", "float32", "bfloat16", "bool")],
}
SHIFTS = {"shift_left", "shift_right_logical", "shift_right_arithmetic"}
LOGIC = {"and", "or", "xor", "not"}
BOTH = {"add", "sub", "mul", "div", "rem", "max", "min", "neg", "sign", "abs", "square", "clamp"}
BOTH |= COMPARISONS | {"select_n", "integer_pow", "convert", "stop_gradient"}
ARITY = {"clamp": 3, "select_n": 3} | dict.fromkeys(COMPARISONS | SHIFTS | {"and", "or", "xor"}, 2)
ARITY |= dict.fromkeys(["add", "sub", "mul", "div", "rem", "max", "min"], 2)


def cases():
    for name, op in OPS.items():
        if op.numpy is None:
            continue
        kinds = {"bool": BOOLS} if name in LOGIC else {} if name in SHIFTS else {"float": FLOATS}
        kinds |= {"int": INTEGERS} if name in BOTH | LOGIC | SHIFTS else {}
        for (kind, values), params in itertools.product(kinds.items(), PARAMS.get(name, [{}])):
            shown = "-".join([name, kind, *map(str, params.values())])
            yield pytest.param(name, values, params, id=shown)


@pytest.mark.parametrize(("name", "values", "params"), list(cases()))
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_numpy_computes_what_jax_does(name, values, params):
    grids = np.meshgrid(*[values] * ARITY.get(name, 1), indexing="ij")
    operands = [g.reshape(-1) for g in grids]
    if name == "select_n":
        operands[0] = np.arange(operands[0].size) % 2 == 1
    if name == "clamp":
        keep = operands[0] <= operands[2]
        operands = [x[keep] for x in operands]
    if name == "convert" and params["dtype"] == "int32":
        operands = [x[np.abs(x.astype(np.float64)) < 2**31] for x in operands]
    op = OPS[name]
    expected = np.asarray(op.jax(params, *map(jnp.asarray, operands)))
    actual = np.asarray(op.numpy(params, *operands)).astype(expected.dtype)
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    if name in (BOTH | {"floor", "ceil", "round"}) - {"integer_pow"}:
        np.testing.assert_array_equal(actual, expected)
        if name not in ("max", "min", "clamp"):  # which zero these return is the platform's choice
            numbers = ~np.isnan(expected)
            np.testing.assert_array_equal(
                np.signbit(actual)[numbers], np.signbit(expected)[numbers]
            )
    else:
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize(
    ("dtype", "kinds"),
    [
        (np.int8, "integer"),
        (np.uint32, "integer"),
        (np.bool_, "bool"),
        (np.float16, "float"),
        (np.float32, "float"),
        (ml_dtypes.bfloat16, "float"),
        (ml_dtypes.float8_e4m3fn, "float"),
        (np.complex64, "none"),
    ],
    ids=lambda x: x if isinstance(x, str) else np.dtype(x).name,
)
def test_kinds_of_types(dtype, kinds):
    found = [
        n for n, f in (("integer", is_integer), ("bool", is_bool), ("float", is_float)) if f(dtype)
    ]
    assert found == ([kinds] if kinds != "none" else [])


@pytest.mark.parametrize("name", sorted(SHIFTS))
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32"])
def test_shifts_of_other_words(name, dtype):
    values = np.array([0, 1, 3, 100, 127, 128, 200, 255]).astype(dtype)
    x, by = (g.reshape(-1) for g in np.meshgrid(values, np.arange(0, 40, 3).astype(dtype)))
    expected = np.asarray(OPS[name].jax({}, jnp.asarray(x), jnp.asarray(by)))
    actual = OPS[name].numpy({}, x, by)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)
