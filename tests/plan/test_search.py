"""All legal plans of a world, none twice and none forgotten."""

from itertools import product

import pytest

from seqloom.plan import ModelShape, Plan, every_plan, fit, read_config, reasons

TINY = ModelShape.from_config(fit(read_config("llama"), Plan(ulysses=8), 64, layers=16))


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
