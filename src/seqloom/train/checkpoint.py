"""Checkpoints: whole or absent, checked before they are loaded, readable under any plan.

A checkpoint is a folder `step-000120` that `torch.distributed.checkpoint` wrote: parameters and
optimizer state by name, random state by rank, and `progress.json` with everything else and the size
of every file. It is written under another name and renamed when it is complete. Each rank writes and
reads what it holds; the files know the whole shapes, and under the same plan a run goes on bit for bit.
"""

import json
import re
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel

from seqloom.errors import CheckpointError, counted
from seqloom.fabric import Fabric
from seqloom.train.boxes import Boxes, LoadPlanner, SavePlanner
from seqloom.train.state import (
    Entry,
    differences,
    entries,
    generators_to_load,
    load_generators,
    reseed,
    share_numbers,
    state_to_load,
)

_NAME = re.compile(r"step-(\d{6,})$")
_PROGRESS = "progress.json"
_BEST = "best.json"
_ADVICE = "move that folder aside and take an older one"


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


def best(folder: Path) -> Path | None:
    """The checkpoint in `folder` that was marked as the best, or None."""
    try:
        path = step_folder(folder, int(json.loads((folder / _BEST).read_text(encoding="utf-8"))["step"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if path.is_dir() else None


def begin(unfinished: Path) -> None:
    """Make the empty folder that a checkpoint is written into; raises CheckpointError where the disk refuses."""
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise _unwritten(unfinished.with_suffix(""), _said(error)) from error


def write(unfinished: Path, state: dict[str, Boxes], group: Any = None) -> None:
    """Write the files of a checkpoint; every rank calls it together.

    group: the processes that talk about it, by default all. Raises CheckpointError where the disk refuses.
    """
    try:
        checkpoint.save(state, checkpoint_id=unfinished, planner=SavePlanner(), process_group=group)
    except CheckpointException as error:
        raise _unwritten(unfinished.with_suffix(""), _first_failure(error)) from error


def publish(unfinished: Path, progress: Progress, keep: int, *, mark: bool) -> Path:
    """Make written files the checkpoint of a step, on one rank, and drop all but the `keep` newest and the best.

    mark: whether this one is the best from now on. Raises CheckpointError where the disk refuses.
    """
    folder, target = unfinished.parent, unfinished.with_suffix("")
    try:
        files = {path.name: [path.stat().st_size, _checksum(path)] for path in unfinished.iterdir()}
        written = json.dumps({"files": files, **asdict(progress)}, indent=1)
        (unfinished / _PROGRESS).write_text(written, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
        if mark:
            marking = (folder / _BEST).with_suffix(".unfinished")
            marking.write_text(json.dumps({"step": progress.step}), encoding="utf-8")
            marking.replace(folder / _BEST)
        for old in _whole(folder)[:-keep]:
            if old != best(folder):
                shutil.rmtree(old)
    except OSError as error:
        raise _unwritten(target, _said(error)) from error
    return target


def _unwritten(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} cannot be written ({why}); make room there and resume from the one before.")


def read_progress(path: Path, *, contents: bool = False) -> Progress:
    """Read where a checkpoint stands, having checked that all its files are there in full.

    contents: check each file's checksum too, which reads all of it. Raises CheckpointError for what is no
    checkpoint, or one that is incomplete or damaged.
    """
    if not _NAME.fullmatch(path.name):
        raise CheckpointError(f"{path} is no checkpoint; name a folder step-..., as step-000120, or that of the run.")
    try:
        written = json.loads((path / _PROGRESS).read_text(encoding="utf-8"))
        files = {str(name): (int(size), int(checksum)) for name, (size, checksum) in written.pop("files").items()}
        progress = Progress(**written)
        if (
            type(progress.step) is not int
            or path.name != step_folder(path.parent, progress.step).name
            or not isinstance(progress.config, dict)
        ):
            raise ValueError(f"{_PROGRESS} does not describe {path.name}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a whole checkpoint: {_PROGRESS} is missing or broken; {_ADVICE}."
        ) from error
    for name, (size, checksum) in files.items():
        file = path / name
        there = file.stat().st_size if file.is_file() else 0
        if there != size:
            raise CheckpointError(
                f"{path} is not a whole checkpoint: {name} has {counted(there, 'byte')} of {size:,}; {_ADVICE}."
            )
        if contents and _checksum(file) != checksum:
            raise CheckpointError(f"{path} is damaged: the contents of {name} are not what was written; {_ADVICE}.")
    return progress


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while part := stream.read(2**24):
            value = crc32(part, value)
    return value


def step_folder(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / f"step-{step:06d}"


def load(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, fabric: Fabric, *, seed: int) -> None:
    """Restore parameters, optimizer and random state, whatever plan wrote them; every rank calls it together.

    Random state is of ranks: where another number of them wrote it, theirs is drawn anew from the run's `seed`.
    Raises CheckpointError, before anything is changed, where the checkpoint is of another model or cannot be read.
    """
    written = written_entries(path)
    differing = differences(model, optimizer, fabric, written)
    if differing:
        more = f", and {len(differing) - 1} more differ" if len(differing) > 1 else ""
        raise CheckpointError(
            f"{path} is of another model: {differing[0]}{more}; resume with the configuration it was trained with."
        )
    generators = generators_to_load(fabric, written)
    state = state_to_load(model, optimizer, written) | generators
    read(path, state)
    share_numbers(model, optimizer, state)
    if generators:
        load_generators(generators, fabric)
    else:
        reseed(seed, int(path.name.partition("-")[2]), fabric)


def written_entries(path: Path) -> dict[str, Entry]:
    """Whole shape and type of each tensor of a checkpoint, by its name there."""
    try:
        return entries(checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata)
    # Bytes gone bad end in whatever pickle meets first; all of it means the same to the reader.
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({_said(error)}); {_ADVICE}.") from error


def read(path: Path, state: dict[str, Boxes], *, alone: bool = False) -> None:
    """Fill boxes from a checkpoint; every rank calls it together, unless this process is `alone`."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process, as was asked
            checkpoint.load(state, checkpoint_id=path, planner=LoadPlanner(), no_dist=alone)
    except CheckpointException as error:
        raise CheckpointError(f"{path} cannot be read ({_first_failure(error)}); {_ADVICE}.") from error


def _whole(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first: by number, for step 1000000 follows step 999999."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def _first_failure(error: CheckpointException) -> str:
    """What went wrong on the first rank that failed to read or write."""
    inner, _ = next(iter(error.failures.values()))
    return _said(inner)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
