"""From a plan to named process groups; nothing else in seqloom makes groups."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from math import prod

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

from seqloom.errors import PlanError, counted
from seqloom.fabric.meter import Meter
from seqloom.fabric.watch import Watch
from seqloom.plan import Plan

AXES = ("pipeline", "data", "ring", "ulysses")
"""Mesh axes, slowest first, before those of the tensor grid, in a plan's own order of ranks."""


@dataclass(frozen=True)
class Axis:
    """This rank's place on one axis of the mesh.

    `rank` is the coordinate on the axis, `group` the processes along it (None when there is one, and in a
    sketch).
    """

    name: str
    rank: int
    size: int
    group: distributed.ProcessGroup | None = field(repr=False)
    meter: Meter = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """The processes of a run, arranged as its plan says.

    `ring` and `ulysses` are those of attention: the plan's, with the token axes of the tensor grid that join
    them. `inner` and `outer` are the ring as two axes where the plan has an inner_ring: neighbours, and the
    ranks of equal place among theirs. Without it `inner` is `ring` itself and `outer` one rank.
    `tensor` is the whole tensor group, `grid` its axes by name, slowest first, and `mesh` the same as
    parameters split over it know it (None where there is one rank). `replicas` is data x ring x ulysses of
    the plan as one axis: the ranks that hold the same weights; `zero` are those of them that share them out, and
    `zero_replicas` those that hold the same share. `expert` are the ranks a layer's experts are dealt to, and
    `expert_replicas` those that hold the same experts. `ends` are the first and the last rank of a pipeline, where
    they differ; the others stand on it alone. `world` is all ranks.
    """

    plan: Plan
    device: torch.device
    meter: Meter
    pipeline: Axis
    data: Axis
    ring: Axis
    inner: Axis
    outer: Axis
    ulysses: Axis
    tensor: Axis
    grid: dict[str, Axis]
    replicas: Axis
    zero: Axis
    zero_replicas: Axis
    expert: Axis
    expert_replicas: Axis
    ends: Axis
    world: Axis
    mesh: DeviceMesh | None = field(default=None, repr=False)
    groups: tuple[distributed.ProcessGroup, ...] = field(default=(), repr=False)

    @property
    def rank(self) -> int:
        """This process among all of the run."""
        return self.world.rank

    @contextmanager
    def second_world(self, timeout_seconds: float) -> Iterator[Axis]:
        """All ranks once more, as CPU processes: for what a thread of each says beside the training.

        Every rank enters it together. The messages of two threads in one group would be taken for one another.
        """
        group = None
        if self.world.size > 1:
            group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        yield replace(self.world, name="beside", group=group)
        if group is not None:
            distributed.destroy_process_group(group)

    def alone(self) -> distributed.ProcessGroup:
        """A new group of this process alone, for code that hands torch.distributed a group, where none means all.

        Every rank calls it together; who asked for it ends it.
        """
        return distributed.new_subgroups_by_enumeration([[rank] for rank in range(self.world.size)])[0]

    def close(self) -> None:
        """End the groups of this fabric, all but the one torch.distributed itself was given."""
        for group in self.groups:
            distributed.destroy_process_group(group)

    @classmethod
    def build(cls, plan: Plan, device: torch.device | str | None = None) -> "Fabric":
        """Make the groups of `plan`; every process of the run calls it together.

        torch.distributed must be initialised, unless the plan takes one process. Raises PlanError
        when the plan does not take exactly the processes there are.
        """
        started = distributed.is_initialized()
        world = distributed.get_world_size() if started else 1
        if plan.world_size != world:
            raise PlanError(f"The plan '{plan}' takes {counted(plan.world_size, 'process')}, but there are {world}.")
        rank = distributed.get_rank() if started else 0
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        made: dict[tuple[int, ...], distributed.ProcessGroup] = {}
        if world > 1:
            made[tuple(range(world))] = distributed.group.WORLD

        def group_of(families: Families) -> distributed.ProcessGroup | None:
            mine = next((ranks for ranks in families if rank in ranks), (rank,))
            if mine not in made:
                group = distributed.new_subgroups_by_enumeration([list(ranks) for ranks in families])[0]
                if group is None:
                    return None
                made[mine] = group
            return made[mine]

        fabric = _arranged(plan, rank, device, group_of)
        if plan.tensor > 1 and 1 in plan.tensor_grid.sizes:
            group_of(tuple((one,) for one in range(world)))  # DTensor asks for a group of one too
        mesh = _mesh(fabric, made) if plan.tensor > 1 else None
        groups = tuple(group for ranks, group in made.items() if len(ranks) < world)
        if device.type == "cuda":
            # NCCL asks all ranks of a group to take part in its first call, and the first trade may be between a few.
            for group in groups:
                distributed.all_reduce(torch.zeros(1, device=device), group=group)
        if world > 1:
            store = distributed.group.WORLD.get_group_store()
            fabric.meter.watch = Watch(fabric.meter.place, rank, world, store)
        return replace(fabric, mesh=mesh, groups=groups)

    @classmethod
    def sketch(cls, plan: Plan, rank: int = 0) -> "Fabric":
        """The fabric as one rank would see it, without processes or groups: for work on shapes alone."""
        return _arranged(plan, rank, torch.device("meta"), lambda _: None)


Families = tuple[tuple[int, ...], ...]
"""The ranks of every group of an axis; each rank is in one of them at most."""


