"""The nnx layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Float

from flexjax.block_mask import BlockMask
from flexjax.flax.shared import batched_attention, head_shapes, mask_arguments, rotated


class FlexAttention(nnx.Module):
    """Multi-head attention with a score and a mask of your own.

    Projects to queries, keys and values, runs `flexjax.flex_attention`, projects back. Parameters have the
    names and shapes of `nnx.MultiHeadAttention`, so that its checkpoints fit.

    A mod may be an `nnx.Module` with a `__call__` of a mod's signature. As an attribute of this layer its
    parameters are trained with the others:

        class Bias(nnx.Module):
            def __init__(self, heads, length):
                self.table = nnx.Param(jnp.zeros((heads, 2 * length)))

            def __call__(self, score, b, h, q_idx, kv_idx):
                return score + self.table[h, q_idx - kv_idx + self.table.shape[1] // 2]

        layer = FlexAttention(8, 512, score_mod=Bias(8, 1024), mask_mod=causal(), rngs=nnx.Rngs(0))

    Args:
        num_heads: query heads Hq.
        in_features: features of `inputs_q`.
        qkv_features: Hq * head_dim; `in_features` by default.
        out_features: features of the output; `in_features` by default.
        num_kv_heads: key heads Hkv, a divisor of num_heads; num_heads by default.
        in_kv_features: features of `inputs_kv`; `in_features` by default.
        head_dim: dimension D of a head, instead of qkv_features.
        score_mod: default for the call's score_mod.
        mask_mod: default for the call's mask_mod.
        block_mask: default for the call's block_mask; its arrays become part of the layer's state.
        use_sinks: learn one logit a query head that takes part in the softmax without a value.
        rope: rotary embedding of queries and keys, a function (or module) of (batch..., length, D) such as
            `nnx.RoPE`.
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
        rngs: random keys for the parameters.

    Raises:
        ValueError: head counts or features that do not divide.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        head_dim: int | None = None,
        score_mod: Callable[..., Any] | None = None,
        mask_mod: Callable[..., Any] | None = None,
        block_mask: BlockMask | None = None,
        use_sinks: bool = False,
        rope: Callable[[Array], Array] | None = None,
        scale: float | None = None,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: str | lax.Precision | None = None,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = nnx.initializers.zeros,
        out_bias_init: Initializer | None = None,
        sinks_init: Initializer = nnx.initializers.zeros,
        kernel_options: Mapping[str, Any] | None = None,
        backend: str | None = None,
        rngs: nnx.Rngs,
    ):
        qkv_features = in_features if qkv_features is None else qkv_features
        kv_heads, head_dim = head_shapes(num_heads, num_kv_heads, qkv_features, head_dim)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, head_dim
        self.in_features = in_features
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        self.out_features = in_features if out_features is None else out_features
        self.score_mod, self.mask_mod, self.rope = score_mod, mask_mod, rope
        self.block_mask = nnx.data(block_mask)
        self.scale, self.precision, self.backend = scale, precision, backend
        self.kernel_options = kernel_options
        linear = functools.partial(
            nnx.LinearGeneral,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=rngs,
        )
        project = functools.partial(linear, kernel_init=kernel_init, bias_init=bias_init)
        self.query = project(self.in_features, (num_heads, head_dim))
        self.key = project(self.in_kv_features, (kv_heads, head_dim))
        self.value = project(self.in_kv_features, (kv_heads, head_dim))
        self.out = linear(
            (num_heads, head_dim),
            self.out_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
        )
        self.sinks = nnx.data(None)
        if use_sinks:
            self.sinks = nnx.Param(sinks_init(rngs.params(), (num_heads,), param_dtype))

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
            inputs_q: (batch..., L, in_features), any number of batch axes.
            inputs_kv: (batch..., S, in_kv_features); `inputs_q` itself by default.
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
        out = batched_attention(
            rotated(self.rope, self.query(inputs_q)),
            rotated(self.rope, self.key(inputs_kv)),
            self.value(inputs_kv),
            score_mod=self.score_mod if score_mod is None else score_mod,
            **mask_arguments((mask_mod, block_mask), (self.mask_mod, self.block_mask)),
            scale=self.scale,
            sinks=None if self.sinks is None else self.sinks[...],
            precision=self.precision,
            kernel_options=self.kernel_options,
            backend=self.backend,
        )
        return self.out(out)
