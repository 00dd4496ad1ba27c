"""A rectangle of the attention matrix with one diagonal bound on either side, and its area."""

from collections.abc import Iterable
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
        aligned = self.low == self.q.start - self.k.start and self.high is None
        return aligned and self.q.size == self.k.size

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


def _pairs_below(q: Span, k: Span, bound: int) -> int:
    """How many (i, j) in q x k have i - j < bound."""
    # In row i the keys j > i - bound qualify: k.stop - 1 - (i - bound) of them, cut to 0..k.size.
    count = k.stop - 1 + bound - q.start  # in the first row, before cutting; one fewer each row
    rows = q.size
    full_rows = min(rows, max(0, count - k.size + 1))
    first, last = min(count - full_rows, k.size), count - rows + 1
    slope_rows = max(0, first - max(last, 1) + 1) if full_rows < rows else 0
    return full_rows * k.size + slope_rows * (2 * first - slope_rows + 1) // 2


def causal_tiles(q: Span, k: Span, shift: int) -> Iterable[Tile]:
    """Cut {i - j >= shift} over q x k into full rectangles and aligned causal squares.

    `i` and `j` count from the start of `q` and of `k`. At most three tiles come out: the rows that
    see all of k, the columns left of the diagonal band, and the band itself.
    """
    rows, columns = q.size, k.size
    all_visible = min(rows, max(0, columns + shift))  # rows from here on see every key
    band = min(rows, max(0, shift))  # rows before this one see nothing
    left = band - shift  # columns that all rows of the band see
    if all_visible > band:
        square = all_visible - band
        q_band = Span(q.start + band, q.start + all_visible)
        k_band = Span(k.start + left, k.start + left + square)
        if left:
            yield Tile(q_band, Span(k.start, k.start + left))
        yield Tile(q_band, k_band, low=q_band.start - k_band.start)
    below = max(all_visible, band)
    if below < rows:
        yield Tile(Span(q.start + below, q.stop), k)


def coalesce(tiles: Iterable[Tile]) -> tuple[Tile, ...]:
    """The same visible pairs in fewer tiles, so in fewer kernel calls.

    Neighbouring rectangles become one; two causal squares with the rectangle between them become
    one larger square (the two halves of a zigzag rank against themselves, for one).
    """
    tiles = list(tiles)
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
