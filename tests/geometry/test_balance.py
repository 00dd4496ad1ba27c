"""The balanced deal: even work under any mask, even tokens, the same answer everywhere, and at once."""

import time
from itertools import pairwise
from math import log
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloom.geometry import Mask, Span, total
from seqloom.geometry.balance import BLOCKS, balanced
from seqloom.geometry.layout import zigzag

TOKENS, RING = 65_536, 8


def heavy_tailed(num_tokens: int, seed: int) -> tuple[int, ...]:
    """Lengths of documents packed into a row: log-normal, median 1,024, sigma 1.5, the last one cut."""
    random, left, lengths = Random(seed), num_tokens, []
    while left:
        lengths.append(min(left, max(1, round(random.lognormvariate(log(1024), 1.5)))))
        left -= lengths[-1]
    return tuple(lengths)


def unevenness(deal: tuple[tuple[Span, ...], ...], masks: list[Mask], num_tokens: int) -> float:
    """Most visible pairs of a rank over the mean."""
    work = [sum(mask.seen(spans, num_tokens) for mask in masks) for spans in deal]
    return max(work) * len(work) / sum(work)


@pytest.mark.parametrize(
    "kind",
    [{}, {"window": 4096}, {"window": 512}, {"prefix": 64}, {"causal": False}, {"causal": False, "window": 1024}],
)
def test_heavy_tailed_documents_are_balanced(kind: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a deal that evens tokens but not work: zigzag is up to three times off on the same documents."""
    ours, theirs = [], []
    for seed in range(40):
        masks = [Mask(documents=heavy_tailed(TOKENS, seed), **kind)]  # type: ignore[arg-type]
        deal = balanced(TOKENS, RING, masks)
        ours.append(unevenness(deal, masks, TOKENS))
        theirs.append(unevenness(zigzag(TOKENS, RING), masks, TOKENS))
        counts, blocks = [total(spans) for spans in deal], max(map(len, deal))
        assert max(counts) - min(counts) <= TOKENS // (RING * blocks)
    with capsys.disabled():
        print(f" [most work over mean, worst of 40: balanced {max(ours):.3f}, zigzag {max(theirs):.3f}]", end="")
    assert max(ours) <= 1.05
    assert max(theirs) > 1.1


def test_one_document_is_dealt_as_well_as_by_zigzag() -> None:
    """Catches a deal that gives up the perfect balance of zigzag where there is one, or cuts finer than it."""
    assert unevenness(balanced(4096, 8, [Mask()]), [Mask()], 4096) == 1.0
    assert sum(map(len, balanced(4096, 8, [Mask()]))) == 2 * 8 - 1


@pytest.mark.parametrize("mask", [Mask(causal=False), Mask(window=64), Mask(documents=(512,) * 8)])
def test_one_run_each_where_that_is_even(mask: Mask) -> None:
    """Catches a sequence cut up for nothing: its neighbours' keys would all have to travel."""
    assert balanced(4096, 8, [mask]) == tuple((Span(512 * r, 512 * (r + 1)),) for r in range(8))


def test_neighbours_stay_together_where_that_is_nearly_even() -> None:
    """Catches blocks of equal work dealt anywhere: under a window only the first rank has less to do than others."""
    mask = Mask(window=4096)
    deal = balanced(TOKENS, RING, [mask])
    fetched = sum(total(mask.needed(mine, theirs)) for mine in deal for theirs in deal if mine is not theirs)
    assert unevenness(deal, [mask], TOKENS) <= 1.02 < unevenness(zigzag(TOKENS, RING), [mask], TOKENS)
    assert sum(map(len, deal)) <= 3 * RING and fetched < TOKENS


def test_rows_are_evened_out_together() -> None:
    """Catches a deal that looks at the first row only."""
    masks = [Mask(documents=heavy_tailed(TOKENS, seed)) for seed in range(4)]
    assert unevenness(balanced(TOKENS, RING, masks), masks, TOKENS) <= 1.05
    assert unevenness(balanced(TOKENS, RING, masks[:1]), masks, TOKENS) > 1.05


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@given(lengths, st.integers(1, 7), st.booleans(), st.none() | st.integers(1, 20), st.integers(0, 5), st.booleans())
def test_every_token_is_dealt_once(
    documents: list[int], ring: int, causal: bool, window: int | None, prefix: int, padded: bool
) -> None:
    """Catches tokens lost, doubled or out of order on a rank, unmerged neighbours, and ranks that differ by a block."""
    num_tokens = sum(documents)
    padding = (len(documents) - 1,) if padded else ()
    mask = Mask(causal=causal, window=window, prefix=prefix, documents=tuple(documents), padding=padding)
    deal = balanced(num_tokens, ring, [mask])
    assert len(deal) == ring
    held = [position for spans in deal for span in spans for position in range(*span)]
    assert sorted(held) == list(range(num_tokens))
    for spans in deal:
        assert all(a.stop < b.start for a, b in pairwise(spans))
    counts = [total(spans) for spans in deal]
    per_rank = max([b for b in BLOCKS if num_tokens >= ring * b * max(4, b)], default=1)
    assert max(counts) - min(counts) <= per_rank
    if num_tokens >= 2 * ring:
        assert min(counts) >= num_tokens / ring / 2  # so a Ulysses group of that size has a token for each
    assert balanced(num_tokens, ring, [mask]) == deal


def test_no_mask_is_one_causal_document() -> None:
    """Catches a layout made without a batch that has no work to even out."""
    assert balanced(64, 2, []) == balanced(64, 2, [Mask()])


def test_padding_alone_is_no_work() -> None:
    """Catches a division by the work there is not."""
    assert balanced(64, 2, [Mask(documents=(64,), padding=(0,))]) == ((Span(0, 32),), (Span(32, 64),))


@pytest.mark.parametrize(("num_tokens", "ring", "seconds"), [(TOKENS, 8, 0.05), (2**20, 512, 1.0)])
def test_it_is_dealt_at_once(num_tokens: int, ring: int, seconds: float) -> None:
    """Catches a search that holds up every batch: processor time, the best of three."""
    masks = [Mask(documents=heavy_tailed(num_tokens, 7))]
    taken = []
    for _ in range(3):
        started = time.process_time()
        balanced(num_tokens, ring, masks)
        taken.append(time.process_time() - started)
    assert min(taken) < seconds
