"""Whole training runs on a tiny model: what they leave, and that the plan does not matter."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from transformers import AutoModelForCausalLM

from pool import Pool
from seqloom.errors import ConfigError, DataError, PlanError
from seqloom.train import load_config, prepare
from seqloom.train.schedule import learning_rate
from train.conftest import Finished
from train.runs import contents, metrics, run_file, write_config

FIELDS = {
    "step",
    "loss",
    "gradient_norm",
    "learning_rate",
    "label_tokens",
    "seconds",
    "tokens_per_second",
    "sent_bytes",
}


def test_loss_falls(finished: Finished) -> None:
    """Catches a run that does not learn: a gradient of the wrong sign, weights never stepped, labels of another row."""
    losses = [line["loss"] for line in metrics(finished.folder)]
    assert losses[-1] < 0.7 * losses[0]
    assert finished.summary.step == finished.summary.steps == len(losses) == 12
    assert not finished.summary.stopped
    assert finished.summary.loss == pytest.approx(sum(losses[-10:]) / 10)
    assert 2.5 < finished.summary.unigram_entropy < 3.5


def test_metrics(finished: Finished) -> None:
    """Catches a field that is lost or renamed, steps counted from 0, a rate that is not the schedule's, and bytes
    summed over steps instead of those of each."""
    lines = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    train = load_config(finished.config).train
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        assert line.keys() == FIELDS
        assert line["learning_rate"] == learning_rate(train, line["step"] - 1)
        assert line["tokens_per_second"] == pytest.approx(4 * 64 / line["seconds"])
        assert 4 * 62 <= line["label_tokens"] <= 4 * 64
        assert line["gradient_norm"] > 0
        assert line["sent_bytes"] == lines[0]["sent_bytes"] and line["sent_bytes"]["ring"] > 0


def test_run_json(finished: Finished) -> None:
    """Catches a record that says another model, plan or text than the one that ran."""
    said = json.loads((finished.folder / "run.json").read_text())
    assert (said["plan"], said["world_size"], said["num_tokens"]) == ("ring=2", 2, 64)
    assert (said["batch"], said["accumulate"], said["dtype"], said["steps"]) == (2, 2, "float32", 12)
    assert said["model"]["vocab_size"] == 257
    text = (finished.config.parent / "text.txt").read_bytes()
    assert said["data"] == {
        "files": 1,
        "documents": 1,
        "tokens": len(text) + 1,
        "sequences": -(-(len(text) + 1) // 64),
    }
    assert said["unigram_entropy"] == finished.summary.unigram_entropy
    assert said["parameters"] == sum(p.numel() for p in trained(finished.folder).values())


def trained(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", local_files_only=True)
    assert model.config.vocab_size == 257
    return dict(model.named_parameters())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_model_loads(finished: Finished) -> None:
    """Catches a model folder with the first weights, or with those of an earlier step."""
    weights = trained(finished.folder)
    last = {f"model.{name}": torch.empty_like(p) for name, p in weights.items()}
    load(last, storage_reader=FileSystemReader(finished.folder / "checkpoints" / "step-000012"), no_dist=True)
    assert len(weights) > 10
    for name, weight in weights.items():
        assert torch.equal(weight, last[f"model.{name}"]), name
    earlier = {f"model.{name}": torch.empty_like(p) for name, p in weights.items()}
    load(earlier, storage_reader=FileSystemReader(finished.folder / "checkpoints" / "step-000008"), no_dist=True)
    assert not any(torch.equal(weight, earlier[f"model.{name}"]) for name, weight in weights.items())


@pytest.mark.parametrize(
    "text",
    [
        "data=1",
        "ring=2 ulysses=2",
        "data=2",
        "ring=2 layout=striped exchange=gather",
        "data=2 ulysses=2",
        "data=2 tensor=2",
        "tensor=4 tensor_kind=2d",
    ],
)
def test_plan_does_not_matter(pool: Pool, finished: Finished, tmp_path: Path, text: str) -> None:
    """Catches an order of the data, first weights, a clip or a weight decay that depend on the plan."""
    run_file(pool, finished.config, f"plan={text}", f"run.folder={tmp_path}", "train.steps=6", "train.warmup_steps=2")
    reference = tmp_path / "reference"
    run_file(pool, finished.config, f"run.folder={reference}", "train.steps=6")
    for found, expected in zip(metrics(tmp_path), metrics(reference), strict=True):
        assert found["label_tokens"] == expected["label_tokens"]
        # Sums in another order: one unit of float32 in the loss at first, some more with each step.
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert min(abs(a - b) for a, b in pairwise(losses)) > 1e-3, "too still to tell steps apart"


@pytest.mark.parametrize("setting", ["train.seed=1", "data.seed=1", "train.weight_decay=5.0", "train.clip=0.001"])
def test_settings_matter(pool: Pool, finished: Finished, tmp_path: Path, setting: str) -> None:
    """Catches a setting that is accepted and ignored."""
    run_file(pool, finished.config, "plan=data=1", f"run.folder={tmp_path}", "train.steps=12", setting)
    losses = [[line["loss"] for line in metrics(folder)] for folder in (tmp_path, finished.folder)]
    assert abs(losses[0][-1] - losses[1][-1]) > 1e-3


@pytest.mark.parametrize("plan", ["ring=2", "tensor=2", "tensor=4 tensor_kind=3d grid=2x2x1"])
def test_recomputation_changes_nothing(pool: Pool, finished: Finished, tmp_path: Path, plan: str) -> None:
    """Catches gradient checkpointing that loses the shard on the way, so that attention goes wrong or hangs."""
    asked = (f"plan={plan}", f"run.folder={tmp_path}", "train.gradient_checkpointing=true", "train.steps=12")
    run_file(pool, finished.config, *asked)
    found, expected = ([line["loss"] for line in metrics(folder)] for folder in (tmp_path, finished.folder))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        (["data.sequence_length=512"], PlanError, "longer than the model's 256 positions"),
        (["plan=ulysses=5"], PlanError, "ulysses=5 is more than the model's 4 query heads"),
        (["plan=tensor=3"], PlanError, "4 query heads cannot be split evenly over tensor=3"),
        (["plan=data=4"], ConfigError, "leaves 2 sequences for data=4"),
        (["data.files=[nothing/*.txt]"], DataError, "No file matches 'nothing/*.txt'"),
    ],
)
def test_refused_before_any_process(
    finished: Finished, overrides: list[str], error: type[Exception], says: str
) -> None:
    """Catches a mistake that is told only after processes have started, or after a folder was made for the run."""
    folder = finished.folder.parent / "never"
    with pytest.raises(error) as caught:
        prepare(load_config(finished.config, [f"run.folder={folder}", *overrides]), resume=False)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["/proc/run", "{}/text.txt/run", "{}/" + "a" * 300, "{}/dangling"])
def test_a_folder_that_cannot_be_made(finished: Finished, tmp_path: Path, name: str) -> None:
    """Catches a folder that only rank 0 finds it cannot write to, once all have read the text and built the model."""
    (tmp_path / "text.txt").write_text("a file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at all")
    folder = name.format(tmp_path)
    with pytest.raises(ConfigError) as caught:
        prepare(load_config(finished.config, [f"run.folder={folder}"]), resume=False)
    assert str(caught.value).startswith(f"run.folder {folder} cannot be written to (")
    assert str(caught.value).endswith("; name another one.") and "\n" not in str(caught.value)


def test_empty_text(pool: Pool, tmp_path: Path) -> None:
    """Catches training on nothing, or a folder left behind that then 'holds a run already'."""
    config = write_config(tmp_path)
    (tmp_path / "text.txt").write_text(" \n")
    for _ in range(2):
        with pytest.raises(DataError, match="There is no text to train on"):
            run_file(pool, config)


def test_small_vocabulary(pool: Pool, finished: Finished, tmp_path: Path) -> None:
    """Catches token ids beyond the embedding, which crash in the middle of a step on the device."""
    with pytest.raises(DataError, match="vocab_size of at least 257"):
        run_file(pool, finished.config, f"run.folder={tmp_path / 'x'}", "model.config.vocab_size=256")
    assert not (tmp_path / "x").exists()


def test_folder_that_holds_a_run(pool: Pool, finished: Finished) -> None:
    """Catches a second run that writes over the first one's metrics and checkpoints."""
    before = contents(finished.folder)
    with pytest.raises(ConfigError, match=r"holds a run already \(checkpoints\); go on with it by --resume"):
        run_file(pool, finished.config)
    assert contents(finished.folder) == before and len(before) > 10
