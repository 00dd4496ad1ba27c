"""What is refused before a run starts: settings that do not fit the model, the folder or the checkpoint."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from seqloom.errors import CheckpointError, ConfigError, counted
from seqloom.model import outline, probe
from seqloom.plan import ModelShape, check
from seqloom.train.checkpoint import Progress, newest, read_progress
from seqloom.train.config import Config
from seqloom.train.curriculum import begun, stretches
from seqloom.train.data import glance, load_text
from seqloom.train.packing import PackedText
from seqloom.train.tokenizer import Tokenizer, load_tokenizer

CHECKPOINTS = "checkpoints"
MAY_CHANGE = frozenset(
    [
        *("steps", "learning_rate", "schedule", "warmup_steps", "warmup_samples", "decay_steps", "decay_samples"),
        *("final_learning_rate_share", "clip", "accumulate", "loss_chunk", "gradient_checkpointing"),
    ]
)
"""Keys of `train` that may differ when a run is resumed, as `plan` may; a note says so. All else must be as it was."""


def prepare(config: Config, *, resume: bool, world: int | None = None) -> tuple[str, ...]:
    """Refuse what would fail later, before any process starts; what passes leaves the run's folder.

    world: processes there are, where a launcher has started them already; these compare the text, and find out about
    another run in the folder, by themselves.
    Returns notes for the user. Raises ConfigError, PlanError, ModelError, DataError, CheckpointError.
    """
    for stretch in stretches(config):
        _check_fit(stretch.config, world)
    shape = ModelShape.from_config(config.model.settings())
    glance(config.data, "data")
    if config.eval is not None:
        glance(config.eval.as_data(config.data), "eval")
    tokenizer = load_tokenizer(config.data.tokenizer, model_vocab=shape.vocab)
    folder = config.run.folder
    _make_folder(folder)  # of what is refused below, it is there already
    held = [name for name in (CHECKPOINTS, "metrics.jsonl") if (folder / name).exists()]
    if held and not resume:
        raise ConfigError(
            f"{folder} holds a run already ({held[0]}); go on with it by --resume, or name another run.folder."
        )
    notes = _resuming(config, tokenizer, alone=world is None) if resume else ()
    if world is None:
        with sole_writer(folder):
            pass
    return notes


def _resuming(config: Config, tokenizer: Tokenizer, *, alone: bool) -> tuple[str, ...]:
    """Notes on going on from the newest checkpoint; alone: whether this process is to look at the text itself."""
    path = newest(config.run.folder / CHECKPOINTS)
    if path is None:
        return (f"There is no checkpoint in {config.run.folder} yet, so training starts from the beginning.",)
    progress = read_progress(path, contents=True)
    notes = _compare_settings(path, progress, config)
    if alone:
        compare_text(path, progress, load_text(config.data, tokenizer))
    return notes


def _check_fit(config: Config, world: int | None) -> None:
    """Whether the model, the lengths and the batches fit the plan."""
    shape = ModelShape.from_config(config.model.settings())
    train, data = config.train, config.plan.data
    if train.micro_batch % data:
        raise ConfigError(
            f"train.batch={train.batch} with train.accumulate={train.accumulate} leaves "
            f"{counted(train.micro_batch, 'sequence')} for data={data}, which must divide them; make train.batch a "
            f"multiple of {train.accumulate * data} with as many micro-batches, or train.micro_batch one of {data}."
        )
    for number in train.micro_batches:  # several while the batch ramps up
        length = config.data.sequence_length
        check(config.plan, shape, length, world=world, batch=train.micro_batch, micro_batches=number)
    probe(outline(config.model.settings()), config.plan)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"run.folder {folder} cannot be written to ({said}); name another one.") from error


def steps_taken(config: Config) -> int:
    """The step of the newest checkpoint of a run, 0 where there is none."""
    path = newest(config.run.folder / CHECKPOINTS)
    return 0 if path is None else read_progress(path).step


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Refuse a second run in the same folder while one is going on."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"Another run is writing to {folder}; wait for its end, or name another run.folder."
            ) from error
        yield


def run_settings(config: Config) -> dict[str, Any]:
    """The configuration as plain values, the model's path replaced by what it says."""
    return config.model_dump(mode="json") | {"model": config.model.settings()}


def compare_text(path: Path, progress: Progress, text: PackedText) -> None:
    """Raise CheckpointError where a checkpoint was trained on other text."""
    if progress.text != text.fingerprint:
        raise CheckpointError(
            f"{path} was trained on other text than data.files holds now; "
            "restore the files, or name another run.folder."
        )


def _compare_settings(path: Path, progress: Progress, config: Config) -> tuple[str, ...]:
    """Notes about settings that changed harmlessly; CheckpointError for those that would change the run."""
    before, now = (_flat(settings) for settings in (progress.config, json.loads(json.dumps(run_settings(config)))))
    phases = [list(begun(settings.pop("curriculum", ()), progress.step)) for settings in (before, now)]
    if phases[0] != phases[1]:
        before["curriculum"], now["curriculum"] = phases
    changed = {key: (before.get(key), now.get(key)) for key in {**before, **now} if before.get(key) != now.get(key)}
    free = {"plan", *(f"train.{key}" for key in MAY_CHANGE)}
    fixed = [key for key in changed if key not in free and not key.startswith(("run.", "eval"))]
    if fixed:
        said = ", ".join(f"{key} was {changed[key][0]} and is {changed[key][1]}" for key in fixed)
        raise CheckpointError(
            f"{path} was written with other settings: {said}; resume with those it was written with, "
            "or name another run.folder."
        )
    return tuple(
        f"{key} was {was} when the checkpoint was written and is {value} now."
        for key, (was, value) in changed.items()
        if key in free
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
