"""Who may see whom, said in integers about global token positions; no S x S array exists."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from seqloom.errors import DataError
from seqloom.geometry.span import Span
from seqloom.geometry.tile import Tile, band, coalesce, keys_of


@dataclass(frozen=True)
class Mask:
    """The attention mask of one row of a batch.

    causal: a query sees no later position; False is full (bidirectional) attention.
    window: a query sees positions less than `window` away only, itself included: with `causal` the
        last `window`, as transformers' `sliding_window`. None sees any distance.
    prefix: so many first positions of each document are visible to all of the document, whatever
        `causal` and `window` say (PrefixLM, arXiv 1910.10683; attention's lasting first tokens).
    documents: the lengths of the documents packed into the row, in order; a token never sees
        another document. None is one document as long as the row.
    padding: the numbers of those documents that are padding: they see nothing, and nothing sees them.
    allowed: any further rule, `allowed(q, k)` true where the query at position q may see the key at
        position k. It is called with ints and with integer tensors that broadcast, so it is written
        with elementwise operators (`(q - k) % 4 == 0`, `&`, `|`), and can only forbid what the rest permits.
    """

    causal: bool = True
    window: int | None = None
    prefix: int = 0
    documents: tuple[int, ...] | None = None
    padding: tuple[int, ...] = ()
    allowed: Callable[[Any, Any], Any] | None = None

    def __post_init__(self) -> None:
        if type(self.causal) is not bool:
            raise DataError(f"causal={self.causal!r} is neither true nor false; False is full attention.")
        if (self.window is not None and type(self.window) is not int) or type(self.prefix) is not int:
            raise DataError(
                f"window={self.window!r} and prefix={self.prefix!r} count tokens; give whole numbers, or no window."
            )
        if self.allowed is not None and not callable(self.allowed):
            raise DataError(f"allowed={self.allowed!r} cannot be called; give a function of two positions.")
        if self.window is not None and self.window < 1:
            raise DataError(f"A window of {self.window} tokens lets no token see itself; the smallest is 1.")
        if self.prefix < 0:
            raise DataError(f"A prefix of {self.prefix} tokens is not possible; 0 is none.")
        if any(not 0 <= number < len(self.documents or ()) for number in self.padding):
            raise DataError(
                f"Padding names documents {self.padding}, but there are {len(self.documents or ())}, counted from 0."
            )

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Where each document ends, cumulated: lengths (3, 2) give (3, 5)."""
        return tuple(accumulate(self.documents or ()))

    def within(self, window: int | None) -> "Mask":
        """This mask under a layer's own window: the tighter of the two holds."""
        if window is None or (self.window is not None and self.window <= window):
            return self
        return replace(self, window=window)

    def visible(self, q: int, k: int) -> bool:
        """Whether the query at position q may see the key at position k: the definition."""
        document = bisect_right(self.bounds, q)
        if document != bisect_right(self.bounds, k) or document in self.padding:
            return False
        if self.documents is not None and document == len(self.documents):
            return False  # beyond the row
        if self.allowed is not None and not self.allowed(q, k):
            return False
        start = self.bounds[document - 1] if document else 0
        near = self.window is None or abs(q - k) < self.window
        return k - start < self.prefix or (near and (k <= q or not self.causal))

    def tiles(self, q: Sequence[Span], k: Sequence[Span]) -> tuple[Tile, ...]:
        """Cut the pairs visible between a query block and a key block into tiles.

        q, k: the positions the blocks hold, in the order in which they hold them. Spans of more
        than one step must share it. The tiles are disjoint and cover exactly the visible pairs, but
        for what `allowed` forbids, and every row and column of a tile sees something.

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
        """The number of visible (query, key) pairs between two blocks, `allowed` not asked."""
        return sum(tile.area for tile in self.tiles(q, k))

    def needed(self, q: Sequence[Span], k: Sequence[Span]) -> tuple[Span, ...]:
        """The index ranges of the key block that some query of the query block sees, in order, `allowed` not asked.

        >>> Mask(documents=(4, 4)).needed([Span(2, 6)], [Span(0, 2), Span(6, 8)])
        (Span(start=0, stop=2, step=1),)
        """
        return keys_of(self.tiles(q, k))

    def seen(self, q: Sequence[Span], num_tokens: int) -> int:
        """How many (query, key) pairs the queries see among all keys of a row, in closed form, `allowed` not asked.

        >>> Mask().seen([Span(0, 4)], 8)    # 1 + 2 + 3 + 4
        10
        """
        pairs = 0
        for span in q:
            for start, stop in self._documents_over(span, Span(0, num_tokens)):
                first, last = span.indices_within(start, stop)
                if first == last:
                    continue
                # The query at x of its document sees all before `head` and, from `tail` on, no longer the first ones.
                size, count, x = min(stop, num_tokens) - start, last - first, span.start + first * span.step - start
                reach = 1 if self.causal else self.window or size
                pairs += _sum_clipped(x + reach, span.step, count, min(self.prefix, size), size)
                if self.window is not None:
                    left_behind = x - (self.window - 1 + self.prefix)
                    pairs -= _sum_clipped(left_behind, span.step, count, 0, size)
        return pairs

    def _pair(self, q: Span, q_offset: int, k: Span, k_offset: int) -> Iterator[Tile]:
        if self.causal and not self.prefix and k.start >= q.stop:
            return
        for start, stop in self._documents_over(q, k):
            i0, i1 = q.indices_within(start, stop)
            if i0 == i1:
                continue
            q_part = Span(q_offset + i0, q_offset + i1)
            split = min(stop, start + self.prefix)
            for banded, low, high in ((False, start, split), (True, split, stop)):
                j0, j1 = k.indices_within(low, high)
                if j0 == j1:
                    continue
                k_part = Span(k_offset + j0, k_offset + j1)
                apart = (q.start + i0 * q.step) - (k.start + j0 * k.step)
                bounds = self._diagonals(apart, q.step, k.step) if banded else (None, None)
                shift = q_part.start - k_part.start  # the bounds count from the corner of the parts
                tile = band(q_part, k_part, *(None if bound is None else bound + shift for bound in bounds))
                if tile is not None:
                    yield tile

    def _diagonals(self, apart: int, q_step: int, k_step: int) -> tuple[int | None, int | None]:
        """The bounds on i - j for query i and key j of two spans whose first positions differ by `apart`."""
        back = None if self.window is None else self.window - 1
        ahead = 0 if self.causal else back
        if ahead is None and back is None:
            return None, None
        if q_step != k_step:
            raise ValueError(f"spans of steps {q_step} and {k_step} have no common diagonal")
        # q - k = apart + step (i - j) must lie in [-ahead, back].
        low = None if ahead is None else -((apart + ahead) // q_step)
        return low, None if back is None else (back - apart) // q_step

    def _documents_over(self, q: Span, k: Span) -> Iterator[tuple[int, int]]:
        """The [start, stop) of each document, padding aside, that both spans reach into."""
        if self.documents is None:
            yield 0, max(q.stop, k.stop)
            return
        first = bisect_right(self.bounds, max(q.start, k.start))
        start = self.bounds[first - 1] if first else 0
        for number, stop in enumerate(self.bounds[first:], first):
            if start >= min(q.stop, k.stop):
                return
            if number not in self.padding:
                yield start, stop
            start = stop


def _sum_clipped(first: int, step: int, count: int, low: int, high: int) -> int:
    """The sum of min(max(x, low), high) over x = first, first + step, ..., `count` of them."""
    under = min(count, max(0, -(-(low - first) // step)))  # x < low
    within = min(count, max(under, (high - first) // step + 1))  # x <= high
    between = within - under
    return low * under + between * (2 * first + step * (under + within - 1)) // 2 + high * (count - within)
