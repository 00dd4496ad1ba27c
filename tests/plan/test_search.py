"""All legal plans of a world, none twice and none forgotten; the nearest one keeps what it can of every field."""

from itertools import product
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqloom.errors import PlanError
from seqloom.plan import ModelShape, Plan, check, every_plan, fit_world, nearest, read_config, reasons

TINY = ModelShape.from_config(fit_world(read_config("llama"), 8, 64))
EXPERTS = ModelShape.from_config(fit_world(read_config("mixtral"), 4, 64))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
def test_every_plan_is_legal_and_comes_once(world: int) -> None:
    """Catches plans listed that cannot run, listed twice in two spellings, or of another world."""
    found = list(every_plan(TINY, 64, world=world))
    assert len({str(plan) for plan in found}) == len(set(found)) == len(found) > 0
    assert not any(reasons(plan, TINY, 64, world=world) for plan in found)


@pytest.mark.parametrize("world", [2, 4, 6])
def test_no_plan_of_whole_degrees_is_forgotten(world: int) -> None:
    """Catches an axis left out of the list: every tuple of degrees is tried, with every stage and kind."""
    found = set(every_plan(TINY, 64, world=world))
    for degrees in product(range(1, world + 1), repeat=5):
        data, pipeline, ring, ulysses, tensor = degrees
        if data * pipeline * ring * ulysses * tensor != world:
            continue
        for zero, parallel in product(range(4), (True, False)):
            plan = Plan(
                data=data,
                pipeline=pipeline,
                ring=ring,
                ulysses=ulysses,
                tensor=tensor,
                zero=zero,
                sequence_parallel=parallel or tensor == 1,
            )
            assert (plan in found) == (not reasons(plan, TINY, 64, world=world)), str(plan)


def test_no_schedule_share_or_expert_degree_is_forgotten() -> None:
    """Catches schedules, repeated shares or ways to deal out experts that the list leaves out or makes up."""
    found = {plan for plan in every_plan(EXPERTS, 64, world=4) if plan.tensor_kind == "1d"}
    fields = {
        "schedule": ("gpipe", "1f1b", "interleaved", "zbv"),
        "zero": range(4),
        "zero_replicas": (1, 2, 4),
        "expert": (1, 2, 4),
        "expert_tensor": (1, 2, 4),
    }
    axes = [degrees for degrees in product((1, 2, 4), repeat=5) if prod(degrees) == 4]
    legal = set()
    for degrees, values in product(axes, product(*fields.values())):
        named = dict(zip(("data", "pipeline", "ring", "ulysses", "tensor"), degrees, strict=True))
        plan = Plan(**named, **dict(zip(fields, values, strict=True)))
        if not reasons(plan, EXPERTS, 64, world=4):
            legal.add(plan)
    assert len({plan.schedule for plan in legal}) == 4 and len({plan.expert_tensor for plan in legal}) == 3
    assert found == legal


def test_grids_of_every_kind_are_listed() -> None:
    """Catches rectangular grids, depths or cubes that the list passes over."""
    found = {str(plan) for plan in every_plan(TINY, 64, world=8)}
    assert {
        "tensor=8 tensor_kind=2d grid=2x4",
        "tensor=8 tensor_kind=2d grid=4x2",
        "tensor=8 tensor_kind=2.5d depth=2",
        "tensor=8 tensor_kind=3d",
        "data=2 tensor=4 tensor_kind=2d",
    } <= found


NEAREST = {
    "zero=1": "data=1",
    "pipeline=2 zero=1": "pipeline=2",
    "data=4 zero=2 zero_replicas=4": "data=4 zero=2",
    "data=2 zero=1 offload=true": "data=2 zero=1",
    "ring=2 zero=2 pipeline=2 schedule=zbv recompute=full": "zero=2 pipeline=2 ring=2 recompute=full",
    "data=2 expert=3": "data=2",
    "data=6 expert=6": "data=6 expert=3",
    "data=4 tensor=2 expert=16 expert_tensor=2": "data=4 tensor=2 expert=4 expert_tensor=2",
    "data=4 tensor=2 expert=2 expert_tensor=3": "data=4 tensor=2 expert=2 expert_tensor=2",
    "pipeline=2 recompute=full/none/none": "pipeline=2",
    "pipeline=4 recompute=full:block:3": "pipeline=4 recompute=full",
    "tensor=2 recompute=full activations=partitioned": "tensor=2 recompute=full",
    "activations=offloaded": "data=1",
}


@pytest.mark.parametrize("text", NEAREST)
def test_the_nearest_plan_relaxes_what_no_degree_allows(text: str) -> None:
    """Catches a refusal of ZeRO, experts or recomputation without a way out, or one that gives up more than it must."""
    with pytest.raises(PlanError) as caught:
        check(Plan.parse(text), EXPERTS, 64)
    assert caught.value.nearest == NEAREST[text]


degree = st.sampled_from([1, 1, 2, 3, 4])
wide = st.fixed_dictionaries(
    {
        "data": degree,
        "ring": degree,
        "tensor": st.sampled_from([1, 2]),
        "pipeline": st.sampled_from([1, 2, 4]),
        "schedule": st.sampled_from(["1f1b", "gpipe", "zbv"]),
        "zero": st.integers(0, 3),
        "zero_replicas": degree,
        "offload": st.booleans(),
        "expert": degree,
        "expert_tensor": st.sampled_from([1, 1, 2]),
        "recompute": st.sampled_from(["none", "selective", "full/none", "full:block:2", "full:uniform:9"]),
        "activations": st.sampled_from(["whole", "partitioned", "offloaded"]),
    }
)


@settings(max_examples=30)
@given(wide, st.sampled_from([TINY, EXPERTS]))
def test_there_is_always_a_nearest_plan(fields: dict[str, Any], model: ModelShape) -> None:
    """Catches combined reasons that no relaxed plan meets, advice that does not run, and a legal plan changed."""
    plan = Plan(**fields)
    found = nearest(plan, model, 64)
    assert found is not None and reasons(found, model, 64, world=plan.world_size) == []
    if not reasons(plan, model, 64):
        assert found == plan
    bare = Plan(**{axis: fields[axis] for axis in ("data", "ring", "tensor", "pipeline")})
    if not reasons(bare, model, 64):
        kept = [getattr(found, axis) == getattr(plan, axis) for axis in ("data", "ring", "tensor", "pipeline")]
        assert all(kept), "a field that can be relaxed is no reason for other degrees"
