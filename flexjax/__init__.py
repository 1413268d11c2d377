"""FlexAttention for JAX: attention with a score and a mask of your own, block-sparse and fused."""

from flexjax import masks as masks
from flexjax import paged as paged
from flexjax import scores as scores
from flexjax.attention import AuxOutput as AuxOutput
from flexjax.attention import AuxRequest as AuxRequest
from flexjax.attention import flex_attention as flex_attention
from flexjax.backends.registry import FallbackWarning as FallbackWarning
from flexjax.block_creation import create_block_mask as create_block_mask
from flexjax.block_creation import create_mask as create_mask
from flexjax.block_mask import BlockMask as BlockMask
from flexjax.decoding import decode as decode
from flexjax.kv_cache import KVCache as KVCache
from flexjax.masks import and_masks as and_masks
from flexjax.masks import noop_mask as noop_mask
from flexjax.masks import not_mask as not_mask
from flexjax.masks import or_masks as or_masks

__version__ = "0.1.0"
