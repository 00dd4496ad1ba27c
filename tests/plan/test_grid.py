"""Who holds what inside a tensor group, and the moves of one linear, against the tables of the schemes."""

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqloom.plan import Grid, Move, Moves, Plan, Side, chunks, input_stays

GRIDS = [
    Grid("1d", (4,)),
    Grid("1d", (3,), sequence_parallel=False),
    Grid("2d", (3, 2)),
    Grid("2.5d", (2, 3, 2)),
    Grid("3d", (2, 3, 2)),
]


@pytest.mark.parametrize(
    ("grid", "outer", "inner"),
    [
        (GRIDS[0], Side(("tensor",), None), Side((), "tensor")),
        (GRIDS[1], Side((), None), Side((), "tensor")),
        (GRIDS[2], Side(("row",), "col"), Side(("row",), "col")),
        (GRIDS[3], Side(("depth", "row"), "col"), Side(("depth", "row"), "col")),
        (GRIDS[4], Side(("input", "weight"), "output"), Side(("output", "weight"), "input")),
    ],
)
def test_the_two_sides_of_each_kind(grid: Grid, outer: Side, inner: Side) -> None:
    """Catches an axis on the wrong side, and the axes that split tokens on one side alone taken from the other."""
    assert (grid.outer, grid.inner) == (outer, inner)
    assert grid.outer_only == next(iter(set(outer.tokens) - set(inner.tokens)), None)
    assert grid.inner_only == next(iter(set(inner.tokens) - set(outer.tokens)), None)
    assert grid.heads == grid.axes[inner.hidden or ""]
    assert grid.tokens == prod(grid.axes[axis] for axis in inner.tokens)


@pytest.mark.parametrize(
    ("grid", "colwise", "rowwise"),
    [
        (
            GRIDS[0],
            Moves(Move("tensor", "tokens"), None, None, {"tensor": 0}),
            Moves(None, None, Move("tensor", "tokens"), {"tensor": 1}),
        ),
        (
            GRIDS[1],
            Moves(Move("tensor", "whole"), None, None, {"tensor": 0}),
            Moves(None, None, Move("tensor", "whole"), {"tensor": 1}),
        ),
        (
            GRIDS[2],
            Moves(Move("col", "hidden"), Move("row", 1), None, {"row": 1, "col": 0}),
            Moves(None, Move("row", 0), Move("col", "hidden"), {"row": 0, "col": 1}),
        ),
        (
            GRIDS[3],
            Moves(Move("col", "hidden"), Move("row", 1), None, {"depth": None, "row": 1, "col": 0}),
            Moves(None, Move("row", 0), Move("col", "hidden"), {"depth": None, "row": 0, "col": 1}),
        ),
        (
            GRIDS[4],
            Moves(
                Move("input", "tokens"),
                Move("weight", 0),
                Move("output", "tokens"),
                {"output": 1, "input": 0, "weight": 0},
            ),
            Moves(
                Move("output", "tokens"),
                Move("weight", 0),
                Move("input", "tokens"),
                {"output": 0, "input": 1, "weight": 0},
            ),
        ),
    ],
)
def test_the_moves_of_each_kind(grid: Grid, colwise: Moves, rowwise: Moves) -> None:
    """Catches a linear that gathers or scatters over another axis, or along another dim, than its kind's paper."""
    assert (grid.linear("colwise"), grid.linear("rowwise")) == (colwise, rowwise)
    assert grid.linear("colwise", input_stays=False) == colwise
    same = grid.linear("colwise") if grid.kind in ("2d", "2.5d") else rowwise
    assert grid.linear("rowwise", input_stays=False) == same, "SUMMA knows no directions"


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.kind} {grid.sizes} {grid.sequence_parallel}")
@pytest.mark.parametrize("direction", ["colwise", "rowwise"])
@pytest.mark.parametrize("stays", [True, False])
def test_a_linear_takes_one_side_to_the_other(grid: Grid, direction: str, stays: bool) -> None:
    """Catches a product that is computed twice, or not at all: all (token, in, out) triples, each on one rank."""
    moves = grid.linear(direction, input_stays=stays)  # type: ignore[arg-type]
    source, target = (grid.outer, grid.inner) if direction == "colwise" else (grid.inner, grid.outer)
    size = 12
    seen: list[tuple[frozenset[int], frozenset[int], frozenset[int]]] = []
    for place in product(*map(range, grid.axes.values())):
        at = dict(zip(grid.axes, place, strict=True))
        moved = {move.axis for move in (moves.x, moves.w, moves.y) if move is not None}
        assert all(axis in moved or grid.axes[axis] == 1 or axis == "depth" for axis in grid.axes)
        tokens = held(size, grid, at, tuple(a for a in source.tokens if not gathered(moves.x, a, "tokens")))
        width = held(
            size, grid, at, (source.hidden,) if source.hidden and not gathered(moves.x, source.hidden, "hidden") else ()
        )
        rows = held(size, grid, at, [a for a, d in moves.shards.items() if d == 0 and not gathered(moves.w, a, 0)])
        columns = held(size, grid, at, [a for a, d in moves.shards.items() if d == 1 and not gathered(moves.w, a, 1)])
        assert columns == width, "x and w must meet in the same part of the input dim"
        out_tokens = held(size, grid, at, target.tokens)
        out_width = held(size, grid, at, (target.hidden,) if target.hidden else ())
        assert out_tokens <= tokens and out_width <= rows, "what is scattered must contain what is kept"
        seen.append((tokens, width, rows))
    triples = sum(len(tokens) * len(width) * len(rows) for tokens, width, rows in seen)
    assert triples == size**3


