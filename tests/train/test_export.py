"""Checkpoints as ordinary weights, saving beside the training, and the best one."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pool import Pool
from seqloom.cli.main import app
from seqloom.errors import CheckpointError, WorkerError
from seqloom.train import Config, Summary, export, load_config, train
from train.conftest import Finished
from train.runs import metrics, run, run_file


@pytest.mark.parametrize(("family", "plan"), [("gpt2", "tensor=2"), ("mixtral", "data=2 zero=3")])
def test_exported_weights_are_the_run_s(pool: Pool, finished: Finished, tmp_path: Path, family: str, plan: str) -> None:
    """Catches names of the split model, parts, weights of another step, a tied head lost, and a folder that neither
    from_pretrained nor `model.path` loads."""
    folder, out = tmp_path / "run", tmp_path / "out"
    common = (f"plan={plan}", f"model.path={family}", "train.steps=2")
    run_file(pool, finished.config, *common, f"run.folder={folder}")
    said = CliRunner().invoke(app, ["export", str(folder), str(out)])
    assert said.exit_code == 0 and f"The weights of step 2 are in {out}." in said.stdout
    found, expected = (load_file(path / "model.safetensors") for path in (out, folder / "model"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {path.name for path in out.iterdir()} == {path.name for path in (folder / "model").iterdir()}
    again = AutoModelForCausalLM.from_pretrained(out)
    first, second = (
        dict(m.named_parameters()) for m in (again, AutoModelForCausalLM.from_pretrained(folder / "model"))
    )
    assert all(torch.equal(first[name], second[name]) for name in second)
    config = load_config(finished.config, [f"model.path={out}", f"run.folder={tmp_path / 'on'}", "train.steps=2"])
    run(pool, config)
    line = metrics(tmp_path / "on")[0]
    assert (
        line["loss"] < metrics(folder)[1]["loss"] < metrics(folder)[0]["loss"]
    )  # from trained weights, not from new ones


def test_what_cannot_be_exported_is_refused(finished: Finished, tmp_path: Path) -> None:
    """Catches a folder with two models mixed in it, a bare FileNotFoundError, and advice to remove good checkpoints."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="is there already and would be mixed"):
        export(finished.folder, tmp_path / "full")
    for folder in ("/proc/out", tmp_path / "full" / "file" / "out"):
        with pytest.raises(CheckpointError, match=r"out cannot be written to \(.*\); name another folder"):
            export(finished.folder, Path(folder))
    with pytest.raises(CheckpointError, match=r"There is no folder .*absent; name a checkpoint"):
        export(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds none that an evaluation marked as the best"):
        export(finished.folder, tmp_path / "out", marked=True)
    for folder in (tmp_path / "full", finished.folder / "checkpoints"):
        with pytest.raises(CheckpointError, match=r"is no checkpoint; name a folder step-\.\.\., as step-000120, or "):
            export(folder, tmp_path / "out")
    (tmp_path / "step-000004").mkdir()
    with pytest.raises(
        CheckpointError, match=r"is not a whole checkpoint: progress\.json is missing .* move that folder"
    ):
        export(tmp_path / "step-000004", tmp_path / "out")
    other = shutil.copytree(finished.folder / "checkpoints" / "step-000004", tmp_path / "other" / "step-000004")
    progress = json.loads((other / "progress.json").read_text())
    progress["config"]["model"]["intermediate_size"] += 8
    (other / "progress.json").write_text(json.dumps(progress))
    with pytest.raises(CheckpointError, match=r"another model than its settings say: model\.layers\.0\.mlp\.down_proj"):
        export(other, tmp_path / "out")
    assert export(finished.folder / "checkpoints" / "step-000004", tmp_path / "out")[0] == 4


def test_the_best_is_kept_and_exported(pool: Pool, finished: Finished, tmp_path: Path) -> None:
    """Catches the best checkpoint pruned as old, and a mark that stays with an earlier one."""
    folder, out = tmp_path / "run", tmp_path / "out"
    text = finished.config.parent / "text.txt"
    rising = ("train.learning_rate=0.3", "train.warmup_steps=4", "train.final_learning_rate_share=1.0")
    common = (*rising, f"eval.files=[{text}]", "eval.every=1", "eval.sequences=4", "run.save_every=1", "run.keep=1")
    run_file(pool, finished.config, *common, f"run.folder={folder}", "train.steps=6")
    losses = [line["evaluation_loss"] for line in metrics(folder)]
    step = losses.index(min(losses)) + 1
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert step < 6 and kept == [f"step-{step:06d}", "step-000006"]
    assert export(folder, out, marked=True) == (step, ())


def test_saving_beside_the_training(pool: Pool, finished: Finished, tmp_path: Path) -> None:
    """Catches weights of a later step in an earlier checkpoint, one without its name at the end, and other numbers."""
    both = ("run.save_async=true", "run.keep=3")
    run_file(pool, finished.config, *both, f"run.folder={tmp_path / 'run'}")
    assert metrics(tmp_path / "run") == metrics(finished.folder)
    for step in (4, 8, 12):
        for folder, name in ((tmp_path / "run", "a"), (finished.folder, "b")):
            export(folder / "checkpoints" / f"step-{step:06d}", tmp_path / f"{step}{name}")
        found, expected = ((tmp_path / f"{step}{name}" / "model.safetensors").read_bytes() for name in "ab")
        assert found == expected
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000012")
    run_file(pool, finished.config, *both, f"run.folder={tmp_path / 'run'}", resume=True)
    assert metrics(tmp_path / "run") == metrics(finished.folder)


def meet_in_save(config: Config, step: int, kill: bool) -> Summary:
    """Train, but while rank 1 writes the checkpoint of `step`, not in its main thread, it dies or its disk is full."""
    write = FileSystemWriter.write_data

    def meet(self: FileSystemWriter, plan: Any, planner: Any) -> Any:
        if f"step-{step:06d}" in str(self.path) and dist.get_rank() == 1:
            assert threading.current_thread() is not threading.main_thread()
            (Path(self.path) / "__1_0.distcp").write_bytes(b"half")
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")
        return write(self, plan, planner)

    with patch.object(FileSystemWriter, "write_data", meet):
        return train(config, resume=False)


@pytest.mark.parametrize("kill", [True, False])
def test_met_while_saving_beside(pool: Pool, finished: Finished, tmp_path: Path, kill: bool) -> None:
    """Catches an older checkpoint lost to one that never became whole, and a full disk that nobody is told of."""
    config = load_config(finished.config, [f"run.folder={tmp_path}", "run.keep=1", "run.save_async=true"])
    error, says = (
        (WorkerError, "killed by SIGKILL") if kill else (CheckpointError, r"step-000008 cannot be written .*No space")
    )
    with pytest.raises(error, match=says):
        pool.run(2, meet_in_save, config, 8, kill)
    assert (tmp_path / "checkpoints" / "step-000004").exists()
    assert not (tmp_path / "checkpoints" / "step-000008").exists()
    assert run(pool, config, resume=True).step == 12
    assert metrics(tmp_path) == metrics(finished.folder)
