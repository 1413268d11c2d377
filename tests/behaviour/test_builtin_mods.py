"""Every mask of flexjax.masks and every score of flexjax.scores, computed and differentiated."""

import jax.numpy as jnp
import numpy as np

from flexjax import masks, scores
from tests.behaviour.harness import Case, cases, check, normal

LENGTHS = (13, 1, 16, 10)  # of documents; they fill 40 tokens
DOCUMENTS = jnp.asarray(np.repeat([0, 1, 2, 3], LENGTHS), jnp.int32)
# Another cut in every batch row; the second row ends in padding of its own id.
PACKED = jnp.asarray([np.repeat([0, 1, 2, 3], LENGTHS), np.repeat([0, 1, 2, 7], (5, 20, 9, 6))])
GLOBAL = jnp.arange(40) % 17 == 3


def masked(name, mask, **options):
    return Case(name, mask=mask, **options)


PER_BATCH = {"mask_shape": (2, None)}

MASKS = [
    masked("noop", masks.noop_mask),
    masked("causal", masks.causal()),
    masked("causal_offset", masks.causal(jnp.asarray([3, -7])), **PER_BATCH),
    masked("sliding_window", masks.sliding_window(5, 20)),
    masked("prefix_lm", masks.prefix_lm(jnp.asarray([18, 0])), **PER_BATCH),
    masked("padding", masks.padding(jnp.asarray([40, 21])), **PER_BATCH),
    masked("document", masks.document(DOCUMENTS)),
    masked("packed_documents", masks.document(PACKED, causal=True), smoke=True, **PER_BATCH),
    masked("document_from_lengths", masks.document_from_lengths(LENGTHS, 40, causal=True)),
    masked("document_from_offsets", masks.document_from_offsets([0, 13, 14, 30], 40)),
    masked("document_from_cu_seqlens", masks.document_from_cu_seqlens([0, 13, 14, 30, 40])),
    masked("dilated_window", masks.dilated_window(12, 3)),
    masked("global_window", masks.global_window(4, GLOBAL)),
    masked("chunked", masks.chunked(12)),
    masked("block_diffusion", masks.block_diffusion(20, 6)),
    masked("shared_prefix", masks.shared_prefix([0, 16, 22, 31, 40])),
    masked("neighborhood_1d", masks.neighborhood_1d(40, 7)),
    masked("neighborhood_2d", masks.neighborhood_2d((5, 8), (3, 4))),
    masked("strided", masks.strided(6)),
    masked("fixed", masks.fixed(9, 2)),
    masked("and", masks.and_masks(masks.causal(), masks.document(DOCUMENTS))),
    masked("or", masks.or_masks(masks.sliding_window(3), masks.prefix_lm(6))),
    masked(
        "and_or_not",
        masks.and_masks(
            masks.or_masks(masks.sliding_window(6, 6), masks.global_window(0, GLOBAL)),
            masks.not_mask(masks.dilated_window(40, 5)),
            masks.padding(jnp.asarray([40, 33])),
        ),
        **PER_BATCH,
    ),
]

CAUSAL = masks.causal()


def scored(name, score, mask=CAUSAL, **captures):
    return Case(name, score=score, mask=mask, captures=captures)


SCORES = [
    scored("alibi", lambda c: scores.alibi(2)),
    scored(
        "alibi_symmetric_learned",
        lambda c: scores.alibi(slopes=c["slopes"], symmetric=True),
        mask=None,
        slopes=normal(2),
    ),
    scored("soft_cap", lambda c: scores.soft_cap(1.5)),
    scored(
        "relative_position_bias",
        lambda c: scores.relative_position_bias(c["table"], max_distance=20),
        mask=None,
        table=normal(12, 2),
    ),
    scored(
        "relative_position_bias_causal",
        lambda c: scores.relative_position_bias(c["table"], False, max_distance=30),
        table=normal(8, 2),
    ),
    scored(
        "relative_table",
        lambda c: scores.compose(
            scores.relative_table(c["shared"]), scores.relative_table(c["clipped_per_head"])
        ),
        mask=None,
        shared=normal(79),
        clipped_per_head=normal(2, 31),
    ),
    scored(
        "additive_bias",
        lambda c: scores.compose(
            scores.additive_bias(c["per_batch"]), scores.additive_bias(c["per_key"])
        ),
        per_batch=normal(2, 1, 40, 40),
        per_key=normal(1, 40),
    ),
    scored(
        "head_gate_then_bias_then_head_scale",
        lambda c: scores.compose(
            scores.head_gate(c["gate"]),
            scores.additive_bias(c["bias"]),
            scores.head_scale(c["scale"]),
        ),
        mask=masks.document(DOCUMENTS, causal=True),
        gate=normal(2),
        bias=normal(40, 40),
        scale=normal(2, seed=1),
    ),
    scored(
        "alibi_then_soft_cap_learned",
        lambda c: scores.compose(scores.alibi(slopes=c["slopes"]), scores.soft_cap(c["cap"])),
        slopes=normal(2),
        cap=jnp.float32(1.5),
    ),
]


@cases(*MASKS)
def test_mask(case, backend):
    check(case, backend)


@cases(*SCORES)
def test_score(case, backend):
    check(case, backend)