def gathered(move: Move | None, axis: str, dim: str | int) -> bool:
    return move is not None and (move.axis, move.dim) == (axis, dim)


def held(size: int, grid: Grid, at: dict[str, int], axes: "list[str] | tuple[str, ...]") -> frozenset[int]:
    """The numbers below `size` that a rank holds of a dim which these axes split, those of both sides first."""
    numbers = list(range(size))
    for axis in sorted(axes, key=lambda name: name in (grid.outer_only, grid.inner_only)):
        share = len(numbers) // grid.axes[axis]
        numbers = numbers[at[axis] * share : (at[axis] + 1) * share]
    return frozenset(numbers)


@given(st.integers(0, 60), st.integers(1, 12))
def test_chunks_are_those_of_torch(size: int, parts: int) -> None:
    """Catches shards cut otherwise than DTensor and FSDP2 cut them, and parts left out where there are fewer rows."""
    theirs = [len(part) for part in torch.arange(size).chunk(parts)] if size else [0]
    assert chunks(size, parts) == (*theirs, *[0] * (parts - len(theirs)))


def test_the_smaller_operand_moves() -> None:
    """Catches the larger one moved: an input gathered twice and its gradient once, or an output moved twice."""
    assert [input_stays(width, 60, regather=True) for width in (39, 40, 60)] == [False, True, True]
    assert [input_stays(width, 60, regather=False) for width in (59, 60, 240)] == [False, True, True]


def test_an_embedding_has_the_shards_of_a_tied_head() -> None:
    """Catches a tied table that lies otherwise than the head that shares it."""
    for grid in GRIDS:
        assert grid.embedding(tied=True).shards == grid.linear("colwise").shards
    assert GRIDS[3].embedding(tied=False).shards == {"depth": None, "row": 0, "col": 1}


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("tensor=4", {"tensor": 4}),
        ("tensor=9 tensor_kind=2d", {"row": 3, "col": 3}),
        ("tensor=6 tensor_kind=2d grid=3x2", {"row": 3, "col": 2}),
        ("tensor=8 tensor_kind=2.5d depth=2", {"depth": 2, "row": 2, "col": 2}),
        ("tensor=12 tensor_kind=2.5d depth=2 grid=2x3", {"depth": 2, "row": 2, "col": 3}),
        ("tensor=27 tensor_kind=3d", {"output": 3, "input": 3, "weight": 3}),
        ("tensor=12 tensor_kind=3d grid=2x2x3", {"output": 2, "input": 2, "weight": 3}),
        ("tensor_kind=2d", {"row": 1, "col": 1}),
    ],
)
def test_the_grid_of_a_plan(text: str, axes: dict[str, int]) -> None:
    """Catches rows and columns exchanged, and a root rounded the wrong way."""
    assert Plan.parse(text).tensor_grid.axes == axes


def test_every_cube_and_square_is_found() -> None:
    """Catches a root that rounding misses: 64 ** (1 / 3) is 3.9999..."""
    for side in range(1, 41):
        assert Plan(tensor=side**3, tensor_kind="3d").tensor_grid.sizes == (side,) * 3
        assert Plan(tensor=side**2, tensor_kind="2d").tensor_grid.sizes == (side,) * 2


@pytest.mark.parametrize(
    ("text", "ring", "ulysses"),
    [
        ("ring=2 ulysses=3 tensor=4", 2, 3),
        ("ring=2 ulysses=3 tensor=6 tensor_kind=2d grid=3x2", 6, 3),
        ("ring=2 ulysses=3 tensor=6 tensor_kind=2d grid=3x2 tensor_tokens=ulysses", 2, 9),
        ("tensor=12 tensor_kind=2.5d depth=2 grid=3x2", 6, 1),
        ("tensor=12 tensor_kind=3d grid=2x2x3 ulysses=2 tensor_tokens=ulysses", 1, 12),
    ],
)
def test_the_degrees_of_attention(text: str, ring: int, ulysses: int) -> None:
    """Catches token axes of a grid that no exchange of attention's knows of, or that join both of its axes."""
    plan = Plan.parse(text)
    assert (plan.attention_ring, plan.attention_ulysses) == (ring, ulysses)
    assert plan.rings == (1, ring)
