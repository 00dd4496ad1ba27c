"""From a plan to named process groups; nothing else in seqloom makes groups."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from seqloom.errors import PlanError
from seqloom.fabric.meter import Meter
from seqloom.plan import Plan

AXES = ("pipeline", "data", "ring", "ulysses", "tensor")
"""Mesh axes, slowest first: neighbouring ranks share a tensor group, then a Ulysses group."""


@dataclass(frozen=True)
class Axis:
    """This rank's place on one axis of the mesh.

    `rank` is the coordinate on the axis, `group` the processes along it (None when there is one).
    """

    name: str
    rank: int
    size: int
    group: distributed.ProcessGroup | None = field(repr=False)
    meter: Meter = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """The processes of a run, arranged as its plan says.

    `replicas` is data x ring x ulysses as one axis: the ranks that hold the same weights.
    `world` is all ranks. `inner` and `outer` are the ring as two axes where the plan has an
    inner_ring: neighbours, and the ranks of equal place among theirs. Without it `inner` is `ring`
    itself and `outer` one rank.
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
    replicas: Axis
    world: Axis
    groups: tuple[distributed.ProcessGroup, ...] = field(repr=False)

    @property
    def rank(self) -> int:
        """This process among all of the run."""
        return self.world.rank

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
            raise PlanError(f"The plan '{plan}' takes {plan.world_size} processes, but there are {world}.")
        meter, rank = Meter(), distributed.get_rank() if started else 0
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        groups: list[distributed.ProcessGroup] = []

        def place(shape: dict[str, int], wanted: tuple[str, ...]) -> dict[str, Axis]:
            # Only axes of more than one rank are in the mesh: a group costs threads and a rendezvous.
            wide = {name: size for name, size in shape.items() if size > 1}
            alone = {name: Axis(name, 0, 1, None, meter) for name in wanted}
            if not any(name in wide for name in wanted):
                return alone
            mesh = init_device_mesh(device.type, tuple(wide.values()), mesh_dim_names=tuple(wide))
            groups.extend(g for g in mesh.get_all_groups() if g not in (*groups, distributed.group.WORLD))
            return alone | {
                name: Axis(name, mesh.get_local_rank(name), wide[name], mesh.get_group(name), meter)
                for name in wanted
                if name in wide
            }

        everyone = Axis("world", rank, world, distributed.group.WORLD if started and world > 1 else None, meter)
        axes = place({axis: getattr(plan, axis) for axis in AXES}, AXES)
        replicas = plan.data * plan.ring * plan.ulysses
        axes |= place({"pipeline": plan.pipeline, "replicas": replicas, "tensor": plan.tensor}, ("replicas",))
        rings = _rings(plan, axes["ring"], place)
        if device.type == "cuda":
            # NCCL asks all ranks of a group to take part in its first call, and the first trade may be between a few.
            for group in groups:
                distributed.all_reduce(torch.zeros(1, device=device), group=group)
        return cls(plan=plan, device=device, meter=meter, world=everyone, groups=tuple(groups), **axes, **rings)


def _rings(
    plan: Plan, ring: Axis, place: Callable[[dict[str, int], tuple[str, ...]], dict[str, Axis]]
) -> dict[str, Axis]:
    """The ring as `outer` x `inner`, the inner of neighbours."""
    outer, inner = plan.rings
    if outer == 1:
        return {"inner": ring, "outer": Axis("outer_ring", 0, 1, None, ring.meter)}
    shape = {
        "slower": plan.pipeline * plan.data,
        "outer_ring": outer,
        "inner_ring": inner,
        "faster": plan.ulysses * plan.tensor,
    }
    axes = place(shape, ("outer_ring", "inner_ring"))
    return {"inner": axes["inner_ring"], "outer": axes["outer_ring"]}
