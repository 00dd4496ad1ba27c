"""Who holds which tokens of a sequence.

A sequence is dealt to the ranks of the ring; each ring rank's part is then cut in consecutive pieces
among the ranks of its Ulysses group, so that exchanging heads for tokens inside that group restores
the ring rank's part in order. Lengths need not divide by anything: sizes differ by a token or two.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from seqloom.geometry.balance import balanced
from seqloom.geometry.mask import Mask
from seqloom.geometry.span import Span, cut, even_bounds, total


def contiguous(num_tokens: int, ring: int) -> tuple[tuple[Span, ...], ...]:
    """Rank r holds the r-th of `ring` even runs. Under a causal mask the last rank works most."""
    bounds = even_bounds(num_tokens, ring)
    return tuple((Span(bounds[r], bounds[r + 1]),) for r in range(ring))


def zigzag(num_tokens: int, ring: int) -> tuple[tuple[Span, ...], ...]:
    """Rank r holds chunks r and 2 ring - 1 - r of 2 ring chunks: even work under a causal mask."""
    bounds = even_bounds(num_tokens, 2 * ring)
    chunks = [Span(bounds[c], bounds[c + 1]) for c in range(2 * ring)]
    return tuple((chunks[r], chunks[2 * ring - 1 - r]) for r in range(ring))


def striped(num_tokens: int, ring: int) -> tuple[tuple[Span, ...], ...]:
    """Rank r holds tokens r, r + ring, r + 2 ring, ... (Striped Attention, arXiv 2311.09431)."""
    return tuple((Span(r, num_tokens, ring),) for r in range(ring))


DEALS: dict[str, Callable[[int, int], tuple[tuple[Span, ...], ...]]] = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "striped": striped,
}


@dataclass(frozen=True)
class Layout:
    """The tokens of a sequence over ring x ulysses ranks.

    kind: a key of DEALS, or `balanced`. num_tokens: the length of the global sequence. masks: those
    of the rows, whose work `balanced` evens out and the other kinds do not ask for.
    """

    kind: str
    num_tokens: int
    ring: int = 1
    ulysses: int = 1
    masks: tuple[Mask, ...] = ()

    @cached_property
    def ring_spans(self) -> tuple[tuple[Span, ...], ...]:
        """For each ring rank, the positions its Ulysses group holds together, in order.

        >>> Layout("zigzag", 16, ring=2).ring_spans[0]
        (Span(start=0, stop=4, step=1), Span(start=12, stop=16, step=1))
        """
        if self.kind == "balanced":
            return balanced(self.num_tokens, self.ring, self.masks)
        return DEALS[self.kind](self.num_tokens, self.ring)

    def shard(self, ring_rank: int, ulysses_rank: int) -> tuple[Span, ...]:
        """The positions one rank holds between attention layers.

        >>> Layout("zigzag", 16, ring=2, ulysses=2).shard(0, 1)
        (Span(start=12, stop=16, step=1),)
        """
        spans = self.ring_spans[ring_rank]
        bounds = even_bounds(total(spans), self.ulysses)
        return cut(spans, bounds[ulysses_rank], bounds[ulysses_rank + 1])

    def work(self, mask: Mask) -> tuple[int, ...]:
        """Visible (query, key) pairs that each ring rank computes; its Ulysses group shares them by heads."""
        return tuple(mask.seen(queries, self.num_tokens) for queries in self.ring_spans)

    def imbalance(self, *masks: Mask) -> float:
        """Most work of any ring rank over the mean, that of all masks together: 1.0 is perfect balance.

        >>> Layout("zigzag", 64, ring=8).imbalance(Mask())
        1.0
        >>> round(Layout("contiguous", 8192, ring=8).imbalance(Mask()), 3)    # (2 P - 1) / P
        1.875
        """
        counts = Counter(masks)  # rows and layers often share a mask
        work = [0] * self.ring
        for mask, times in counts.items():
            work = [pairs + times * more for pairs, more in zip(work, self.work(mask), strict=True)]
        return max(work) * len(work) / max(1, sum(work))
