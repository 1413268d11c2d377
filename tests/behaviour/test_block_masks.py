"""Block masks of every make: sliced, from lists, from dense arrays, with garbage past the counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import BlockMask, create_block_mask, flex_attention, masks
from flexjax.testing import assert_close, oracle
from tests.behaviour.harness import Case, attend, cases, check, normal

causal = masks.causal()


def shifted(mod, offset):
    """A mask_mod or score_mod that sees query indices counted from `offset`."""
    return lambda *args: mod(*args[:-2], args[-2] + offset, args[-1])


def relative(c):
    return lambda s, b, h, q, k: s + c["a"][h, q - k + 20]


# -- slices -----------------------------------------------------------------------------------------------


def sliced(name, index, offset, q_len, mask=causal, score=relative, **options):
    """Rows of blocks of a mask over 80 queries and 40 keys, with the offset that they carry."""
    whole = options.pop("whole", None) or (lambda: create_block_mask(mask, 2, 2, 80, 40, 16))
    return Case(
        name,
        q_len=q_len,
        kv_len=40,
        block_mask=lambda: whole()[index],
        true_mask=shifted(mask, offset),
        score=score,
        true_score=lambda c: shifted(score(c), offset),
        captures={"a": normal(2, 120)},
        **options,
    )


def per_batch_and_head(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx - 3 * b + 11 * h


ROWS = np.s_[:, :, 1:4]
DOCUMENTS = jnp.asarray(np.repeat([0, 1, 2], (23, 30, 27)), jnp.int32)

SLICES = [
    sliced("rows", ROWS, 16, 48, smoke=True),
    sliced("last_row", np.s_[:, :, -1], 64, 16),
    sliced(
        "rows_of_rows",
        np.s_[:, :, 1:],
        32,
        48,
        whole=lambda: create_block_mask(causal, None, None, 80, 40, 16)[:, :, 1:],
    ),
    sliced(
        "rows_of_documents",
        ROWS,
        16,
        48,
        mask=masks.document(DOCUMENTS, causal=True),
    ),
    sliced(
        "a_tail_of_odd_length",
        np.s_[:, :, 2:],
        32,
        45,
        whole=lambda: create_block_mask(causal, None, None, 77, 40, 16),
    ),
    Case(
        "batch_row",
        mask=per_batch_and_head,
        batch=1,
        block_mask=lambda: create_block_mask(per_batch_and_head, 2, 2, 40, 40, 16)[1],
        true_mask=lambda b, h, q, k: per_batch_and_head(1, h, q, k),
    ),
    Case(
        "heads_in_another_order",
        mask=per_batch_and_head,
        block_mask=lambda: create_block_mask(per_batch_and_head, 2, 2, 40, 40, 16)[:, [1, 0]],
        true_mask=lambda b, h, q, k: per_batch_and_head(b, 1 - h, q, k),
    ),
    Case(
        "batch_row_head_and_rows",
        batch=1,
        heads=1,
        q_len=32,
        block_mask=lambda: create_block_mask(per_batch_and_head, 2, 2, 64, 40, 16)[1, 0, 1:3],
        true_mask=lambda b, h, q, k: per_batch_and_head(1, 0, q + 16, k),
    ),
]

# -- dense masks ------------------------------------------------------------------------------------------


def dense(name, mask, **options):
    """A mask given as a boolean array, (L, S), (H, L, S) or (B, H, L, S)."""
    full = np.broadcast_to(mask.reshape((1,) * (4 - mask.ndim) + mask.shape), (2, 2, 40, 40))
    return Case(
        name,
        block_mask=lambda: BlockMask.from_dense(jnp.asarray(mask), 16),
        true_mask=lambda b, h, q, k: jnp.asarray(full)[b, h, q, k],
        **options,
    )


def random_mask(*shape):
    """Half of the positions, but for some blocks that are full and some that are empty."""
    rng = np.random.default_rng(3)
    mask = rng.random(shape) < 0.5
    mask[..., 16:32, :16] = True
    mask[..., :16, 16:] = False
    mask[..., 35, :] = False
    return mask


DENSE = [
    dense("dense_query_by_key", random_mask(40, 40)),
    dense("dense_per_head", random_mask(2, 40, 40)),
    dense("dense_per_batch_and_head", random_mask(2, 2, 40, 40)),
]

# -- block lists ------------------------------------------------------------------------------------------


def listed(name, partial, full=None, mask_mod=None, lengths=(40, 40), block=16, **options):
    """A mask from rows of columns of blocks, the partial and the full ones."""
    rows, columns = (-(-n // block) for n in lengths)

    def lists(of):
        counts = np.array([len(row) for row in of], np.int32)
        indices = np.full((rows, columns), 999, np.int32)  # past the counts
        for i, row in enumerate(of):
            indices[i, : len(row)] = row
        return counts, indices

    def block_mask():
        some, whole = lists(partial), (None, None) if full is None else lists(full)
        return BlockMask.from_kv_blocks(*some, *whole, block, mask_mod, lengths)

    map_of = np.zeros((2, rows, columns), bool)
    for kind, of in enumerate((partial, full or [[]] * rows)):
        for i, row in enumerate(of):
            map_of[kind, i, row] = True

    def true_mask(b, h, q, k):
        some, whole = jnp.asarray(map_of)[:, q // block, k // block]
        inside = True if mask_mod is None else mask_mod(b, h, q, k)
        return whole | (some & inside)

    return Case(
        name,
        q_len=lengths[0],
        kv_len=lengths[1],
        block_mask=block_mask,
        true_mask=true_mask,
        **options,
    )


LISTS = [
    listed("lists_without_mask_mod", [[0, 2], [], [2, 0, 1]]),
    listed("lists_with_mask_mod", [[0], [2, 0], [1]], mask_mod=causal),
    listed(
        "lists_of_odd_lengths_with_full_blocks",
        [[2, 0], [1, 2]],
        [[1], []],
        lengths=(27, 45),
        mask_mod=masks.dilated_window(40, 2),
    ),
]

# -- garbage past the counts ------------------------------------------------------------------------------


def spoiled(block_mask):
    """The mask with every entry of its lists that the counts do not cover replaced by nonsense."""
    rng = np.random.default_rng(11)
    changes = {}
    for prefix in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (
            np.asarray(getattr(block_mask, f"{prefix}_{part}"))
            for part in ("num_blocks", "indices")
        )
        past = np.arange(indices.shape[-1]) >= counts[..., None]
        assert past.any(), f"the {prefix} lists have no entry past their counts"
        nonsense = rng.choice([-1, -(2**31), 2**31 - 1, 7, 3, 0], size=indices.shape)
        spoilt = np.where(past, nonsense, indices).astype(np.int32)
        changes[f"{prefix}_indices"] = jnp.asarray(spoilt)
    return dataclasses.replace(block_mask, **changes)


def garbage(name, mask, **options):
    shape = options.get("mask_shape", (None, None))
    return Case(
        name,
        mask=mask,
        block_mask=lambda: spoiled(create_block_mask(mask, *shape, 40, 40, 8)),
        score=lambda c: lambda s, b, h, q, k: s + c["a"][h, q, k],
        captures={"a": normal(2, 40, 40)},
        **options,
    )


GARBAGE = [
    garbage("garbage_window", masks.sliding_window(11, 2)),
    garbage("garbage_and_dead_rows", masks.causal(-18)),
    garbage("garbage_per_batch_and_head", per_batch_and_head, mask_shape=(2, 2)),
]

# -- how a mask reaches the function ------------------------------------------------------------------------

WAYS = [
    Case(
        "made_outside",
        mask=causal,
        block_mask=lambda: create_block_mask(causal, 1, 1, 40, 40, BLOCK_SIZE=(8, 16)),
    ),
    Case("made_by_flex_attention", mask=per_batch_and_head, own_mask=True),
]


@cases(*SLICES)
def test_slice(case, backend):
    check(case, backend)


@cases(*DENSE)
def test_from_dense(case, backend):
    check(case, backend)


@cases(*LISTS)
def test_from_lists(case, backend):
    check(case, backend)


@cases(*GARBAGE)
def test_garbage_past_the_counts(case, backend):
    check(case, backend)


@cases(*WAYS)
def test_way_of_passing(case, backend):
    check(case, backend)


def test_an_inference_mask_has_a_forward_pass_only(backend):
    inference = create_block_mask(causal, None, None, 40, 40, 16, compute_q_blocks=False)
    case = Case("inference", mask=causal, block_mask=lambda: inference, grads=False)
    check(case, backend)
    with pytest.raises((ValueError, NotImplementedError), match="inference"):
        attend(dataclasses.replace(case, grads=True), backend)


def test_the_row_to_slice_may_be_traced(backend):
    """Decoding: one compiled step, whatever row of the mask it is at."""
    whole = create_block_mask(causal, None, None, 64, 40, 16)
    case = Case("step", q_len=16)

    @jax.jit
    def step(row):
        return flex_attention(*case.operands, block_mask=whole[:, :, row], backend=backend)

    for row in (0, 3):
        exact = oracle(*case.operands, mask_mod=shifted(causal, 16 * row))
        assert_close(f"out of row {row}", step(row), exact.out)
    assert step._cache_size() == 1
