"""Who holds what inside a tensor group, and the moves that one linear makes of it; integers and names only.

Two sides fix the activations: outer (the residual stream) and inner (heads, the MLP's intermediate,
the vocabulary). On each, tokens are split over some axes and the hidden dim over at most one:

| kind | axes, slowest first  | outer: tokens; hidden  | inner: tokens; hidden  |
|------|----------------------|------------------------|------------------------|
| 1d   | tensor               | tensor; -              | -; tensor              |
| 2d   | row, col             | row; col               | row; col               |
| 2.5d | depth, row, col      | depth, row; col        | depth, row; col        |
| 3d   | output, input, weight| input, weight; output  | output, weight; input  |

1d without sequence parallelism holds all tokens on the outer side too. A column-wise linear takes
outer to inner, a row-wise one inner to outer, whatever the order in which a model makes them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Literal, get_args

from seqloom.errors import PlanError

TensorKind = Literal["1d", "2d", "2.5d", "3d"]
Direction = Literal["colwise", "rowwise"]
Along = Literal["tokens", "hidden", "whole"]

GRID_AXES: dict[str, tuple[str, ...]] = {
    "1d": ("tensor",),
    "2d": ("row", "col"),
    "2.5d": ("depth", "row", "col"),
    "3d": ("output", "input", "weight"),
}
"""The mesh axes of each kind, slowest first."""


@dataclass(frozen=True)
class Side:
    """How activations are split: tokens over some axes, slowest first, and the hidden dim over one or none."""

    tokens: tuple[str, ...]
    hidden: str | None

    @property
    def axes(self) -> frozenset[str]:
        """The axes over which activations of this side differ."""
        return frozenset((*self.tokens, *((self.hidden,) if self.hidden else ())))


@dataclass(frozen=True)
class Move:
    """One transfer over an axis: of activations along tokens, hidden or, summed only, as a whole; of a weight
    along its dim 0 (output) or 1 (input)."""

    axis: str
    dim: Along | int


@dataclass(frozen=True)
class Moves:
    """y = scatter_y(gather_x(x) gather_w(w)^T): the moves of one linear, and where its weight [out, in] lives.

    shards: for each axis of the grid the dim of the weight that is split over it, None where replicated.
    Where x or y moves as a `whole`, x is the same on all ranks of the axis (and its gradient is summed),
    and y is summed to all of them.
    """

    x: Move | None
    w: Move | None
    y: Move | None
    shards: Mapping[str, int | None]


@dataclass(frozen=True)
class Grid:
    """The ranks of a tensor group.

    sizes: of each axis of the kind, slowest first. sequence_parallel: whether 1d splits the tokens of the
    outer side; the other kinds always do.
    """

    kind: TensorKind
    sizes: tuple[int, ...]
    sequence_parallel: bool = True

    @property
    def axes(self) -> dict[str, int]:
        """Axis name to size, slowest first.

        >>> Grid("2d", (3, 2)).axes
        {'row': 3, 'col': 2}
        """
        return dict(zip(GRID_AXES[self.kind], self.sizes, strict=True))

    @property
    def outer(self) -> Side:
        """The residual stream."""
        if self.kind == "1d":
            return Side(("tensor",) if self.sequence_parallel else (), None)
        return Side(("input", "weight"), "output") if self.kind == "3d" else Side(self._rows, "col")

    @property
    def inner(self) -> Side:
        """Heads, the MLP's intermediate, the vocabulary."""
        if self.kind == "1d":
            return Side((), "tensor")
        return Side(("output", "weight"), "input") if self.kind == "3d" else Side(self._rows, "col")

    @property
    def both(self) -> Side:
        """What a weight meets: tokens of either side; its rows lie on the inner one's hidden axis."""
        return Side(tuple(dict.fromkeys((*self.outer.tokens, *self.inner.tokens))), self.inner.hidden)

    @property
    def _rows(self) -> tuple[str, ...]:
        return ("depth", "row") if self.kind == "2.5d" else ("row",)

    @property
    def outer_only(self) -> str | None:
        """The axis that splits tokens on the outer side alone: over it the tokens of the inner side are gathered."""
        return next((axis for axis in self.outer.tokens if axis not in self.inner.tokens), None)

    @property
    def inner_only(self) -> str | None:
        """The axis that splits tokens on the inner side alone."""
        return next((axis for axis in self.inner.tokens if axis not in self.outer.tokens), None)

    @property
    def heads(self) -> int:
        """The ranks that heads, the intermediate dim and the vocabulary are split over."""
        return self.axes[self.inner.hidden or "tensor"]

    @property
    def tokens(self) -> int:
        """The ranks that the tokens of the inner side, and so attention's, are split over.

        >>> Grid("2.5d", (2, 3, 2)).tokens, Grid("1d", (4,)).tokens
        (6, 1)
        """
        product = 1
        for axis in self.inner.tokens:
            product *= self.axes[axis]
        return product

    def linear(self, direction: Direction, *, input_stays: bool = True) -> Moves:
        """The moves of a linear.

        input_stays: whether a row-wise linear of 2d and 2.5d leaves its input where it is and scatters
        the output; otherwise it gathers the input, as SUMMA does.
        """
        colwise = direction == "colwise"
        if direction not in get_args(Direction):
            raise PlanError(f"A linear goes colwise (outer to inner) or rowwise (inner to outer), not '{direction}'.")
        if self.kind == "1d":
            move = Move("tensor", "tokens" if self.sequence_parallel else "whole")
            return Moves(move if colwise else None, None, None if colwise else move, {"tensor": 0 if colwise else 1})
        if self.kind == "3d":
            source, target = ("input", "output") if colwise else ("output", "input")
            shards = {"output": 1 if colwise else 0, "input": 0 if colwise else 1, "weight": 0}
            return Moves(Move(source, "tokens"), Move("weight", 0), Move(target, "tokens"), shards)
        depth: dict[str, int | None] = {"depth": None} if self.kind == "2.5d" else {}
        if colwise or not input_stays:
            return Moves(Move("col", "hidden"), Move("row", 1), None, {**depth, "row": 1, "col": 0})
        return Moves(None, Move("row", 0), Move("col", "hidden"), {**depth, "row": 0, "col": 1})

    def embedding(self, *, tied: bool) -> Moves:
        """The moves of a lookup in a table [vocab, width]: ids are gathered like x, rows looked up, y scattered.

        tied: whether the table is the head's weight too, whose shards it then has; on 2d and 2.5d the table
        is gathered for it instead of the ids.
        """
        if self.kind == "1d":
            ids = Move("tensor", "tokens") if self.sequence_parallel else None
            return Moves(ids, None, Move("tensor", "tokens" if self.sequence_parallel else "whole"), {"tensor": 0})
        if self.kind == "3d":
            head = self.linear("colwise")
            return Moves(head.x, head.w, Move("input", "tokens"), head.shards)
        if tied:
            return Moves(None, Move("row", 1), Move("col", "hidden"), self.linear("colwise").shards)
        depth: dict[str, int | None] = {"depth": None} if self.kind == "2.5d" else {}
        return Moves(Move("row", "tokens"), None, Move("row", "tokens"), {**depth, "row": 0, "col": 1})


