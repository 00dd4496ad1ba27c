"""Who may see whom, said in integers about global token positions; no S x S array exists."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from seqloom.geometry.span import Span
from seqloom.geometry.tile import Tile, causal_tiles, coalesce


@dataclass(frozen=True)
class Mask:
    """The attention mask of one row of a batch.

    causal: a query sees no later position.
    documents: the lengths of the documents packed into the row, in order; a token never sees
        another document. None is one document as long as the row.
    """

    causal: bool = True
    documents: tuple[int, ...] | None = None

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Where each document ends, cumulated: lengths (3, 2) give (3, 5)."""
        return tuple(accumulate(self.documents or ()))

    def visible(self, q: int, k: int) -> bool:
        """Whether the query at position q may see the key at position k: the definition."""
        same = bisect_right(self.bounds, q) == bisect_right(self.bounds, k)
        return same and (k <= q or not self.causal)

    def tiles(self, q: Sequence[Span], k: Sequence[Span]) -> tuple[Tile, ...]:
        """Cut the pairs visible between a query block and a key block into tiles.

        q, k: the positions the blocks hold, in the order in which they hold them. Spans of more
        than one step must share it. The tiles are disjoint and cover exactly the visible pairs.

        >>> Mask().tiles([Span(4, 8)], [Span(0, 4)])
        (Tile(q=Span(start=0, stop=4, step=1), k=Span(start=0, stop=4, step=1), low=None, high=None),)
        """
        found: list[Tile] = []
        q_offset = 0
        for q_span in q:
            k_offset = 0
            for k_span in k:
                found += self._pair(q_span, q_offset, k_span, k_offset)
                k_offset += k_span.size
            q_offset += q_span.size
        return coalesce(found)

    def area(self, q: Sequence[Span], k: Sequence[Span]) -> int:
        """The number of visible (query, key) pairs between two blocks."""
        return sum(tile.area for tile in self.tiles(q, k))

    def seen(self, q: Sequence[Span], num_tokens: int) -> int:
        """How many (query, key) pairs the queries see among all keys of a row, without cutting tiles.

        >>> Mask().seen([Span(0, 4)], 8)    # 1 + 2 + 3 + 4
        10
        """
        pairs = 0
        for span in q:
            for start, stop in self._documents_over(span, Span(0, num_tokens)):
                first, last = span.indices_within(start, stop)
                count, before = last - first, span.start + first * span.step - start
                steps = span.step * count * (count - 1) // 2
                pairs += count * (before + 1) + steps if self.causal else count * (min(stop, num_tokens) - start)
        return pairs

    def _pair(self, q: Span, q_offset: int, k: Span, k_offset: int) -> Iterator[Tile]:
        if self.causal and k.start >= q.stop:
            return
        for low, high in self._documents_over(q, k):
            (i0, i1), (j0, j1) = q.indices_within(low, high), k.indices_within(low, high)
            if i0 == i1 or j0 == j1:
                continue
            q_part, k_part = (Span(q_offset + i0, q_offset + i1), Span(k_offset + j0, k_offset + j1))
            if not self.causal:
                yield Tile(q_part, k_part)
                continue
            if q.step != k.step:
                raise ValueError(f"spans of steps {q.step} and {k.step} have no common diagonal")
            # Position of query i is q0 + i * step, of key j k0 + j * step, so k <= q <=> i - j >= shift.
            q0, k0 = q.start + i0 * q.step, k.start + j0 * k.step
            yield from causal_tiles(q_part, k_part, shift=-((q0 - k0) // q.step))

    def _documents_over(self, q: Span, k: Span) -> Iterator[tuple[int, int]]:
        """The [start, stop) of each document that both spans reach into."""
        if self.documents is None:
            yield 0, max(q.stop, k.stop)
            return
        first = bisect_right(self.bounds, max(q.start, k.start))
        start = self.bounds[first - 1] if first else 0
        for stop in self.bounds[first:]:
            if start >= min(q.stop, k.stop):
                return
            yield start, stop
            start = stop
