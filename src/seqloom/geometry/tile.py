"""A rectangle of the attention matrix with a diagonal bound on either side: its area, and its cut for kernels."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from seqloom.geometry.span import Span


class Tile(NamedTuple):
    """Queries `q` see keys `k` where low <= i - j <= high.

    `q` and `k` are index ranges into the query block and the key block the tile was cut for, and i
    and j are indices in those blocks; None means no bound. A kernel slices its tensors by `q` and
    `k` and needs no positions.
    """

    q: Span
    k: Span
    low: int | None = None
    high: int | None = None

    @property
    def full(self) -> bool:
        """Every query of the tile sees every key of it."""
        return self.low is None and self.high is None

    @property
    def causal(self) -> bool:
        """A square whose visible part is its lower triangle with the diagonal."""
        return self.high is None and self.q.size == self.k.size and self.low == self.q.start - self.k.start

    @property
    def anticausal(self) -> bool:
        """A square whose visible part is its upper triangle with the diagonal."""
        return self.low is None and self.q.size == self.k.size and self.high == self.q.start - self.k.start

    @property
    def area(self) -> int:
        """The number of visible (query, key) pairs, in closed form.

        >>> Tile(Span(0, 4), Span(0, 4), low=0).area    # 1 + 2 + 3 + 4
        10
        """
        pairs = self.q.size * self.k.size
        below = 0 if self.low is None else _pairs_below(self.q, self.k, self.low)
        upto = pairs if self.high is None else _pairs_below(self.q, self.k, self.high + 1)
        return max(0, upto - below)

    def pieces(self) -> Iterator["Tile"]:
        """Cut the tile into what kernels know: full rectangles, causal and anticausal squares.

        Together they cover exactly the visible pairs, once. A band of w diagonals over n rows comes
        in about 3 n / w pieces, any other tile in at most four.

        >>> [(p.q.size, p.k.size, p.causal) for p in Tile(Span(0, 2), Span(0, 6), low=-4).pieces()]
        [(2, 4, False), (2, 2, True)]
        """
        if self.full or self.causal or self.anticausal:
            yield self
            return
        shift = self.k.start - self.q.start  # from here on i and j count from the tile's own corner
        low, high = (None if bound is None else bound + shift for bound in (self.low, self.high))
        rows, columns = self.q.size, self.k.size
        first = 0 if low is None else max(0, low)
        last = rows if high is None else min(rows, columns + high)
        grown = first if low is None else columns + low  # up to this row, the last visible key moves right
        moving = last if high is None else high  # from this row on, the first visible key moves right
        cuts = sorted({first, *(row for row in (grown, moving) if first < row < last), max(first, last)})
        for start, stop in pairwise(cuts):
            left_moves, right_moves = start >= moving, start < grown
            # Where both edges move, at most as many rows at once as leave the two triangles apart.
            width = columns if low is None or high is None else high - low + 1
            at_once = max(1, width - 1) if left_moves and right_moves else stop - start
            for top in range(start, stop, at_once):
                size = min(at_once, stop - top)
                left = 0 if high is None else max(0, top - high)
                right = columns if low is None else min(columns, top - low + 1)
                yield from self._run(top, size, (left, left_moves and size > 1), (right, right_moves and size > 1))

    def _run(self, top: int, size: int, left: tuple[int, bool], right: tuple[int, bool]) -> Iterator["Tile"]:
        """Rows [top, top + size): in the first of them keys [left, right) are visible; an edge may move each row."""
        (first, left_moves), (last, right_moves) = left, right
        rows, origin = Span(self.q.start + top, self.q.start + top + size), self.k.start
        if left_moves:
            square = Span(origin + first, origin + first + size)
            yield Tile(rows, square, high=rows.start - square.start)
        middle = Span(origin + first + size * left_moves, origin + last - right_moves)
        if middle.size:
            yield Tile(rows, middle)
        if right_moves:
            square = Span(origin + last - 1, origin + last - 1 + size)
            yield Tile(rows, square, low=rows.start - square.start)


def _pairs_below(q: Span, k: Span, bound: int) -> int:
    """How many (i, j) in q x k have i - j < bound."""
    # In row i the keys j > i - bound qualify: k.stop - 1 - (i - bound) of them, cut to 0..k.size.
    count = k.stop - 1 + bound - q.start  # in the first row, before cutting; one fewer each row
    rows = q.size
    full_rows = min(rows, max(0, count - k.size + 1))
    first, last = min(count - full_rows, k.size), count - rows + 1
    slope_rows = max(0, first - max(last, 1) + 1) if full_rows < rows else 0
    return full_rows * k.size + slope_rows * (2 * first - slope_rows + 1) // 2


def band(q: Span, k: Span, low: int | None, high: int | None) -> Tile | None:
    """The tile of {low <= i - j <= high} over q x k, trimmed so that every row and column of it sees something.

    A bound that nowhere bites is dropped. None where nothing is visible.

    >>> band(Span(0, 8), Span(0, 4), 6, None)
    Tile(q=Span(start=6, stop=8, step=1), k=Span(start=0, stop=2, step=1), low=6, high=None)
    """
    if low is not None:
        q, k = Span(max(q.start, k.start + low), q.stop), Span(k.start, min(k.stop, q.stop - low))
    if high is not None:
        q, k = Span(q.start, min(q.stop, k.stop + high)), Span(max(k.start, q.start - high), k.stop)
    if not (q.size and k.size) or (low is not None and high is not None and low > high):
        return None
    low = None if low is None or q.start - (k.stop - 1) >= low else low
    high = None if high is None or q.stop - 1 - k.start <= high else high
    return Tile(q, k, low, high)


def keys_of(tiles: Iterable[Tile]) -> tuple[Span, ...]:
    """The index ranges of the key block that the tiles reach, in order, those that touch in one."""
    joined: list[Span] = []
    for start, stop, _ in sorted(tile.k for tile in tiles):
        if joined and start <= joined[-1].stop:
            joined[-1] = Span(joined[-1].start, max(stop, joined[-1].stop))
        else:
            joined.append(Span(start, stop))
    return tuple(joined)


def coalesce(tiles: Iterable[Tile]) -> tuple[Tile, ...]:
    """The same visible pairs in fewer tiles, so in fewer kernel calls.

    Neighbouring rectangles become one; two causal squares with the rectangle between them become
    one larger square (the two halves of a zigzag rank against themselves, for one).
    """
    tiles = list(tiles)
    if len(tiles) == 1:
        return tuple(tiles)
    full = _join([tile for tile in tiles if tile.full], along_k=True)
    squares: list[Tile] = []
    other = [tile for tile in tiles if not tile.full and not tile.causal]
    for tile in sorted(tile for tile in tiles if tile.causal):
        last = squares[-1] if squares else None
        bridge = Tile(tile.q, last.k) if last else None
        if last and last.q.stop == tile.q.start and last.k.stop == tile.k.start and bridge in full:
            full.remove(bridge)
            q, k = Span(last.q.start, tile.q.stop), Span(last.k.start, tile.k.stop)
            squares[-1] = Tile(q, k, low=q.start - k.start)
        else:
            squares.append(tile)
    return tuple(sorted([*_join(full, along_k=False), *squares, *other], key=lambda t: (t.q, t.k)))


def _join(tiles: list[Tile], along_k: bool) -> list[Tile]:
    """Join full rectangles that touch along keys (same queries) or along queries (same keys)."""
    joined: list[Tile] = []
    for tile in sorted(tiles, key=lambda t: (t.q, t.k) if along_k else (t.k, t.q)):
        last = joined[-1] if joined else None
        if last and along_k and last.q == tile.q and last.k.stop == tile.k.start:
            joined[-1] = Tile(tile.q, Span(last.k.start, tile.k.stop))
        elif last and not along_k and last.k == tile.k and last.q.stop == tile.q.start:
            joined[-1] = Tile(Span(last.q.start, tile.q.stop), tile.k)
        else:
            joined.append(tile)
    return joined
