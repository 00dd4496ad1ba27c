"""Which tokens a rank of a tensor grid holds, on both sides of a linear.

The inner side's tokens are attention's: the layout deals them to the ring and Ulysses ranks, of which the
token axes of the grid are a part. Where an axis splits tokens on the outer side alone, the pieces of
the ranks that share the inner tokens are laid end to end and cut anew, as evenly as can be: so the
gather over that axis brings back the inner tokens in their order.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from seqloom.fabric import Fabric
from seqloom.geometry import Layout, Span, cut, even_bounds, total
from seqloom.plan import Grid


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
    grid, here = fabric.plan.tensor_grid, {name: axis.rank for name, axis in fabric.grid.items()}
    dealt = _Dealt(layout, fabric)
    sizes = {}
    for axis in {*grid.outer.tokens, *grid.inner.tokens}:
        held = dealt.outer if axis in grid.outer.tokens else dealt.inner
        sizes[axis] = tuple(total(held(grid, {**here, axis: rank})) for rank in range(grid.axes[axis]))
    return TokenSplit(dealt.outer(grid, here), dealt.inner(grid, here), sizes)


@dataclass(frozen=True)
class _Dealt:
    """What other ranks of this rank's tensor group hold."""

    layout: Layout
    fabric: Fabric

    def inner(self, grid: Grid, at: Mapping[str, int]) -> tuple[Span, ...]:
        """The positions of the rank `at` on the inner side."""
        number = 0
        for axis, size in grid.axes.items():
            if axis in grid.inner.tokens:
                number = number * size + at[axis]
        ring, ulysses = self.fabric.ring.rank, self.fabric.ulysses.rank
        if self.fabric.plan.tensor_tokens == "ring":
            ring += number - ring % grid.tokens
        else:
            ulysses += number - ulysses % grid.tokens
        return self.layout.shard(ring, ulysses)

    def outer(self, grid: Grid, at: Mapping[str, int]) -> tuple[Span, ...]:
        """The positions of the rank `at` on the outer side."""
        if grid.outer_only is None:
            return self.inner(grid, at)
        places = [at]
        if grid.inner_only is not None:
            places = [{**at, grid.inner_only: rank} for rank in range(grid.axes[grid.inner_only])]
        together = tuple(span for place in places for span in self.inner(grid, place))
        bounds = even_bounds(total(together), grid.axes[grid.outer_only])
        return cut(together, bounds[at[grid.outer_only]], bounds[at[grid.outer_only] + 1])
