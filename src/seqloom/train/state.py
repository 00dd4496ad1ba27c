"""What a checkpoint holds: weights, optimizer state and random state, by names and whole shapes alone.

| name                     | what                                                       |
|--------------------------|------------------------------------------------------------|
| model.NAME               | a parameter or lasting buffer, by its Hugging Face name    |
| optimizer.state.NAME.KIND | of a trained parameter `exp_avg`, `exp_avg_sq`, `step`    |
| random.RANK.DEVICE       | a generator of torch's, of one rank                        |
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from seqloom.fabric import Fabric, gather_values
from seqloom.model import Piece, lasting, pieces
from seqloom.tensor import local
from seqloom.train.boxes import Boxes, boxes, whole

MODEL, OPTIMIZER, RANDOM = "model.", "optimizer.state.", "random."

Entry = tuple[tuple[int, ...], torch.dtype]
"""Whole shape and type."""


def saved_state(model: nn.Module, optimizer: torch.optim.Optimizer, fabric: Fabric) -> dict[str, Boxes]:
    """This rank's part of all that a checkpoint holds, sharing memory with what it is of."""
    state = boxes(pieces(model, lasting(model)), MODEL)
    for piece, key in stepped_pieces(model, optimizer):
        for kind, value in optimizer.state.get(key, {}).items():
            _add(state, piece, kind, value)
    return state | {
        f"{RANDOM}{fabric.rank}.{device}": whole(numbers) for device, numbers in _generators(fabric).items()
    }


def state_to_load(model: nn.Module, optimizer: torch.optim.Optimizer, written: Mapping[str, Entry]) -> dict[str, Boxes]:
    """What a checkpoint that has `written` fills: weights in place, and optimizer state, made anew of zeros."""
    kinds: dict[str, list[str]] = {}
    for name in written:
        stem, _, kind = name.removeprefix(OPTIMIZER).rpartition(".")
        if name.startswith(OPTIMIZER):
            kinds.setdefault(stem, []).append(kind)
    state = boxes(pieces(model, lasting(model)), MODEL)
    for piece, key in stepped_pieces(model, optimizer):
        held: dict[str, Tensor] = {}
        for kind in kinds.get(piece.name, ()):
            shape, dtype = written[f"{OPTIMIZER}{piece.name}.{kind}"]
            held[kind] = torch.zeros_like(key, dtype=dtype) if shape == piece.shape else torch.zeros(shape, dtype=dtype)
            _add(state, piece, kind, held[kind])
        optimizer.state[key] = held
    return state


def share_numbers(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Boxes]) -> None:
    """Give the parts of a packed parameter the number that was loaded for one of them: each counts its own steps."""
    for piece, key in stepped_pieces(model, optimizer):
        for kind, value in optimizer.state[key].items():
            if value.ndim == 0 and piece.shape != ():
                [loaded] = state[f"{OPTIMIZER}{piece.name}.{kind}"].parts.values()
                value.copy_(loaded)


def load_generators(state: Mapping[str, Boxes], fabric: Fabric) -> None:
    """Set this rank's generators to what was loaded."""
    for device in _generators(fabric):
        [numbers] = state[f"{RANDOM}{fabric.rank}.{device}"].parts.values()
        (torch.cuda.set_rng_state if device == "cuda" else torch.set_rng_state)(numbers)


def generators_to_load(fabric: Fabric, written: Mapping[str, Entry]) -> dict[str, Boxes]:
    """Places for this rank's generators, where as many ranks as now wrote theirs; else nothing."""
    ranks = {name.split(".")[1] for name in written if name.startswith(RANDOM)}
    mine = {f"{RANDOM}{fabric.rank}.{device}": whole(held) for device, held in _generators(fabric).items()}
    return mine if len(ranks) == fabric.world.size and mine.keys() <= written.keys() else {}


def reseed(seed: int, step: int, fabric: Fabric) -> None:
    """Draw new generators where another number of ranks goes on: from the run's seed, the step and the rank alone."""
    torch.manual_seed((seed + (step << 20) + fabric.rank) % 2**63)


def differences(
    model: nn.Module, optimizer: torch.optim.Optimizer, fabric: Fabric, written: Mapping[str, Entry]
) -> list[str]:
    """In words what parameters a checkpoint lacks, has too many of, or has in another shape or type.

    Every rank calls it together and gets the same: a rank may hold few of the names.
    """
    mine: dict[str, Entry] = {
        name: (held.shape, held.dtype) for name, held in boxes(pieces(model, lasting(model)), MODEL).items()
    }
    trained = [piece.name for piece, _ in stepped_pieces(model, optimizer)]
    here: dict[str, Entry] = {}
    stepped: set[str] = set()
    for entries, names in gather_values((mine, trained), fabric.world):
        here |= entries
        stepped |= set(names)
    there = {name: entry for name, entry in written.items() if name.startswith(MODEL)}
    found = [
        f"{name.removeprefix(MODEL)} is {_described(there.get(name))} there and {_described(here.get(name))} here"
        for name in (*here, *(there.keys() - here))
        if here.get(name) != there.get(name)
    ]
    moved = {name.removeprefix(OPTIMIZER).rpartition(".")[0] for name in written if name.startswith(OPTIMIZER)}
    if not moved:  # no step has been taken: under float16 all may have been left out
        return found
    found += [f"{name} is not trained there and is here" for name in sorted(stepped - moved)]
    return found + [f"{name} is trained there and is not here" for name in sorted(moved - stepped)]


def stepped_pieces(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Piece, Tensor]]:
    """What this rank steps of each parameter, and the key under which the optimizer keeps its state.

    An optimizer that steps other tensors than the model's parameters says so in `stepped`.
    """
    parts: dict[str, tuple[Tensor, int | None]] = {
        name: (parameter, None) for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    for one in getattr(optimizer, "stepped", ()):
        parts[one.name] = one.part, one.first
    named = {name: part for name, (part, _) in parts.items()}
    held = pieces(model, named, {name: first for name, (_, first) in parts.items() if first is not None})
    yield from zip(held, named.values(), strict=True)


def _add(state: dict[str, Boxes], piece: Piece, kind: str, value: Tensor) -> None:
    """Enter one kind of optimizer state of a piece: it lies where the piece does, or is whole (a step's number)."""
    name = f"{OPTIMIZER}{piece.name}.{kind}"
    part = local(value.detach())
    if part.shape != piece.tensor.shape:
        state[name] = whole(part)
        return
    held = state.setdefault(name, Boxes(piece.shape, part.dtype))
    if part.numel():
        held.parts[piece.offset] = part


def _generators(fabric: Fabric) -> dict[str, Tensor]:
    numbers = {"cpu": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        numbers["cuda"] = torch.cuda.get_rng_state()
    return numbers


def entries(metadata: Mapping[str, object]) -> dict[str, Entry]:
    """Shapes and types of the tensors of a checkpoint's metadata."""
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _described(entry: Entry | None) -> str:
    if entry is None:
        return "absent"
    return f"{list(entry[0])} in {str(entry[1]).removeprefix('torch.')}"
