"""The ranks that hold a copy of a model as a plan arranges them, and the tokens each of them holds; integers only.

The tokens are those of `sequence.tokens`, without processes: the layout deals them to attention's ring and
Ulysses ranks, which is the inner side of a tensor grid. Where an axis splits tokens on the outer side alone,
the pieces of the ranks that share the inner tokens are laid end to end and cut anew.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from seqloom.geometry import Layout, Span, cut, even_bounds, even_sizes, total
from seqloom.plan import Plan


@dataclass(frozen=True)
class Place:
    """Where a rank stands within its copy: on attention's ring and Ulysses axes, and among the ranks of heads.

    ring, ulysses: of `Plan.attention_ring` and `attention_ulysses`, which the token axes of a tensor grid
    are a part of. heads: on the axis of the grid that splits heads.
    """

    ring: int = 0
    ulysses: int = 0
    heads: int = 0

    def on_grid(self, plan: Plan) -> dict[str, int]:
        """The rank on each axis of the tensor grid, slowest first.

        >>> Place(ring=3, heads=1).on_grid(Plan(ring=2, tensor=4, tensor_kind="2d"))
        {'row': 1, 'col': 1}
        """
        grid = plan.tensor_grid
        number = (self.ring if plan.tensor_tokens == "ring" else self.ulysses) % grid.tokens
        found = {}
        for axis, size in reversed(grid.axes.items()):
            if axis in grid.inner.tokens:
                number, found[axis] = divmod(number, size)
            else:
                found[axis] = self.heads
        return dict(reversed(found.items()))

    def moved(self, plan: Plan, axis: str, rank: int) -> "Place":
        """The place that differs in its rank on one axis of the tensor grid."""
        grid, here = plan.tensor_grid, {**self.on_grid(plan), axis: rank}
        number = 0
        for name in grid.inner.tokens:
            number = number * grid.axes[name] + here[name]
        heads = here[grid.inner.hidden or ""]
        if plan.tensor_tokens == "ring":
            return Place(self.ring - self.ring % grid.tokens + number, self.ulysses, heads)
        return Place(self.ring, self.ulysses - self.ulysses % grid.tokens + number, heads)

    def rank(self, plan: Plan, *, data: int = 0, pipeline: int = 0) -> int:
        """The number of the process, by the plan's order of ranks.

        >>> Place(ring=3, heads=1).rank(Plan(data=2, ring=2, tensor=4, tensor_kind="2d"), data=1)
        15
        """
        grid, here = plan.tensor_grid, self.on_grid(plan)
        ring = self.ring // (grid.tokens if plan.tensor_tokens == "ring" else 1)
        ulysses = self.ulysses // (grid.tokens if plan.tensor_tokens == "ulysses" else 1)
        at = {"pipeline": pipeline, "data": data, "ring": ring, "ulysses": ulysses}
        number = 0
        for axis in reversed(plan.axis_order):
            if axis == "tensor":
                for name, size in grid.axes.items():
                    number = number * size + here[name]
            else:
                number = number * getattr(plan, axis) + at[axis]
        return number


def places(plan: Plan) -> Iterator[Place]:
    """Every rank of a copy, heads fastest, then Ulysses."""
    sizes = plan.attention_ring, plan.attention_ulysses, plan.tensor_grid.heads
    yield from (Place(*at) for at in product(*map(range, sizes)))


def inner_spans(layout: Layout, place: Place) -> tuple[Span, ...]:
    """The positions a rank holds inside attention and the MLP."""
    return layout.shard(place.ring, place.ulysses)


def outer_spans(plan: Plan, layout: Layout, place: Place) -> tuple[Span, ...]:
    """The positions a rank holds between linears, in the residual stream."""
    grid = plan.tensor_grid
    if grid.outer_only is None:
        return inner_spans(layout, place)
    sharing = [place]
    if grid.inner_only is not None:
        sharing = [place.moved(plan, grid.inner_only, rank) for rank in range(grid.axes[grid.inner_only])]
    together = tuple(span for each in sharing for span in inner_spans(layout, each))
    bounds, rank = even_bounds(total(together), grid.axes[grid.outer_only]), place.on_grid(plan)[grid.outer_only]
    return cut(together, bounds[rank], bounds[rank + 1])


@dataclass(frozen=True)
class Tokens:
    """How many tokens of a row a rank of a tensor grid holds.

    outer, inner: on each side. sizes: for each token axis of the grid those of each of its ranks, on the side
    that the axis splits (outer where both).
    """

    outer: int
    inner: int
    sizes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, plan: Plan, layout: Layout, place: Place) -> "Tokens":
        """Those of a sequence that `layout` deals."""
        grid = plan.tensor_grid

        def outer(where: Place) -> int:
            return total(outer_spans(plan, layout, where))

        def inner(where: Place) -> int:
            return total(inner_spans(layout, where))

        sizes = {}
        for axis in dict.fromkeys((*grid.outer.tokens, *grid.inner.tokens)):
            held = outer if axis in grid.outer.tokens else inner
            sizes[axis] = tuple(held(place.moved(plan, axis, rank)) for rank in range(grid.axes[axis]))
        return cls(outer(place), inner(place), sizes)


def tokens_held(plan: Plan, layout: Layout) -> tuple[frozenset[int], frozenset[int]]:
    """How many tokens ranks hold on the outer side and on the inner: all the numbers that occur.

    >>> tokens_held(Plan(tensor=4), Layout("zigzag", 10))
    (frozenset({2, 3}), frozenset({10}))
    """
    grid, inner = plan.tensor_grid, dict[tuple[int, int], int]()
    for ring, spans in enumerate(layout.ring_spans):
        inner |= {(ring, member): size for member, size in enumerate(even_sizes(total(spans), layout.ulysses))}
    together = set(inner.values())
    if grid.inner_only is not None:
        sharing = range(grid.axes[grid.inner_only])
        together = {
            sum(inner[each.ring, each.ulysses] for each in (place.moved(plan, grid.inner_only, o) for o in sharing))
            for place in (Place(*at) for at in inner)
            if place.on_grid(plan)[grid.inner_only] == 0
        }
    parts = grid.axes[grid.outer_only] if grid.outer_only is not None else 1
    outer = {count for each in together for count in (each // parts, -(-each // parts))}
    return frozenset(outer), frozenset(inner.values())
