"""The mesh: who sits where, with whom."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from pool import Pool
from seqloom.errors import PlanError, counted
from seqloom.fabric import AXES, Axis, Fabric, all_reduce_
from seqloom.plan import Plan

TEXTS = [
    "data=3",
    "ring=3",
    "ulysses=3",
    "ring=3 ulysses=2",
    "ring=2 ulysses=3",
    "data=3 tensor=2",
    "pipeline=2 ring=3",
    "pipeline=3 data=2",
    "data=2 ring=2 ulysses=2",
    "ring=2 ulysses=2 tensor=2",
    "pipeline=2 data=2 tensor=2",
    "pipeline=2 ulysses=4",
    "data=4 ulysses=2",
    "ring=4 inner_ring=2",
    "ring=6 inner_ring=2",
    "ring=6 inner_ring=3",
    "ring=6 inner_ring=6",
    "ring=3 inner_ring=1 ulysses=2",
    "data=2 ring=4 inner_ring=2",
    "ring=4 inner_ring=2 ulysses=2",
]


def members(axis: Axis) -> list[int]:
    """The global ranks of an axis, by its own group."""
    return [dist.get_rank()] if axis.group is None else dist.get_process_group_ranks(axis.group)


def place(text: str) -> dict[str, Any]:
    fabric = Fabric.build(Plan.parse(text))
    axes = {name: getattr(fabric, name) for name in (*AXES, "inner", "outer", "replicas", "world")}
    heard = {}
    for name, axis in axes.items():
        # The ranks as seen by a collective, not by the book: each adds 2 ** its global rank.
        mask = torch.tensor([1 << fabric.rank])
        heard[name] = int(all_reduce_(mask, axis))
    return {
        "rank": (fabric.rank, dist.get_rank()),
        "places": {name: (axis.name, axis.rank, axis.size) for name, axis in axes.items()},
        "members": {name: members(axis) for name, axis in axes.items()},
        "heard": heard,
    }


def rings(plan: Plan, ring: list[int], rank: int) -> dict[str, tuple[str, list[int]]]:
    """The axis names and global ranks that `inner` and `outer` must have: neighbours, and every inner_ring-th."""
    inner = plan.inner_ring or plan.ring
    first, place = ring.index(rank) // inner * inner, ring.index(rank) % inner
    name = "ring" if inner == plan.ring else "inner_ring"
    return {"inner": (name, ring[first : first + inner]), "outer": ("outer_ring", ring[place::inner])}


@pytest.mark.parametrize("text", TEXTS)
def test_rank_order(pool: Pool, text: str) -> None:
    """Catches two axes that trade places: tensor is fastest, then ulysses, ring, data, and pipeline slowest."""
    plan = Plan.parse(text)
    shape = [getattr(plan, name) for name in ("pipeline", "data", "ring", "ulysses", "tensor")]
    grid = torch.arange(plan.world_size).view(shape)
    for rank, found in enumerate(pool.run(plan.world_size, place, text)):
        at = torch.nonzero(grid == rank)[0].tolist()
        assert found["rank"] == (rank, rank)
        expected: dict[str, list[int]] = {}
        for dim, name in enumerate(AXES):
            line: list[Any] = list(at)
            line[dim] = slice(None)
            expected[name] = grid[tuple(line)].tolist()
            assert found["places"][name] == (name, at[dim], shape[dim])
        expected["replicas"] = grid[at[0], :, :, :, at[4]].flatten().tolist()
        expected["world"] = list(range(plan.world_size))
        assert {name: found["members"][name] for name in expected} == expected
        assert {name: found["heard"][name] for name in expected} == {
            n: sum(1 << r for r in x) for n, x in expected.items()
        }
        for name in ("replicas", "world"):
            ranks = expected[name]
            assert found["places"][name] == (name, ranks.index(rank), len(ranks))
        for name, along in rings(plan, expected["ring"], rank).items():
            axis_name, ranks = along
            assert found["places"][name] == (axis_name, ranks.index(rank), len(ranks))
            assert found["members"][name] == ranks
            assert found["heard"][name] == sum(1 << r for r in ranks)


ORDERS = [
    ("ulysses-tensor-ring-pipeline-data", "data=2 tensor=2 ulysses=2"),
    ("tensor-ulysses-ring-pipeline-data", "data=2 ring=2 pipeline=2"),
    ("data-pipeline-ring-tensor-ulysses", "ring=3 tensor=2"),
]


@pytest.mark.parametrize(("order", "text"), ORDERS)
def test_another_rank_order(pool: Pool, order: str, text: str) -> None:
    """Catches an axis whose members are those of our order, or counted otherwise than its group counts them."""
    plan = Plan.parse(f"{text} order={order}")
    slowest = list(reversed(order.split("-")))
    grid = torch.arange(plan.world_size).view([getattr(plan, name) for name in slowest])
    for rank, found in enumerate(pool.run(plan.world_size, place, str(plan))):
        at = torch.nonzero(grid == rank)[0].tolist()

        def members(*names: str, at: list[int] = at) -> list[int]:
            line: list[Any] = [slice(None) if name in names else at[dim] for dim, name in enumerate(slowest)]
            return grid[tuple(line)].flatten().tolist()

        axes = {name: members(name) for name in AXES} | {"replicas": members("data", "ring", "ulysses")}
        for name, ranks in (axes | {"world": list(range(plan.world_size))}).items():
            assert found["members"][name] == ranks
            assert found["heard"][name] == sum(1 << r for r in ranks)
            assert found["places"][name] == (name, ranks.index(rank), len(ranks))


def build(text: str) -> None:
    Fabric.build(Plan.parse(text))


@pytest.mark.parametrize(("world", "text"), [(3, "ring=2"), (3, "ring=2 ulysses=2"), (1, "data=2"), (2, "data=1")])
def test_world_must_fit(pool: Pool, world: int, text: str) -> None:
    """Catches processes that are left over, or missing, without a word."""
    plan = Plan.parse(text)
    with pytest.raises(PlanError) as caught:
        pool.run(world, build, text)
    assert f"'{plan}' takes {counted(plan.world_size, 'process')}, but there " in str(caught.value)
    assert f" {world}." in str(caught.value)


def test_one_process_needs_no_group() -> None:
    """Catches a plan of one process that asks for torch.distributed."""
    assert not dist.is_initialized()
    fabric = Fabric.build(Plan())
    assert fabric.world.size == 1 and fabric.rank == 0 and fabric.ring.group is None
    with pytest.raises(PlanError, match="takes 2 processes, but there are 1"):
        Fabric.build(Plan(ring=2))


def two_plans() -> list[tuple[float, float, float, dict[str, int], dict[str, int]]]:
    first, second = Fabric.build(Plan(ring=3, ulysses=2)), Fabric.build(Plan(data=2, ring=3))
    rank = float(first.rank)
    results = []
    for _ in range(2):  # interleaved
        along_ring, of_second, of_data = (torch.full((3,), rank, dtype=torch.float64) for _ in range(3))
        all_reduce_(along_ring, first.ring)
        all_reduce_(of_second, second.ring)
        all_reduce_(of_data, second.data)
        results.append(
            (float(along_ring[0]), float(of_second[0]), float(of_data[0]), first.meter.sent, second.meter.sent)
        )
    return results


def test_two_plans_in_one_process(pool: Pool) -> None:
    """Catches groups or meters kept in a module: the second fabric would answer for the first."""
    for rank, found in enumerate(pool.run(6, two_plans)):
        mine = rank % 2
        sums = (float(mine + 2 + mine + 4 + mine), 3.0 if rank < 3 else 12.0, float(2 * (rank % 3) + 3))
        sent = 2 * 2 * 24 // 3
        assert [x[:3] for x in found] == [sums, sums]
        assert [x[3] for x in found] == [{"ring": sent}, {"ring": 2 * sent}]
        assert [x[4] for x in found] == [{"ring": sent, "data": 24}, {"ring": 2 * sent, "data": 48}]


def closed(text: str) -> tuple[list[float], int]:
    before = len(dist.distributed_c10d._world.pg_map)
    first = Fabric.build(Plan.parse(text))
    first.close()
    left = len(dist.distributed_c10d._world.pg_map) - before
    second = Fabric.build(Plan(data=2, ring=3))
    ones = torch.ones(1)
    all_reduce_(ones, second.ring)
    second.close()
    return ones.tolist(), left


@pytest.mark.parametrize("text", ["ring=3 ulysses=2", "ring=6 inner_ring=2", "data=3 ulysses=2"])
def test_a_closed_fabric_leaves_the_rest_alone(pool: Pool, text: str) -> None:
    """Catches a close that ends the default group, or groups whose threads stay when their fabric is gone."""
    assert pool.run(6, closed, text) == [([3.0], 0)] * 6
