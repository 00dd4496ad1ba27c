"""The process groups of this process, under Megatron-LM's names: state of the process, as there.

`initialize_model_parallel` makes the groups of a plan and keeps them until `destroy_model_parallel`. Ranks are
numbered as Megatron-LM numbers them: a tensor group's are neighbours, then context, data and pipeline.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from seqloom.compat.megatron.refusal import refuse
from seqloom.errors import ConfigError, PlanError, counted
from seqloom.fabric import Axis, Fabric, Meter
from seqloom.plan import Plan

_REFUSED = {
    "virtual_pipeline_model_parallel_size": "groups know no virtual stages; use Plan(schedule='interleaved', chunks=N)",
    "pipeline_model_parallel_comm_backend": "all groups have the backend of init_process_group; name it there",
    "pipeline_model_parallel_split_rank": "there are no models of an encoder and a decoder here; leave it out",
    "use_sharp": "groups are made as torch makes them; leave it out",
    "hierarchical_context_parallel_sizes": "there is one context group; use Plan(ulysses=U, ring=R) for two",
    "hybrid_context_parallel": "every sequence is split over all context ranks; leave it out",
    "expert_model_parallel_size": "a plan deals experts to ranks; use Plan(expert=N)",
    "num_distributed_optimizer_instances": "a plan shares out the optimizer; use Plan(zero=1, zero_replicas=N)",
    "expert_tensor_parallel_size": "a plan deals experts to ranks; use Plan(expert=N)",
    "nccl_communicator_config_path": "groups are made as torch makes them; set NCCL's variables instead",
    "distributed_timeout_minutes": "groups have the time limit of torch; leave it out",
    "get_embedding_ranks": "no group of embedding ranks is made; leave it out",
    "get_position_embedding_ranks": "no group of embedding ranks is made; leave it out",
    "create_gloo_process_groups": "no gloo groups are made beside the others, so there is nothing to say; leave it out",
    "high_priority_stream_groups": "groups are made as torch makes them; leave it out",
    "sharp_enabled_group": "groups are made as torch makes them; leave it out",
    "create_all_gather_group": "all-gathers take the group of their axis; leave it out",
}
_NAMES = {"tp": ("tensor",), "cp": ("ulysses", "ring"), "dp": ("data",), "pp": ("pipeline",), "ep": ()}


@dataclass(frozen=True)
class _Groups:
    fabric: Fabric
    alone: distributed.ProcessGroup | None
    """A group of this process alone: None would mean all processes to torch.distributed."""


_MADE: list[_Groups] = []
"""The groups of this process, at most one entry."""


def initialize_model_parallel(  # noqa: PLR0913, PLR0917 -- Megatron-LM's
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    pipeline_model_parallel_comm_backend: str | None = None,
    use_sharp: bool = False,
    context_parallel_size: int = 1,
    hierarchical_context_parallel_sizes: Sequence[int] | None = None,
    hybrid_context_parallel: bool = False,
    expert_model_parallel_size: int = 1,
    num_distributed_optimizer_instances: int = 1,
    expert_tensor_parallel_size: int | None = None,
    nccl_communicator_config_path: str | None = None,
    distributed_timeout_minutes: int = 30,
    order: str = "tp-cp-ep-dp-pp",
    get_embedding_ranks: Callable[..., Any] | None = None,
    get_position_embedding_ranks: Callable[..., Any] | None = None,
    create_gloo_process_groups: bool = True,
    high_priority_stream_groups: Sequence[str] | None = None,
    sharp_enabled_group: str | None = None,
    create_all_gather_group: bool = False,
    *,
    pipeline_model_parallel_split_rank: int | None = None,
) -> None:
    """Make the groups of this process; every process calls it together.

    Data parallelism is what the degrees leave of the processes. order: which axis neighbours share, fastest first.
    Raises PlanError for degrees that do not divide the processes, ConfigError for an argument that is not
    honoured and where groups exist already.
    """
    refuse(initialize_model_parallel, locals(), _REFUSED)
    if _MADE:
        raise ConfigError("The model parallel groups of this process exist already; call destroy_model_parallel first.")
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    taken = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    if taken < 1 or world % taken:
        raise PlanError(
            f"{counted(world, 'process')} cannot be shared out to tensor {tensor_model_parallel_size} x pipeline "
            f"{pipeline_model_parallel_size} x context {context_parallel_size}; use degrees whose product "
            f"divides {world}."
        )
    plan = Plan(
        tensor=tensor_model_parallel_size,
        pipeline=pipeline_model_parallel_size,
        ring=context_parallel_size,
        data=world // taken,
        order=_order(order),
    )
    fabric = Fabric.build(plan)
    _MADE.append(_Groups(fabric, fabric.alone() if distributed.is_initialized() else None))


def _order(order: str) -> str:
    """Megatron-LM's order of axes in the words of a plan; axes that it leaves out come last."""
    named = order.lower().split("-")
    unknown = [name for name in named if name not in _NAMES]
    if unknown or len(set(named)) < len(named):
        raise PlanError(f"order='{order}' is no order of axes; name tp, cp, ep, dp and pp once each, joined by '-'.")
    return "-".join(axis for name in dict.fromkeys([*named, *_NAMES]) for axis in _NAMES[name])


