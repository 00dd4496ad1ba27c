"""Tiles against the definition of who may see whom."""

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geometry.cases import layouts, masks, pairs, visible_pairs
from seqloom.errors import DataError
from seqloom.geometry import Layout, Mask, Span, Tile
from seqloom.geometry.tile import band, coalesce


@settings(max_examples=400)
@given(layouts(), st.data())
def test_tiles_cover_exactly_the_visible_pairs(layout: Layout, data: st.DataObject) -> None:
    """Catches a pair computed twice, one missed, a document that leaks, and an area that is not the count."""
    mask = data.draw(masks(layout.num_tokens))
    everything = 0
    for q, k in product(layout.ring_spans, repeat=2):
        tiles = mask.tiles(q, k)
        found = [pair for tile in tiles for pair in pairs(tile)]
        assert sorted(found) == sorted(visible_pairs(mask, q, k))
        assert [tile.area for tile in tiles] == [len(pairs(tile)) for tile in tiles]
        assert all(tile.area for tile in tiles), "an empty tile would reach a kernel"
        seen_keys = sorted({j for _, j in found})
        assert [j for span in mask.needed(q, k) for j in range(*span)] == seen_keys
        everything += mask.area(q, k)
    whole = [Span(0, layout.num_tokens)]
    assert everything == len(visible_pairs(mask, whole, whole)) == sum(layout.work(mask))


@given(st.data())
def test_visible_is_the_definition(data: st.DataObject) -> None:
    """Catches document borders off by one in the definition that others may lean on."""
    num_tokens = data.draw(st.integers(1, 20))
    mask = data.draw(masks(num_tokens))
    whole = [Span(0, num_tokens)]
    stated = {(q, k) for q, k in product(range(num_tokens), repeat=2) if mask.visible(q, k)}
    assert stated == visible_pairs(mask, whole, whole)


def test_a_document_cut_by_shards_stays_whole() -> None:
    """Catches borders taken from the shard: lengths 3, 1, 4 over two contiguous halves of 4."""
    mask = Mask(documents=(3, 1, 4))
    left, right = Span(0, 4), Span(4, 8)
    assert mask.area([left], [left]) == 6 + 1
    assert mask.area([right], [left]) == 0
    assert mask.area([right], [right]) == 10
    assert Mask(documents=(2, 6)).area([right], [left]) == 4 * 2


def test_spans_without_a_common_diagonal_are_refused() -> None:
    """Catches tiles that would be silently wrong between spans of different steps."""
    with pytest.raises(ValueError, match="steps 2 and 3"):
        Mask().tiles([Span(0, 12, 2)], [Span(0, 12, 3)])


@given(
    st.builds(Span, st.integers(0, 9), st.integers(9, 18), st.just(1)),
    st.builds(Span, st.integers(0, 9), st.integers(9, 18), st.just(1)),
    st.none() | st.integers(-20, 20),
    st.none() | st.integers(-20, 20),
)
def test_area_counts_any_band(q: Span, k: Span, low: int | None, high: int | None) -> None:
    """Catches a closed form that holds for aligned squares only."""
    tile = Tile(q, k, low, high)
    assert tile.area == len(pairs(tile))


_BOUND = st.none() | st.integers(-14, 14)


@settings(max_examples=500)
@given(st.integers(1, 12), st.integers(1, 12), _BOUND, _BOUND)
def test_pieces_cut_any_band(rows: int, columns: int, low: int | None, high: int | None) -> None:
    """Catches a staircase cut wrongly where a diagonal enters or leaves by another side, and pieces no kernel has."""
    q, k = Span(100, 100 + rows), Span(7, 7 + columns)
    offset = 100 - 7
    tile = band(q, k, *(None if bound is None else bound + offset for bound in (low, high)))
    pieces = list(tile.pieces()) if tile else []
    expected = [
        (i, j)
        for i in range(rows)
        for j in range(columns)
        if (low is None or i - j >= low) and (high is None or i - j <= high)
    ]
    assert sorted((i - 100, j - 7) for piece in pieces for i, j in pairs(piece)) == expected
    assert all(piece.full or piece.causal or piece.anticausal for piece in pieces)
    if low is None or high is None:
        assert len(pieces) <= 4
    if tile:
        assert {i for i, _ in pairs(tile)} == set(range(tile.q.start, tile.q.stop)), "a row of the tile sees nothing"
        assert {j for _, j in pairs(tile)} == set(range(tile.k.start, tile.k.stop)), "nobody sees a column of the tile"


