"""Whole tensors by the names of the Hugging Face model, whatever a plan has split or taken apart."""

import weakref
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqloom.errors import ModelError
from seqloom.fabric import Fabric, barrier, broadcast_, send
from seqloom.model.gradients import gradient
from seqloom.model.pieces import Part, Piece, holders, pieces, tied_names
from seqloom.model.zero import at_rest


def whole_tensors(
    model: nn.Module, fabric: Fabric, kind: Literal["parameter", "gradient"] = "parameter"
) -> dict[str, Tensor]:
    """Every parameter, or every gradient there is, as one device would hold it, by its Hugging Face name.

    Every rank calls it together and gets the same. A parameter that is tied to another stands under the
    first of its names; one without a gradient is left out. What all ranks hold whole is not copied.
    """
    at_rest(model)
    named: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        found = parameter if kind == "parameter" else gradient(parameter)
        if found is not None:
            named[name] = found
    return dict(assemble(pieces(model, named), fabric))


def assemble(held: Iterable[Piece], fabric: Fabric, target: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of all pieces of all ranks, one after the other.

    Every rank calls it together and goes through all of it. target: the only rank that gets the wholes, the others
    get empty tensors; by default every rank does. Each box travels once, from the first rank that holds it, and what
    a rank holds whole it is not sent. Raises ModelError for a name of which boxes are missing.
    """
    held = list(held)
    mine = {(piece.name, piece.box): piece.tensor for piece in held}
    for name, (shape, parts) in holders(held, fabric).items():
        if sum(prod(part.box[1]) for part in parts) < prod(shape):
            raise ModelError(
                f"Some ranks hold {name} and others nothing of it, so its {list(shape)} are not all there."
            )
        whole: Tensor | None = None
        for part in parts:
            arrived = _brought(mine.get((name, part.box)), part, fabric, target)
            if arrived is None or arrived.shape == shape:
                whole = arrived
                continue
            if whole is None:
                whole = arrived.new_empty(shape)
            whole[tuple(slice(start, start + size) for start, size in zip(*part.box, strict=True))] = arrived
        yield name, torch.empty(0) if whole is None else whole


def _brought(mine: Tensor | None, part: Part, fabric: Fabric, target: int | None) -> Tensor | None:
    """A box where it is wanted; None on other ranks."""
    source, world = part.holders[0], fabric.world
    here = target is None or target == fabric.rank
    served = part.holders if target is None else [rank for rank in part.holders if rank == target]
    if len(served) < (world.size if target is None else 1) and prod(part.box[1]):
        if mine is None and (here or target is None):
            device = fabric.device if part.device == fabric.device.type else part.device
            mine = torch.empty(part.box[1], dtype=part.dtype, device=device)
        if mine is not None and target is None:
            mine = broadcast_(mine.contiguous(), world, source)
        elif mine is not None and target is not None:
            mine = send(mine.contiguous(), world, source, target)
    elif here and mine is None:
        mine = torch.empty(part.box[1], dtype=part.dtype)
    return mine if here else None


def lasting(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and lasting buffers by the names that `model` has, tied ones once: what a checkpoint is of."""
    at_rest(model)
    named: dict[str, Tensor] = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                named[name] = buffer
    return named


def save_whole(fabric: Fabric, model: PreTrainedModel, save_directory: str | Path, **asked: Any) -> None:
    """`model.save_pretrained` of a model under a plan: ordinary weights, whole, in one folder.

    Every rank calls it, whatever the plan; rank 0 writes, and all return when the folder is whole. Raises ModelError
    for a state of the caller's own, which may hold parts.
    """
    for name in ("state_dict", "distributed_checkpoint"):
        if asked.get(name):
            raise ModelError(
                f"save_pretrained was given {name}, but under '{fabric.plan}' it gathers the whole weights itself; "
                "leave it out."
            )
    state = _whole_state(model, fabric)
    if fabric.rank == 0:
        model.__class__.save_pretrained(model, save_directory, state_dict=state, **asked)
    barrier(fabric.world)


def install_save(model: PreTrainedModel, fabric: Fabric) -> None:
    """Make this instance's `save_pretrained` gather ordinary weights, to be called by all ranks together."""
    model.save_pretrained = _Save(fabric, model)  # type: ignore[method-assign]


class _Save:
    """`save_whole` of one model."""

    def __init__(self, fabric: Fabric, model: PreTrainedModel) -> None:
        # Weak: a model that holds itself would keep its process groups until the next collection.
        self._fabric, self._model = fabric, weakref.ref(model)

    def __call__(self, save_directory: str | Path, **asked: Any) -> None:
        model = self._model()
        if model is None:
            raise ModelError("The model has ended before it was saved; keep it as long as its save_pretrained.")
        save_whole(self._fabric, model, save_directory, **asked)

    def __deepcopy__(self, copied: dict[int, Any]) -> "_Save":
        """Of the copy of the model, which is under way."""
        return _Save(self._fabric, copied[id(self._model())])


def _whole_state(model: nn.Module, fabric: Fabric) -> dict[str, Tensor]:
    """On rank 0 the model's state dict of whole tensors on the CPU, tied ones shared; on others of empty ones."""
    state: dict[str, Tensor] = {}
    for name, full in assemble(pieces(model, lasting(model)), fabric, target=0):
        state[name] = full.cpu()
    for name, first in tied_names(model).items():
        state[name] = state[first]
    return state