def destroy_model_parallel() -> None:
    """End the groups of this process, if there are any; every process calls it together."""
    while _MADE:
        made = _MADE.pop()
        made.fabric.close()
        if made.alone is not None:
            distributed.destroy_process_group(made.alone)


def model_parallel_is_initialized() -> bool:
    """Whether this process has its groups."""
    return bool(_MADE)


def _made() -> _Groups:
    if not _MADE:
        raise ConfigError("This process has no model parallel groups yet; call initialize_model_parallel first.")
    return _MADE[0]


def tensor_axis(group: distributed.ProcessGroup | None = None) -> Axis:
    """The axis that a region or linear works over: the tensor group, or a process group of the caller's own.

    Raises ConfigError where the tensor group is asked for and no groups have been made.
    """
    if group is None:
        return _made().fabric.tensor
    meter = _MADE[0].fabric.meter if _MADE else Meter()
    return Axis("group", group.rank(), group.size(), group, meter)


def device() -> torch.device:
    """Where parameters go: the accelerator of this process, or its host memory."""
    return _made().fabric.device


def _group(axis: Axis) -> distributed.ProcessGroup | None:
    return axis.group if axis.size > 1 else _made().alone


def _data(with_context_parallel: bool) -> Axis:
    fabric = _made().fabric
    return fabric.replicas if with_context_parallel else fabric.data


def get_tensor_model_parallel_group() -> distributed.ProcessGroup | None:
    """The processes that share the weights of a layer."""
    return _group(_made().fabric.tensor)


def get_tensor_model_parallel_rank() -> int:
    """This process among those that share the weights of a layer."""
    return _made().fabric.tensor.rank


def get_tensor_model_parallel_world_size() -> int:
    """The number of processes that share the weights of a layer."""
    return _made().fabric.tensor.size


def get_context_parallel_group() -> distributed.ProcessGroup | None:
    """The processes that share the tokens of a sequence."""
    return _group(_made().fabric.ring)


def get_context_parallel_rank() -> int:
    """This process among those that share the tokens of a sequence."""
    return _made().fabric.ring.rank


def get_context_parallel_world_size() -> int:
    """The number of processes that share the tokens of a sequence."""
    return _made().fabric.ring.size


def get_pipeline_model_parallel_group() -> distributed.ProcessGroup | None:
    """The processes that share the layers of a model."""
    return _group(_made().fabric.pipeline)


def get_pipeline_model_parallel_rank() -> int:
    """This process among those that share the layers of a model."""
    return _made().fabric.pipeline.rank


def get_pipeline_model_parallel_world_size() -> int:
    """The number of processes that share the layers of a model."""
    return _made().fabric.pipeline.size


def get_data_parallel_group(with_context_parallel: bool = False) -> distributed.ProcessGroup | None:
    """The processes that hold the same weights and other rows; with those of other tokens too, if asked."""
    return _group(_data(with_context_parallel))


def get_data_parallel_rank(with_context_parallel: bool = False) -> int:
    """This process among those of `get_data_parallel_group`."""
    return _data(with_context_parallel).rank


def get_data_parallel_world_size(with_context_parallel: bool = False) -> int:
    """The number of processes of `get_data_parallel_group`."""
    return _data(with_context_parallel).size
