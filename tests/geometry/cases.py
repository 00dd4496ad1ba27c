"""Drawn masks, layouts and spans, and the slow definitions that the fast forms are held against."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from hypothesis import strategies as st

from seqloom.geometry import Layout, Mask, Span, Tile

Pair = tuple[int, int]


def positions(spans: Iterable[Span]) -> list[int]:
    """The positions the spans hold, in order."""
    return [position for span in spans for position in range(span.start, span.stop, span.step)]


def pairs(tile: Tile) -> list[Pair]:
    """The (i, j) a tile declares visible, one by one."""
    return [
        (i, j)
        for i in range(tile.q.start, tile.q.stop)
        for j in range(tile.k.start, tile.k.stop)
        if (tile.low is None or i - j >= tile.low) and (tile.high is None or i - j <= tile.high)
    ]


def visible_pairs(mask: Mask, q: Sequence[Span], k: Sequence[Span]) -> set[Pair]:
    """The (i, j) whose positions may see each other, by a definition of its own: lists of documents and places."""
    documents = mask.documents or (10**6,)
    document = [number for number, length in enumerate(documents) for _ in range(min(length, 1000))]
    place = [index for length in documents for index in range(min(length, 1000))]

    def sees(a: int, b: int) -> bool:
        if document[a] != document[b] or document[a] in mask.padding:
            return False
        if place[b] < mask.prefix:
            return True
        if mask.causal and b > a:
            return False
        return mask.window is None or -mask.window < b - a < mask.window

    return {
        (i, j)
        for i, q_position in enumerate(positions(q))
        for j, k_position in enumerate(positions(k))
        if sees(q_position, k_position)
    }


@st.composite
def layouts(draw: st.DrawFn, even: bool = False) -> Layout:
    """Any layout of up to 40 tokens over up to 5 x 3 ranks; with `even`, of a length all of them divide."""
    kind = draw(st.sampled_from(["contiguous", "zigzag", "striped", "balanced"]))
    ring, ulysses = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    if even:
        return Layout(kind, 2 * ring * ulysses * draw(st.integers(1, 4)), ring, ulysses)
    return Layout(kind, draw(st.integers(1, 40)), ring, ulysses)


@st.composite
def masks(draw: st.DrawFn, num_tokens: int) -> Mask:
    """Causal or full, windowed, with a prefix; one document or several, of one token too, some of them padding."""
    causal, prefix = draw(st.booleans()), draw(st.just(0) | st.integers(0, 5))
    window = draw(st.none() | st.integers(1, num_tokens + 1))
    if draw(st.booleans()):
        return Mask(causal=causal, window=window, prefix=prefix)
    cuts = draw(st.sets(st.integers(1, num_tokens), max_size=6)) | {0, num_tokens}
    bounds = sorted(cuts)
    lengths = tuple(stop - start for start, stop in pairwise(bounds))
    padding = tuple(sorted(draw(st.sets(st.integers(0, len(lengths) - 1), max_size=1))))
    return Mask(causal=causal, window=window, prefix=prefix, documents=lengths, padding=padding)


def spans(largest: int = 30) -> st.SearchStrategy[Span]:
    """Any span, empty ones included."""
    return st.builds(
        lambda start, length, step: Span(start, start + length, step),
        st.integers(0, largest),
        st.integers(0, largest),
        st.integers(1, 5),
    )
