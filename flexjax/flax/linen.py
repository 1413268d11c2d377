"""The linen layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.linear import default_kernel_init
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Float

from flexjax.block_mask import BlockMask
from flexjax.flax.shared import batched_attention, head_shapes, mask_arguments, rotated


class FlexAttention(nn.Module):
    """Multi-head attention with a score and a mask of your own.

    Projects to queries, keys and values, runs `flexjax.flex_attention`, projects back. Parameters have the
    names and shapes of `linen.MultiHeadDotProductAttention`, so that its checkpoints fit. A mod that reads a
    parameter closes over it: `table = self.param(...)` in the module that calls this one.

    Attributes:
        num_heads: query heads Hq.
        qkv_features: Hq * head_dim; the features of `inputs_q` by default.
        out_features: features of the output; those of `inputs_q` by default.
        num_kv_heads: key heads Hkv, a divisor of num_heads; num_heads by default.
        head_dim: dimension D of a head, instead of qkv_features.
        score_mod: default for the call's score_mod.
        mask_mod: default for the call's mask_mod.
        block_mask: default for the call's block_mask.
        use_sinks: learn one logit a query head that takes part in the softmax without a value.
        rope: rotary embedding of queries and keys, a function of (batch..., length, D).
        scale: factor on Q K^T; 1 / sqrt(D) by default.
        use_bias: whether the projections have biases.
        dtype: dtype of the computation; inferred from inputs and parameters by default.
        param_dtype: dtype of the parameters.
        precision: of the projections' and of float32 attention's matrix products.
        kernel_init: initializer of the projections.
        out_kernel_init: that of the output projection; kernel_init by default.
        bias_init: initializer of the biases.
        out_bias_init: that of the output projection; bias_init by default.
        sinks_init: initializer of the sinks.
        kernel_options: tuning options of the backend.
        backend: see `flexjax.flex_attention`.

    Raises:
        ValueError: head counts or features that do not divide.
    """

    num_heads: int
    qkv_features: int | None = None
    out_features: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    score_mod: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None
    block_mask: BlockMask | None = None
    use_sinks: bool = False
    rope: Callable[[Array], Array] | None = None
    scale: float | None = None
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: str | lax.Precision | None = None
    kernel_init: Initializer = default_kernel_init
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros
    out_bias_init: Initializer | None = None
    sinks_init: Initializer = nn.initializers.zeros
    kernel_options: Mapping[str, Any] | None = None
    backend: str | None = None

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "*batch L features"],
        inputs_kv: Float[Array, "*batch S kv_features"] | None = None,
        *,
        score_mod: Callable[..., Any] | None = None,
        mask_mod: Callable[..., Any] | None = None,
        block_mask: BlockMask | None = None,
    ) -> Float[Array, "*batch L out_features"]:
        """Attends from `inputs_q` to `inputs_kv`.

        Args:
            inputs_q: (batch..., L, features), any number of batch axes.
            inputs_kv: (batch..., S, kv_features); `inputs_q` itself by default.
            score_mod: `(score, b, h, q_idx, kv_idx) -> score`, in place of the layer's own; b is the
                row-major index over all batch axes.
            mask_mod: `(b, h, q_idx, kv_idx) -> bool`, True where the query may attend. A mask_mod or
                block_mask in the call takes the place of whichever the layer has.
            block_mask: a ready BlockMask instead of mask_mod.

        Returns:
            (batch..., L, out_features).

        Raises:
            ValueError: see `flexjax.flex_attention`.
        """
        inputs_kv = inputs_q if inputs_kv is None else inputs_kv
        features = inputs_q.shape[-1]
        kv_heads, head_dim = head_shapes(
            self.num_heads, self.num_kv_heads, self.qkv_features or features, self.head_dim
        )
        dense = functools.partial(
            nn.DenseGeneral,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
        )
        project = functools.partial(dense, kernel_init=self.kernel_init, bias_init=self.bias_init)
        query = project((self.num_heads, head_dim), name="query")(inputs_q)
        key = project((kv_heads, head_dim), name="key")(inputs_kv)
        value = project((kv_heads, head_dim), name="value")(inputs_kv)
        sinks = None
        if self.use_sinks:
            sinks = self.param("sinks", self.sinks_init, (self.num_heads,), self.param_dtype)
        out = batched_attention(
            rotated(self.rope, query),
            rotated(self.rope, key),
            value,
            score_mod=self.score_mod if score_mod is None else score_mod,
            **mask_arguments((mask_mod, block_mask), (self.mask_mod, self.block_mask)),
            scale=self.scale,
            sinks=sinks,
            precision=self.precision,
            kernel_options=self.kernel_options,
            backend=self.backend,
        )
        return dense(
            self.out_features or features,
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            name="out",
        )(out)
