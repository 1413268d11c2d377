"""What a page operation may be refused for: a bit each, so that they can be collected inside `jax.jit`."""

from __future__ import annotations

OUT_OF_PAGES = 1
PAST_TABLE = 2
NOT_ALLOCATED = 4
ALREADY_ALLOCATED = 8
BAD_ROW = 16
BAD_COUNT = 32

_SENTENCES = {
    OUT_OF_PAGES: (
        "There were not enough free pages (now {free} of {pages} are free). Free sequences that are finished, or "
        "create the cache with more pages."
    ),
    PAST_TABLE: (
        "A sequence would grow past its row of the page table, which holds {capacity} tokens ({max_pages} pages "
        "of {page_size}). Create the cache with a larger max_length."
    ),
    NOT_ALLOCATED: (
        "A row was appended to, reserved for, forked or freed that holds no sequence: it was never allocated, or "
        "was freed before."
    ),
    ALREADY_ALLOCATED: (
        "A row was allocated, or forked into, that still holds a sequence. Free it first, or take a row for which "
        "cache.active is False."
    ),
    BAD_ROW: (
        "A row is out of the range [0, {batch}), or named twice in one call. Every row may be named once."
    ),
    BAD_COUNT: (
        "A count of tokens is negative, or exceeds the tokens that were passed. Counts must lie between 0 and the "
        "length of the chunk."
    ),
}


class PageError(ValueError):
    """An operation on a paged cache was refused; the cache is as it was before."""


def sentences(code: int, **facts: int) -> str:
    """What the bits of `code` mean, as sentences."""
    return " ".join(text.format(**facts) for bit, text in _SENTENCES.items() if code & bit)
