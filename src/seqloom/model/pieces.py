"""Who holds what of a model: boxes of whole tensors, by their Hugging Face names.

Whatever a plan does (tensor grids, ZeRO, stages, experts), what a rank holds of a tensor is one box of it: a
`Piece`. Saving, gathering and counting know nothing else.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqloom.fabric import Fabric, gather_values
from seqloom.model.zero import at_rest
from seqloom.tensor import Slot, local

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size in each dim."""


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a whole tensor: the box from `offset` on, of the size of `tensor`, a view.

    name: that of the Hugging Face model; tied parameters have the first of theirs, and packed ones that of the
    packed tensor. shape: of the whole.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor

    @property
    def box(self) -> Box:
        """Offset and size."""
        return self.offset, tuple(self.tensor.shape)


def pieces(
    model: nn.Module, named: Mapping[str, Tensor] | None = None, rows: Mapping[str, int] | None = None
) -> list[Piece]:
    """This rank's pieces of the tensors of `named`, each held like the parameter of `model` of its name.

    named: by the names that the split model has, by default its parameters; gradients and moments lie where their
    parameters do, and what has no parameter's name is whole. rows: by name the first of the rows of this rank's part of
    the parameter, where a tensor is not of all that is held of it. A tensor that stands under several names comes
    once. Nothing is copied.
    """
    at_rest(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    named = dict(model.named_parameters()) if named is None else named
    packed, tied = _packed(model), tied_names(model)
    found = []
    for name, tensor in named.items():
        if tied.get(name) in named:
            continue
        part = local(tensor.detach())
        slot, first = _slot(parameters.get(name), part)
        shape, offset = list(slot.shape), list(slot.offset)
        if first := (rows or {}).get(name, first):
            offset[0] += first
        joined, number, count, dim = packed.get(name, (tied.get(name, name), 0, 1, 0))
        if count > 1:
            offset[dim] += number * shape[dim]
            shape[dim] *= count
        found.append(Piece(joined, tuple(shape), tuple(offset), part))
    return found


def _slot(parameter: Tensor | None, part: Tensor) -> tuple[Slot, int]:
    """Where a parameter lies, and the first of its rows that its share under ZeRO begins with."""
    slot = getattr(parameter, "slot", None)
    rows = getattr(parameter, "zero_rows", 0)
    if slot is None and parameter is not None:
        slot = Slot(tuple(parameter.shape), (0,) * parameter.ndim)
    return slot or Slot(tuple(part.shape), (0,) * part.ndim), rows


def _packed(model: nn.Module) -> dict[str, tuple[str, int, int, int]]:
    """By the name of each part of a packed parameter: the packed name, the part's number, their count, the dim.

    A module whose parameters are parts of a packed one says so in `packed`: the packed name inside the module, and
    with it the names of the parts in order and the dim along which they are laid end to end.
    """
    found: dict[str, tuple[str, int, int, int]] = {}
    for prefix, module in model.named_modules():
        inside = f"{prefix}." if prefix else ""
        packed: Mapping[str, tuple[tuple[str, ...], int]] = getattr(module, "packed", {})
        for joined, (parts, dim) in packed.items():
            for number, part in enumerate(parts):
                found[inside + part] = inside + joined, number, len(parts), dim
    return found


def tied_names(model: nn.Module) -> dict[str, str]:
    """For every further name of a tied parameter its first; a split model remembers those it had whole."""
    found: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if found.setdefault(id(parameter), name) != name:
            names[name] = found[id(parameter)]
    remembered: Mapping[str, str] = getattr(model, "_tied_names", {})
    return names | remembered


Holding = tuple[str, tuple[int, ...], Box, torch.dtype, str]
"""Of a piece what other ranks must know: name, whole shape, box, type and kind of device."""


@dataclass
class Part:
    """A box of a tensor, and the ranks that hold it, lowest first."""

    box: Box
    dtype: torch.dtype
    device: str
    holders: list[int]


def holders(held: Iterable[Piece], fabric: Fabric) -> dict[str, tuple[tuple[int, ...], list[Part]]]:
    """For each name the whole shape and all boxes there are, in one order on all ranks, which call it together."""
    mine: list[Holding] = [(p.name, p.shape, p.box, p.tensor.dtype, p.tensor.device.type) for p in held]
    found: dict[str, tuple[tuple[int, ...], dict[Box, Part]]] = {}
    for rank, listed in enumerate(gather_values(mine, fabric.world)):
        for name, shape, box, dtype, device in listed:
            _, parts = found.setdefault(name, (shape, {}))
            parts.setdefault(box, Part(box, dtype, device, [])).holders.append(rank)
    return {name: (shape, list(parts.values())) for name, (shape, parts) in found.items()}


def count_copies(model: nn.Module, fabric: Fabric) -> None:
    """Set of every parameter `copies`, the number of ranks that hold the very same box of it.

    Every rank calls it together.
    """
    held = pieces(model)
    table = holders(held, fabric)
    counts = {(name, part.box): len(part.holders) for name, (_, parts) in table.items() for part in parts}
    for parameter, piece in zip(model.parameters(), held, strict=True):
        parameter.copies = counts[piece.name, piece.box]  # type: ignore[attr-defined]
