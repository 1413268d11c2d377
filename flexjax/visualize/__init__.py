"""Pictures of masks, scores, attention and block masks: as arrays, as text, with matplotlib, and as HTML.

The text and the HTML need nothing; the plots need matplotlib, which the `viz` extra installs.
"""

from flexjax.visualize.attention import attention_grid as attention_grid
from flexjax.visualize.attention import plot_attention as plot_attention
from flexjax.visualize.html import blocks_html as blocks_html
from flexjax.visualize.pictures import EMPTY as EMPTY
from flexjax.visualize.pictures import FULL as FULL
from flexjax.visualize.pictures import PARTIAL as PARTIAL
from flexjax.visualize.pictures import blocks_text as blocks_text
from flexjax.visualize.pictures import mask_grid as mask_grid
from flexjax.visualize.pictures import mask_text as mask_text
from flexjax.visualize.pictures import plot_blocks as plot_blocks
from flexjax.visualize.pictures import plot_mask as plot_mask
from flexjax.visualize.pictures import plot_scores as plot_scores
from flexjax.visualize.pictures import require_matplotlib as require_matplotlib
from flexjax.visualize.pictures import score_grid as score_grid
from flexjax.visualize.pictures import score_text as score_text
