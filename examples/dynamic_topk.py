"""A trainable top-k block-sparse attention, whose mask follows the data in every step.

    python examples/dynamic_topk.py

The task is recall: the sequence is full of noise, with a few (marker, payload) pairs hidden in random places,
and the last tokens ask for the payload of a marker each. Causal attention over everything can solve it; here each
block of queries may visit only its own block and the `TOP_K` other blocks of keys that it scores highest.

The scores come from the model: queries and keys of a block are pooled to one vector each, and their products
say which blocks look promising (as in VSA, arXiv:2505.13389, and NSA, arXiv:2502.11089). The choice has no
gradient, so the pooled scores also enter the attention as a bias that score_mod reads, through which they learn.

The BlockMask is built inside the jitted training step; nothing recompiles when it changes. Afterwards the script
checks one step against dense attention with the same blocks allowed. The exit code is 1 if the loss has not
fallen, or if the two differ.
"""

import functools
import math
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from flexjax import BlockMask, create_mask, flex_attention, masks

BLOCK, TOP_K = 16, 2
LENGTH, DIM, HEADS = 256, 32, 2
MARKERS, PAYLOADS, PAIRS, QUESTIONS = 8, 8, 4, 4
VOCABULARY = 2 + MARKERS + PAYLOADS  # noise, question, markers, payloads
BATCH = 16

Parameters = dict[str, Array]