def test_a_band_takes_pieces_as_wide_as_itself() -> None:
    """Catches a window cut into single rows: 4,096 tokens under a window of 512 take about 3 pieces per window."""
    (tile,) = Mask(window=512).tiles([Span(0, 4096)], [Span(0, 4096)])
    assert len(list(tile.pieces())) <= 3 * 4096 // 512


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"window": 0}, "window of 0"),
        ({"prefix": -1}, "prefix of -1"),
        ({"window": 2.5}, "whole numbers"),
        ({"window": True}, "whole numbers"),
        ({"causal": "no"}, "neither true nor false"),
        ({"allowed": 5}, "cannot be called"),
        ({"documents": (3,), "padding": (1,)}, "Padding names documents"),
        ({"padding": (0,)}, "there are 0"),
    ],
)
def test_impossible_masks_are_refused(fields: dict[str, Any], said: str) -> None:
    """Catches a window that hides a token from itself, and padding that names no document."""
    with pytest.raises(DataError, match=said):
        Mask(**fields)


def test_the_tighter_window_holds() -> None:
    """Catches a layer's window that widens the batch's, or is lost."""
    assert Mask(window=4).within(9).window == 4
    assert Mask(window=9).within(4).window == 4
    assert Mask().within(4).window == 4
    assert Mask(window=4).within(None).window == 4


def test_allowed_only_forbids() -> None:
    """Catches a further rule that opens what causality or a document border closes."""
    mask = Mask(documents=(4, 4), allowed=lambda q, k: (q - k) % 2 == 0)
    assert mask.visible(2, 0)
    assert not mask.visible(3, 0)
    assert not mask.visible(0, 2)
    assert not mask.visible(4, 2)


@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=16), st.data())
def test_coalesce_keeps_the_pairs(cells: set[tuple[int, int, bool]], data: st.DataObject) -> None:
    """Catches joined tiles that reach over a gap, and a bridge taken for two squares at once."""
    side = data.draw(st.integers(1, 3))
    chosen = {(row, column): causal for row, column, causal in sorted(cells)}
    tiles = [
        Tile(q, k, low=q.start - k.start if causal else None)
        for (row, column), causal in chosen.items()
        for q, k in [(Span(row * side, row * side + side), Span(column * side, column * side + side))]
    ]
    before = sorted(pair for tile in tiles for pair in pairs(tile))
    joined = coalesce(tiles)
    assert sorted(pair for tile in joined for pair in pairs(tile)) == before
    assert len(joined) <= len(tiles)


@pytest.mark.parametrize("ring", [1, 2, 3, 4, 8])
def test_a_zigzag_step_is_one_kernel_call(ring: int) -> None:
    """Catches tiles left uncoalesced: every step of the ring is one square triangle or one rectangle."""
    layout = Layout("zigzag", 6 * 2 * ring, ring)
    for a, b in product(range(ring), repeat=2):
        (tile,) = Mask().tiles(layout.ring_spans[a], layout.ring_spans[b])
        assert tile.causal if a == b else tile.full


@pytest.mark.parametrize("num_tokens", [64, 1024, 65536])
def test_striped_tiles_do_not_grow_with_the_length(num_tokens: int) -> None:
    """Catches striped layouts falling to a tile per token."""
    layout = Layout("striped", num_tokens, ring=4)
    for q, k in product(layout.ring_spans, repeat=2):
        assert len(Mask().tiles(q, k)) == 1
        assert len(Mask(documents=(num_tokens // 4 + 1, num_tokens * 3 // 4 - 1)).tiles(q, k)) == 2