class _Lines:
    """The groups of ranks along the axes of a plan, and where one rank stands in them."""

    def __init__(self, plan: Plan, rank: int, group_of: Callable[[Families], distributed.ProcessGroup | None]) -> None:
        self.plan, self.rank, self.group_of, self.meter = plan, rank, group_of, Meter()
        self.grid = plan.tensor_grid.axes
        sizes = {**{name: getattr(plan, name) for name in AXES}, **self.grid}
        self.ordered = [
            name for axis in reversed(plan.axis_order) for name in (self.grid if axis == "tensor" else (axis,))
        ]
        self.ranks = torch.arange(plan.world_size, device="cpu").view(*(sizes[name] for name in self.ordered))

    def families(self, *names: str) -> Families:
        """The ranks of each group along these axes together."""
        last = sorted(map(self.ordered.index, names))  # a group counts its members by number
        order = [*(i for i in range(len(self.ordered)) if i not in last), *last]
        length = prod(self.ranks.shape[i] for i in last)
        return tuple(map(tuple, self.ranks.permute(order).reshape(-1, length).tolist()))

    def joined(self, name: str) -> Families:
        """The groups of `ring` or `ulysses` in attention, which the token axes of the grid may join."""
        inner = self.plan.tensor_grid.inner.tokens
        tokens = [axis for axis in self.grid if axis in inner and self.plan.tensor_tokens == name]
        return self.families(name, *tokens)

    def place(self, name: str, found: Families) -> Axis:
        """This rank on an axis of such groups; every rank calls it together."""
        mine = next(ranks for ranks in found if self.rank in ranks)
        group = self.group_of(found) if len(mine) > 1 else None
        return Axis(name, mine.index(self.rank), len(mine), group, self.meter)

    def along(self, name: str) -> Axis:
        """This rank on an axis of the plan or the grid."""
        return self.place(name, self.families(name))

    def alone(self, name: str) -> Axis:
        """An axis of this rank only."""
        return Axis(name, 0, 1, None, self.meter)

    def halves(self, whole: Axis, found: Families, inner: int, names: tuple[str, str]) -> tuple[Axis, Axis]:
        """An axis as two: `inner` neighbours, and the ranks of equal place among theirs."""
        if inner == whole.size:
            return replace(whole, name=names[0]), self.alone(names[1])
        near = tuple(one[i : i + inner] for one in found for i in range(0, whole.size, inner))
        far = tuple(one[i::inner] for one in found for i in range(inner))
        return self.place(names[0], near), self.place(names[1], far)

    def ends(self) -> Axis:
        """The first and the last rank of each pipeline, where the first and the last stage lie on two."""
        if self.plan.pipeline == 1 or self.plan.schedule == "zbv":
            return self.alone("ends")
        pairs = tuple((ranks[0], ranks[-1]) for ranks in self.families("pipeline"))
        group = self.group_of(pairs)  # by all ranks, those between the ends too
        mine = next((ranks for ranks in pairs if self.rank in ranks), (self.rank,))
        return Axis("ends", mine.index(self.rank), len(mine), group, self.meter)


def _arranged(
    plan: Plan, rank: int, device: torch.device, group_of: Callable[[Families], distributed.ProcessGroup | None]
) -> Fabric:
    """The fabric as `rank` stands on its axes, without a mesh for parameters."""
    lines = _Lines(plan, rank, group_of)
    around, alike = lines.joined("ring"), lines.families("data", "ring", "ulysses")
    ring, replicas = lines.place("ring", around), lines.place("replicas", alike)
    inner, outer = lines.halves(ring, around, plan.rings[1], ("inner_ring", "outer_ring"))
    sharing = plan.replicas // plan.zero_replicas
    zero, zero_replicas = lines.halves(replicas, alike, sharing, ("zero", "zero_replicas"))
    expert, expert_replicas = lines.alone("expert"), replicas
    if plan.expert > 1:
        dealt = lines.families("data", "ring", "ulysses", *(lines.grid if plan.expert_tensor == 1 else ()))
        names = ("expert", "expert_replicas")
        expert, expert_replicas = lines.halves(lines.place("expert", dealt), dealt, plan.expert, names)
    return Fabric(
        plan=plan,
        device=device,
        meter=lines.meter,
        pipeline=lines.along("pipeline"),
        data=lines.along("data"),
        ring=ring,
        inner=inner if plan.rings[0] > 1 else ring,
        outer=outer,
        ulysses=lines.place("ulysses", lines.joined("ulysses")),
        tensor=lines.place("tensor", lines.families(*lines.grid)),
        grid={name: lines.along(name) for name in lines.grid},
        replicas=replicas,
        zero=zero,
        zero_replicas=zero_replicas,
        expert=expert,
        expert_replicas=expert_replicas,
        ends=lines.ends(),
        world=lines.place("world", lines.families(*lines.ordered)),
    )


def _mesh(fabric: Fabric, made: Mapping[tuple[int, ...], distributed.ProcessGroup]) -> DeviceMesh:
    """This rank's tensor group as parameters know it, made of the groups there are."""
    assert fabric.tensor.group is not None
    mine = distributed.get_process_group_ranks(fabric.tensor.group)
    ranks = torch.tensor(mine, device="cpu").view(*fabric.plan.tensor_grid.sizes)
    groups = [axis.group or made[(fabric.rank,)] for axis in fabric.grid.values()]
    return DeviceMesh.from_group(groups, fabric.device.type, mesh=ranks, mesh_dim_names=tuple(fabric.grid))
