"""Training in stages: stopped and resumed, evaluated, and saved as an ordinary model."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pool import Pool
from train.runs import metrics, run_file, write_config


def test_a_pipeline_goes_on_where_it_stopped(pool: Pool, tmp_path: Path) -> None:
    """Catches optimizer state of one stage written over another's, and a saved model that lacks a stage."""
    for name in ("once", "stopped"):
        (tmp_path / name).mkdir()
    once, stopped = (write_config(tmp_path / name, steps=4, save_every=2) for name in ("once", "stopped"))
    asked = ("plan=pipeline=2 schedule=interleaved", "model.path=qwen2")
    run_file(pool, once, *asked)
    run_file(pool, stopped, *asked, "train.steps=2")
    run_file(pool, stopped, *asked, resume=True)
    assert metrics(tmp_path / "once" / "run")[-2:] == metrics(tmp_path / "stopped" / "run")[-2:]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "run" / "model") for name in ("once", "stopped")]
    for (name, x), (_, y) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.equal(x, y), name
