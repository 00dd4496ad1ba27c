"""A run that stops under one plan and goes on under another: the same curve, whatever holds what."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from close import assert_close
from pool import Pool
from seqloom.plan import Plan
from seqloom.train import Config, load_config, prepare, train
from train.conftest import Finished
from train.runs import metrics

STEPS, CUT = 6, 3
SIX_HEADS = ("model.config.num_attention_heads=6", "model.config.num_key_value_heads=2", "model.config.head_dim=8")
PAIRS = [
    ("gpt2", "tensor=2", "data=2 ring=2"),  # packed and tied
    ("llama", "ring=2 layout=striped", "tensor=4 tensor_kind=2d"),
    ("qwen2", "tensor=8 tensor_kind=2.5d depth=2", "data=1"),
    ("llama", "data=2 ulysses=2", "tensor=8 tensor_kind=3d"),
    ("llama", "data=2 zero=1 ring=2", "zero=3 ring=2 tensor=2"),
    ("mixtral", "ring=2 expert=2", "data=2 zero=2 ulysses=2 expert=4"),
    ("llama", "pipeline=2 schedule=zbv data=2", "ring=2 ulysses=2 zero=2"),
    ("gpt2", "zero=2 data=2", "pipeline=2 data=2"),  # a tied head on the last stage
    ("llama", "pipeline=2 tensor=2 zero=1 data=2", "tensor=4 tensor_kind=2d zero=3 ring=2"),
    ("qwen3", "tensor=3 sequence_parallel=false", "data=2 tensor=2 ulysses=2"),
]
DAILY = 2


def run(pool: Pool, config: Config, *, resume: bool = False) -> tuple[str, ...]:
    """Train in float64, norms and softmax too; returns what `prepare` noted."""
    notes = prepare(config, resume=resume)
    pool.run(config.plan.world_size, train, config, resume, timeout_seconds=240)
    return notes


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [pytest.param(*pair, marks=() if i < DAILY else pytest.mark.sweep) for i, pair in enumerate(PAIRS)],
)
def test_moved_run(pool: Pool, finished: Finished, tmp_path: Path, family: str, before: str, after: str) -> None:
    """Catches moments, steps, weights or a place in the data that a plan keeps for itself: the curve would bend."""
    stayed, moved = tmp_path / "stayed", tmp_path / "moved"
    common = [f"model.path={family}", "train.precision=float64", f"train.steps={STEPS}", f"run.save_every={CUT}"]
    common += SIX_HEADS if family == "qwen3" else ()
    run(pool, load_config(finished.config, [*common, f"plan={before}", f"run.folder={stayed}"]))
    shutil.copytree(stayed, moved)
    shutil.rmtree(moved / "checkpoints" / f"step-{STEPS:06d}")
    shutil.rmtree(moved / "model")
    notes = run(pool, load_config(finished.config, [*common, f"plan={after}", f"run.folder={moved}"]), resume=True)
    assert notes == (f"plan was {Plan.parse(before)} when the checkpoint was written and is {Plan.parse(after)} now.",)
    found, expected = metrics(moved), metrics(stayed)
    assert found[:CUT] == expected[:CUT] and len(found) == len(expected) == STEPS
    for a, b in zip(found[CUT:], expected[CUT:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-9)
        assert a["learning_rate"] == b["learning_rate"]
    assert found[-1]["loss"] != pytest.approx(expected[CUT]["loss"], rel=1e-3)  # steps that move something
    weights, whole = (load_file(folder / "model" / "model.safetensors") for folder in (moved, stayed))
    assert weights.keys() == whole.keys()
    for name, tensor in whole.items():
        assert_close(weights[name], tensor, tolerance=1e-9)
    settings = json.loads((moved / "run.json").read_text())
    assert settings["world_size"] == Plan.parse(after).world_size
