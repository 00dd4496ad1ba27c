"""A run of global token positions, and how runs are cut."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple


class Span(NamedTuple):
    """Positions start, start + step, ... below stop.

    With step 1 this is the half-open interval [start, stop); a step above 1 describes the tokens of
    one rank in a striped layout in one value instead of one span per token.
    """

    start: int
    stop: int
    step: int = 1

    @property
    def size(self) -> int:
        """How many positions the span holds.

        >>> Span(1, 10, 4).size    # 1, 5, 9
        3
        """
        return max(0, -(-(self.stop - self.start) // self.step))

    def cut(self, first: int, last: int) -> "Span":
        """The span's positions number `first` up to, not including, number `last`.

        >>> Span(1, 100, 4).cut(1, 3)    # 5, 9
        Span(start=5, stop=13, step=4)
        """
        return Span(
            self.start + first * self.step,
            min(self.stop, self.start + last * self.step),
            self.step,
        )

    def indices_within(self, low: int, high: int) -> tuple[int, int]:
        """The half-open range of this span's indices whose positions lie in [low, high).

        >>> Span(1, 100, 4).indices_within(5, 12)    # positions 5 and 9
        (1, 3)
        """
        first = max(0, -(-(low - self.start) // self.step))
        last = min(self.size, -(-(high - self.start) // self.step))
        return first, max(first, last)


def total(spans: Iterable[Span]) -> int:
    """How many positions the spans hold together."""
    return sum(span.size for span in spans)


def even_bounds(size: int, parts: int) -> tuple[int, ...]:
    """Boundaries that cut `size` into `parts` pieces whose sizes differ by at most one.

    >>> even_bounds(10, 4)
    (0, 2, 5, 7, 10)
    """
    return tuple(part * size // parts for part in range(parts + 1))


def even_sizes(size: int, parts: int) -> tuple[int, ...]:
    """The sizes of the pieces that `even_bounds` cuts.

    >>> even_sizes(10, 4)
    (2, 3, 2, 3)
    """
    return tuple(stop - start for start, stop in pairwise(even_bounds(size, parts)))


def cut(spans: Sequence[Span], first: int, last: int) -> tuple[Span, ...]:
    """Tokens number `first` up to `last` of the spans laid end to end.

    >>> cut((Span(0, 4), Span(12, 16)), 3, 6)
    (Span(start=3, stop=4, step=1), Span(start=12, stop=14, step=1))
    """
    found, offset = [], 0
    for span in spans:
        low, high = max(first - offset, 0), min(last - offset, span.size)
        if low < high:
            found.append(span.cut(low, high))
        offset += span.size
    return tuple(found)
