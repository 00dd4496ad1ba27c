"""What is computed again of each stage, and which choices are refused with a way out."""

import pytest

from seqloom.plan import ModelShape, Plan, Unit, run_again, units
from seqloom.plan.recompute import recompute_reasons

MODEL = ModelShape(family="llama", vocab=96, hidden=96, layers=6, heads=12, kv_heads=6, head_dim=8, max_positions=4096)


def test_units_of_stages() -> None:
    """Catches layers left out of a unit or in two, a stage that takes another's choice, and attention kept by full."""
    plan = Plan(pipeline=3, recompute="full:uniform:2/none/selective")
    assert units(plan, 0, 3) == (Unit(0, 2), Unit(2, 3))
    assert units(plan, 1, 3) == ()
    assert units(plan, 2, 2) == (Unit(0, 1, True), Unit(1, 2, True))
    assert units(Plan(recompute="full:block:4"), 0, 3) == tuple(Unit(i, i + 1) for i in range(3))
    assert run_again(plan, (3, 3, 2)) == (5, 3)


REFUSED = [
    ("recompute=full/none", "names 2 stages, but the plan has 1; name one choice for all, or 1."),
    ("pipeline=2 recompute=full/none/none", "names 3 stages, but the plan has 2"),
    ("recompute=full:block:7", "counts 7 layers, but the model has 6"),
    ("pipeline=3 recompute=full:block:4", "counts 4 layers, but the largest stage has 2; use at most so many"),
    ("pipeline=2 stages=2-4 recompute=full:uniform:5", "counts 5 layers, but the largest stage has 4; "),
    ("pipeline=2 stages=2-4 recompute=full:block:3/none", "counts 3 layers in stage 0, which has 2; use at most so"),
    ("pipeline=2 schedule=zbv recompute=selective", "does not go with schedule=zbv"),
    ("activations=offloaded", "recompute=none keeps none"),
    ("recompute=full activations=partitioned", "tensor=1 has one rank a layer"),
    ("tensor=2 recompute=full activations=partitioned", "sequence_parallel=true has split them already"),
    ("tensor=4 tensor_kind=2d recompute=full activations=partitioned", "tensor_kind=2d has split them already"),
]


@pytest.mark.parametrize(("text", "says"), REFUSED, ids=[text for text, _ in REFUSED])
def test_refusals(text: str, says: str) -> None:
    """Catches a choice that would be taken and not honoured."""
    (reason,) = recompute_reasons(Plan.parse(text), MODEL)
    assert says in reason and ";" in reason


@pytest.mark.parametrize(
    "text",
    [
        "recompute=full",
        "recompute=full:uniform:6",
        "pipeline=2 stages=2-4 recompute=full:block:4",
        "pipeline=2 stages=2-4 recompute=none/full:block:4",
        "pipeline=4 stages=1-2-2-1 recompute=full:uniform:2",
        "pipeline=2 recompute=selective",
        "pipeline=2 schedule=interleaved recompute=full/none/selective/full:block:1",
        "data=2 zero=3 recompute=full:uniform:2",
        "tensor=2 sequence_parallel=false recompute=selective activations=partitioned",
        "tensor=4 tensor_kind=2d recompute=selective activations=offloaded",
    ],
)
def test_taken(text: str) -> None:
    """Catches a refusal of what is honoured."""
    assert not list(recompute_reasons(Plan.parse(text), MODEL))
