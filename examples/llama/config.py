"""Sizes and styles of the model."""

from __future__ import annotations

import dataclasses

ATTENTIONS = ("flexjax", "xla", "cudnn")


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder-only transformer.

    Attributes:
        vocabulary: number of different tokens.
        width: of the residual stream.
        layers: number of blocks.
        heads: query heads of a layer.
        kv_heads: key heads, a divisor of `heads`.
        head_dim: dimension D of a head.
        hidden: width inside the SwiGLU.
        tied: whether the output matrix is the embedding, transposed.
        rope_theta: base of the rotary frequencies.
        window: if given, layers 0, 2, 4, ... see that many tokens, their own included; the others see all.
        score_cap: soft cap of attention scores: cap * tanh(score / cap).
        logit_cap: the same for the output logits.
        sinks: whether every head learns an attention sink.
        attention: "flexjax", or `jax.nn.dot_product_attention` by "xla" or "cudnn".
        backend: of flexjax; None for the best one that can.
        remat: whether the backward pass computes a block's activations again instead of keeping them.
        dtype: of activations and matrix products; parameters are float32.

    Raises:
        ValueError: sizes that do not fit, or a style that the attention cannot compute.
    """

    vocabulary: int = 256
    width: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    hidden: int = 192
    tied: bool = False
    rope_theta: float = 500_000.0
    window: int | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    sinks: bool = False
    attention: str = "flexjax"
    backend: str | None = None
    remat: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads = {self.heads} must be a multiple of kv_heads = {self.kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"Rotary positions need an even head_dim, but it is {self.head_dim}.")
        if self.attention not in ATTENTIONS:
            raise ValueError(
                f"attention must be one of {', '.join(ATTENTIONS)}, but it is {self.attention!r}."
            )
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"A token sees itself at least, so window must be at least 1, but it is {self.window}."
            )
        if self.attention == "cudnn" and (self.sinks or self.score_cap is not None):
            raise ValueError(
                "jax.nn's cuDNN attention has neither sinks nor a soft cap. Use attention='flexjax' or 'xla'."
            )

    def windowed(self, layer: int) -> bool:
        """Whether a layer sees the window alone."""
        return self.window is not None and layer % 2 == 0

    @property
    def parameters(self) -> int:
        """How many numbers the model learns."""
        projections = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        block = projections + 3 * self.width * self.hidden + 2 * self.width
        block += self.heads if self.sinks else 0
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.width
        return embeddings + self.layers * block + self.width

    def flops(self, tokens: int, visible: tuple[int, int]) -> float:
        """Multiplications and additions of a training step that the model itself asks for.

        The backward pass counts twice the forward pass, and what remat computes again does not count (model FLOP
        utilisation, arXiv:2204.02311). Of attention, visible pairs of tokens count and no others.

        Args:
            tokens: in the batch.
            visible: pairs of a query and a key that it sees, in a full and in a windowed layer.
        """
        # The embedding is a look-up; the output matrix multiplies whether it is tied or not.
        matrices = self.parameters - (0 if self.tied else self.vocabulary * self.width)
        pairs = sum(visible[self.windowed(layer)] for layer in range(self.layers))
        return 6.0 * tokens * matrices + 12.0 * pairs * self.heads * self.head_dim


SIZES = {
    "tiny": Config(),
    "15M": Config(256, 384, 9, 6, 2, 64, 1152),
    "110M": Config(256, 768, 18, 12, 4, 64, 2048),
    "1B": Config(128_256, 2048, 16, 32, 8, 64, 8192, tied=True),
    "3B": Config(128_256, 3072, 28, 24, 8, 128, 8192, tied=True),
    "8B": Config(128_256, 4096, 32, 32, 8, 128, 14_336),
}

STYLES = {
    "llama": {},
    "gemma2": {"window": 4096, "score_cap": 50.0, "logit_cap": 30.0},
    "gpt_oss": {"window": 128, "sinks": True},
}


def make_config(size: str, style: str = "llama", **changes: object) -> Config:
    """A size in a style, with further fields changed."""
    return dataclasses.replace(SIZES[size], **(STYLES[style] | changes))
