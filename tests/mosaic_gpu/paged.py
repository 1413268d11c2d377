"""A paged cache for tests of what reads one."""

import dataclasses
import functools
from typing import Any

import jax


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key_pages", "value_pages", "page_table", "lengths"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Paged:
    """The least that `decode` takes for a paged cache."""

    key_pages: Any
    value_pages: Any
    page_table: Any
    lengths: Any
