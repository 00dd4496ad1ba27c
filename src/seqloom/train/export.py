"""A checkpoint as ordinary weights, in one process, whatever plan and however many ranks wrote it."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from seqloom.errors import CheckpointError, SeqloomError
from seqloom.model import outline, tied_names, without_progress_bars
from seqloom.train.boxes import whole
from seqloom.train.checkpoint import best, newest, read, read_progress, written_entries
from seqloom.train.prepare import CHECKPOINTS
from seqloom.train.state import MODEL
from seqloom.train.tokenizer import load_tokenizer


def export(source: Path, out: Path, *, marked: bool = False) -> tuple[int, tuple[str, ...]]:
    """Write the weights of a checkpoint as `save_pretrained` does: config.json, safetensors and the tokenizer.

    source: a checkpoint, or the folder of a run, of which the newest one is taken. out: a folder that is empty or not
    there. marked: of a run take the checkpoint that evaluation marked as the best. Returns its step, and
    notes for the user. Raises CheckpointError.
    """
    path = _chosen(source, marked)
    progress = read_progress(path, contents=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        full = any(out.iterdir())
    except OSError as error:
        raise _unwritten(out, error) from error
    if full:
        raise CheckpointError(f"{out} is there already and would be mixed with what is written; name an empty folder.")
    written = {
        name.removeprefix(MODEL): entry for name, entry in written_entries(path).items() if name.startswith(MODEL)
    }
    state: dict[str, Tensor] = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in written.items()}
    read(path, {f"{MODEL}{name}": whole(tensor) for name, tensor in state.items()}, alone=True)
    # Weights that are tied stand in the checkpoint once, and the model knows which.
    model = outline(progress.config["model"]).to(next(iter(state.values())).dtype)
    state |= {name: state[first] for name, first in tied_names(model).items() if first in state}
    found, expected = ({name: tensor.shape for name, tensor in held.items()} for held in (state, model.state_dict()))
    differing = sorted(name for name in found | expected if found.get(name) != expected.get(name))
    if differing:
        raise CheckpointError(
            f"{path} is of another model than its settings say: {differing[0]} is in one of them alone, or of another "
            f"shape ({len(differing)} in all); export it with the versions that wrote it."
        )
    try:
        with without_progress_bars():
            model.save_pretrained(out, state_dict=state)
    except (OSError, SafetensorError) as error:
        raise _unwritten(out, error) from error
    return progress.step, _save_tokenizer(progress.config["data"]["tokenizer"], model.config.vocab_size, out)


def _chosen(source: Path, marked: bool) -> Path:
    if (source / ".metadata").exists() or not (source / CHECKPOINTS).is_dir():
        if not source.is_dir():
            raise CheckpointError(f"There is no folder {source}; name a checkpoint, or the folder of a run.")
        if marked:
            raise CheckpointError(
                f"{source} is no folder of a run, whose best checkpoint could be chosen; leave it out."
            )
        return source
    path = best(source / CHECKPOINTS) if marked else newest(source / CHECKPOINTS)
    if path is None:
        what = "none that an evaluation marked as the best" if marked else "no checkpoint"
        raise CheckpointError(f"{source} holds {what}; name a checkpoint, or another run.")
    return path


def _unwritten(out: Path, error: Exception) -> CheckpointError:
    said = getattr(error, "strerror", None) or error
    return CheckpointError(f"{out} cannot be written to ({said}); name another folder, or make room there.")


def _save_tokenizer(name: str, vocab: int, out: Path) -> tuple[str, ...]:
    try:
        load_tokenizer(name, model_vocab=vocab).save(out)
    except SeqloomError as error:
        return (f"The tokenizer was not written beside the weights: {error}",)
    return ()
