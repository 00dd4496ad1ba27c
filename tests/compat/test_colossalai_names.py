"""What programs for Colossal-AI ask beside the model: groups, coordinators, schedulers and loss scales."""

import logging
import logging.handlers
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from compat.test_colossalai_booster import Rows, groups, tiny
from pool import Pool
from seqloom.compat import colossalai
from seqloom.compat.colossalai.booster import Booster
from seqloom.compat.colossalai.booster.plugin import (
    HybridParallelPlugin,
    LowLevelZeroPlugin,
    MoeHybridParallelPlugin,
    TorchDDPPlugin,
)
from seqloom.compat.colossalai.cluster import DistCoordinator
from seqloom.compat.colossalai.context import ParallelMode
from seqloom.compat.colossalai.core import global_context as gpc
from seqloom.compat.colossalai.nn.lr_scheduler import CosineAnnealingWarmupLR, LinearWarmupLR
from seqloom.compat.colossalai.nn.optimizer import HybridAdam
from seqloom.compat.colossalai.state import LOGGER, PROCESS
from seqloom.errors import ConfigError


def summed(group: distributed.ProcessGroup | None) -> int:
    """How many processes a program's own all-reduce counts."""
    one = torch.ones(())
    distributed.all_reduce(one, group=group)
    return int(one)


def asked() -> dict[str, Any]:
    colossalai.launch_from_torch(config={"parallel": {"tensor": {"size": 2, "mode": "1d"}}})
    found: dict[str, Any] = {
        "config": [summed(gpc.get_group(mode)) for mode in (ParallelMode.PARALLEL_1D, ParallelMode.DATA)]
    }
    sequence = {"enable_sequence_parallelism": True, "precision": "fp32"}
    ring = HybridParallelPlugin(1, 1, 2, sequence_parallelism_mode="ring_attn", **sequence)
    split = HybridParallelPlugin(2, 1, sequence_parallelism_mode="split_gather", **sequence)
    for name, plugin in (("ring", ring), ("split", split)):
        found[name] = [summed(getattr(plugin, f"{which}_group")) for which in ("tp", "pp", "dp", "sp")]
    experts = MoeHybridParallelPlugin(ep_size=2, tp_size=1, pp_size=1)
    found["experts"] = isinstance(experts, HybridParallelPlugin), experts.stage_manager
    coordinator = DistCoordinator()
    with coordinator.priority_execution():
        found["coordinator"] = coordinator.is_master(), coordinator.is_last_process(split.dp_group)
    found["once"] = coordinator.on_master_only()(lambda value: value)(7)
    PROCESS.leave()
    return found


def test_groups_are_those_of_the_plan_and_not_all_processes(pool: Pool) -> None:
    """Catches a group of one process given as None, over which a program's all-reduce sums all; a MoE plugin that is
    no HybridParallelPlugin; and a coordinator under which every process speaks, or none."""
    found = pool.run(2, asked)
    assert [one["config"] for one in found] == [[2, 1]] * 2
    assert [one["ring"] for one in found] == [[1, 1, 1, 2]] * 2
    assert [one["split"] for one in found] == [[2, 1, 1, 2]] * 2
    assert found[0]["experts"] == (True, None)
    assert [one["coordinator"] for one in found] == [(True, True), (False, True)]
    assert [one["once"] for one in found] == [7, None]


def scaled(given: dict[str, Any]) -> list[float]:
    """The loss scale before a step, what a step's backward multiplies, and the scale after it."""
    colossalai.launch_from_torch()
    plugin = HybridParallelPlugin(1, 1, precision="fp16", **given)
    booster, model = Booster(plugin=plugin), tiny()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model, optimizer, *_ = booster.boost(model, HybridAdam(groups(model), lr=1e-2))
    ids = Rows(2).ids
    first = optimizer.scale.value
    with booster.no_sync(model, optimizer):
        booster.backward(model(ids, labels=ids).loss, optimizer)
    weight = next(model.parameters())
    left = float(weight.grad.norm())
    optimizer.step()
    moved = sum(float((a - b).norm()) for a, b in zip(model.parameters(), before, strict=True))
    PROCESS.leave()
    return [first, left, optimizer.scale.value, moved]


def test_a_plugins_loss_scale_is_the_first(pool: Pool) -> None:
    """Catches an initial_scale that is read and not used, gradients stepped with the scale still in them, and a step
    taken from gradients that overflowed."""
    [small] = pool.run(1, scaled, {"initial_scale": 2.0**3, "max_norm": 1.0})
    [unsaid] = pool.run(1, scaled, {})
    [huge] = pool.run(1, scaled, {"initial_scale": 2.0**40})
    assert [small[0], unsaid[0], huge[0]] == [2.0**3, 2.0**16, 2.0**40]
    assert unsaid[1] / small[1] == pytest.approx(2.0**13, rel=1e-2)
    assert abs(unsaid[3] / small[3] - 1) < 1e-3
    assert (huge[2], huge[3]) == (2.0**39, 0.0)


def mixed() -> list[str]:
    colossalai.launch_from_torch(config={})
    said = [Booster(mixed_precision="bf16", plugin=TorchDDPPlugin()).boost(tiny())[0].precision]
    said.append(Booster(mixed_precision="bf16", plugin=LowLevelZeroPlugin(precision="fp16")).boost(tiny())[0].precision)
    with pytest.raises(ConfigError) as caught:
        Booster(mixed_precision="fp8", plugin=TorchDDPPlugin())
    PROCESS.leave()
    return [*said, str(caught.value)]


