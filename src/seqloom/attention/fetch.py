"""Each rank fetches other ranks' keys and values at once: all of them, or just those that its queries see.

`gather` (Llama 3, arXiv 2407.21783, section 3.3.2): every rank gets every block whole. Bytes sent per
rank equal the ring's. `needed`: for every pair of ring ranks the spans of the one's block that some
query of the other sees, row by row, planned from the tiles once a batch and window, by every rank
alone. Under one causal document this sends about as much as the ring (under `zigzag` every block is
seen); under packed documents and windows only what they reach.

What travels: k and v in one all-to-all of uneven parts; again in backward, rather than kept; and the
gradients of exactly these parts back the same way, in the accumulation type. This rank's own block is
computed with while the parts come. Memory: what is fetched, all at once, for the length of one layer, and
in backward the gradients of all of it. A rule of the user's own (`Mask.allowed`) is not asked for what is seen.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from seqloom.attention.blocks import Block, Exchange, Gradient, Trip, Visit
from seqloom.attention.local import accumulation_type
from seqloom.fabric import Pending, start_trade
from seqloom.geometry import Span, Tile, keys_of, total
from seqloom.sequence import RowTiles, SequenceShard


@dataclass(frozen=True)
class Need:
    """What one rank needs of another's block in consecutive rows: index ranges of its tokens, and its tiles there.

    The tiles count keys among those of `spans` laid end to end.
    """

    rows: Span
    spans: tuple[Span, ...]
    work: tuple[RowTiles, ...] = ()

    def cut(self, block: Block) -> Block:
        """The needed part of a block; a view where it is one piece of memory."""
        rows = [x[self.rows.start : self.rows.stop] for x in block]
        if len(self.spans) == 1:
            return tuple(x[:, self.spans[0].start : self.spans[0].stop].contiguous() for x in rows)
        return tuple(torch.cat([x[:, span.start : span.stop] for span in self.spans], 1) for x in rows)

    def room(self, block: Block, dtype: torch.dtype | None = None) -> Block:
        """Buffers for such a part of a block like this one, or in another type for its gradient."""
        return tuple(x.new_empty((self.rows.size, total(self.spans), *x.shape[2:]), dtype=dtype) for x in block)

    def add(self, home: Gradient, part: Block) -> None:
        """Add the gradient of the part to that of the whole block."""
        rows = slice(self.rows.start, self.rows.stop)
        for sum_of, x in zip(home.totals, part, strict=True):
            for span, piece in zip(self.spans, x.split([span.size for span in self.spans], 1), strict=True):
                sum_of.add(rows, span, piece.transpose(1, 2))


@dataclass(frozen=True)
class Needs:
    """Who needs what: [owner] what this rank needs of the owner, [peer] what the peer needs of it."""

    fetched: tuple[tuple[Need, ...], ...]
    given: tuple[tuple[Need, ...], ...]


def everything(sequence: SequenceShard, window: int | None) -> Needs:
    """Every block whole."""
    me, rows = sequence.ring.rank, Span(0, len(sequence.masks))
    others = [rank for rank in range(sequence.ring.size) if rank != me]
    whole = [(Span(0, tokens),) for tokens in sequence.ring_tokens]
    work = sequence.work(window)
    fetched = {rank: (Need(rows, whole[rank], work[rank]),) for rank in others}
    given = {rank: (Need(rows, whole[me]),) for rank in others}
    return Needs(*(tuple(needs.get(rank, ()) for rank in range(sequence.ring.size)) for needs in (fetched, given)))


def what_tiles_touch(sequence: SequenceShard, window: int | None) -> Needs:
    """What every other ring rank gives to this one, and this one to them, read from the tiles."""
    spans, me = sequence.layout.ring_spans, sequence.ring.rank
    fetched, given = [], []
    for peer, held in enumerate(spans):
        coming, leaving = [], []
        for rows, mask in sequence.row_masks(window) if peer != me else ():
            tiles = mask.tiles(spans[me], held)
            if arriving := keys_of(tiles):
                packed = tuple(_packed(tile, arriving) for tile in tiles)
                coming.append(Need(rows, arriving, (RowTiles(rows, packed, mask.allowed),)))
            if wanted := mask.needed(held, spans[me]):
                leaving.append(Need(rows, wanted))
        fetched.append(tuple(coming))
        given.append(tuple(leaving))
    return Needs(tuple(fetched), tuple(given))


def _packed(tile: Tile, spans: tuple[Span, ...]) -> Tile:
    """The tile with its keys counted among those of `spans` laid end to end; they lie in one of them whole."""
    offset = 0
    for span in spans:
        if tile.k.start < span.stop:
            break
        offset += span.size
    moved = offset - span.start
    low, high = (None if bound is None else bound - moved for bound in (tile.low, tile.high))
    return Tile(tile.q, Span(tile.k.start + moved, tile.k.stop + moved), low, high)


def _start(trip: Trip, needs: Needs) -> Pending:
    leaving = [[x for need in given for x in need.cut(trip.own)] for given in needs.given]
    arriving = [[x for need in fetched for x in need.room(trip.own)] for fetched in needs.fetched]
    return start_trade(leaving, arriving, trip.sequence.ring)


def _in_blocks(parts: list[Tensor], needs: tuple[Need, ...]) -> list[Block]:
    """The tensors of one peer's parts, those of each need together."""
    width = len(parts) // max(1, len(needs))
    return [tuple(parts[i * width : (i + 1) * width]) for i in range(len(needs))]


def _visit(trip: Trip, owner: int, need: Need, block: Block, gradient: Gradient | None) -> Visit:
    def places() -> tuple[Tensor, Tensor]:
        queries, keys = trip.places(owner, block[0].device)()
        return queries, torch.cat([keys[span.start : span.stop] for span in need.spans])

    return Visit(owner, need.work, block, places, gradient, need.rows.start)


def _exchange(name: str, plan: Callable[[SequenceShard, int | None], Needs]) -> Exchange:
    """The exchange in which each rank fetches what `plan` says."""

    def planned(trip: Trip) -> Needs:
        return trip.sequence.once((name, trip.window), lambda: plan(trip.sequence, trip.window))

    def visits(trip: Trip) -> Iterator[Visit]:
        needs, me = planned(trip), trip.sequence.ring.rank
        pending = _start(trip, needs)
        yield trip.visit(me, trip.own)
        for owner, parts in enumerate(pending.wait()):
            for need, block in zip(needs.fetched[owner], _in_blocks(parts, needs.fetched[owner]), strict=True):
                yield _visit(trip, owner, need, block, None)

    def returns(trip: Trip) -> Iterator[Visit]:
        needs, me = planned(trip), trip.sequence.ring.rank
        pending = _start(trip, needs)
        yield trip.visit(me, trip.own, trip.home)
        leaving: list[list[Tensor]] = []
        for owner, parts in enumerate(pending.wait()):
            leaving.append([])
            for need, block in zip(needs.fetched[owner], _in_blocks(parts, needs.fetched[owner]), strict=True):
                gradient = Gradient(block)
                yield _visit(trip, owner, need, block, gradient)
                leaving[-1] += gradient.block()
        wide = accumulation_type(trip.own[0].dtype)
        coming = [[x for need in given for x in need.room(trip.own, wide)] for given in needs.given]
        for peer, parts in enumerate(start_trade(leaving, coming, trip.sequence.ring).wait()):
            for need, block in zip(needs.given[peer], _in_blocks(parts, needs.given[peer]), strict=True):
                need.add(trip.home, block)

    return Exchange(visits, returns)


GATHER = _exchange("gather", everything)
NEEDED = _exchange("needed", what_tiles_touch)
