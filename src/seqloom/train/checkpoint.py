"""Checkpoints: whole or absent, checked before they are loaded, the same run bit for bit after.

A checkpoint is a folder `step-000120` that `torch.distributed.checkpoint` wrote: parameters and
optimizer state by name, random state by rank, and `progress.json` with everything else and the size
of every file. It is written under another name and renamed when it is complete. Of what a tensor grid
splits each rank writes and reads its part; the file knows the whole shapes.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import PreTrainedModel

from seqloom.errors import CheckpointError
from seqloom.fabric import Fabric, barrier
from seqloom.model import lasting

_NAME = re.compile(r"step-(\d{6,})$")
_PROGRESS = "progress.json"
_ADVICE = "remove that folder and resume from an older one"


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    step: optimizer steps taken, which is the position in the data too, since the batch may not change.
    text: the fingerprint of the packed text. config: the settings, the plan among them.
    running: what neither the step nor the settings tell: the loss scale, the best evaluation.
    """

    step: int
    text: int
    config: dict[str, Any]
    running: dict[str, float] = field(default_factory=dict)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None; unfinished ones carry another name."""
    return next(reversed(_whole(folder)), None)


def save(
    folder: Path,
    progress: Progress,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    fabric: Fabric,
    keep: int,
) -> Path:
    """Write the checkpoint of a step and drop all but the `keep` newest; every rank calls it together."""
    target = folder / _name(progress.step)
    unfinished = target.with_suffix(".unfinished")
    if fabric.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    barrier(fabric.world)
    try:
        checkpoint.save(_state(model, optimizer, fabric), checkpoint_id=unfinished)
    except CheckpointException as error:
        raise CheckpointError(
            f"{target} cannot be written ({_first_failure(error)}); make room there and resume from the one before."
        ) from error
    if fabric.rank == 0:
        files = {path.name: [path.stat().st_size, _checksum(path)] for path in unfinished.iterdir()}
        written = json.dumps({"files": files, **asdict(progress)}, indent=1)
        (unfinished / _PROGRESS).write_text(written, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
        for old in _whole(folder)[:-keep]:
            shutil.rmtree(old)
    barrier(fabric.world)
    return target


def read_progress(path: Path, *, contents: bool = False) -> Progress:
    """Read where a checkpoint stands, having checked that all its files are there in full.

    contents: check each file's checksum too, which reads all of it. Raises CheckpointError for a
    checkpoint that is incomplete or damaged.
    """
    try:
        written = json.loads((path / _PROGRESS).read_text(encoding="utf-8"))
        files = {str(name): (int(size), int(checksum)) for name, (size, checksum) in written.pop("files").items()}
        progress = Progress(**written)
        if type(progress.step) is not int or path.name != _name(progress.step) or not isinstance(progress.config, dict):
            raise ValueError(f"{_PROGRESS} does not describe {path.name}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a whole checkpoint: {_PROGRESS} is missing or broken; {_ADVICE}."
        ) from error
    for name, (size, checksum) in files.items():
        file = path / name
        there = file.stat().st_size if file.is_file() else 0
        if there != size:
            raise CheckpointError(f"{path} is not a whole checkpoint: {name} has {there} bytes of {size}; {_ADVICE}.")
        if contents and _checksum(file) != checksum:
            raise CheckpointError(f"{path} is damaged: the contents of {name} are not what was written; {_ADVICE}.")
    return progress


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while part := stream.read(2**24):
            value = crc32(part, value)
    return value


def _name(step: int) -> str:
    return f"step-{step:06d}"


def load(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, fabric: Fabric) -> None:
    """Restore parameters, optimizer and random state; every rank calls it together.

    Raises CheckpointError, before the run goes on, where the checkpoint is of another model or cannot be read.
    """
    state = _state(model, optimizer, fabric)
    _check_names(path, state)
    try:
        checkpoint.load(state, checkpoint_id=path)
    except CheckpointException as error:
        raise CheckpointError(f"{path} cannot be read ({_first_failure(error)}); {_ADVICE}.") from error
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"])
    for device, numbers in state["random"][str(fabric.rank)].items():
        (torch.cuda.set_rng_state if device == "cuda" else torch.set_rng_state)(numbers)


def _whole(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first: by number, for step 1000000 follows step 999999."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def _state(model: PreTrainedModel, optimizer: torch.optim.Optimizer, fabric: Fabric) -> dict[str, Any]:
    # Not `model.state_dict()`, which would gather what a plan holds in parts; loading fills the model itself.
    moments = get_optimizer_state_dict(model, optimizer)
    held = {name: tensor.detach() for name, tensor in lasting(model).items()}
    random = {"cpu": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state()
    return {"model": held, "optimizer": moments, "random": {str(fabric.rank): random}}


def _check_names(path: Path, state: Mapping[str, Any]) -> None:
    """Compare names, shapes and types of parameters: loading would cast and skip without a word."""
    try:
        written = checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata
    # Bytes gone bad end in whatever pickle meets first; all of it means the same to the reader.
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({_said(error)}); {_ADVICE}.") from error
    there = {
        name.removeprefix("model."): (tuple(entry.size), entry.properties.dtype)
        for name, entry in written.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    here = {name: (tuple(x.shape), x.dtype) for name, x in state["model"].items() if isinstance(x, Tensor)}
    differing = [name for name in (*here, *(there.keys() - here)) if here.get(name) != there.get(name)]
    if differing:
        name = differing[0]
        more = f", and {len(differing) - 1} more differ" if len(differing) > 1 else ""
        raise CheckpointError(
            f"{path} is of another model: {name} is {_described(there.get(name))} there and "
            f"{_described(here.get(name))} here{more}; resume with the configuration it was trained with."
        )


def _described(entry: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    if entry is None:
        return "absent"
    return f"{list(entry[0])} in {str(entry[1]).removeprefix('torch.')}"


def _first_failure(error: CheckpointException) -> str:
    """What went wrong on the first rank that failed to read or write."""
    inner, _ = next(iter(error.failures.values()))
    return _said(inner)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
