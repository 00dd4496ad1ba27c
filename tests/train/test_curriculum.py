"""A run in phases of their own plans, lengths and batches."""

from pathlib import Path
from typing import Any

import pytest

from pool import Pool
from seqloom.errors import CheckpointError, ConfigError
from seqloom.train import Config, load_config, prepare, remaining, steps_taken, train
from train.conftest import Finished
from train.runs import metrics, started

PHASES = "curriculum=[{until_step: 2, sequence_length: 32, batch: 8}, {until_step: 4, plan: ulysses=2}]"
TORCHRUN = "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "seqloom.cli.main", "train"


def go(pool: Pool, config: Config, *, resume: bool = False, phases: int | None = None) -> None:
    """What the command line does where no launcher is, of `phases` phases: each begins with processes of its own."""
    prepare(config, resume=resume)
    for stretch in remaining(config, steps_taken(config) if resume else 0)[:phases]:
        pool.run(stretch.config.plan.world_size, train, config, resume, stretch)
        resume = True


def test_a_run_in_phases(pool: Pool, finished: Finished, tmp_path: Path) -> None:
    """Catches a phase under the plan, length or batch of another, steps taken twice, a rate that begins anew, and a run
    that resumes in the wrong phase; and ranks of torchrun that meet a second time, which it does not bear."""

    def told(name: str) -> list[str]:
        return [PHASES, "train.steps=4", f"run.folder={tmp_path / name}", "run.keep=1"]

    def config(name: str) -> Config:
        return load_config(finished.config, told(name))

    with started(*TORCHRUN, str(finished.config), *told("once")) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("Until step") == 2 and out.count("Trained 4 steps.") == 1
    lines = metrics(tmp_path / "once")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] < rates[1] >= rates[2] > rates[3]
    labels = [line["label_tokens"] for line in lines]
    assert all(200 < count <= 256 for count in labels)  # 8 x 32, then 4 x 64
    assert ["ring" in line["sent_bytes"] for line in lines] == [True, True, False, False]
    go(pool, config("twice"), phases=1)
    assert steps_taken(config("twice")) == 2 and not (tmp_path / "twice" / "model").exists()
    go(pool, config("twice"), resume=True)
    assert metrics(tmp_path / "twice") == lines
    name = "model/model.safetensors"
    assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    other = load_config(
        finished.config, [PHASES.replace("32", "16"), "train.steps=4", f"run.folder={tmp_path / 'once'}"]
    )
    with pytest.raises(CheckpointError, match="written with other settings: curriculum was"):
        prepare(other, resume=True)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.steps=5"], "curriculum has phases until the steps 2, 4; they must rise and end at train.steps=5"),
        (
            ["train.steps=4", "curriculum=[{until_step: 4, micro_batch: 3}]"],
            "which micro_batch=3 does not divide; give",
        ),
        (["train.steps=4", "train.rampup=[2, 2, 8]"], "beside which train.rampup and schedules by samples are not"),
    ],
)
def test_phases_that_do_not_fit(finished: Finished, overrides: list[str], says: str, tmp_path: Any) -> None:
    """Catches a phase that never begins, or a batch that two settings decide."""
    with pytest.raises(ConfigError, match=says):
        load_config(finished.config, [PHASES, *overrides, f"run.folder={tmp_path}"])
