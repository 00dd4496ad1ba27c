"""Spans behave as Python's ranges do."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from geometry.cases import positions, spans
from seqloom.geometry import Span, cut, even_bounds, total


@given(spans())
def test_size_counts_the_positions(span: Span) -> None:
    """Catches an off-by-one in a strided span whose step does not divide its length."""
    assert span.size == len(positions([span]))


@given(spans(), st.data())
def test_cut_takes_positions_by_number(span: Span, data: st.DataObject) -> None:
    """Catches a cut that counts tokens where it should count strides."""
    first = data.draw(st.integers(0, span.size))
    last = data.draw(st.integers(first, span.size + 2))
    assert positions([span.cut(first, last)]) == positions([span])[first:last]


@given(spans(), st.integers(-5, 70), st.integers(-5, 70))
def test_indices_within_finds_the_positions_in_a_range(span: Span, low: int, high: int) -> None:
    """Catches a document's border tokens given to its neighbour."""
    first, last = span.indices_within(low, high)
    inside = [position for position in positions([span]) if low <= position < high]
    assert 0 <= first <= last
    assert positions([span])[first:last] == inside


@given(st.integers(0, 200), st.integers(1, 17))
def test_even_bounds_differ_by_at_most_one(size: int, parts: int) -> None:
    """Catches the remainder piled on one rank, or tokens dropped."""
    bounds = even_bounds(size, parts)
    sizes = [stop - start for start, stop in pairwise(bounds)]
    assert (len(sizes), sum(sizes)) == (parts, size)
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(spans(), max_size=4), st.data())
def test_cut_across_spans_counts_tokens_end_to_end(found: list[Span], data: st.DataObject) -> None:
    """Catches a Ulysses piece that starts in one chunk of its ring rank and ends in the other."""
    size = total(found)
    first = data.draw(st.integers(0, size))
    last = data.draw(st.integers(first, size))
    assert positions(cut(found, first, last)) == positions(found)[first:last]
