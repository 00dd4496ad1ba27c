"""seqloom train --from: what it says, what it keeps, and what it refuses before anything starts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Cli, refused
from pool import Pool
from seqloom.cli.foreign import read
from seqloom.train import load_config
from train.runs import metrics, write_text

FLAGS = (
    "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --swiglu --normalization RMSNorm --seq-length 8192 "
    "--micro-batch-size 1 --context-parallel-size 4 --context-parallel-algo megatron_cp_algo "
    "--train-iters 1000 --lr 3e-4"
)


@pytest.fixture
def in_pool(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of the command line are those of the session."""

    def run(world: int, function: Callable[..., Any], *args: Any, timeout_seconds: float) -> list[Any]:
        return pool.run(world, function, *args, timeout_seconds=timeout_seconds)

    monkeypatch.setattr("seqloom.fabric.launch.run_local", run)


def command(folder: Path, *more: str) -> list[str]:
    """A small run in a folder, before its settings."""
    text = write_text(folder / "text.txt")
    return [f"data.files=['{text}']", f"run.folder={folder / 'run'}", "data.sequence_length=64", "train.steps=2", *more]


@pytest.mark.usefixtures("in_pool")
def test_flags_train(cli: Cli, tmp_path: Path) -> None:
    """Catches flags eaten by the command line, notes that are printed and not kept, or kept and not printed, and a
    config.yaml that describes another run."""
    code, out, err = cli(
        "train", "--from", "megatron", "--scale", "tiny", *command(tmp_path, "plan=ring=2"), "--", *FLAGS.split()
    )
    assert (code, err) == (0, ""), (out, err)
    assert "Plan: 'ring=4' on 4 processes." in out and "  --lr 3e-4: train.schedule.learning_rate." in out
    assert "  model.hidden_size 4096: 32 at reduced size." in out and "Trained 2 steps." in out
    kept = json.loads((tmp_path / "run" / "translation.json").read_text(encoding="utf-8"))
    assert kept["dialect"] == "megatron" and kept["settings"] == FLAGS.split() and kept["scale"] == "tiny"
    assert {note["option"] for note in kept["notes"]} >= {word for word in FLAGS.split() if word.startswith("--")}
    assert all(f"{note['option']} " in out or f"{note['option']}:" in out for note in kept["notes"] + kept["run"])
    again = load_config(tmp_path / "run" / "config.yaml")
    assert again.train.learning_rate == 3e-4 and again.plan.ring == 2 and len(metrics(tmp_path / "run")) == 2


@pytest.mark.usefixtures("in_pool")
def test_resuming(cli: Cli, tmp_path: Path) -> None:
    """Catches a run whose settings, translated again, are no longer those of its checkpoint."""
    words = ["train", "--from", "megatron", "--scale", "tiny", *command(tmp_path, "plan=data=1")]
    assert cli(*words, "--", FLAGS)[0] == 0
    code, out, err = cli(*words, "--resume", "--", FLAGS)
    assert (code, err) == (0, "") and "Nothing is left of 2 steps" in out


def test_options_of_translating() -> None:
    """Catches an option of `translate` that `train --from` takes and does not hand on."""

    def plan(flags: str, **options: Any) -> str:
        words = [flags, "data.files=[text.txt]"]
        asked = {"scale": None, "world": None, "version": None, "keep_order": False} | options
        return str(read("megatron", words, **asked).config.plan)

    unnamed = FLAGS.replace("--context-parallel-algo megatron_cp_algo", "")
    assert plan(unnamed) == "ulysses=4" and plan(unnamed, version="core_r0.12.1") == "ring=4"
    assert plan(FLAGS, world=8) == "data=2 ring=4" and plan(FLAGS, world=64, scale="tiny") == "data=2 ring=4"
    ordered = f"{FLAGS} --pipeline-model-parallel-size 2 --use-tp-pp-dp-mapping --global-batch-size 16"
    assert plan(ordered, world=16, keep_order=True).endswith("order=tensor-ulysses-ring-pipeline-data")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--from", "megatorn", "--", "--lr"], "'megatorn' is no dialect"),
        (["--from", "mindformers", "nowhere.yaml"], "There is no file nowhere.yaml"),
        (["--from", "mindformers", "data.files=[a]"], "--from mindformers has nothing to read"),
        (["--from", "megatron", "--scale", "small", "--", "--lr", "1"], "--scale is 'small'; it is one of tiny, full."),
        (["--from", "megatron", "--", "--tensor-model-parallel-size", "2", "--lr", "1"], "name no model that is known"),
        (["--from", "megatron", "--world", "6", "--", FLAGS], "6 processes is no multiple"),
        (["--from", "megatron", "--", FLAGS], "data.files and data.dataset are both missing"),
        (["--from", "megatron", "data.files=[nowhere.txt]", "--", FLAGS], "No file matches 'nowhere.txt'"),
        (["--from", "megatron", "--", FLAGS, "trian.steps=2"], "trian is not a setting"),
        (["mine.yaml", "--scale", "tiny"], "--scale is for settings of another system; say whose with --from"),
        (["mine.yaml", "--world", "2"], "--world is for settings of another system"),
    ],
)
def test_refusals(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str) -> None:
    """Catches a refusal that comes after processes have started or files are written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("seqloom.fabric.launch.run_local", None)
    assert says in refused(cli("train", *words))
    assert not list(tmp_path.iterdir())
