"""Checkpoints of a Booster: model, optimizer and scheduler go on under another plan as if nothing had happened."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from close import assert_close
from compat.test_colossalai_booster import LENGTH, ROWS, VOCAB, groups, tiny
from pool import Pool
from seqloom.compat import colossalai
from seqloom.compat.colossalai.booster import Booster
from seqloom.compat.colossalai.booster.plugin import HybridParallelPlugin
from seqloom.compat.colossalai.nn.optimizer import HybridAdam
from seqloom.compat.colossalai.state import PROCESS
from seqloom.errors import CheckpointError, ConfigError
from seqloom.model import whole_tensors

IDS = torch.randint(VOCAB, (4 * ROWS, LENGTH), generator=torch.Generator().manual_seed(8))


def stepping(given: dict[str, Any], steps: range, folder: str | None, found: str | None) -> dict[str, Tensor]:
    """Take some of the steps under a plugin, from what was found and into a folder; the weights after them."""
    colossalai.launch_from_torch(seed=3)
    try:
        plugin = HybridParallelPlugin(precision="fp32", max_norm=0.5, **given)
        booster, model = Booster(plugin=plugin), tiny()
        optimizer = HybridAdam(groups(model), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        model, optimizer, *_, scheduler = booster.boost(model, optimizer, lr_scheduler=scheduler)
        if found:
            booster.load_model(model, Path(found) / "model")
            booster.load_optimizer(optimizer, Path(found) / "optimizer")
            booster.load_lr_scheduler(scheduler, Path(found) / "scheduler")
        for step in steps:
            rows = IDS[step * ROWS : (step + 1) * ROWS].chunk(plugin.dp_size)[model.fabric.data.rank]
            batch = {"input_ids": rows, "labels": rows}
            if plugin.pp_size > 1:
                booster.execute_pipeline(iter([batch]), model, lambda outputs, _: outputs.loss, optimizer)
            else:
                booster.backward(model(**batch).loss, optimizer)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if folder:
            booster.save_model(model, Path(folder) / "model", shard=True)
            booster.save_optimizer(optimizer, Path(folder) / "optimizer", shard=True)
            booster.save_lr_scheduler(scheduler, Path(folder) / "scheduler")
        return whole_tensors(model.unwrap(), model.fabric)
    finally:
        PROCESS.leave()


def on_one_device() -> dict[str, Tensor]:
    model = tiny()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for rows in IDS.split(ROWS):
        model(rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


ULYSSES = {"sp_size": 2, "enable_sequence_parallelism": True, "sequence_parallelism_mode": "all_to_all"}


def test_a_checkpoint_goes_on_under_other_plans(pool: Pool, tmp_path: Path) -> None:
    """Catches moments that come back for other parameters or rows, steps counted from 0 again, a rate or a schedule
    that begins anew, and a checkpoint that knows its own plan alone."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    pool.run(2, stepping, {"tp_size": 1, "pp_size": 1, "zero_stage": 1, **ULYSSES}, range(2), first, None)
    pool.run(2, stepping, {"tp_size": 2, "pp_size": 1}, range(2, 3), second, first)
    pipeline = {"tp_size": 1, "pp_size": 2, "num_microbatches": 2}
    found = pool.run(2, stepping, pipeline, range(3, 4), None, second)
    for name, whole in on_one_device().items():
        assert_close(found[0][name], whole, tolerance=1e-5)


def refusals(folder: str) -> list[str]:
    said = []

    def refused(kind: type[Exception], call: Any, *args: Any, **given: Any) -> None:
        with pytest.raises(kind) as caught:
            call(*args, **given)
        said.append(str(caught.value))

    colossalai.launch_from_torch()
    booster = Booster(plugin=HybridParallelPlugin(1, 1, precision="fp32"))
    model = tiny()
    model, optimizer, *_ = booster.boost(model, HybridAdam(groups(model)))
    place = Path(folder) / "optimizer"
    refused(CheckpointError, booster.load_optimizer, optimizer, place)
    booster.save_optimizer(optimizer, place)
    _, one_group, *_ = booster.boost(fresh := tiny(), HybridAdam(fresh.parameters()))
    refused(CheckpointError, booster.load_optimizer, one_group, place)
    _, moved, *_ = booster.boost(fresh := tiny(), HybridAdam(groups(fresh)[::-1]))
    refused(CheckpointError, booster.load_optimizer, moved, place)
    refused(ConfigError, booster.save_optimizer, optimizer, place, prefix="module.")
    (Path(folder) / "file").write_text("")
    refused(CheckpointError, booster.save_optimizer, optimizer, Path(folder) / "file")
    booster.save_optimizer(optimizer, place)  # once more in its place
    booster.load_optimizer(optimizer, place)
    booster.save_model(model, Path(folder) / "model", shard=True)
    kept = sorted(path.name for path in (Path(folder) / "model").iterdir())
    refused(CheckpointError, booster.save_optimizer, optimizer, Path(folder) / "model")
    assert kept == sorted(path.name for path in (Path(folder) / "model").iterdir())
    assert sorted(path.name for path in Path(folder).iterdir()) == ["file", "model", "optimizer"]
    factored, adafactor, *_ = booster.boost(fresh := tiny(), torch.optim.Adafactor(fresh.parameters()))
    booster.backward(factored(IDS, labels=IDS).loss, adafactor)
    adafactor.step()
    refused(ConfigError, booster.save_optimizer, adafactor, Path(folder) / "factored")
    PROCESS.leave()
    return said


def test_what_does_not_fit_is_refused_in_a_sentence(pool: Pool, tmp_path: Path) -> None:
    """Catches moments loaded into another group's parameters, factored state cut as if it had rows, a saved model
    deleted by an optimizer's state of the same name, and a second state that leaves none or two."""
    found = pool.run(1, refusals, str(tmp_path))[0]
    wanted = ["cannot be read", "2 groups", "in group 0", "prefix", "is a file", "would delete", "Adafactor keeps"]
    assert [(word, said) for word, said in zip(wanted, found, strict=True) if word not in said] == []
