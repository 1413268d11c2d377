"""Ready-made mask_mods and the combinators over them.

Each factory returns a mask_mod, a function `(b, h, q_idx, kv_idx) -> bool` of integer scalars that
is True where query `q_idx` of head `h` in batch entry `b` may attend key `kv_idx`. Indices are raw:
both count from 0, whatever the two lengths (see `causal` for aligning the ends). Arrays that a
factory is given may be traced. Each file draws itself: `python -m flexjax.masks.causal`, also with
`--save causal.png`.
"""

import sys
import warnings

from flexjax.masks._types import MaskMod as MaskMod
from flexjax.masks.big_bird import big_bird as big_bird
from flexjax.masks.block_diffusion import block_diffusion as block_diffusion
from flexjax.masks.canvas_order import CanvasOrder as CanvasOrder
from flexjax.masks.canvas_order import morton_order as morton_order
from flexjax.masks.canvas_order import row_order as row_order
from flexjax.masks.canvas_order import tiled_order as tiled_order
from flexjax.masks.causal import causal as causal
from flexjax.masks.chunked import chunked as chunked
from flexjax.masks.combine import and_masks as and_masks
from flexjax.masks.combine import noop_mask as noop_mask
from flexjax.masks.combine import not_mask as not_mask
from flexjax.masks.combine import or_masks as or_masks
from flexjax.masks.dilated_window import dilated_window as dilated_window
from flexjax.masks.document import document as document
from flexjax.masks.document import document_from_cu_seqlens as document_from_cu_seqlens
from flexjax.masks.document import document_from_lengths as document_from_lengths
from flexjax.masks.document import document_from_offsets as document_from_offsets
from flexjax.masks.global_window import global_window as global_window
from flexjax.masks.image_text import image_text as image_text
from flexjax.masks.neighborhood import neighborhood as neighborhood
from flexjax.masks.neighborhood import neighborhood_1d as neighborhood_1d
from flexjax.masks.neighborhood import neighborhood_2d as neighborhood_2d
from flexjax.masks.neighborhood import neighborhood_3d as neighborhood_3d
from flexjax.masks.padding import padding as padding
from flexjax.masks.prefix_lm import prefix_lm as prefix_lm
from flexjax.masks.shared_prefix import shared_prefix as shared_prefix
from flexjax.masks.sliding_tile import sliding_tile as sliding_tile
from flexjax.masks.sliding_window import sliding_window as sliding_window
from flexjax.masks.sparse_transformer import fixed as fixed
from flexjax.masks.sparse_transformer import strided as strided
from flexjax.masks.tree import tree as tree
from flexjax.masks.video_heads import spatial_head as spatial_head
from flexjax.masks.video_heads import temporal_head as temporal_head
from flexjax.masks.within import within_documents as within_documents
from flexjax.masks.within import within_groups as within_groups

if sys.argv[:1] == ["-m"]:
    # `python -m flexjax.masks.causal` runs a module that this file has just imported. Python warns
    # about every such case; running the example twice over is harmless here.
    warnings.filterwarnings("ignore", r"'flexjax\.masks\..*' found in sys\.modules", RuntimeWarning)
