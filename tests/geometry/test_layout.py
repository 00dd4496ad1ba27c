"""Every token has one holder, and the work is spread as the formulas say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geometry.cases import layouts, positions
from seqloom.geometry import Layout, Mask


@given(layouts())
def test_layouts_partition_the_tokens(layout: Layout) -> None:
    """Catches a token held twice or by nobody, at lengths that do not divide too."""
    held = [
        position
        for ring_rank in range(layout.ring)
        for ulysses_rank in range(layout.ulysses)
        for position in positions(layout.shard(ring_rank, ulysses_rank))
    ]
    assert sorted(held) == list(range(layout.num_tokens))


@given(layouts())
def test_ulysses_pieces_restore_the_ring_ranks_part_in_order(layout: Layout) -> None:
    """Catches pieces that an exchange of heads for tokens would lay end to end in another order."""
    for ring_rank, spans in enumerate(layout.ring_spans):
        pieces = [positions(layout.shard(ring_rank, rank)) for rank in range(layout.ulysses)]
        assert [position for piece in pieces for position in piece] == positions(spans)


@given(layouts(even=True))
def test_even_lengths_give_even_shards(layout: Layout) -> None:
    """Catches shards of different sizes where the length divides: collectives would mix them up."""
    sizes = {
        len(positions(layout.shard(ring_rank, ulysses_rank)))
        for ring_rank in range(layout.ring)
        for ulysses_rank in range(layout.ulysses)
    }
    assert sizes == {layout.num_tokens // (layout.ring * layout.ulysses)}


def test_the_deals_by_hand() -> None:
    """Catches kinds that are exchanged for each other: 12 tokens over 3 ranks."""
    held = {kind: [positions(spans) for spans in Layout(kind, 12, 3).ring_spans] for kind in ("contiguous", "striped")}
    assert held["contiguous"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert held["striped"] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert [positions(s) for s in Layout("zigzag", 12, 3).ring_spans] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]


@given(st.integers(1, 16), st.integers(1, 40))
def test_zigzag_balances_causal_work_exactly(ring: int, chunk: int) -> None:
    """Catches any difference at all: 1.0, not nearly 1, where 2 x ring divides the tokens."""
    layout = Layout("zigzag", 2 * ring * chunk, ring)
    assert len(set(layout.work(Mask()))) == 1
    assert layout.imbalance(Mask()) == 1.0


@given(st.integers(1, 16), st.integers(1, 40))
def test_contiguous_gives_the_last_rank_the_most(ring: int, each: int) -> None:
    """Catches work counted wrongly: (N (2 P - 1) / P + 1) / (N + 1), which tends to (2 P - 1) / P."""
    num_tokens = ring * each
    layout = Layout("contiguous", num_tokens, ring)
    expected = (num_tokens * (2 * ring - 1) / ring + 1) / (num_tokens + 1)
    assert layout.imbalance(Mask()) == pytest.approx(expected, rel=1e-12)
    assert Layout("contiguous", 2**20, 8).imbalance(Mask()) == pytest.approx(15 / 8, rel=1e-5)


@given(st.integers(1, 16), st.integers(1, 40))
def test_striped_is_nearly_balanced(ring: int, each: int) -> None:
    """Catches stripes that start at the wrong token: 1 + (P - 1) / (N + 1)."""
    num_tokens = ring * each
    expected = 1 + (ring - 1) / (num_tokens + 1)
    assert Layout("striped", num_tokens, ring).imbalance(Mask()) == pytest.approx(expected, rel=1e-12)


def test_work_follows_the_documents() -> None:
    """Catches balance computed for one long document where several are packed."""
    layout = Layout("contiguous", 12, 2)
    assert layout.work(Mask(documents=(6, 6))) == (21, 21)
    assert layout.work(Mask(documents=(2, 10))) == (3 + 10, 21 + 24)
    assert layout.work(Mask(causal=False)) == (72, 72)


@given(layouts(), st.booleans(), st.lists(st.integers(1, 30), max_size=6))
def test_work_is_the_area_of_all_tiles(layout: Layout, causal: bool, lengths: list[int]) -> None:
    """Catches a closed form of the work that forgets a step, a document's start or the mask's direction."""
    rest = layout.num_tokens - sum(lengths)
    mask = Mask(causal=causal, documents=(*lengths, rest) if lengths and rest > 0 else None)
    keys = layout.ring_spans
    if causal or all(span.step == 1 for spans in keys for span in spans):
        assert layout.work(mask) == tuple(sum(mask.area(queries, k) for k in keys) for queries in keys)


def test_work_of_many_ranks_is_quick() -> None:
    """Catches a work figure that compares every rank with every other: a plan of 4,096 took minutes."""
    assert Layout("zigzag", 2**20, ring=4096).imbalance(Mask()) == 1.0
