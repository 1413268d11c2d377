"""Masks as words: a bit for each key that a thread holds in a row of a tile.

Of a tile of 64 queries a thread holds two rows, of at most 32 keys each. A comparison of indices holds for a run
of these keys, which is known without comparing each of them: as a word of bits it takes some seven instructions
where a comparison an element takes 32, and conjunctions of words one. The hardware spreads a word over predicates,
seven at a time, where they are used. What reads captured arrays at every key stays a comparison an element.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from flexjax.backends.mosaic_gpu import lanes
from flexjax.backends.mosaic_gpu.index_forms import Form, Forms
from flexjax.backends.mosaic_gpu.lanes import BOOL, I32, U32, Lane, select
from flexjax.backends.mosaic_gpu.placement import Offsets
from flexjax.mods.graph import COLUMN, ROW, SCALAR, TILE, Node
from flexjax.mods.ops import COMPARISONS

if TYPE_CHECKING:
    from flexjax.backends.mosaic_gpu.program import Run

BITS = 32
# Up to so many different values a row, a comparison of each is cheaper than one an element.
_FEW = 8
# Neighbouring keys may stand in so many blocks of coordinates.
_PIECES = 4
# Where elements are compared anyway, so many comparisons as words outweigh the second selection.
_WORTH = 3
# Of an ordering, the one that says the same with its operands exchanged.
_EXCHANGED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}

Words = list[Lane]  # uint32, one for each row that a thread holds


class RowWords:
    """Words of boolean values of one run of a program."""

    def __init__(self, run: Run):
        self.run = run
        self.rows = [o[0] for o in run.offsets[ROW]]
        self.columns = [o[0] for o in run.offsets[COLUMN]]
        self._made: dict[int, Words | None] = {}

    def terms(self, position: int) -> tuple[Words | None, list[int]]:
        """A conjunction as the words of those of its terms that have any, and the nodes of the others."""
        terms = self._conjuncts(position)
        found = {term: words for term in terms if (words := self.of(term)) is not None}
        others = [term for term in terms if term not in found]
        if others and sum(self.run.graph.nodes[term].rank == TILE for term in found) < _WORTH:
            return None, terms
        total = None
        for words in found.values():
            total = words if total is None else _each(Lane.__and__, total, words)
        return total, others

    def _conjuncts(self, position: int) -> list[int]:
        node = self.run.graph.nodes[position]
        if node.op != "and" or node.dtype != BOOL:
            return [position]
        parts = itertools.chain.from_iterable(map(self._conjuncts, node.args))
        return list(dict.fromkeys(parts))

    def of(self, position: int) -> Words | None:
        """The words of a boolean node, where they are cheaper than its elements."""
        if position not in self._made:
            self._made[position] = self._words(position, self.run.graph.nodes[position])
        return self._made[position]

    def _words(self, position: int, node: Node) -> Words | None:
        if len(self.columns) > BITS:
            return None
        if node.rank == SCALAR:
            return [_filled(self.run.output(position, ()))] * len(self.rows)
        if node.rank == ROW:
            return [_filled(self.run.output(position, (r,))) for r in self.rows]
        logical = node.op in ("and", "or", "xor", "not") and node.dtype == BOOL
        if logical:
            args = _all(self.of(a) for a in node.args)
            if args is not None:
                return _each(_LOGIC[node.op], *args)
        elif node.op in COMPARISONS and self.run.graph.nodes[node.args[0]].dtype == I32:
            each = _all(self._compared(node, r) for r in self.rows)
            if each is not None:
                return each
        return self._few(position, node)

    def _few(self, position: int, node: Node) -> Words | None:
        """Words of values that are the same for many keys, each of which is compared by itself."""
        if node.rank == COLUMN and not self._reads_keys(position):
            found: dict[int, tuple[Lane, int]] = {}
            for i, column in enumerate(self.columns):
                value = self.run.output(position, (column,))
                found[id(value)] = value, found.get(id(value), (value, 0))[1] | 1 << i
            if len(found) <= _FEW:
                parts = [select(v, _bits(bits), _bits(0)) for v, bits in found.values()]
                word = parts[0]
                for part in parts[1:]:
                    word = word | part
                return [word] * len(self.rows)
        return None

    def _reads_keys(self, position: int) -> bool:
        nodes = self.run.graph.nodes
        cone = self.run.cone({position})
        return any(nodes[i].op == "load" and "kv" in nodes[i].depends for i in cone)

    # -- comparisons ----------------------------------------------------------------------------

    def _compared(self, node: Node, row: int) -> Lane | None:
        """The word of a comparison of integers in one row."""
        if node.op in ("eq", "ne") or any(self._reads_keys(a) for a in node.args):
            return None
        forms = self.run.forms
        sides = [[self._form(a, row, column) for column in self.columns] for a in node.args]
        sides = [self._bounded(x, other) for x, other in zip(sides, reversed(sides), strict=True)]
        differences = [forms.add(x, y, -1) for x, y in zip(*sides, strict=True)]
        bounds = [forms.bound(d) for d in differences]
        if any(b is None or b >= 2**30 for b in bounds):
            return None
        pieces = [list(piece) for _, piece in itertools.groupby(differences, lambda d: d.terms)]
        if len(pieces) > _PIECES:
            return None
        word, start = None, 0
        for piece in pieces:
            part = self._ordered(node.op, piece)
            if part is None:
                return None
            if len(pieces) > 1:
                part = lanes.shift_left(part & _bits((1 << len(piece)) - 1), start)
            word = part if word is None else word | part
            start += len(piece)
        return word

    def _ordered(self, op: str, differences: Sequence[Form]) -> Lane | None:
        """The word of `difference op 0` for differences of the same terms, as far as there are any."""
        forms = self.run.forms
        # Offsets are compared with -terms, or negated ones with terms if those ascend.
        terms, offsets = forms.of_terms(differences[0].terms), [d.offset for d in differences]
        limit = forms.scale(terms, -1)
        if offsets[0] > offsets[-1]:
            limit, offsets, op = terms, [-o for o in offsets], _EXCHANGED[op]
        if op in ("lt", "ge"):
            limit = forms.add(limit, forms.constant(-1))
        word = self._up_to(offsets, limit)
        return word if word is None or op in ("lt", "le") else ~word

    def _form(self, position: int, row: int, column: int) -> Form:
        rank = self.run.graph.nodes[position].rank
        offsets: Offsets = {SCALAR: (), ROW: (row,), COLUMN: (column,)}.get(rank, (row, column))
        item = self.run.values[position][offsets]
        return item if isinstance(item, Form) else self.run.forms.base(item)

    def _bounded(self, side: Sequence[Form], other: Sequence[Form]) -> list[Form]:
        """One side of a comparison, clamped to just beyond what the other side can be."""
        forms: Forms = self.run.forms
        first = side[0]
        bounds = [forms.bound(x) for x in other]
        if forms.bound(first) is not None or any(x is not first for x in side):
            return list(side)
        if any(b is None or b >= 2**28 for b in bounds):
            return list(side)
        most = max(b for b in bounds if b is not None) + 1
        return [self.run.clamped(first, most)] * len(side)

    def _up_to(self, offsets: Sequence[int], limit: Form) -> Lane | None:
        """The word of offset <= limit."""
        regular = _Regular.of(offsets)
        if regular is not None:
            limit = self.run.forms.add(limit, self.run.forms.constant(-regular.first))
            return _low_bits(regular.count(self.run.forms.lane(limit)))
        values = sorted(set(offsets))
        if len(values) > _FEW:
            return None
        most, word = self.run.forms.lane(limit), _bits(0)
        for value in values:
            bits = sum(1 << i for i, o in enumerate(offsets) if o <= value)
            word = select(most >= value, _bits(bits), word)
        return word


@dataclasses.dataclass(frozen=True)
class _Regular:
    """Ascending offsets first + step * (i // run) + inner * (i % run), of a step that is a power of two.

    Such are the keys of a thread: pairs of neighbours, eight apart.
    """

    first: int
    step: int
    run: int
    inner: int

    @classmethod
    def of(cls, offsets: Sequence[int]) -> _Regular | None:
        first, n = offsets[0], len(offsets)
        for run in (2, 1, 4, 8, 16):
            if n <= run:
                continue
            step, inner = offsets[run] - first, offsets[run - 1] - first
            if (run > 2 and inner) or step < max(run * inner, 1) or not _powers_of_two(step, inner):
                continue
            made = [first + step * (i // run) + inner * (i % run) for i in range(n)]
            if made == list(offsets):
                return cls(first, step, run, inner)
        return None

    def count(self, limit: Lane) -> Lane:
        """How many offsets are at most first + limit; more than there are, or negative, beyond the ends."""
        whole = lanes.shift_right(limit, self.step.bit_length() - 1)
        if not self.inner:
            return (whole + 1) * self.run
        rest = lanes.shift_right(limit & (self.step - 1), self.inner.bit_length() - 1)
        return whole * self.run + lanes.minimum(rest + 1, self.run)


def _powers_of_two(*numbers: int) -> bool:
    """Whether they are powers of two, or 0."""
    return all(n >= 0 and n & (n - 1) == 0 for n in numbers)


def _low_bits(count: Lane) -> Lane:
    """A word with so many of its low bits set, as far as it goes."""
    one = lanes.const(1, U32)
    return lanes.call("shl", one, lanes.cast(lanes.maximum(count, 0), U32), dtype=U32) - 1


def _bits(value: int) -> Lane:
    return lanes.const(value, U32)


def _filled(condition: Lane) -> Lane:
    return select(condition, _bits(2**BITS - 1), _bits(0))


_LOGIC: dict[str, Callable[..., Lane]] = {
    "and": Lane.__and__,
    "or": Lane.__or__,
    "xor": Lane.__xor__,
    "not": Lane.__invert__,
}


def _all[T](items: Iterable[T | None]) -> list[T] | None:
    """The items, if none is missing."""
    found = []
    for item in items:
        if item is None:
            return None
        found.append(item)
    return found


def _each(operation: Callable[..., Lane], *words: Words) -> Words:
    return [operation(*w) for w in zip(*words, strict=True)]
