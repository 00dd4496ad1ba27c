"""Checkpoints: the same run after them, bit for bit, and a sentence for each one that cannot be used."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter

from pool import Pool
from seqloom.errors import CheckpointError, ConfigError, WorkerError
from seqloom.train import Config, Summary, load_config, prepare, train
from seqloom.train.checkpoint import newest
from seqloom.train.prepare import sole_writer
from train.conftest import Finished
from train.runs import contents, metrics, run, run_file


@pytest.fixture
def stopped(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run as it stood after step 8: checkpoints at 4 and 8, metrics that went on to 11."""
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "step-000012")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:10]) + lines[10][:30])
    return folder


def test_resume_is_exact(pool: Pool, finished: Finished, stopped: Path) -> None:
    """Catches moments, a step counter or a place in the data that is lost, and steps told twice in the metrics."""
    summary = run_file(pool, finished.config, f"run.folder={stopped}", resume=True)
    assert metrics(stopped) == metrics(finished.folder)
    assert summary.step == 12
    for name in ("model/model.safetensors", "model/config.json"):
        assert (stopped / name).read_bytes() == (finished.folder / name).read_bytes()


def test_resume_reads_the_checkpoint(pool: Pool, finished: Finished, stopped: Path) -> None:
    """Catches a comparison that passes because everything is computed again: other weights must show."""
    older, newer = (stopped / "checkpoints" / f"step-{step:06d}" for step in (4, 8))
    shutil.rmtree(newer)
    older.rename(newer)
    progress = json.loads((newer / "progress.json").read_text())
    (newer / "progress.json").write_text(json.dumps(progress | {"step": 8}))
    run_file(pool, finished.config, f"run.folder={stopped}", resume=True)
    found, expected = metrics(stopped), metrics(finished.folder)
    assert found[:8] == expected[:8]
    assert all(a["loss"] != b["loss"] for a, b in zip(found[8:], expected[8:], strict=True))


