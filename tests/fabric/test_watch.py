"""A hang names the collective, its axis and the ranks that are missing."""

import time
from typing import Any

import pytest
import torch
from torch import distributed

from pool import Pool
from seqloom.errors import CommunicationError
from seqloom.fabric import Fabric, all_reduce_, naming_others, start_trade
from seqloom.fabric.failure import naming
from seqloom.fabric.watch import missing, standings
from seqloom.plan import Plan

TIMEOUT = 4.0
"""Seconds; ranks that are merely slow on a busy machine must not reach it."""


def place(inside: tuple[str, str, int] | None = None, **counts: int) -> dict[str, Any]:
    return {"counts": counts, "inside": inside, "last": inside or ("all-reduce", "world", 3)}


def test_who_is_missing() -> None:
    """Catches a rank blamed that has arrived, one behind that is not, and a culprit outside the group unnamed."""
    waiting = ("shift", "ring", 7)
    places = {0: place(waiting, ring=7), 1: place(ring=6), 3: place(waiting, ring=7), 5: place(ring=9)}
    assert missing("ring", 7, [0, 3], places).startswith("every rank has arrived")
    assert missing("ring", 7, [0, 1, 2, 3], places) == (
        "rank 1 has not arrived: it is in no collective, after all-reduce 3 over world; "
        "rank 2 has not arrived: it does not answer, so its process has ended, is stopped, or cannot be reached"
    )
    held = {0: place(waiting, ring=7), 1: place(("send", "pipeline", 0), ring=6), 5: place(ring=6)}
    assert missing("ring", 7, [0, 1], held) == (
        "rank 1 has not arrived: it waits in send over pipeline; "
        "rank 5 keeps them: it is in no collective, after all-reduce 3 over world"
    )
    assert missing("ring", 7, range(30), {}).endswith("; nor have 22 more ranks")
    assert standings(12, places).endswith("; and 4 more ranks")


def places_in_a_pipeline() -> list[Any]:
    """Where this rank says it is inside a step of the pipeline, after a collective of that step, and after the step."""
    fabric = Fabric.build(Plan(ring=2))
    place, found = fabric.meter.place, []
    place.begin("pipeline", "pipeline")
    with naming("pipeline", fabric.ring, 1):
        all_reduce_(torch.ones(3), fabric.ring)
        found.append(place.inside)
    return [*found, place.inside]


def test_a_rank_stands_in_the_pipeline_after_a_collective_inside_it(pool: Pool) -> None:
    """Catches a rank stuck in a pipeline's step that says it is in no collective."""
    assert pool.run(2, places_in_a_pipeline)[0] == [("pipeline", "ring", 1), None]


def until_all_have_said(fabric: Fabric, waiting: int) -> None:
    """Be in no collective until that many ranks have given up; the store's lock stays free for the watch."""
    store = distributed.group.WORLD.get_group_store()
    while store.add("given up", 0) < waiting:
        time.sleep(0.05)


def hang(kind: str) -> str:
    """Rank 2 of three does not come to the second collective; the error that the others meet."""
    fabric = Fabric.build(Plan(ring=3))
    ones = torch.ones(3)
    all_reduce_(ones, fabric.ring)
    empty = [[torch.empty(0)]] * 3
    start_trade(empty, empty, fabric.ring)  # counted by all, though nothing is sent
    if fabric.rank == 2:
        until_all_have_said(fabric, 2)
        return ""
    with pytest.raises(CommunicationError) as caught:
        if kind == "fabric":
            all_reduce_(ones, fabric.ring)
        else:
            with naming_others(fabric):
                distributed.all_reduce(ones)
    distributed.group.WORLD.get_group_store().add("given up", 1)
    return str(caught.value)


def test_a_hang_names_collective_axis_and_missing_rank(pool: Pool) -> None:
    """Catches a time-out that names nothing, a rank that cannot answer while it is stuck, and numbers that differ by
    rank where some had nothing to send."""
    first, second, _ = pool.run(3, hang, "fabric", collective_seconds=TIMEOUT)
    for rank, said in enumerate((first, second)):
        assert said.startswith("all-reduce 3 on axis ring waited"), said
        assert f"at rank {rank} of 3 (ranks 0, 1, 2)" in said
        assert "rank 2 has not arrived: it is in no collective, after all-to-all 2 over ring; see docs" in said


def test_a_hang_outside_the_fabric_tells_where_all_ranks_are(pool: Pool) -> None:
    """Catches a collective of FSDP or a pipeline that ends in gloo's own words."""
    first, second, _ = pool.run(3, hang, "raw", collective_seconds=TIMEOUT)
    for rank, said in enumerate((first, second)):
        assert said.startswith(f"A collective of torch itself (of FSDP or of the pipeline) failed at rank {rank}: "), (
            said
        )
    assert "rank 2: it is in no collective, after all-to-all 2 over ring" in first + second