def input_stays(in_features: int, out_features: int, *, regather: bool) -> bool:
    """Whether a row-wise linear of 2d and 2.5d sends less when its input stays and its output is scattered.

    The input is gathered, perhaps again in backward, and its gradient scattered; the output moves twice.

    >>> input_stays(4096, 4096, regather=False), input_stays(1024, 4096, regather=True)
    (True, False)
    """
    return 2 * out_features <= (3 if regather else 2) * in_features


def chunks(size: int, parts: int) -> tuple[int, ...]:
    """The sizes of `parts` shards of a parameter's dim, as torch.chunk, and DTensor and FSDP2 with it, cut it.

    Rounded up, so that the last ones are short or empty.

    >>> chunks(10, 4), chunks(5, 4)
    ((3, 3, 3, 1), (2, 2, 1, 0))
    """
    each = -(-size // parts)
    return tuple(max(0, min(each, size - part * each)) for part in range(parts))


def divisors(number: int) -> list[int]:
    """The divisors of a number, rising."""
    low = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


def factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All tuples of so many numbers whose product is `number`, small first ones first.

    >>> list(factors(4, 2))
    [(1, 4), (2, 2), (4, 1)]
    """
    if count == 1:
        yield (number,)
        return
    for first in divisors(number):
        for rest in factors(number // first, count - 1):
            yield first, *rest
