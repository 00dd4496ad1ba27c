"""What a training run may be told beyond its plan, run as the command line runs it."""

from pathlib import Path

from pool import Pool
from train.runs import metrics, run_file, write_config


def test_ramp_up_and_its_resumption(pool: Pool, tmp_path: Path) -> None:
    """Catches batches that do not grow, a sequence consumed twice or never after a resume inside the ramp-up, and
    weights of micro-batches that assume the full batch."""
    told = ["train.batch=6", "train.micro_batch=2", "train.rampup=[2, 2, 8]", "train.schedule=constant"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    path = write_config(tmp_path, steps=5, save_every=None, accumulate=None)
    run_file(pool, path, *told, f"run.folder={whole}")
    run_file(pool, path, *told, f"run.folder={parts}", "train.steps=3")
    run_file(pool, path, *told, f"run.folder={parts}", resume=True)
    tokens = [line["label_tokens"] // 60 for line in metrics(whole)]
    assert tokens == [2, 2, 4, 6, 6]
    assert metrics(parts) == metrics(whole)
