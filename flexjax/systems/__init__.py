"""Attention systems that are more than a mask: functions over arrays, built on `flex_attention`.

The systems that are a mask alone are in `flexjax.masks`; docs/systems.md lists all of them.
"""

from flexjax.systems.linformer import linformer_attention as linformer_attention
from flexjax.systems.longformer import longformer_attention as longformer_attention
from flexjax.systems.perceiver import init_perceiver as init_perceiver
from flexjax.systems.perceiver import perceiver as perceiver
from flexjax.systems.reformer import lsh_buckets as lsh_buckets
from flexjax.systems.reformer import reformer_attention as reformer_attention
