"""Whole tensors by the names of the Hugging Face model, whatever a plan has split or taken apart."""

import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqloom.errors import ModelError
from seqloom.fabric import Fabric, barrier
from seqloom.model.gradients import gradient
from seqloom.tensor import whole


def whole_tensors(
    model: nn.Module, fabric: Fabric, kind: Literal["parameter", "gradient"] = "parameter"
) -> dict[str, Tensor]:
    """Every parameter, or every gradient there is, as one device would hold it, by its Hugging Face name.

    Every rank calls it together and gets the same. A parameter that is tied to another stands under the
    first of its names; one without a gradient is left out. What a plan did not split is not copied. A module
    whose parameters are parts of a packed one says so in `packed`: the packed name inside the module, and
    with it the names of the parts in order and the dim along which they are laid end to end.
    """
    named: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        found = parameter if kind == "parameter" else gradient(parameter)
        if found is not None:
            named[name] = found
    return {name: _rejoined(parts, dim, fabric) for name, parts, dim in _unpacked(model, named)}


def held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a state dict of `model` is of, as this rank holds it and sharing its memory: parts where it is split."""
    return {name: tensor.detach() for name, tensor in _named_tensors(model).items()}


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones under each of their names, and lasting buffers."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                named[name] = buffer
    return named


def save_whole(fabric: Fabric, model: PreTrainedModel, save_directory: str | Path, **asked: Any) -> None:
    """`model.save_pretrained` of a model whose parameters are split: ordinary weights, whole, in one folder.

    Every rank calls it; rank 0 writes, and all return when the folder is whole. Raises ModelError for a state
    of the caller's own, which would hold parts.
    """
    for name in ("state_dict", "distributed_checkpoint"):
        if asked.get(name):
            raise ModelError(
                f"save_pretrained was given {name}, but under '{fabric.plan}' it gathers the whole weights itself; "
                "leave it out."
            )
    if fabric.replicas.rank == 0 and fabric.pipeline.rank == 0:
        state = _whole_state(model, fabric)
        if fabric.rank == 0:
            model.__class__.save_pretrained(model, save_directory, state_dict=state, **asked)
    barrier(fabric.world)


def install_save(model: PreTrainedModel, fabric: Fabric) -> None:
    """Make this instance's `save_pretrained` write ordinary weights, where a plan splits its parameters."""
    if fabric.tensor.size > 1:
        # Weak: a model that holds itself would keep its process groups until the next collection.
        model.save_pretrained = partial(save_whole, fabric, weakref.proxy(model))  # type: ignore[method-assign]


def _whole_state(model: nn.Module, fabric: Fabric) -> dict[str, Tensor]:
    """On rank 0 the model's state dict of whole tensors on the CPU, tied ones shared; on others of empty ones."""
    state: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}
    for name, parts, dim in _unpacked(model, _named_tensors(model)):
        if id(parts[0]) not in made:
            full = _rejoined(parts, dim, fabric)
            made[id(parts[0])] = full.cpu() if fabric.rank == 0 else full.new_empty(0)
        state[name] = made[id(parts[0])]
    return state


def _unpacked(model: nn.Module, named: Mapping[str, Tensor]) -> Iterator[tuple[str, list[Tensor], int]]:
    """(Hugging Face name, its parts, the dim they are joined along) of tensors named as the split model has them."""
    member: dict[str, tuple[str, tuple[str, ...], int]] = {}
    for prefix, module in model.named_modules():
        packed: Mapping[str, tuple[tuple[str, ...], int]] = getattr(module, "packed", {})
        inside = f"{prefix}." if prefix else ""
        for joined, (parts, dim) in packed.items():
            names = tuple(inside + part for part in parts)
            member |= dict.fromkeys(names, (inside + joined, names, dim))
    for name, tensor in named.items():
        if name not in member:
            yield name, [tensor], 0
        elif name == member[name][1][0]:
            joined, names, dim = member[name]
            yield joined, [named[part] for part in names], dim


def _rejoined(parts: list[Tensor], dim: int, fabric: Fabric) -> Tensor:
    full = [whole(part.detach(), fabric.grid) for part in parts]
    return full[0] if len(full) == 1 else torch.cat(full, dim)
