"""What FSDP2 is given of a fabric: a mesh along one axis, and metered collectives in place of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh

from seqloom.fabric.collectives import all_gather_into_, reduce_scatter_into_
from seqloom.fabric.mesh import Axis


def line(axis: Axis, device: torch.device) -> DeviceMesh:
    """The ranks of one axis of several as a mesh of their own, made of the group there is."""
    assert axis.group is not None
    ranks = distributed.get_process_group_ranks(axis.group)
    return DeviceMesh.from_group(axis.group, device.type, mesh=torch.tensor(ranks), mesh_dim_names=(axis.name,))


class _Along:
    """A collective of FSDP2 along one axis; `allocate` makes its buffers, as FSDP2 asks."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An empty buffer."""
        return torch.empty(size, dtype=dtype, device=device)


class AllGather(_Along):
    """What `FSDPModule.set_custom_all_gather` takes: gathers parameters, counting their bytes."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: distributed.ProcessGroup, async_op: bool = False
    ) -> Any:
        """Fill output_tensor [ranks x n] with every rank's input_tensor [n]; the work under way if async_op."""
        return all_gather_into_(output_tensor, input_tensor, self.axis, async_op=async_op)


class ReduceScatter(_Along):
    """What `FSDPModule.set_custom_reduce_scatter` takes: sums gradients, counting their bytes."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: distributed.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        """Fill output_tensor [n] with this rank's part of the sum of input_tensor [ranks x n]."""
        if op != distributed.ReduceOp.SUM:
            raise ValueError(f"Gradients are summed over {self.axis.name}, never averaged, but FSDP2 asked for {op}.")
        return reduce_scatter_into_(output_tensor, input_tensor, self.axis, async_op=async_op)
