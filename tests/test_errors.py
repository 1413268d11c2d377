"""Bad input: the right exception, in a sentence that shows the values and a way out."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import (
    AuxRequest,
    BlockMask,
    and_masks,
    create_block_mask,
    create_mask,
    flex_attention,
    masks,
)

B, HQ, HKV, L, S, D = 2, 4, 2, 32, 48, 16
QUERY, KEY, VALUE = (jnp.zeros(shape) for shape in ((B, HQ, L, D), (B, HKV, S, D), (B, HKV, S, D)))
CAUSAL = masks.causal()
FLAGS = jnp.zeros(S, bool)
NUMPY_IDS = np.arange(S)
OBJECTS = np.array([object()] * S)

# What a sentence may begin with besides a capital letter: the name of an argument.
NAMES = {"query", "key", "value", "scale", "sinks", "layout", "backend", "precision"}
NAMES |= {"score_mod", "mask_mod", "block_mask", "kernel_options"}
NAMES |= {"enable_gqa", "return_lse", "return_aux"}


def check(error, exception, fragments):
    message = str(error.value)
    assert type(error.value) is exception
    assert message[0].isupper() or re.match(r"\w+", message)[0] in NAMES, message
    assert message.endswith("."), message
    for fragment in fragments:
        assert fragment in message, (fragment, message)


def attend(query=QUERY, key=KEY, value=VALUE, **kwargs):
    return flex_attention(query, key, value, **kwargs)


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def mask(mod=CAUSAL, batch=None, heads=None, q_len=L, kv_len=S):
    return create_block_mask(mod, batch, heads, q_len, kv_len)


SHAPES = [
    pytest.param(
        {"query": ones(L, D)},
        ["query must have four axes (B, H, L, D)", "(32, 16)", "jax.vmap"],
        id="rank-2",
    ),
    pytest.param(
        {"key": ones(1, B, HKV, S, D)},
        ["key must have four axes", "(1, 2, 2, 48, 16)", "jax.vmap"],
        id="rank-5",
    ),
    pytest.param(
        {"value": ones(HKV, S, D), "layout": "BLHD"},
        ["value must have four axes (B, L, H, D)", "(2, 48, 16)"],
        id="rank-3-BLHD",
    ),
    pytest.param(
        {"query": ones(B, HQ, 0, D)},
        ["query has an axis of length 0", "(2, 4, 0, 16)", "at least 1"],
        id="no-queries",
    ),
    pytest.param(
        {"key": ones(B, HKV, 0, D), "value": ones(B, HKV, 0, D)},
        ["key has an axis of length 0", "(2, 2, 0, 16)", "at least 1"],
        id="no-keys",
    ),
    pytest.param(
        {"key": ones(B, 3, S, D), "value": ones(B, 3, S, D)},
        ["query heads (4)", "multiple of the number of key heads (3)", "layout='BLHD'"],
        id="heads-do-not-divide",
    ),
    pytest.param(
        {
            "query": ones(B, 3, HQ, D),
            "key": ones(B, 5, HKV, D),
            "value": ones(B, 5, HKV, D),
            "layout": "BLHD",
        }
        | {"query": ones(B, 3, 5, D)},
        ["query heads (5)", "key heads (2)", "layout='BHLD'"],
        id="heads-do-not-divide-BLHD",
    ),
    pytest.param(
        {"value": ones(B, HKV, S + 1, D)},
        ["key and value must agree", "(2, 2, 48, 16)", "(2, 2, 49, 16)", "Only their last axes"],
        id="lengths-of-key-and-value",
    ),
    pytest.param(
        {"value": ones(B, HQ, S, D)},
        ["key and value must agree", "(2, 4, 48, 16)"],
        id="heads-of-key-and-value",
    ),
    pytest.param(
        {"key": ones(B, HKV, S, 8)},
        ["same head dimension D", "(2, 4, 32, 16)", "(2, 2, 48, 8)", "Only value"],
        id="head-dimensions",
    ),
    pytest.param(
        {"key": ones(3, HKV, S, D), "value": ones(3, HKV, S, D)},
        ["query's batch size or 1", "(2, 4, 32, 16)", "(3, 2, 48, 16)", "jnp.repeat"],
        id="batch",
    ),
    pytest.param(
        {"value": ones(B, HKV, S, 300)},
        ["Head dimensions up to 256", "(2, 2, 48, 300)", "more heads of a smaller"],
        id="head-dimension-too-large",
    ),
    pytest.param(
        {"enable_gqa": False},
        ["enable_gqa=False", "(2, 4, 32, 16)", "(2, 2, 48, 16)", "Leave enable_gqa out"],
        id="grouped-heads-forbidden",
    ),
]


@pytest.mark.parametrize(("arguments", "fragments"), SHAPES)
def test_shapes(arguments, fragments):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (check compares the text)
        attend(**arguments)
    check(error, ValueError, fragments)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        pytest.param(
            {"query": [[1.0]]}, ["query must be a JAX array", "list", "jnp.asarray"], id="list"
        ),
        pytest.param(
            {"query": ones(B, HQ, L, D, dtype=jnp.int32)},
            ["query must be bfloat16, float16 or float32", "int32", "astype(jnp.float32)"],
            id="integer-query",
        ),
        pytest.param(
            {"key": ones(B, HKV, S, D, dtype=jnp.int8)},
            ["key must have the query's dtype float32", "int8", "key.astype(query.dtype)"],
            id="integer-key",
        ),
        pytest.param(
            {"query": ones(B, HQ, L, D, dtype=jnp.bfloat16)},
            ["key must have the query's dtype bfloat16", "float32", "key.astype(query.dtype)"],
            id="wider-keys",
        ),
        pytest.param(
            {
                "query": ones(B, HQ, L, D, dtype=jnp.bfloat16),
                "key": ones(B, HKV, S, D, dtype=jnp.float16),
                "value": ones(B, HKV, S, D, dtype=jnp.bfloat16),
            },
            ["key must have the query's dtype bfloat16", "float16"],
            id="other-half",
        ),
        pytest.param(
            {"query": ones(B, HQ, L, D, dtype=jnp.complex64)}, ["complex64"], id="complex"
        ),
    ],
)
def test_dtypes(arguments, fragments):
    with pytest.raises(TypeError) as error:
        attend(**arguments)
    check(error, TypeError, fragments)


def test_float64():
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in (QUERY, KEY, VALUE)]
        with pytest.raises(TypeError) as error:
            attend(*wide)
    check(error, TypeError, ["bfloat16, float16 or float32", "float64", "astype(jnp.float32)"])


@pytest.mark.parametrize(
    ("arguments", "exception", "fragments"),
    [
        pytest.param(
            {"layout": "BSHD"},
            ValueError,
            ["layout must be 'BHLD' or 'BLHD'", "'BSHD'"],
            id="layout",
        ),
        pytest.param(
            {"backend": "cudnn"},
            ValueError,
            ["backend='cudnn' does not exist", "'reference', 'xla'", "None for the best one"],
            id="backend",
        ),
        pytest.param({"backend": ["xla"]}, ValueError, ["backend=['xla']"], id="backend-list"),
        pytest.param(
            {"backend": "xla", "kernel_options": {"BLOCK_M": 64}},
            ValueError,
            ["kernel_options has no option 'BLOCK_M'", "backend xla", "Known options: ['lanes']"],
            id="unknown-option",
        ),
        pytest.param(
            {"kernel_options": {"num_warps": 4}},
            ValueError,
            ["kernel_options has no option 'num_warps'", "Known options"],
            id="unknown-option-automatic",
        ),
        pytest.param(
            {"backend": "reference", "kernel_options": {"lanes": 4}},
            ValueError,
            ["kernel_options has no option 'lanes'", "backend reference", "Known options: none"],
            id="option-of-another-backend",
        ),
        pytest.param(
            {"backend": "xla", "kernel_options": {"lanes": "4"}},
            ValueError,
            ["kernel_options['lanes'] must be of type int", "'4'"],
            id="option-type",
        ),
        pytest.param(
            {"backend": "xla", "kernel_options": {"lanes": True}},
            ValueError,
            ["kernel_options['lanes'] must be of type int", "True"],
            id="option-bool",
        ),
        pytest.param(
            {"backend": "xla", "kernel_options": {"lanes": 0}},
            ValueError,
            ["kernel_options['lanes'] must be at least 1", "0"],
            id="option-range",
        ),
        pytest.param(
            {"kernel_options": ["lanes"]},
            TypeError,
            ["kernel_options must be a mapping", "['lanes']", "such as {"],
            id="options-not-a-mapping",
        ),
        pytest.param(
            {"return_lse": True, "return_aux": AuxRequest(max_scores=True)},
            ValueError,
            ["return_lse and return_aux were both given", "AuxRequest(lse=True)"],
            id="return-lse-and-aux",
        ),
        pytest.param(
            {"return_aux": True},
            TypeError,
            ["return_aux must be a flexjax.AuxRequest", "AuxRequest(lse=True)", "True"],
            id="return-aux",
        ),
        pytest.param(
            {"scale": "auto"}, ValueError, ["scale must be a number", "'auto'"], id="scale-text"
        ),
        pytest.param(
            {"scale": True}, ValueError, ["scale must be a number", "True"], id="scale-bool"
        ),
        pytest.param(
            {"scale": np.ones(HQ)},
            ValueError,
            ["scale must be a number or a scalar array", "score * scales[h]"],
            id="scale-array",
        ),
        pytest.param(
            {"precision": "exact"},
            ValueError,
            ["precision must be a jax.lax.Precision", "'highest'", "'exact'"],
            id="precision",
        ),
        pytest.param(
            {"precision": ["high"]}, ValueError, ["precision", "['high']"], id="precision-list"
        ),
        pytest.param(
            {"sinks": jnp.zeros(HKV)},
            ValueError,
            ["sinks must be a float array", "shape (4,)", "float32 (2,)", "jnp.full((4,), logit)"],
            id="sinks-shape",
        ),
        pytest.param(
            {"sinks": jnp.zeros(HQ, int)},
            ValueError,
            ["sinks must be a float array", "int32 (4,)"],
            id="sinks-dtype",
        ),
        pytest.param(
            {"sinks": 0.5}, ValueError, ["sinks must be a float array", "()"], id="sinks-scalar"
        ),
    ],
)
def test_options(arguments, exception, fragments):
    with pytest.raises(exception) as error:
        attend(**arguments)
    check(error, exception, fragments)


# -- block masks ------------------------------------------------------------------------------------


def by_batch(b, h, q, k):
    return (q >= k) | (b == 1)


def by_head(b, h, q, k):
    return (q >= k) | (h == 1)


@pytest.mark.parametrize(
    ("make", "exception", "fragments"),
    [
        pytest.param(
            lambda: {"block_mask": mask(q_len=L + 1)},
            ValueError,
            [
                "(queries, keys) = (33, 48)",
                "lengths (32, 48)",
                "create_block_mask(mask_mod, B, H, 32, 48)",
            ],
            id="query-length",
        ),
        pytest.param(
            lambda: {"block_mask": mask(kv_len=S - 1)},
            ValueError,
            ["(queries, keys) = (32, 47)", "lengths (32, 48)", "block_mask[:, :, rows]"],
            id="key-length",
        ),
        pytest.param(
            lambda: {"block_mask": mask(batch=3)},
            ValueError,
            ["distinguishes 3 batch rows", "the query has 2", "B = 2, or 1 for one mask for all"],
            id="batch",
        ),
        pytest.param(
            lambda: {"block_mask": mask(heads=HKV)},
            ValueError,
            ["distinguishes 2 heads", "the query has 4", "H = 4, or 1"],
            id="heads",
        ),
        pytest.param(
            lambda: {"block_mask": mask(by_batch)},
            ValueError,
            ["built for a single batch row", "depends on b", "has 2", "Build it with B = 2"],
            id="depends-on-b",
        ),
        pytest.param(
            lambda: {"block_mask": mask(by_head, batch=B)},
            ValueError,
            ["built for a single head", "depends on h", "has 4 heads", "Build it with H = 4"],
            id="depends-on-h",
        ),
        pytest.param(
            lambda: {"block_mask": masks.causal()},
            TypeError,
            ["block_mask must be a BlockMask from create_block_mask", "function", "as mask_mod"],
            id="function",
        ),
        pytest.param(
            lambda: {"block_mask": jnp.ones((L, S), bool)},
            TypeError,
            ["block_mask must be a BlockMask", "BlockMask.from_dense"],
            id="array",
        ),
        pytest.param(
            lambda: {"block_mask": mask(), "mask_mod": masks.causal()},
            ValueError,
            ["mask_mod and block_mask were both given", "and_masks(block_mask.mask_mod, mask_mod)"],
            id="both",
        ),
        pytest.param(
            lambda: {"mask_mod": mask()},
            TypeError,
            ["mask_mod is a BlockMask", "pass it as block_mask"],
            id="mask-as-mod",
        ),
    ],
)
def test_block_masks(make, exception, fragments):
    arguments = make()
    with pytest.raises(exception) as error:
        attend(**arguments)
    check(error, exception, fragments)


def test_the_way_out_of_two_masks_works():
    block_mask = mask(masks.sliding_window(7))
    both = create_block_mask(and_masks(block_mask.mask_mod, masks.causal()), None, None, L, S)
    assert attend(block_mask=both).shape == (B, HQ, L, D)


# -- mods -------------------------------------------------------------------------------------------


def if_on_an_index(s, b, h, q, k):
    if q >= k:
        return s
    return -jnp.inf


def loop_over_an_index(s, b, h, q, k):
    for _ in range(h):
        s = s * 0.5
    return s


UNTRACEABLE = [
    "it needs the value of an index or score in Python",
    "jnp.where(condition, a, b)",
    "jnp.asarray",
]
SCORE_SIGNATURE = "score_mod(score, b, h, q_idx, kv_idx) -> score"
MASK_SIGNATURE = "mask_mod(b, h, q_idx, kv_idx) -> bool"

MODS = [
    (
        "score-arity",
        {"score_mod": lambda s, q, k: s},
        [SCORE_SIGNATURE, "5 positional", "(s, q, k)"],
    ),
    ("mask-arity", {"mask_mod": lambda q, k: q >= k}, [MASK_SIGNATURE, "4 positional", "(q, k)"]),
    ("mask-as-score", {"score_mod": masks.causal()}, [SCORE_SIGNATURE, "`causal`"]),
    ("not-callable", {"score_mod": 3.0}, [SCORE_SIGNATURE, "but it is of type float"]),
    ("array-as-mask", {"mask_mod": FLAGS}, [MASK_SIGNATURE, "but it is of type ArrayImpl"]),
    (
        "bool-score",
        {"score_mod": lambda s, b, h, q, k: q >= k},
        ["must return a floating-point score", "returned bool", "as mask_mod instead"],
    ),
    ("int-score", {"score_mod": lambda s, b, h, q, k: q - k}, ["floating-point", "int32"]),
    ("complex-score", {"score_mod": lambda s, b, h, q, k: s * 1j}, ["floating-point", "complex64"]),
    (
        "float-mask",
        {"mask_mod": lambda b, h, q, k: (q - k) * 0.5},
        ["must return a bool", "returned float32", "`q_idx >= kv_idx`", "as score_mod"],
    ),
    ("int-mask", {"mask_mod": lambda b, h, q, k: q & 1}, ["must return a bool", "returned int32"]),
    (
        "vector-score",
        {"score_mod": lambda s, b, h, q, k: s + jnp.zeros(3)},
        ["must return one scalar", "(3,)", "bias[h, q_idx, kv_idx]"],
    ),
    ("vector-mask", {"mask_mod": lambda b, h, q, k: FLAGS}, ["must return one scalar", "(48,)"]),
    ("pair", {"score_mod": lambda s, b, h, q, k: (s, s)}, ["one scalar", "shapes (), ()"]),
    ("nothing", {"score_mod": lambda s, b, h, q, k: None}, ["one scalar", "returned None"]),
    ("if", {"score_mod": if_on_an_index}, ["`if_on_an_index`", *UNTRACEABLE]),
    ("range", {"score_mod": loop_over_an_index}, ["`loop_over_an_index`", *UNTRACEABLE]),
    ("and", {"mask_mod": lambda b, h, q, k: q >= k and k > 3}, ["`&`, `|` and `~`", *UNTRACEABLE]),
    ("not", {"mask_mod": lambda b, h, q, k: not q >= k}, UNTRACEABLE),
    ("chain", {"mask_mod": lambda b, h, q, k: 0 <= q - k <= 5}, UNTRACEABLE),
    ("int", {"score_mod": lambda s, b, h, q, k: s * int(h)}, UNTRACEABLE),
    ("numpy-index", {"mask_mod": lambda b, h, q, k: NUMPY_IDS[q] == NUMPY_IDS[k]}, UNTRACEABLE),
    ("numpy-call", {"score_mod": lambda s, b, h, q, k: s + np.sin(s)}, UNTRACEABLE),
    (
        "object-array",
        {"score_mod": lambda s, b, h, q, k: s + jnp.asarray(OBJECTS)[k]},
        ["cannot be traced", "captured arrays must be numeric JAX arrays"],
    ),
    ("object", {"score_mod": lambda s, b, h, q, k: s + object()}, ["cannot be traced", "numeric"]),
    ("object-array-index", {"score_mod": lambda s, b, h, q, k: s + OBJECTS[k]}, UNTRACEABLE),
]


@pytest.mark.parametrize(
    ("arguments", "fragments"), [pytest.param(a, f, id=name) for name, a, f in MODS]
)
def test_mods(arguments, fragments):
    with pytest.raises(TypeError) as error:
        attend(**arguments)
    check(error, TypeError, fragments)


@pytest.mark.parametrize(
    "mod",
    [lambda q, k: q >= k, lambda b, h, q, k: q & 1, lambda b, h, q, k: q >= k and k > 3],
    ids=["arity", "dtype", "and"],
)
def test_mask_mods_of_every_maker_of_masks(mod):
    """The same mistake reads the same wherever the mask is made."""
    texts = set()
    makers = [
        lambda: attend(mask_mod=mod),
        lambda: create_block_mask(mod, 1, 1, L, S),
        lambda: create_mask(mod, 1, 1, L, S),
        lambda: BlockMask.from_kv_blocks([[[1]]], [[[[0]]]], mask_mod=mod),
    ]
    for make in makers:
        with pytest.raises(TypeError) as error:
            make()
        check(error, TypeError, ["mask_mod"])
        texts.add(str(error.value))
    assert len(texts) == 1


def test_the_cause_is_kept():
    with pytest.raises(TypeError) as error:
        attend(score_mod=if_on_an_index)
    assert isinstance(error.value.__cause__, jax.errors.TracerBoolConversionError)


def test_errors_of_the_mod_itself_come_through():
    def broken(s, b, h, q, k):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        attend(score_mod=broken)
    with pytest.raises(IndexError, match="Too many indices"):
        attend(score_mod=lambda s, b, h, q, k: s + FLAGS[h, q])


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap], ids=["jit", "grad", "vmap"])
def test_errors_are_the_same_inside_a_transformation(transform):
    query = QUERY[None] if transform is jax.vmap else QUERY
    with pytest.raises(ValueError) as error:  # noqa: PT011 (check compares the text)
        transform(lambda q: attend(q, ones(B, 3, S, D), ones(B, 3, S, D)).sum())(query)
    check(error, ValueError, ["query heads (4)", "key heads (3)"])
