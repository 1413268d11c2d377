"""Ready-made score_mods and their composition.

Each factory returns a score_mod, a function `(score, b, h, q_idx, kv_idx) -> score` of scalars that
sees the scaled float32 score of query `q_idx` and key `kv_idx` before the mask and the softmax. `h`
is the query's head, also where heads share keys. Arrays that a factory is given may be traced, and
every floating-point one has its gradient. Each file draws itself: `python -m flexjax.scores.alibi`,
also with `--save alibi.png`.
"""

import sys
import warnings

from flexjax.scores._types import ScoreMod as ScoreMod
from flexjax.scores.activation import activation as activation
from flexjax.scores.activation import without_softmax as without_softmax
from flexjax.scores.additive_bias import additive_bias as additive_bias
from flexjax.scores.alibi import alibi as alibi
from flexjax.scores.alibi import alibi_slopes as alibi_slopes
from flexjax.scores.compose import compose as compose
from flexjax.scores.graph_bias import graph_distance_bias as graph_distance_bias
from flexjax.scores.graph_bias import graph_edge_bias as graph_edge_bias
from flexjax.scores.head_gate import head_gate as head_gate
from flexjax.scores.head_gate import head_scale as head_scale
from flexjax.scores.relative_position_bias import relative_position_bias as relative_position_bias
from flexjax.scores.relative_table import relative_table as relative_table
from flexjax.scores.sandwich import sandwich as sandwich
from flexjax.scores.soft_cap import soft_cap as soft_cap

if sys.argv[:1] == ["-m"]:
    # As in flexjax.masks: `python -m flexjax.scores.alibi` runs a module imported just above.
    warnings.filterwarnings(
        "ignore", r"'flexjax\.scores\..*' found in sys\.modules", RuntimeWarning
    )
