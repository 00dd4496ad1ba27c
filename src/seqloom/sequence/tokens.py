"""Which tokens a rank of a tensor grid holds, on both sides of a linear; `planner.place` says how they are dealt."""

from collections.abc import Mapping
from dataclasses import dataclass

from seqloom.fabric import Fabric
from seqloom.geometry import Layout, Span
from seqloom.planner import Place, Tokens, inner_spans, outer_spans


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of one rank.

    outer, inner: the global positions it holds on each side, in order. sizes: for each token axis of the
    grid, how many tokens each of its ranks holds, on the side that the axis splits (outer where both).
    """

    outer: tuple[Span, ...]
    inner: tuple[Span, ...]
    sizes: Mapping[str, tuple[int, ...]]


def split_tokens(layout: Layout, fabric: Fabric) -> TokenSplit:
    """The tokens of this rank, for sequences that `layout` deals."""
    plan = fabric.plan
    place = Place(fabric.ring.rank, fabric.ulysses.rank, fabric.grid[plan.tensor_grid.inner.hidden or ""].rank)
    sizes = Tokens.of(plan, layout, place).sizes
    return TokenSplit(outer_spans(plan, layout, place), inner_spans(layout, place), sizes)