def test_ddp_hears_the_boosters_precision(pool: Pool) -> None:
    """Catches a mixed_precision that programs with TorchDDPPlugin say to the Booster, and a run in float32."""
    [(ddp, zero, refusal)] = pool.run(1, mixed)
    assert (ddp, zero) == ("bf16", "fp16")
    assert "'fp8'" in refusal


def configured(file: str | None) -> tuple[int, int, str]:
    """What a program reads of its CONFIG, and what it is told of the rest."""
    heard = logging.handlers.BufferingHandler(100)
    LOGGER.addHandler(heard)
    given: Any = {"parallel": {"tensor": {"size": 1}}, "BATCH_SIZE": 4, "fp16": {"mode": "naive"}}
    colossalai.launch_from_torch(config=file or given)
    found = gpc.config.BATCH_SIZE, gpc.config.parallel.tensor.size
    with pytest.raises(AttributeError, match="says no 'EPOCHS'"):
        _ = gpc.config.EPOCHS
    PROCESS.leave()
    LOGGER.removeHandler(heard)
    return *found, " ".join(one.getMessage() for one in heard.buffer if one.levelno == logging.WARNING)


@pytest.mark.parametrize("from_file", [False, True])
def test_a_program_reads_its_config(pool: Pool, tmp_path: Path, from_file: bool) -> None:
    """Catches values of a CONFIG that a program reads by name and does not find, and a section for
    colossalai.initialize that is told as if it were in force."""
    file = tmp_path / "config.py"
    file.write_text(
        "BATCH_SIZE = 2 * 2\nEPOCHS = len('x')\nparallel = dict(tensor=dict(size=1))\nfp16 = dict(mode=1)\n"
    )
    [(batch, size, told)] = pool.run(1, configured, str(file) if from_file else None)
    assert (batch, size) == (4, 1)
    assert "fp16.mode: no effect. colossalai.initialize" in told and "BATCH_SIZE" not in told


def stepped_wrongly() -> list[str]:
    colossalai.launch_from_torch()
    booster, said = Booster(plugin=HybridParallelPlugin(1, 1, precision="fp32")), []
    model, optimizer, *_ = booster.boost(fresh := tiny(), HybridAdam(groups(fresh)))
    ids = Rows(2).ids

    def refused(call: Any, *args: Any) -> None:
        with pytest.raises((ConfigError, AttributeError)) as caught:
            call(*args)
        said.append(str(caught.value))

    model(ids, labels=ids).loss.backward()
    refused(optimizer.step)
    optimizer.zero_grad()
    booster.backward(model(ids, labels=ids).loss, optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    refused(optimizer.step)
    model.zero_grad()
    booster.backward(model(ids, labels=ids).loss, optimizer)
    optimizer.step()
    model.zero_grad()
    booster.backward(model(ids, labels=ids).loss, optimizer)
    refused(getattr, optimizer, "clip_grad_by_norm")
    refused(getattr, booster, "enable_lora")
    split, fresh = Booster(plugin=HybridParallelPlugin(2, 1, precision="fp32")), tiny()
    refused(split.boost, fresh, torch.optim.Adafactor(fresh.parameters()))
    staged = Booster(plugin=HybridParallelPlugin(1, 2, num_microbatches=1, precision="fp32"))
    batches = iter([{"input_ids": ids, "labels": ids}])
    refused(staged.execute_pipeline, batches, staged.boost(tiny())[0], lambda outputs, _: outputs.loss)
    PROCESS.leave()
    return said


def test_shares_of_gradients_are_not_stepped_as_if_they_were_whole(pool: Pool) -> None:
    """Catches a clip by hand of each rank's share, which would step something else on every plan, a loss whose scale
    was left out, an optimizer that mixes elements of a part, and gradients cleared by the model that are refused."""
    found = pool.run(2, stepped_wrongly)[0]
    wanted = [
        "in place of loss.backward()",
        "max_norm",
        "save_optimizer",
        "no 'enable_lora'",
        "Adafactor may step",
        "num_microbatches=2",
    ]
    assert [(word, said) for word, said in zip(wanted, found, strict=True) if word not in said] == []


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_schedulers_give_the_rates_of_theirs(warmup: int) -> None:
    """Catches a warm-up that is off by one step, or a cosine that counts the warm-up's steps."""
    total, floor = 10, 0.1

    def rates(kind: Any, **given: float) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        scheduler, found = kind(optimizer, total, warmup, **given), []
        for _ in range(total):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    fall = [floor + (2 - floor) * (1 + cos(pi * step / (total - warmup))) / 2 for step in range(total - warmup)]
    rise = [2 * (step + 1) / warmup for step in range(warmup)]
    assert rates(CosineAnnealingWarmupLR, eta_min=floor) == pytest.approx(rise + fall)
    slow = [2 * (step + 1) / (warmup + 1) for step in range(warmup)]
    straight = [2 * (total - step) / (total - warmup) for step in range(warmup, total)]
    assert rates(LinearWarmupLR) == pytest.approx(slow + straight)
