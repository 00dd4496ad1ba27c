"""Heads over ranks: each query head on one rank, beside the key/value head it reads, and no head sent for nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloom.geometry import HeadSplit


@st.composite
def splits(draw: st.DrawFn) -> HeadSplit:
    """Any split in which every part has a query head."""
    kv_heads, group = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    return HeadSplit(kv_heads * group, kv_heads, draw(st.integers(1, kv_heads * group)))


@given(splits())
def test_every_query_head_is_dealt_once_and_evenly(split: HeadSplit) -> None:
    """Catches a head left over, dealt twice or out of order, a rank without one, and one with two more than another."""
    dealt = [head for part in range(split.parts) for head in range(split.heads)[slice(*split.queries(part))]]
    assert dealt == list(range(split.heads))
    counts = [split.queries(part).size for part in range(split.parts)]
    assert min(counts) >= 1 and max(counts) - min(counts) <= 1


@given(splits())
def test_a_part_has_the_heads_that_its_queries_read_and_no_others(split: HeadSplit) -> None:
    """Catches a query head beside the wrong key/value head, and key/value heads repeated to all."""
    group = split.heads // split.kv_heads
    for part in range(split.parts):
        queries, keys = split.queries(part), split.keys(part)
        wanted = [head // group for head in range(queries.start, queries.stop)]
        assert list(range(keys.start, keys.stop)) == sorted(set(wanted))
        reads = split.reads(part)
        if reads is None:  # what a grouped kernel does by itself
            assert queries.size % keys.size == 0
            reads = tuple(head // (queries.size // keys.size) for head in range(queries.size))
        else:
            assert len({reads.count(head) for head in reads}) > 1  # irregular, or a fused kernel is lost for nothing
        assert [keys.start + head for head in reads] == wanted


@given(splits())
def test_whole_groups_where_the_degree_divides_the_key_heads(split: HeadSplit) -> None:
    """Catches a key/value head sent to two ranks where one would do."""
    if split.kv_heads % split.parts == 0:
        assert [split.keys(part).size for part in range(split.parts)] == [split.kv_heads // split.parts] * split.parts
        assert all(split.reads(part) is None for part in range(split.parts))


@pytest.mark.parametrize(
    ("split", "queries", "keys"),
    [
        (HeadSplit(8, 2, 4), [(0, 2), (2, 4), (4, 6), (6, 8)], [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (HeadSplit(28, 4, 8), [(0, 3), (3, 7), (7, 10), (10, 14)], [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (HeadSplit(5, 5, 2), [(0, 2), (2, 5)], [(0, 2), (2, 5)]),
        (HeadSplit(6, 2, 4), [(0, 1), (1, 3), (3, 4), (4, 6)], [(0, 1), (0, 1), (1, 2), (1, 2)]),
    ],
)
def test_splits_written_out(split: HeadSplit, queries: list[tuple[int, int]], keys: list[tuple[int, int]]) -> None:
    """Catches a rule that satisfies the properties yet is another one: ranks of two versions would disagree."""
    assert [split.queries(part)[:2] for part in range(len(queries))] == queries
    assert [split.keys(part)[:2] for part in range(len(keys))] == keys