@pytest.mark.parametrize(
    ("plan", "family"),
    [
        ("data=2 ring=2", "llama"),
        ("tensor=2", "gpt2"),  # packed and tied
        pytest.param("data=1", "llama", marks=pytest.mark.sweep),
        pytest.param("tensor=3 sequence_parallel=false data=2", "qwen3", marks=pytest.mark.sweep),
        pytest.param("tensor=4 tensor_kind=2d", "llama", marks=pytest.mark.sweep),
    ],
)
def test_resume_of_other_plans(pool: Pool, finished: Finished, tmp_path: Path, plan: str, family: str) -> None:
    """Catches random state, moments or parts of weights kept for one rank only, and one process that cannot load what
    it saved."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    heads = ("model.config.num_attention_heads=6",) if family == "qwen3" else ()
    common = (f"plan={plan}", "train.precision=bf16", "run.save_every=2", "train.warmup_steps=0", *heads)
    common = (*common, f"model.path={family}")
    run_file(pool, finished.config, *common, f"run.folder={whole}", "train.steps=6")
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step-000006")
    run_file(pool, finished.config, *common, f"run.folder={parts}", "train.steps=6", resume=True)
    assert metrics(parts) == metrics(whole)
    weights = "model/model.safetensors"
    assert (parts / weights).read_bytes() == (whole / weights).read_bytes()
    assert json.loads((whole / "run.json").read_text())["parameters"] == sum(
        tensor.numel() for tensor in load_file(whole / weights).values()
    )


def test_finished_run_resumed(pool: Pool, finished: Finished, tmp_path: Path) -> None:
    """Catches a finished run that takes a step too many, and one that cannot be lengthened."""
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    summary = run_file(pool, finished.config, f"run.folder={folder}", resume=True)
    assert summary.step == 12 and metrics(folder) == metrics(finished.folder)
    summary = run_file(pool, finished.config, f"run.folder={folder}", "train.steps=14", resume=True)
    assert summary.step == 14
    assert [line["step"] for line in metrics(folder)] == list(range(1, 15))
    assert metrics(folder)[:12] == metrics(finished.folder)


def test_harmless_changes_are_noted(finished: Finished, stopped: Path) -> None:
    """Catches a changed setting that is used without a word, and a note where nothing changed."""

    def notes(*overrides: str) -> tuple[str, ...]:
        return prepare(load_config(finished.config, [f"run.folder={stopped}", *overrides]), resume=True)

    assert notes() == ()
    assert notes("run.keep=7", "run.save_every=3") == ()
    assert notes("plan=tensor=2 tensor_overlap=none", "train.accumulate=1") == (
        "plan was ring=2 when the checkpoint was written and is tensor=2 tensor_overlap=none now.",
        "train.accumulate was 2 when the checkpoint was written and is 1 now.",
    )
    assert notes("train.learning_rate=1e-4", "train.clip=null") == (
        "train.learning_rate was 0.005 when the checkpoint was written and is 0.0001 now.",
        "train.clip was 1.0 when the checkpoint was written and is None now.",
    )


def test_resume_without_a_checkpoint(pool: Pool, finished: Finished, tmp_path: Path) -> None:
    """Catches --resume that fails, or stays silent, where a run was killed before its first checkpoint."""
    config = load_config(finished.config, [f"run.folder={tmp_path}", "train.steps=2"])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss"')
    [note] = prepare(config, resume=True)
    assert note == f"There is no checkpoint in {tmp_path} yet, so training starts from the beginning."
    assert run(pool, config, resume=True).step == 2
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]


# What is refused.


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "__1_0.distcp", 1000)


def lose(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def spoil(name: str, text: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / name).write_text(text)


WHOLE = "is not a whole checkpoint: "
ADVICE = "move that folder aside and take an older one."
BROKEN_PROGRESS = f"{WHOLE}progress.json is missing or broken; {ADVICE}"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, f"{WHOLE}__1_0.distcp has 1,000 bytes of "),
        (lose("__0_0.distcp"), f"{WHOLE}__0_0.distcp has 0 bytes of "),
        (lose(".metadata"), f"{WHOLE}.metadata has 0 bytes of "),
        (lose("progress.json"), BROKEN_PROGRESS),
        (spoil("progress.json", '{"step": 8, "fil'), BROKEN_PROGRESS),
        (spoil("progress.json", "[]"), BROKEN_PROGRESS),
        (spoil("progress.json", '{"step": 8, "files": {}}'), BROKEN_PROGRESS),
    ],
)
def test_broken_checkpoint(finished: Finished, stopped: Path, damage: Callable[[Path], Any], says: str) -> None:
    """Catches a damaged checkpoint that is found out in the middle of loading, or passed over for an older one."""
    damage(stopped / "checkpoints" / "step-000008")
    before = contents(stopped)
    with pytest.raises(CheckpointError) as caught:
        prepare(load_config(finished.config, [f"run.folder={stopped}"]), resume=True)
    assert says in str(caught.value) and str(caught.value).endswith(ADVICE) and "\n" not in str(caught.value)
    assert str(stopped / "checkpoints" / "step-000008") in str(caught.value)
    assert contents(stopped) == before


def test_the_advice_helps(pool: Pool, finished: Finished, stopped: Path) -> None:
    """Catches an older checkpoint that cannot be gone on from once the broken one is moved aside as advised."""
    shutil.rmtree(stopped / "checkpoints" / "step-000008")
    run_file(pool, finished.config, f"run.folder={stopped}", resume=True)
    assert metrics(stopped) == metrics(finished.folder)


@pytest.mark.parametrize("name", [".metadata", "__1_0.distcp"])
def test_damage_that_keeps_the_size(pool: Pool, finished: Finished, stopped: Path, name: str) -> None:
    """Catches bytes gone bad on the disk that end in a bare error of pickle or zip."""
    file = stopped / "checkpoints" / "step-000008" / name
    file.write_bytes(bytes(file.stat().st_size))
    before = contents(stopped)
    with pytest.raises(CheckpointError, match=f"step-000008 is damaged: .*; {ADVICE}$"):
        run_file(pool, finished.config, f"run.folder={stopped}", resume=True)
    assert contents(stopped) == before


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.config.num_hidden_layers=3", "model.num_hidden_layers was 2 and is 3"),
        ("model.config.hidden_size=64", "model.hidden_size was 32 and is 64"),
        ("data.seed=9", "data.seed was 0 and is 9"),
        ("data.sequence_length=128", "data.sequence_length was 64 and is 128"),
        ("train.batch=8", "train.batch was 4 and is 8"),
        ("train.precision=bf16", "train.precision was float32 and is bf16"),
    ],
)
def test_checkpoint_of_another_run(finished: Finished, stopped: Path, override: str, says: str) -> None:
    """Catches weights or a data order that change under a run without a word."""
    before = contents(stopped)
    with pytest.raises(CheckpointError) as caught:
        prepare(load_config(finished.config, [f"run.folder={stopped}", override]), resume=True)
    assert says in str(caught.value) and "name another run.folder" in str(caught.value)
    assert contents(stopped) == before


def test_other_text(pool: Pool, finished: Finished, stopped: Path) -> None:
    """Catches files that were edited since: the same settings, another order of other sequences. It is told before any
    process starts, and by ranks of another machine, whose files may be others."""
    text, config = finished.config.parent / "text.txt", load_config(finished.config, [f"run.folder={stopped}"])
    was, before = text.read_bytes(), contents(stopped)
    text.write_bytes(was.replace(b"quick", b"brisk", 1))
    try:
        for found in (lambda: prepare(config, resume=True), lambda: pool.run(2, train, config, True)):
            with pytest.raises(CheckpointError, match=r"was trained on other text than data\.files holds now"):
                found()
    finally:
        text.write_bytes(was)
    assert contents(stopped) == before


def test_another_model_behind_the_same_settings(pool: Pool, finished: Finished, stopped: Path) -> None:
    """Catches loading that casts, skips or leaves parameters at random where names or shapes differ."""
    checkpoint = stopped / "checkpoints" / "step-000008"
    progress = json.loads((checkpoint / "progress.json").read_text())
    progress["config"]["model"]["intermediate_size"] = 64
    (checkpoint / "progress.json").write_text(json.dumps(progress))
    before = contents(stopped)
    with pytest.raises(CheckpointError) as caught:
        run_file(pool, finished.config, f"run.folder={stopped}", "model.config.intermediate_size=64", resume=True)
    assert "is of another model: model.layers.0.mlp.gate_proj.weight is [48, 32] in float32 there and " in str(
        caught.value
    )
    assert "[64, 32] in float32 here, and 5 more differ; resume with the configuration" in str(caught.value)
    assert contents(stopped) == before


# How they are written.


def test_a_folder_of_checkpoints_that_cannot_be_made(pool: Pool, finished: Finished, tmp_path: Path) -> None:
    """Catches a bare error of the file system where a checkpoint begins."""
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(
        CheckpointError, match=r"step-000001 cannot be written \(NotADirectoryError: .*; make room there"
    ):
        run_file(pool, finished.config, f"run.folder={tmp_path}", "train.steps=1", "train.warmup_steps=0", resume=True)


def test_keep(pool: Pool, finished: Finished, tmp_path: Path) -> None:
    """Catches checkpoints that fill the disk, or a prune that takes the newest."""
    run_file(pool, finished.config, f"run.folder={tmp_path}", "run.keep=1", "run.save_every=1", "train.steps=3")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_keep_counts_steps_not_letters(pool: Pool, finished: Finished, stopped: Path) -> None:
    """Catches step 1000000 pruned as older than step 999999, and so the newest of a long run lost."""
    checkpoints = stopped / "checkpoints"
    for path in (checkpoints / "step-000004", checkpoints / "step-000008"):
        shutil.rmtree(path) if path.name.endswith("4") else path.rename(checkpoints / "step-999999")
    progress = json.loads((checkpoints / "step-999999" / "progress.json").read_text())
    (checkpoints / "step-999999" / "progress.json").write_text(json.dumps(progress | {"step": 999_999}))
    more = ("train.steps=1000000", "run.keep=1", f"run.folder={stopped}")
    assert run_file(pool, finished.config, *more, resume=True).step == 1_000_000
    assert [path.name for path in checkpoints.iterdir()] == ["step-1000000"]


def test_newest(tmp_path: Path) -> None:
    """Catches an unfinished checkpoint that is resumed from, and order by letters."""
    assert newest(tmp_path / "absent") is None
    for name in ("step-000020", "step-000100", "step-1000000", "step-1000001.unfinished", "step-old", "other"):
        (tmp_path / name).mkdir()
    assert newest(tmp_path) == tmp_path / "step-1000000"


def fail_in_save(config: Config) -> Summary:
    """Train, but the disk of rank 1 is full."""

    def write(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with patch.object(FileSystemWriter, "write_data", FileSystemWriter.write_data if dist.get_rank() == 0 else write):
        return train(config, resume=False)


def test_full_disk(pool: Pool, finished: Finished, tmp_path: Path) -> None:
    """Catches torch's two pages of traceback in place of a sentence, and ranks that wait for the one that failed."""
    config = load_config(finished.config, [f"run.folder={tmp_path}", "run.save_every=1"])
    with pytest.raises(CheckpointError) as caught:
        pool.run(2, fail_in_save, config)
    assert str(caught.value) == (
        f"{tmp_path / 'checkpoints' / 'step-000001'} cannot be written (OSError: [Errno 28] No space left on device); "
        "make room there and resume from the one before."
    )
    assert newest(tmp_path / "checkpoints") is None