def make_batch(rng: np.random.Generator) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B Q"]]:
    """Tokens, and the payloads that the questions at the end ask for."""
    tokens = np.zeros((BATCH, LENGTH), np.int32)
    answers = np.zeros((BATCH, QUESTIONS), np.int32)
    body = LENGTH - 2 * QUESTIONS
    for row in range(BATCH):
        places = 2 * rng.permutation(body // 2)[:PAIRS]
        markers = rng.permutation(MARKERS)[:PAIRS]
        payloads = rng.integers(0, PAYLOADS, PAIRS)
        tokens[row, places], tokens[row, places + 1] = 2 + markers, 2 + MARKERS + payloads
        asked = rng.integers(0, PAIRS, QUESTIONS)
        tokens[row, body::2], tokens[row, body + 1 :: 2] = 1, 2 + markers[asked]
        answers[row] = payloads[asked]
    return tokens, answers


def init(rng: Array) -> Parameters:
    """Embeddings and one attention layer."""
    shapes = {
        "tokens": (VOCABULARY, DIM),
        "previous": (VOCABULARY, DIM),
        "query": (DIM, HEADS, DIM),
        "key": (DIM, HEADS, DIM),
        "value": (DIM, HEADS, DIM),
        "out": (HEADS, DIM, DIM),
        "read": (DIM, PAYLOADS),
    }
    keys = jax.random.split(rng, len(shapes))
    named = zip(keys, shapes.items(), strict=True)
    return {n: jax.random.normal(k, s) / math.sqrt(DIM) for k, (n, s) in named}


def block_scores(query: Float[Array, "B H L D"], key: Float[Array, "B H L D"]) -> Array:
    """A score for every block of queries and block of keys, [B, H, R, C].

    The maximum over a block keeps a rare token visible where a mean would drown it in noise.
    """
    blocks = (*query.shape[:2], LENGTH // BLOCK, BLOCK, DIM)
    pooled_query, pooled_key = query.reshape(blocks).max(axis=3), key.reshape(blocks).max(axis=3)
    return jnp.einsum("bhrd,bhcd->bhrc", pooled_query, pooled_key) / DIM


def choose(scores: Float[Array, "B H R C"]) -> BlockMask:
    """The `TOP_K` best blocks of each row, causal, and the row's own block in any case."""
    return BlockMask.from_block_scores(
        scores,
        top_k=TOP_K,
        mask_mod=masks.causal(),
        always=masks.and_masks(masks.causal(), masks.chunked(BLOCK)),
        block_size=BLOCK,
        seq_lengths=(LENGTH, LENGTH),
    )


def attend(query: Array, key: Array, value: Array) -> tuple[Array, BlockMask]:
    """Attention to the chosen blocks."""
    scores = block_scores(query, key)
    block_mask = choose(scores)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + scores[b, h, q_idx // BLOCK, kv_idx // BLOCK]

    return flex_attention(query, key, value, score_mod, block_mask), block_mask


def attend_densely(query: Array, key: Array, value: Array) -> tuple[Array, BlockMask]:
    """The same with all scores in memory: the blocks are hidden by -inf."""
    scores = block_scores(query, key)
    block_mask = choose(scores)
    visited = block_mask.to_dense().repeat(BLOCK, 2).repeat(BLOCK, 3) > 0
    causal = create_mask(masks.causal(), None, None, LENGTH, LENGTH)
    bias = scores.repeat(BLOCK, 2).repeat(BLOCK, 3)
    logits = jnp.einsum("bhqd,bhkd->bhqk", query, key) / math.sqrt(DIM) + bias
    weights = jax.nn.softmax(jnp.where(visited & causal, logits, -jnp.inf))
    return jnp.einsum("bhqk,bhkd->bhqd", weights, value), block_mask


def loss_of(parameters: Parameters, tokens: Array, answers: Array, attention: Any) -> Any:
    """Cross-entropy of the answers; also the share of right ones, and the mask."""
    before = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    own, previous = parameters["tokens"][tokens], parameters["previous"][before]
    # Keys know the token before theirs, so that a payload is found by its marker.
    query = jnp.einsum("bld,dhk->bhlk", own, parameters["query"])
    key = jnp.einsum("bld,dhk->bhlk", previous, parameters["key"])
    value = jnp.einsum("bld,dhk->bhlk", own, parameters["value"])
    attended, block_mask = attention(query, key, value)
    x = own + jnp.einsum("bhlk,hkd->bld", attended, parameters["out"])
    asking = slice(LENGTH - 2 * QUESTIONS + 1, LENGTH, 2)
    logits = x[:, asking] @ parameters["read"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()
    return loss, ((logits.argmax(-1) == answers).mean(), block_mask)


@functools.partial(jax.jit, static_argnums=0)
def step(
    optimizer: optax.GradientTransformation, parameters: Any, state: Any, tokens: Any, answers: Any
) -> Any:
    """One step of training; the mask is chosen anew inside."""
    (loss, (right, block_mask)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
        parameters, tokens, answers, attend
    )
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(parameters, updates), state, loss, right, block_mask


def largest_difference(parameters: Parameters, tokens: Array, answers: Array) -> float:
    """The largest relative difference of a gradient from that of dense attention."""

    def gradients(attention: Any) -> Parameters:
        run = jax.jit(
            jax.grad(lambda p: loss_of(p, jnp.asarray(tokens), jnp.asarray(answers), attention)[0])
        )
        return run(parameters)

    found, exact = gradients(attend), gradients(attend_densely)
    errors = jax.tree.map(lambda x, y: jnp.linalg.norm(x - y) / jnp.linalg.norm(y), found, exact)
    return float(max(jax.tree.leaves(errors)))


def main() -> int:
    steps = 50 if os.environ.get("FLEXJAX_SMOKE") == "1" else 150
    rng = np.random.default_rng(0)
    parameters = init(jax.random.key(0))
    optimizer = optax.adam(1e-2)
    state = optimizer.init(parameters)
    losses: list[float] = []
    for number in range(steps):
        batch = make_batch(rng)
        parameters, state, loss, right, block_mask = step(optimizer, parameters, state, *batch)
        losses.append(float(loss))
        if number % (steps // 10) == 0 or number == steps - 1:
            skipped = block_mask.sparsity()
            print(
                f"step {number:4}: loss {loss:.3f}, {right:4.0%} right, {skipped:.0f}% of blocks skipped"
            )
    print(block_mask[0, 0])
    error = largest_difference(parameters, *make_batch(rng))
    print(f"gradients differ from those of dense attention over the same blocks by {error:.1e}")
    early, late = np.mean(losses[: steps // 10]), np.mean(losses[-(steps // 10) :])
    wanted = 0.95 * early if steps < 100 else 0.5 * early
    print(f"loss from {early:.3f} to {late:.3f} in {steps} steps")
    if not (late < wanted and error < 1e-4):
        print("FAILED: the loss should have fallen, and the gradients should agree.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
