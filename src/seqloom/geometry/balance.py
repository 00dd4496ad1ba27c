"""Deal a sequence so that every ring rank has the same attention work, whatever the mask."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from itertools import pairwise

from seqloom.geometry.mask import Mask
from seqloom.geometry.span import Span, even_bounds

BLOCKS = (1, 2, 4, 8, 16, 32, 64)
"""How many blocks a rank may get. Fewer are better: each pair of blocks is a kernel call."""

SMALLEST = 4
"""Tokens of a block below which cutting on costs more than evenness gains."""

EVEN = 1.02
"""Most work over the mean that needs no further cutting."""

GAIN = 0.005
"""What twice the blocks must take off most over mean to be worth it."""


def balanced(num_tokens: int, ring: int, masks: Sequence[Mask]) -> tuple[tuple[Span, ...], ...]:
    """For each ring rank, the positions it holds, in order: equally many blocks and as good as equal work.

    The sequence is cut into ring x b equal blocks, b of them to each rank, for the fewest b that
    evens out the visible (query, key) pairs, summed over `masks` (one a row; one causal document
    where there are none). Token counts differ by at most one block. Every rank that asks gets the
    same answer. It is one contiguous run each where that is even already, as under full attention.

    Blocks are dealt in order, or else by Graham's longest-first rule (SIAM J. Appl. Math. 17, 1969)
    with a limit on the count; then busy ranks exchange blocks with idle ones until none helps.

    >>> balanced(16, 2, [Mask(documents=(8, 8))])
    ((Span(start=0, stop=8, step=1),), (Span(start=8, stop=16, step=1),))
    >>> balanced(16, 2, [Mask()])
    ((Span(start=0, stop=4, step=1), Span(start=12, stop=16, step=1)), (Span(start=4, stop=12, step=1),))
    """
    counts = Counter(masks or [Mask()])  # rows and layers often share a mask
    kept: list[list[int]] = []
    kept_bounds: tuple[int, ...] = ()
    least = float("inf")
    for blocks in BLOCKS:
        if blocks > 1 and num_tokens < ring * blocks * max(SMALLEST, blocks):  # blocks differ by a token each
            break
        bounds = even_bounds(num_tokens, ring * blocks)
        work = [_work(Span(start, stop), num_tokens, counts) for start, stop in pairwise(bounds)]
        for deal in (_in_order, _longest_first):
            hands = deal(work, ring)
            uneven = _even_out(work, hands) * ring / max(1, sum(work))
            if not kept or uneven < least - GAIN:
                kept, kept_bounds, least = hands, bounds, uneven
            if least <= EVEN:
                return tuple(_spans(sorted(hand), kept_bounds) for hand in sorted(kept, key=min))
    return tuple(_spans(sorted(hand), kept_bounds) for hand in sorted(kept, key=min))


def _work(block: Span, num_tokens: int, masks: Mapping[Mask, int]) -> int:
    return sum(count * mask.seen([block], num_tokens) for mask, count in masks.items())


def _in_order(work: Sequence[int], ring: int) -> list[list[int]]:
    """Neighbouring blocks in one hand: as few spans as can be, and near keys."""
    room = len(work) // ring
    return [list(range(rank * room, (rank + 1) * room)) for rank in range(ring)]


def _longest_first(work: Sequence[int], ring: int) -> list[list[int]]:
    """Each block, the one with the most work first, to the hand that has the least so far and room for it."""
    room = len(work) // ring
    hands: list[list[int]] = [[] for _ in range(ring)]
    least = [(0, rank) for rank in range(ring)]
    for block in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        load, rank = heappop(least)
        hands[rank].append(block)
        if len(hands[rank]) < room:
            heappush(least, (load + work[block], rank))
    return hands


def _even_out(work: Sequence[int], hands: list[list[int]]) -> int:
    """Exchange blocks of busy hands for lighter ones of idle hands while that helps; the most work of any hand."""
    loads = [sum(work[block] for block in hand) for hand in hands]
    limit = EVEN * sum(loads) / len(loads)
    while max(loads) > limit:
        ranks = sorted(range(len(loads)), key=lambda rank: (loads[rank], rank))
        busy = [rank for rank in reversed(ranks) if loads[rank] > limit]
        # The busiest with the most idle, the next with the next; when all of those fail, the busiest with any.
        pairs = [(heavy, light) for heavy, light in zip(busy, ranks, strict=False) if loads[heavy] > loads[light]]
        moved = [_exchange(work, hands, loads, *pair) for pair in pairs]
        if not any(moved) and not any(_exchange(work, hands, loads, busy[0], light) for light in ranks[:-1]):
            break
    return max(loads)


def _exchange(work: Sequence[int], hands: list[list[int]], loads: list[int], heavy: int, light: int) -> bool:
    """Exchange the two blocks whose difference comes closest to half the gap, if any lowers the higher load."""
    gap = loads[heavy] - loads[light]
    ordered = sorted((work[block], block) for block in hands[light])
    best: tuple[int, int, int] | None = None
    for mine in sorted(hands[heavy]):
        at = bisect_left(ordered, (work[mine] - gap // 2, 0))
        for other, theirs in ordered[max(0, at - 1) : at + 1]:
            moved = work[mine] - other
            candidate = (abs(gap - 2 * moved), mine, theirs)
            if 0 < moved < gap and (best is None or candidate < best):
                best = candidate
    if best is None:
        return False
    _, mine, theirs = best
    hands[heavy][hands[heavy].index(mine)] = theirs
    hands[light][hands[light].index(theirs)] = mine
    loads[heavy] -= work[mine] - work[theirs]
    loads[light] += work[mine] - work[theirs]
    return True


def _spans(blocks: Sequence[int], bounds: Sequence[int]) -> tuple[Span, ...]:
    """The blocks as spans, neighbours in one."""
    spans: list[Span] = []
    for block in blocks:
        start, stop = bounds[block], bounds[block + 1]
        if spans and spans[-1].stop == start:
            spans[-1] = Span(spans[-1].start, stop)
        else:
            spans.append(Span(start, stop))
    return tuple(spans)
