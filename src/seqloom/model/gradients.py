"""Where gradients are kept, and their sum over the ranks that hold the same weights."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from seqloom.errors import ModelError
from seqloom.fabric import Axis, Fabric, Pending, buckets, start_sum_
from seqloom.model.zero import at_rest, is_share, replicas_of, shared_over
from seqloom.tensor import local

UNDER_WAY = 2
"""Buffers on their way at the same time; a third would only hold memory."""


def gradient(parameter: Tensor) -> Tensor | None:
    """The gradient of a parameter: its main gradient where it has one, else `.grad`; None where it has neither."""
    main: Tensor | None = getattr(parameter, "main_grad", None)
    return parameter.grad if main is None else main


def main_gradients(model: nn.Module) -> None:
    """From now on add each backward's gradients into `parameter.main_grad`, in float32 or wider, and free `.grad`.

    For parameters of a lower type, whose `.grad` would round every micro-batch's sum to that type. Call it
    once, after `parallelize`. An optimizer reads `.grad`: see `hand_over`.
    """
    plan = getattr(model, "_split_by", None)
    if plan is not None and plan.pipeline > 1 and plan.schedule == "zbv":
        raise ModelError(
            "schedule=zbv adds up gradients of weights without the hooks of main gradients; use schedule=1f1b or "
            "interleaved, or parameters in float32."
        )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_add_to_main)


def _add_to_main(parameter: Tensor) -> None:
    met = parameter.grad
    if met is None:
        return
    main: Tensor | None = getattr(parameter, "main_grad", None)
    if main is None:
        parameter.main_grad = met.to(torch.promote_types(met.dtype, torch.float32))  # type: ignore[attr-defined]
    else:
        local(main).add_(local(met))
    parameter.grad = None


def hand_over(model: nn.Module) -> None:
    """Make main gradients the `.grad` that an optimizer reads, each rounded once to its parameter's type."""
    for parameter in model.parameters():
        main: Tensor | None = getattr(parameter, "main_grad", None)
        if main is not None:
            parameter.grad = main.to(parameter.dtype)
            parameter.main_grad = None  # type: ignore[attr-defined]


def clear_gradients(model: nn.Module) -> None:
    """Drop every gradient, main ones too."""
    at_rest(model)
    for parameter in model.parameters():
        parameter.grad = None
        if getattr(parameter, "main_grad", None) is not None:
            parameter.main_grad = None  # type: ignore[attr-defined]


def copies(parameter: Tensor, fabric: Fabric) -> int:
    """How many ranks hold the same elements of a parameter and of its gradient; `parallelize` counted them."""
    held: int | None = getattr(parameter, "copies", None)
    if held is None and isinstance(parameter, DTensor):
        raise ModelError("A split parameter was converted after parallelize; convert the model before parallelize.")
    return fabric.world.size if held is None else held


def sum_gradients(model: nn.Module, fabric: Fabric) -> None:
    """Sum every gradient over all ranks whose tokens it depends on; call it after backward.

    Those are the ranks that hold the same weights, `fabric.replicas` or the axis of the fabric that a parameter's
    `replica_axis` names, the tensor axes over which the activations are split and the parameter is not, which are its
    attribute `sum_axes`, and `fabric.ends` for a tied weight whose copies lie on both ends of a pipeline (its attribute
    `at_ends`). Gradients that ZeRO shares out were summed over the ranks that share them in backward; each share is
    summed over the ranks that hold the same one. After it each rank holds its part of the gradient of the global mean
    loss. Raises ModelError where a trainable parameter has no gradient: the ranks could not tell it from a missing
    message.
    """
    at_rest(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and gradient(parameter) is None:
            raise ModelError(
                f"{name} has no gradient: the loss does not depend on it; call requires_grad_(False) on it."
            )
    under_way: deque[_Sum] = deque()
    for bucket in buckets(_sized(model, fabric)):
        while len(under_way) >= UNDER_WAY:
            _settle(under_way)
        under_way.append(_Sum.start([part for part, _ in bucket], bucket[0][1], fabric.device))
    while under_way:
        _settle(under_way)


@dataclass
class _Sum:
    """Gradients on their way as one flat buffer: over one axis now, over `others` next."""

    parts: list[Tensor]
    others: tuple[Axis, ...]
    work: Pending

    @classmethod
    def start(cls, parts: list[Tensor], axes: tuple[Axis, ...], device: torch.device) -> "_Sum":
        flat = torch.cat([part.flatten() for part in parts]).to(device)  # from host memory, where they may wait
        return cls(parts, axes[1:], start_sum_(flat, axes[0]))


def _settle(under_way: "deque[_Sum]") -> None:
    """Wait for the oldest buffer, and send it over its next axis or copy it back."""
    first = under_way.popleft()
    flat = first.work.wait()
    if first.others:
        under_way.append(_Sum(first.parts, first.others[1:], start_sum_(flat, first.others[0])))
        return
    for part, summed in zip(first.parts, flat.split([part.numel() for part in first.parts]), strict=True):
        part.copy_(summed.view_as(part))


def _sized(
    model: nn.Module, fabric: Fabric
) -> Iterator[tuple[tuple[object, ...], int, tuple[Tensor, tuple[Axis, ...]]]]:
    """As `buckets` takes them the local gradients, each with the axes to sum it over: those of one type and axes.

    Bytes are those of even shares of whole parameters, as local ones may differ by rank.
    """
    for parameter in model.parameters():
        found = gradient(parameter) if parameter.requires_grad else None
        axes = _axes(parameter, fabric) if found is not None else ()
        if found is not None and axes:
            key = found.dtype, *(axis.name for axis in axes)
            yield key, found.element_size() * _even_share(parameter, fabric), (local(found), axes)


def _even_share(parameter: Tensor, fabric: Fabric) -> int:
    """The elements of a rank's part, were all parts alike."""
    if is_share(parameter):  # of a parameter that the grid may not have split: then it is more
        slot = getattr(parameter, "slot", None)
        whole = parameter.shape if slot is None else slot.shape
        return prod(whole) // (shared_over(parameter, fabric)[0].size * fabric.tensor.size)
    if hasattr(parameter, "replica_axis"):  # experts, perhaps more on some ranks than on others
        return prod(parameter.slot.shape) // fabric.expert.size  # type: ignore[attr-defined]
    if not isinstance(parameter, DTensor):
        return parameter.numel()
    mesh, placements = parameter.device_mesh, parameter.placements
    return parameter.numel() // prod(mesh.size(dim) for dim, one in enumerate(placements) if isinstance(one, Shard))


def _axes(parameter: Tensor, fabric: Fabric) -> tuple[Axis, ...]:
    """The axes over which the gradient of a parameter is still to be summed."""
    if isinstance(parameter, DTensor) and not (hasattr(parameter, "sum_axes") or is_share(parameter)):
        raise ModelError(
            "A split parameter was converted after parallelize (model.to, .float, ...), which forgets over which "
            "ranks its gradient is summed; convert the model before parallelize."
        )
    alike = shared_over(parameter, fabric)[1] if is_share(parameter) else replicas_of(parameter, fabric)
    axes = [alike, *(fabric.grid[name] for name in getattr(parameter, "sum_axes", ()))]
    axes += [fabric.ends] if hasattr(parameter, "at_ends") else []
    return tuple(axis for axis in axes if axis.size > 1)
