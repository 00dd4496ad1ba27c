"""Weights of a boosted model, to and from ordinary files of whole tensors under their Hugging Face names."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from seqloom.compat.colossalai.booster.model import BoostedModel
from seqloom.errors import CheckpointError
from seqloom.fabric import barrier
from seqloom.model import assemble, build_model, lasting, pieces, save_whole, tied_names


def save_folder(model: BoostedModel, folder: Path, megabytes: int) -> None:
    """An ordinary folder for `from_pretrained`, in files of at most so many megabytes."""
    save_whole(model.fabric, model.module, folder, max_shard_size=f"{megabytes}MB")


def save_one(model: BoostedModel, path: Path, *, safe: bool) -> None:
    """One file of the whole state: safetensors, else torch's."""
    module, fabric = model.module, model.fabric
    state = {name: whole.cpu() for name, whole in assemble(pieces(module, lasting(module)), fabric, target=0)}
    if fabric.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        if safe:
            save_file({name: whole.contiguous() for name, whole in state.items()}, path)
        else:
            torch.save(state | {name: state[first] for name, first in tied_names(module).items()}, path)
    barrier(fabric.world)


@torch.no_grad()
def load(model: BoostedModel, path: Path) -> None:
    """Fill a split model with this rank's parts of whole weights. Raises CheckpointError where they do not fit."""
    module = model.module
    state = _read(model, path)
    for piece in pieces(module, lasting(module)):
        whole = state.get(piece.name)
        if whole is None or tuple(whole.shape) != piece.shape:
            found = "is missing" if whole is None else f"is {list(whole.shape)}"
            raise CheckpointError(f"{piece.name} {found} in {path}, but the model has {list(piece.shape)} of it.")
        box = tuple(slice(first, first + size) for first, size in zip(*piece.box, strict=True))
        piece.tensor.copy_(whole[box])


def _read(model: BoostedModel, path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        dtype = torch.promote_types(next(model.module.parameters()).dtype, torch.float32)
        return lasting(build_model(model.module.config.to_dict(), weights=path, dtype=dtype))
    try:
        if not is_zipfile(path):  # as torch's files are
            return load_file(path)
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as weights ({' '.join(str(error).split())[:200]}).") from error
