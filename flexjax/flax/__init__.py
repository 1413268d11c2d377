"""Flax layers, and an `attention_fn` for Flax's own layers. Needs the extra `flexjax[flax]`.

`FlexAttention` is the nnx layer; the linen layer with the same options is `flexjax.flax.linen.FlexAttention`.
"""

try:
    import flax as _flax  # noqa: F401
except ImportError as error:
    raise ImportError(
        "flexjax.flax needs Flax, which is not installed. Install it with the flax extra, "
        'pip install "flexjax[flax]"; flexjax.flex_attention itself works without it.'
    ) from error

from flexjax.flax import linen as linen
from flexjax.flax import nnx as nnx
from flexjax.flax.adapter import attention_fn as attention_fn
from flexjax.flax.nnx import FlexAttention as FlexAttention
