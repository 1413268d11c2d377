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


MASKS = [
    masked("noop", masks.noop_mask),
    masked("causal", masks.causal()),
    masked("causal_offset", masks.causal(-7)),
    masked("causal_offset_per_batch", masks.causal(jnp.asarray([3, -2])), mask_shape=(2, None)),
    masked("sliding_window", masks.sliding_window(9)),
    masked("sliding_window_both_ways", masks.sliding_window(5, 20)),
    masked("prefix_lm", masks.prefix_lm(11)),
    masked("prefix_lm_per_batch", masks.prefix_lm(jnp.asarray([18, 0])), mask_shape=(2, None)),
    masked("padding", masks.padding(jnp.asarray([40, 21])), mask_shape=(2, None)),
    masked("document", masks.document(DOCUMENTS)),
    masked("packed_documents", masks.document(PACKED, causal=True), mask_shape=(2, None), smoke=True),
    masked("document_lengths", masks.document_from_lengths(LENGTHS, 40, causal=True)),
    masked("document_offsets", masks.document_from_offsets([0, 13, 14, 30], 40)),
    masked("document_cu_seqlens", masks.document_from_cu_seqlens([0, 13, 14, 30, 40])),
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
    masked("not", masks.not_mask(masks.sliding_window(8, 8))),
    masked(
        "three_combined",
        masks.and_masks(
            masks.or_masks(masks.sliding_window(6, 6), masks.global_window(0, GLOBAL)),
            masks.not_mask(masks.dilated_window(40, 5)),
            masks.padding(jnp.asarray([40, 33])),
        ),
        mask_shape=(2, None),
    ),
    masked("given_as_mask_mod", masks.document(PACKED, causal=True), own_mask=True),
]  # fmt: skip


def scored(name, score, mask=masks.causal(), **captures):
    return Case(name, score=score, mask=mask, captures=captures)


SCORES = [
    scored("alibi", lambda c: scores.alibi(2)),
    scored("alibi_learned", lambda c: scores.alibi(slopes=c["slopes"]), slopes=normal(2)),
    scored(
        "alibi_symmetric",
        lambda c: scores.alibi(slopes=c["slopes"], symmetric=True),
        mask=None,
        slopes=normal(2),
    ),
    scored("soft_cap", lambda c: scores.soft_cap(1.5)),
    scored("soft_cap_learned", lambda c: scores.soft_cap(c["cap"]), cap=jnp.float32(1.5)),
    scored(
        "t5_bidirectional",
        lambda c: scores.relative_position_bias(c["table"], max_distance=20),
        mask=None,
        table=normal(12, 2),
    ),
    scored(
        "t5_causal",
        lambda c: scores.relative_position_bias(c["table"], bidirectional=False, max_distance=30),
        table=normal(8, 2),
    ),
    scored("relative_table", lambda c: scores.relative_table(c["table"]), table=normal(79)),
    scored(
        "relative_table_per_head_clipped",
        lambda c: scores.relative_table(c["table"]),
        mask=None,
        table=normal(2, 31),
    ),
    scored("additive_bias", lambda c: scores.additive_bias(c["bias"]), bias=normal(2, 1, 40, 40)),
    scored("additive_key_bias", lambda c: scores.additive_bias(c["bias"]), bias=normal(2, 1, 1, 40)),
    scored("head_gate", lambda c: scores.head_gate(c["gate"]), gate=normal(2)),
    scored("head_scale", lambda c: scores.head_scale(c["scale"]), scale=normal(2)),
    scored(
        "alibi_then_soft_cap",
        lambda c: scores.compose(scores.alibi(slopes=c["slopes"]), scores.soft_cap(2.0)),
        slopes=normal(2),
    ),
    scored(
        "gate_then_bias_then_scale_on_documents",
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
]  # fmt: skip


@cases(*MASKS)
def test_mask(case, backend):
    check(case, backend)


@cases(*SCORES)
def test_score(case, backend):
    check(case, backend)
