"""Where ranks stand and what they hold: the same as the fabric and the shards of a run, without either."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloom.fabric import Fabric
from seqloom.geometry import Layout, total
from seqloom.plan import Plan, shortest
from seqloom.planner import Place, Tokens, inner_spans, outer_spans, places, tokens_held
from seqloom.sequence.tokens import split_tokens

PLANS = [
    "data=2 ring=3 ulysses=2",
    "ring=2 tensor=3",
    "tensor=4 sequence_parallel=false ulysses=2",
    "ring=2 tensor=6 tensor_kind=2d grid=3x2",
    "ulysses=2 tensor=6 tensor_kind=2d grid=2x3 tensor_tokens=ulysses",
    "tensor=8 tensor_kind=2.5d depth=2 data=2",
    "tensor=8 tensor_kind=3d ring=2",
    "tensor=12 tensor_kind=3d grid=2x3x2 tensor_tokens=ulysses ulysses=2",
    "tensor=6 tensor_kind=3d grid=3x2x1 layout=contiguous",
    "tensor=2 ulysses=3 data=2 order=ulysses-tensor-ring-pipeline-data",
    "ring=2 tensor=4 tensor_kind=2d order=tensor-data-ring-ulysses-pipeline",
]


@pytest.mark.parametrize("text", PLANS)
@given(st.integers(0, 60))
def test_places_are_those_of_the_fabric(text: str, more: int) -> None:
    """Catches a rank counted on the wrong axis, and tokens predicted for another rank than the one that holds them."""
    plan = Plan.parse(text)
    layout = Layout(plan.layout, shortest(plan) + more, plan.attention_ring, plan.attention_ulysses)
    found, held = list(places(plan)), []
    copy = [place.rank(plan, data=data) for place in found for data in range(plan.data)]
    assert sorted(copy) == list(range(plan.world_size))
    for place in found:
        fabric = Fabric.sketch(plan, place.rank(plan, data=plan.data - 1))
        assert fabric.data.rank == plan.data - 1
        assert (fabric.ring.rank, fabric.ulysses.rank) == (place.ring, place.ulysses)
        assert {name: axis.rank for name, axis in fabric.grid.items()} == place.on_grid(plan)
        split, tokens = split_tokens(layout, fabric), Tokens.of(plan, layout, place)
        assert (split.outer, split.inner) == (outer_spans(plan, layout, place), inner_spans(layout, place))
        held.append(tokens)
        assert tokens == Tokens(total(split.outer), total(split.inner), split.sizes)

    assert tokens_held(plan, layout) == ({tokens.outer for tokens in held}, {tokens.inner for tokens in held})


@pytest.mark.parametrize("text", PLANS)
def test_a_move_along_an_axis_changes_it_alone(text: str) -> None:
    """Catches a neighbour on one axis that stands elsewhere on another."""
    plan = Plan.parse(text)
    for place, (axis, size) in product(places(plan), plan.tensor_grid.axes.items()):
        for rank in range(size):
            moved = place.moved(plan, axis, rank)
            assert moved.on_grid(plan) == {**place.on_grid(plan), axis: rank}
            if plan.axis_order[0] == "tensor":
                assert moved.rank(plan) // plan.tensor == place.rank(plan) // plan.tensor


def test_the_pieces_of_a_cube_by_hand() -> None:
    """Catches outer tokens taken from ranks that share other inner ones: 8 tokens over a cube of 2."""
    plan = Plan(tensor=8, tensor_kind="3d", layout="contiguous")
    layout = Layout("contiguous", 8, 4, 1)

    def held(spans: tuple[object, ...]) -> list[int]:
        return [position for span in spans for position in range(*span)]  # type: ignore[misc]

    at = {(o, i, w): Place(2 * o + w, 0, i) for o, i, w in product(range(2), repeat=3)}
    assert {key: place.on_grid(plan) for key, place in at.items()} == {
        (o, i, w): {"output": o, "input": i, "weight": w} for o, i, w in at
    }
    assert [held(inner_spans(layout, at[o, 0, w])) for o in (0, 1) for w in (0, 1)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    # Over `output` the inner tokens of weight 0 are 0, 1 and 4, 5: `input` cuts those four in two.
    assert [held(outer_spans(plan, layout, at[0, i, 0])) for i in (0, 1)] == [[0, 1], [4, 5]]
    assert [held(outer_spans(plan, layout, at[1, i, 1])) for i in (0, 1)] == [[2, 3], [6, 7]]
