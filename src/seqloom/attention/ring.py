"""Ring attention: keys and values travel around the ring of ranks while queries stay.

What travels: k and v as one block, P-1 hops forward and again backward; in backward the gradient of
each block follows it, P-1 hops in the accumulation type, started by the block's first stop and ended
by its owner. The next block is in flight while the present one is computed with (double buffer).

With an inner ring of I ranks the ring is I x O: blocks go around among I neighbours while each rank's
first block is on its way to the rank of equal place among the next neighbours. Of the P-1 hops O-1
cross to other neighbours, and each of them has I computations to hide behind.

Bytes sent per rank: `seqloom.planner.attention_bytes`, each block with its own number of tokens.
FLOPs: this rank's tiles, even under `zigzag`. Memory: three blocks of k and v (five with an inner
ring), and in backward four of their gradients (seven).

Sources: Ring Attention (arXiv 2310.01889), section 3; double ring: LoongTrain (arXiv 2406.18485),
section 4.3. Differs from the papers: kv gradients skip their owner's hop (P-1, not P).
"""

from collections.abc import Callable, Iterator

from seqloom.attention.blocks import Block, Exchange, Gradient, Trip, Visit
from seqloom.fabric import Axis, Pending, start_shift

BLOCKS, GRADIENTS = 0, 2  # tags: a block and a gradient are on their way at once, of two tensors each


def circulate(trip: Trip, own: Block, ring: Axis, owner: Callable[[int], int]) -> Iterator[tuple[int, Block]]:
    """Yield (rank, block) for every rank's block on this axis, one's own first, with the next one in flight.

    owner(rank): the ring rank whose block a rank of this axis began with. A yielded block may be
    overwritten after the iterator goes on.
    """
    block, used = own, None
    for step in range(ring.size):
        pending = None
        if step + 1 < ring.size:
            room = trip.room(owner((ring.rank - step - 1) % ring.size), own[0].dtype, used)
            pending = start_shift(block, ring, room, tag=BLOCKS)
        yield (ring.rank - step) % ring.size, block
        if pending:
            used = None if block is own else block
            block = tuple(pending.wait())


def _outer(trip: Trip) -> Iterator[tuple[int, Block]]:
    """(outer rank, block) for each block that the neighbours of this rank begin with."""
    outer, inner = trip.sequence.outer, trip.sequence.inner
    return circulate(trip, trip.own, outer, lambda o: o * inner.size + inner.rank)


def _inner(trip: Trip, o: int, first: Block) -> Iterator[tuple[int, Block]]:
    """(ring rank, block) for the blocks that neighbours pass around once they have begun."""
    inner = trip.sequence.inner
    for i, block in circulate(trip, first, inner, lambda i: o * inner.size + i):
        yield o * inner.size + i, block


def visits(trip: Trip) -> Iterator[Visit]:
    """Every rank's block, as it comes by."""
    for o, first in _outer(trip):
        for owner, block in _inner(trip, o, first):
            yield trip.visit(owner, block)


def returns(trip: Trip) -> Iterator[Visit]:
    """Every rank's block once more, its gradient following it home."""
    outer, inner = trip.sequence.outer, trip.sequence.inner
    crossing: Pending | None = None
    for o, first in _outer(trip):
        # What these neighbours find for the block they began with ends here, then crosses to its owner.
        begun = o * inner.size + inner.rank
        total = trip.home if o == outer.rank else Gradient(first)
        following: Pending | None = None
        for owner, block in _inner(trip, o, first):
            gradient = total if owner == begun else Gradient(block)
            yield trip.visit(owner, block, gradient)
            if owner != begun:
                next_owner = o * inner.size + (owner - 1) % inner.size
                following = _follow(trip, gradient, following, inner, next_owner)
        if following:
            total.add(following.wait())
        if o != outer.rank:
            crossing = _follow(trip, total, crossing, outer, (begun - inner.size) % trip.sequence.ring.size)
    if crossing:
        trip.home.add(crossing.wait())


def _follow(trip: Trip, gradient: Gradient, before: Pending | None, axis: Axis, next_owner: int) -> Pending:
    """Add what the rank before has found for this block, send the sum after the block, and expect the next."""
    arrived: Block | None = None
    if before:
        arrived = tuple(before.wait())
        gradient.add(arrived)
    leaving = gradient.block()
    return start_shift(leaving, axis, trip.room(next_owner, leaving[0].dtype, arrived), tag=GRADIENTS)


RING = Exchange(visits, returns)