def die_in_save(config: Config, step: int) -> Summary:
    """Train, but rank 1 is killed while it writes the checkpoint of `step`."""
    write = FileSystemWriter.write_data

    def write_or_die(self: FileSystemWriter, plan: Any, planner: Any) -> Any:
        if f"step-{step:06d}" in str(self.path):
            (Path(self.path) / f"__{dist.get_rank()}_0.distcp").write_bytes(b"half")
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return write(self, plan, planner)

    with patch.object(FileSystemWriter, "write_data", write_or_die):
        return train(config, resume=False)


def test_killed_while_saving(pool: Pool, finished: Finished, tmp_path: Path) -> None:
    """Catches a half-written checkpoint taken for the newest, or an older one removed before the newer is whole."""
    config = load_config(finished.config, [f"run.folder={tmp_path}", "run.keep=1"])
    with pytest.raises(WorkerError, match="rank 1 was killed by SIGKILL"):
        pool.run(2, die_in_save, config, 8)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000004",
        "step-000008.unfinished",
    ]
    assert run(pool, config, resume=True).step == 12
    assert metrics(tmp_path) == metrics(finished.folder)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000012"]


def test_one_wrong_number_is_found(pool: Pool, finished: Finished, stopped: Path) -> None:
    """Catches a checkpoint whose damage no reader stumbles over: the run went on from wrong weights."""
    file = stopped / "checkpoints" / "step-000008" / "__0_0.distcp"
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)
    with pytest.raises(CheckpointError, match=f"the contents of __0_0.distcp are not what was written; {ADVICE}$"):
        run_file(pool, finished.config, f"run.folder={stopped}", resume=True)


def test_one_run_at_a_time(finished: Finished, tmp_path: Path) -> None:
    """Catches two runs in one folder that take turns in overwriting each other's metrics and checkpoints, and a second
    one told so only once its processes have started."""
    first, second = sole_writer(tmp_path / "run"), sole_writer(tmp_path / "run")
    with first, pytest.raises(ConfigError, match="Another run is writing"), second:
        pass
    config = load_config(finished.config, [f"run.folder={tmp_path / 'run'}"])
    with sole_writer(tmp_path / "run"), pytest.raises(ConfigError, match="Another run is writing"):
        prepare(config, resume=True)
    with sole_writer(tmp_path / "run"):
        pass
