"""Paged caches of keys and values: sequences take pages as they grow, and share those of common prefixes."""

from flexjax.paged.allocate import allocate as allocate
from flexjax.paged.allocate import reserve as reserve
from flexjax.paged.append import append as append
from flexjax.paged.append import extend as extend
from flexjax.paged.append import write as write
from flexjax.paged.attention import prefill as prefill
from flexjax.paged.cache import PagedCache as PagedCache
from flexjax.paged.errors import PageError as PageError
from flexjax.paged.fork import fork as fork
from flexjax.paged.free import free as free
from flexjax.paged.physical import convert_logical_block_mask as convert_logical_block_mask
from flexjax.paged.physical import get_mask_mod as get_mask_mod
from flexjax.paged.physical import get_score_mod as get_score_mod
from flexjax.paged.physical import physical_pools as physical_pools
from flexjax.paged.physical import physical_to_logical as physical_to_logical
from flexjax.paged.selection import Selection as Selection
from flexjax.paged.selection import adaptive_attention as adaptive_attention
from flexjax.paged.selection import select_pages as select_pages
from flexjax.paged.selection import selected_block_mask as selected_block_mask
