"""Parameters split over a tensor grid: DTensors with their true global shapes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from seqloom.fabric import Axis, start_collect
from seqloom.plan import Side, chunks
from seqloom.tensor.group import TensorGroup


@dataclass(frozen=True)
class Slot:
    """Where this rank's part of a parameter lies: in a tensor of `shape`, from `offset` on in each dim.

    The size of the part is that of the local tensor.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]


def split(whole: Tensor, group: TensorGroup, shards: Mapping[str, int | None], side: Side) -> nn.Parameter:
    """This rank's part of `whole`, which is the same on all ranks, as a parameter of its global shape.

    shards: for each axis of the grid the dim that is split over it; axes left out replicate. side: of the
    activations that the parameter meets. Its `sum_axes` name the axes over which its gradients must be summed:
    those that split these activations and not the parameter. Its `slot` tells where the part lies.
    """
    part, offset = whole.detach(), [0] * whole.ndim
    for name, axis in group.axes.items():
        dim = shards.get(name)
        if dim is not None:
            sizes = chunks(part.shape[dim], axis.size)
            offset[dim] += sum(sizes[: axis.rank])
            part = part.split(list(sizes), dim)[axis.rank]
    # The whole may be too large for the device; only the part goes there.
    part = part.to(group.device, copy=True, memory_format=torch.contiguous_format)
    if group.mesh is not None:
        placements = [Replicate() if (dim := shards.get(name)) is None else Shard(dim) for name in group.axes]
        shape, stride = whole.shape, torch.empty(whole.shape, device="meta").stride()
        part = DTensor.from_local(part, group.mesh, placements, run_check=False, shape=shape, stride=stride)
    parameter = nn.Parameter(part, requires_grad=whole.requires_grad)
    parameter.sum_axes = tuple(name for name in group.axes if name in side.axes and shards.get(name) is None)
    parameter.slot = Slot(tuple(whole.shape), tuple(offset))
    return parameter


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter; gradients flow back to it as they are, not yet summed."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def whole(tensor: Tensor, axes: Mapping[str, Axis]) -> Tensor:
    """The whole of a split tensor, as a plain one; every rank of the grid calls it together.

    axes: those of the grid, by name. DTensor's own way gathers a dim that several axes split one by one too, and
    warns of it.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    found, sizes = tensor.to_local(), {dim: tensor.shape[dim] for dim in range(tensor.ndim)}
    moves = []
    for name, placement in zip(tensor.device_mesh.mesh_dim_names or (), tensor.placements, strict=True):
        if isinstance(placement, Shard):
            parts = chunks(sizes[placement.dim], axes[name].size)
            sizes[placement.dim] = parts[axes[name].rank]
            moves.append((axes[name], placement.dim, parts))
    for axis, dim, parts in reversed(moves):
        found = start_collect(found, axis, dim, parts).wait()
    return found
