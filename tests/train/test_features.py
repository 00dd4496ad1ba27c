"""What a training run may be told beyond its plan, run as the command line runs it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pool import Pool
from seqloom.errors import NumericsError, PlanError
from seqloom.fabric import Fabric
from seqloom.model import Float64Islands, build_model, parallelize
from seqloom.plan import Plan, read_config
from seqloom.train import StepReport, compute_gradients, load_config, prepare
from seqloom.train.checkpoint import newest, read_progress
from seqloom.train.evaluate import HeldOut, evaluate
from seqloom.train.finite import check_finite
from seqloom.train.packing import PackedText
from seqloom.train.scale import LossScale
from train.runs import metrics, run_file, write_config
from train.test_step import cut, whole_batch


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


def test_a_ramp_up_that_a_pipeline_cannot_order_is_refused(tmp_path: Path) -> None:
    """Catches a plan checked against the full batch alone, whose first steps have too few micro-batches."""
    path = write_config(tmp_path, accumulate=None)
    told = ["plan=pipeline=2", "train.micro_batch=1", "train.batch=4"]
    prepare(load_config(path, told), resume=False)
    with pytest.raises(PlanError, match="A step of 1 micro-batch cannot be ordered by schedule=1f1b over pipeline=2"):
        prepare(load_config(path, [*told, "train.rampup=[1, 1, 9]"]), resume=False)


EVALUATED = ["train.precision=float64", "train.batch=4", "train.steps=2", "eval.every=1", "eval.sequences=5"]


def evaluation(pool: Pool, folder: Path, plan: str) -> list[float]:
    """The losses on held-out text of a run of two steps in float64."""
    path = write_config(folder, save_every=None)
    (folder / "held.txt").write_text("seven looms weave a ring while the quick brown fox jumps\n" * 8)
    where = folder / plan.replace(" ", "-")
    run_file(pool, path, *EVALUATED, f"plan={plan}", f"eval.files=[{folder / 'held.txt'}]", f"run.folder={where}")
    return [line["evaluation_loss"] for line in metrics(where)]


def test_evaluation_is_the_same_under_every_plan(pool: Pool, tmp_path: Path) -> None:
    """Catches a mean of means, rows that fill the last batch counted, and a share lost: 5 sequences in batches of 2."""
    alone = evaluation(pool, tmp_path, "data=1")
    assert len(alone) == 2 and alone[1] < alone[0]
    for plan in ("data=2", "ring=2", "tensor=2"):
        assert evaluation(pool, tmp_path, plan) == pytest.approx(alone, rel=1e-12, abs=0)


def test_the_best_of_other_text_is_not_compared() -> None:
    """Catches a best that an evaluation of other text, longer sequences or more of them can never beat, or beats."""

    def held_out(sequences: int = 3, length: int = 16, end: int = 9) -> HeldOut:
        return HeldOut(PackedText.pack([np.arange(80) % 7], end_id=end, sequence_length=length), sequences)

    first = held_out()
    for step, loss in enumerate((2.0, 1.5, 1.75), 1):
        first.see(loss, step)
    same = held_out()
    assert same.take_up(first.running()) is None and (same.loss, same.step) == (1.5, 2)
    for other in (held_out(sequences=2), held_out(length=20), held_out(end=8)):
        assert "was 1.500 after step 2, of other text" in str(other.take_up(first.running())) and other.running() == {}
        other.see(1.75, 4)
        assert other.step == 4
    assert held_out().take_up({"loss_scale": 2.0}) is None


def evaluated(plan: Plan) -> float:
    """The loss of a fresh float64 model on a small text."""
    with Float64Islands():
        fabric = Fabric.build(plan)
        model = parallelize(build_model(read_config("llama"), dtype=torch.float64, seed=3), fabric)
        draw = torch.Generator().manual_seed(2)
        documents = [torch.randint(0, 60, (length,), generator=draw).numpy() for length in (30, 90, 41)]
        text = PackedText.pack(documents, end_id=63, sequence_length=32)
        said: dict[str, Any] = {"sequences": None, "precision": "float64", "chunk_tokens": 16}
        first = evaluate(model, text, fabric, micro_batch=2, **said)
        assert model.training and evaluate(model, text, fabric, micro_batch=4, **said) == pytest.approx(
            first, rel=1e-13
        )
        return first


def test_evaluation_under_zero_and_pipelines(pool: Pool) -> None:
    """Catches a loss that the last stage alone knows, shares taken for whole weights, and weights gathered once."""
    [alone] = pool.run(1, evaluated, Plan())
    pipelines = (
        "pipeline=2",
        "pipeline=2 schedule=interleaved",
        "pipeline=2 schedule=zbv",
        "pipeline=2 schedule=gpipe",
    )
    for plan in ("data=2 zero=1", "data=2 zero=2", "ring=2 zero=3", *pipelines):
        assert pool.run(2, evaluated, Plan.parse(plan)) == pytest.approx([alone] * 2, rel=1e-12, abs=0)


def test_evaluation_is_transformers_loss(pool: Pool, tmp_path: Path) -> None:
    """Catches a loss that is the same under all plans and wrong, and weights changed by looking at them."""
    [*_, last] = evaluation(pool, tmp_path, "ring=2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ring=2" / "model", attn_implementation="eager")
    tokens = torch.tensor(list((tmp_path / "held.txt").read_bytes())[: 5 * 64 + 1]).long()
    rows = [tokens[first : first + 64] for first in range(0, 320, 64)]
    logits = torch.cat([model(row[None]).logits[0] for row in rows])
    expected = torch.nn.functional.cross_entropy(logits.double(), tokens[1:321])
    assert last == pytest.approx(expected.item(), rel=1e-5)
    progress = read_progress(newest(tmp_path / "ring=2" / "checkpoints"))
    assert progress.running.items() >= {
        "best_loss": last, "best_step": 2, "best_sequence_length": 64, "best_sequences": 5
    }.items()  # fmt: skip


def test_loss_scale_by_hand() -> None:
    """Catches a scale that grows a step late, forgets to start counting anew, or falls below one."""
    good, bad = StepReport(1.0, 2.0, 3), StepReport(1.0, float("inf"), 3)
    scale = LossScale(2.0)
    values = []
    for report in (good, good, bad, bad, bad, good, good):
        scale = scale.after(report, 2)
        values.append(scale.value)
    assert values == [2.0, 4.0, 2.0, 1.0, 1.0, 1.0, 2.0]
    assert LossScale(2.0).overflowed(bad) and not LossScale(1.0).overflowed(bad)
    assert not LossScale(2.0).overflowed(StepReport(float("nan"), float("nan"), 3))


def scaled() -> tuple[float, float]:
    """The gradient norm with and without a loss scale."""
    fabric = Fabric.build(Plan(ring=2))
    model = parallelize(build_model(read_config("llama"), seed=3), fabric)
    micro_batches = cut(whole_batch(), 2)
    plain, with_scale = (
        compute_gradients(model, micro_batches, fabric, precision="float32", chunk_tokens=64, loss_scale=scale)
        for scale in (1.0, 1024.0)
    )
    return plain.gradient_norm, with_scale.gradient_norm


def test_a_loss_scale_changes_no_gradient(pool: Pool) -> None:
    """Catches gradients that are scaled and not divided, or divided twice: powers of two scale exactly."""
    for plain, with_scale in pool.run(2, scaled):
        assert with_scale == plain


def test_float16_skips_what_overflows_and_goes_on(pool: Pool, tmp_path: Path) -> None:
    """Catches an overflow that is stepped on, a scale that does not come down, and one forgotten by a resume."""
    path = write_config(tmp_path, steps=8, save_every=None)
    told = ["train.precision=fp16", f"train.initial_loss_scale={2.0**26}", "train.schedule=constant"]
    run_file(pool, path, *told)
    lines = metrics(tmp_path / "run")
    skipped = [line["gradient_norm"] is None for line in lines]
    assert skipped[0] and not all(skipped)
    scales = [line["loss_scale"] for line in lines]
    assert scales == [2.0 ** (26 - sum(skipped[:number])) for number in range(8)]
    run_file(pool, path, *told, "train.steps=3", f"run.folder={tmp_path / 'parts'}")
    run_file(pool, path, *told, f"run.folder={tmp_path / 'parts'}", resume=True)
    assert metrics(tmp_path / "parts") == lines


def poisoned(plan: Plan, spoilt: dict[int, list[str]]) -> str:
    """What gradients that are not numbers lead to, on every rank; spoilt: their names, by the rank that has them."""
    fabric = Fabric.build(plan)
    model = parallelize(build_model(read_config("llama"), seed=3), fabric)
    compute_gradients(model, cut(whole_batch(), 2), fabric, precision="float32", chunk_tokens=64)
    for known, parameter in model.named_parameters():
        if known in spoilt.get(fabric.rank, ()):
            part: Any = parameter.grad
            (part.to_local() if hasattr(part, "to_local") else part)[(0,) * part.ndim] = float("nan")
    with pytest.raises(NumericsError) as caught:
        check_finite(model, StepReport(2.0, float("nan"), 4), fabric, step=7)
    return str(caught.value)


@pytest.mark.parametrize("plan", ["data=1", "data=2", "tensor=2", "data=2 zero=1", "ring=2 zero=3", "pipeline=2"])
def test_what_is_not_finite_is_named(pool: Pool, plan: str) -> None:
    """Catches a name that only the rank with the bad part knows, and a later parameter in place of the first."""
    found = Plan.parse(plan)
    name, later, last = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"
    said = pool.run(found.world_size, poisoned, found, {0: [last], found.world_size - 1: [name, later, last]})
    assert len(set(said)) == 1
    assert said[0].startswith(
        f"At step 7 the loss is 2.0 and the gradient norm nan: the gradient of {name} is the first that is not finite. "
    )


def test_a_run_stops_before_it_steps_on_what_is_not_finite(pool: Pool, tmp_path: Path) -> None:
    """Catches a loop that does not ask, a line written for a step that was not taken, and ranks that differ."""
    settings = read_config("llama") | {"vocab_size": 257}
    model = build_model(settings)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    path = write_config(tmp_path, steps=2)
    with pytest.raises(
        NumericsError, match="At step 1 the loss is nan and the gradient norm nan: the gradient of model"
    ):
        run_file(pool, path, f"model.path={tmp_path / 'bad'}")
    assert metrics(tmp_path / "run") == []
    assert newest(tmp_path / "run" / "checkpoints") is None
