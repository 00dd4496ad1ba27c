"""What a boosted optimizer and its scheduler go on from: the state of each parameter by name, under any plan."""

import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from seqloom.compat.colossalai.booster.optimizer import BoostedOptimizer
from seqloom.errors import CheckpointError, ConfigError
from seqloom.fabric import Axis, barrier, gather_values
from seqloom.tensor import local
from seqloom.train.checkpoint import read, write, written_entries
from seqloom.train.scale import LossScale
from seqloom.train.state import OPTIMIZER, saved_state, share_numbers, state_to_load, stepped_pieces

_GROUPS = "groups.pt"


def save_stepped(optimizer: BoostedOptimizer, folder: Path) -> None:
    """State by the names of parameters, each rank what it steps; groups with the names of theirs.

    Every rank calls it together. Raises ConfigError for state that is neither of its parameter's shape nor a number,
    CheckpointError where a file, or a folder of something else, stands in the way.
    """
    module, fabric = optimizer.model.module, optimizer.model.fabric
    for piece, key in stepped_pieces(module, optimizer.optim):
        for kind, value in list(optimizer.optim.state.get(key, {}).items()):
            if not isinstance(value, torch.Tensor) or (value.ndim and local(value).shape != local(key).shape):
                raise ConfigError(
                    f"{type(optimizer.optim).__name__} keeps {kind} of {piece.name}, which is not of its shape and "
                    "cannot be cut for another plan; save the model alone, or use HybridAdam."
                )
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file, and an optimizer's state is a folder here; give another name.")
    if other := sorted(path.name for path in folder.glob("*") if not _ours(path)):
        raise CheckpointError(f"{folder} holds {other[0]}, which saving an optimizer would delete; give another name.")
    unfinished, before = (folder.with_name(f"{folder.name}.{word}") for word in ("unfinished", "before"))
    groups = _groups(optimizer)
    if fabric.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        scale = optimizer.scale
        torch.save({"groups": groups, "scale": (scale.value, scale.finite_steps)}, unfinished / _GROUPS)
    barrier(fabric.world)
    state = saved_state(module, optimizer.optim, fabric)
    write(unfinished, {name: held for name, held in state.items() if name.startswith(OPTIMIZER)})
    if fabric.rank == 0:
        if folder.exists():  # it goes only when the new state stands in its place
            shutil.rmtree(before, ignore_errors=True)
            folder.rename(before)
        unfinished.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    barrier(fabric.world)


def _ours(path: Path) -> bool:
    """Whether a file is part of an optimizer's state."""
    return path.name in (_GROUPS, ".metadata") or path.suffix == ".distcp"


def load_stepped(optimizer: BoostedOptimizer, folder: Path) -> None:
    """Fill in what `save_stepped` saved, whatever plan it was; every rank calls it together.

    Raises CheckpointError, before anything is changed, where groups or shapes differ, or it cannot be read.
    """
    module, optim = optimizer.model.module, optimizer.optim
    saved, written = load_plain(folder / _GROUPS), written_entries(folder)
    if differing := _differences(optimizer, saved["groups"], written):
        raise CheckpointError(
            f"{folder} is of another optimizer: {differing}; make the groups as they were when it was saved."
        )
    for group, settings in zip(optim.param_groups, saved["groups"], strict=True):
        group.update({name: value for name, value in settings.items() if name != "params"})
    if optimizer.model.precision == "fp16":
        optimizer.scale = LossScale(*saved["scale"])
    state = {n: held for n, held in state_to_load(module, optim, written).items() if n.startswith(OPTIMIZER)}
    read(folder, state)
    share_numbers(module, optim, state)


def _groups(optimizer: BoostedOptimizer) -> list[dict[str, Any]]:
    """The settings of each group, and the names of all ranks' parameters in it, sorted."""
    optim = optimizer.optim
    named = {id(key): piece.name for piece, key in stepped_pieces(optimizer.model.module, optim)}
    mine = [{named[id(p)] for p in group["params"] if id(p) in named} for group in optim.param_groups]
    found = gather_values(mine, optimizer.model.fabric.world)
    return [
        {**group, "params": sorted(set().union(*(ranks[number] for ranks in found)))}
        for number, group in enumerate(optim.param_groups)
    ]


def _differences(optimizer: BoostedOptimizer, there: list[dict[str, Any]], written: Any) -> str:
    """In words the first difference of groups or shapes, the same on every rank; empty where there is none."""
    here = _groups(optimizer)
    if len(here) != len(there):
        return f"it has {len(there)} groups of parameters, and here are {len(here)}"
    for number, (mine, theirs) in enumerate(zip(here, there, strict=True)):
        if odd := sorted(set(mine["params"]) ^ set(theirs["params"])):
            return f"{odd[0]} is in group {number} {'here' if odd[0] in mine['params'] else 'there'} alone"
    wrong = [
        f"{name.removeprefix(OPTIMIZER)} is {list(shape)} there and {list(piece.shape)} here"
        for piece, _ in stepped_pieces(optimizer.model.module, optimizer.optim)
        for name, (shape, _) in written.items()
        if name.rpartition(".")[0] == f"{OPTIMIZER}{piece.name}" and shape not in ((), piece.shape)
    ]
    return next((one for ranks in gather_values(wrong, optimizer.model.fabric.world) for one in ranks), "")


def save_plain(state: dict[str, Any], path: Path, world: Axis) -> None:
    """Numbers that are the same on every rank, written by rank 0; every rank calls it together."""
    if world.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
    barrier(world)


def load_plain(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, without running anything of it. Raises CheckpointError."""
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return found
    except (OSError, RuntimeError, ValueError, UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}).") from error
