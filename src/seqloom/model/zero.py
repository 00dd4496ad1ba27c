"""ZeRO stages 2 and 3: parameters, gradients and optimizer state shared out over ranks that hold the same weights.

The shares are FSDP2's (`fully_shard`): each rank keeps some rows of each of its parameters, gathers a layer's
when the layer begins, and gives back their gradient summed. What FSDP2 sees are plain tensors, this rank's parts
of a tensor grid, so every grid composes with it; a share's `zero_rows` is the first row of that part it holds. Stage 2
keeps parameters whole from forward to backward, stage 3 gathers them again. Sums over other axes are taken of the
shares, once a step: see `sum_gradients`.

Gradients of several micro-batches are reduced after each of them, so that no rank ever holds them whole.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from seqloom.errors import ModelError
from seqloom.fabric import AllGather, Axis, Fabric, ReduceScatter, line
from seqloom.plan import chunks
from seqloom.tensor import local


def is_share(parameter: Tensor) -> bool:
    """Whether a parameter is some rows of what this rank would hold without ZeRO; `zero_rows` is the first of them."""
    return hasattr(parameter, "zero_rows")


def replicas_of(parameter: Tensor, fabric: Fabric) -> Axis:
    """The ranks that hold the same parameter where ZeRO does not share it out; its `replica_axis` names them."""
    found: Axis = getattr(fabric, getattr(parameter, "replica_axis", "replicas"))
    return found


def shared_over(parameter: Tensor, fabric: Fabric) -> tuple[Axis, Axis]:
    """The axis over which ZeRO shares out a parameter, and that of the ranks which then hold the same share.

    One with a `replica_axis` of its own, of experts that are dealt to ranks, is shared out over all of that.
    """
    if hasattr(parameter, "replica_axis"):
        return replicas_of(parameter, fabric), Axis("alone", 0, 1, None, fabric.meter)
    return fabric.zero, fabric.zero_replicas


def shard(root: nn.Module, layers: Sequence[nn.Module], fabric: Fabric, together: Iterable[range] = ()) -> None:
    """Share out the parameters of `root`, those of each of its `layers` as a unit, the rest as one.

    root: a model, or a pipeline's stage of one. together: layers that make one unit, since they run as one.
    Parameters keep their names and attributes, and get `zero_rows`. Raises ModelError for a parameter that has no
    rows.
    """
    stage = fabric.plan.zero
    said: dict[str, dict[str, Any]] = {}
    plain: dict[int, nn.Parameter] = {}
    for name, parameter in root.named_parameters():
        if parameter.dim() == 0:
            raise ModelError(f"{name} is a single number, which zero={stage} cannot share out; use zero=1.")
        axis, _ = shared_over(parameter, fabric)
        said[name] = dict(parameter.__dict__)
        if axis.size > 1:
            said[name]["zero_rows"] = sum(chunks(len(local(parameter)), axis.size)[: axis.rank])
        if isinstance(parameter, DTensor):
            plain[id(parameter)] = nn.Parameter(local(parameter.detach()), requires_grad=parameter.requires_grad)
    for module in root.modules():
        module._parameters.update(
            {name: plain[id(held)] for name, held in module._parameters.items() if id(held) in plain}
        )
    alone = _shard_experts(root, fabric, keep=stage == 2)
    first, last = {run.start: run for run in together}, 0
    for number in range(len(layers)):
        if number >= last:
            run = first.get(number, range(number, number + 1))
            last = run.stop
            _fully_shard([layers[i] for i in run], fabric.zero, fabric, alone, keep=stage == 2)
    # What would be freed after forward is what backward needs first.
    _fully_shard([root], fabric.zero, fabric, alone, keep=True)
    for name, parameter in root.named_parameters():
        parameter.__dict__.update(said[name])
    root._inside = _call
    register_fsdp_forward_method(root, "_inside")


def _shard_experts(root: nn.Module, fabric: Fabric, *, keep: bool) -> set[nn.Parameter]:
    """Make units of the modules whose parameters have replicas of their own; returns parameters that have none."""
    alone: set[nn.Parameter] = set()
    for module in root.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if hasattr(parameter, "replica_axis")]
        if not own:
            continue
        axis, _ = shared_over(own[0], fabric)
        if axis.size == 1:
            alone.update(own)
        else:
            _fully_shard([module], axis, fabric, set(), keep=keep)
    return alone


def _fully_shard(unit: list[nn.Module], axis: Axis, fabric: Fabric, ignored: set[nn.Parameter], *, keep: bool) -> None:
    """Make a unit of FSDP2, which sums its gradients, as the objective asks, and never averages them.

    FSDP2 would divide them by the number of ranks, of each unit by itself: no setting of an outer one reaches those
    inside. Sums alone are asked for, since not every backend has those that multiply.
    """
    types = {p.dtype for module in unit for p in module.parameters()}
    lower = any(dtype.itemsize < torch.float32.itemsize for dtype in types)
    # Sums are taken in float32 at least, as everywhere; None leaves wider types as they are.
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32 if lower else None, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=fabric.device.type == "cuda") if fabric.plan.offload else OffloadPolicy()
    fully_shard(
        unit if len(unit) > 1 else unit[0],
        mesh=line(axis, fabric.device),
        reshard_after_forward=not keep,
        mp_policy=precision,
        offload_policy=offload,
        ignored_params=ignored or None,
    )
    made = unit[0]
    assert isinstance(made, FSDPModule)
    made.set_gradient_divide_factor(1.0)
    made.set_force_sum_reduction_for_comms(True)
    made.set_custom_all_gather(AllGather(axis))
    made.set_custom_reduce_scatter(ReduceScatter(axis))


def sharded_units(root: nn.Module) -> Sequence[FSDPModule]:
    """What is gathered at once: FSDP2's modules, the outermost first."""
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def inside(model: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), in which the parameters outside the layers are whole, forward and backward.

    For what uses them outside the model's own forward, as a loss that takes the head's weight.
    """
    if not isinstance(model, FSDPModule):
        return function(*args, **kwargs)
    result = model._inside(function, *args, **kwargs)
    if not torch.is_grad_enabled():
        at_rest(model)  # no backward will come that frees them
    return result


def at_rest(model: nn.Module) -> None:
    """Free what is gathered, so that `model.parameters()` are the shares; after a backward they are."""
    for unit in sharded_units(model):
        unit.reshard()
