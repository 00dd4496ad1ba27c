"""The share of time in a pipeline's bubble, held against torch's own order of work; no timings."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

from seqloom.plan import Plan, micro_batches_needed
from seqloom.planner import bubble_share

UNITS = {"F": 1, "I": 1, "W": 1, "B": 2}
"""Time of a stage's forward, backward for inputs and for weights, and of both at once."""


def plain(plan: Plan, rank: int, micro_batches: int) -> list[tuple[str, int, int]]:
    """GPipe's and 1F1B's order, written out: as (kind, stage, micro-batch)."""
    ahead = micro_batches if plan.schedule == "gpipe" else min(micro_batches, plan.pipeline - rank)
    found = [("F", rank, number) for number in range(ahead)]
    for number in range(micro_batches):
        found.append(("B", rank, number))
        found += [("F", rank, ahead + number)] if ahead + number < micro_batches else []
    return found


def orders(plan: Plan, micro_batches: int) -> list[list[tuple[str, int, int]]]:
    """What each rank does, in order."""
    ranks, chunks = plan.pipeline, plan.num_stages // plan.pipeline
    if plan.schedule in ("gpipe", "1f1b"):
        return [plain(plan, rank, micro_batches) for rank in range(ranks)]
    kind: Any = ScheduleZBVZeroBubble if plan.schedule == "zbv" else ScheduleInterleaved1F1B
    asked = SimpleNamespace(
        pp_group_size=ranks,
        num_stages=plan.num_stages,
        n_local_stages=chunks,
        _n_microbatches=micro_batches,
        microbatches_per_round=micro_batches // max(1, micro_batches // ranks),
    )
    return [
        [
            (action.computation_type.value, action.stage_index, action.microbatch_index)
            for action in kind._calculate_single_rank_operations(asked, rank)
            if action is not None
        ]
        for rank in range(ranks)
    ]


def span(plan: Plan, micro_batches: int) -> int:
    """Units of time from the first forward to the last backward, when everything starts as soon as it can."""
    waiting = orders(plan, micro_batches)
    free, ended = [0] * plan.pipeline, dict[tuple[str, int, int], int]()
    while any(waiting):
        moved = False
        for rank, order in enumerate(waiting):
            while order:
                kind, stage, number = order[0]
                needs = [("F", stage - 1, number)] if kind == "F" and stage else []
                if kind in "IB":
                    needs = [("F", stage, number)]
                    needs += [("I", stage + 1, number)] if stage + 1 < plan.num_stages else []
                elif kind == "W":
                    needs = [("I", stage, number)]
                if any(need not in ended for need in needs):
                    break
                free[rank] = max([free[rank], *(ended[need] for need in needs)]) + UNITS[kind]
                ended["I" if kind == "B" else kind, stage, number] = free[rank]
                order.pop(0)
                moved = True
        assert moved
    return max(free)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zbv"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_the_formula_is_that_of_the_order(schedule: str, ranks: int) -> None:
    """Catches a formula of another paper's order than the one that runs."""
    plan = Plan.parse(f"pipeline={ranks} schedule={schedule}")
    for asked in range(1, 3 * ranks):
        count = micro_batches_needed(plan, asked)
        work = 3 * plan.num_stages // ranks * count
        assert bubble_share(plan, count) == pytest.approx(1 - work / span(plan, count), abs=1e-12), (schedule, count)


def test_no_pipeline_waits_for_nobody() -> None:
    """Catches a bubble claimed where there is one rank."""
    assert bubble_share(Plan(), 4) == 0
