"""Programs for Colossal-AI's Booster: a model, its optimizer and its data, equal to one device under each plugin."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from close import assert_close
from pool import Pool
from seqloom.compat import colossalai
from seqloom.compat.colossalai.booster import Booster
from seqloom.compat.colossalai.booster.plugin import GeminiPlugin, HybridParallelPlugin
from seqloom.compat.colossalai.nn.optimizer import HybridAdam
from seqloom.compat.colossalai.state import PROCESS
from seqloom.errors import CheckpointError, ConfigError, DataError, DialectError
from seqloom.model import whole_tensors

ROWS, LENGTH, VOCAB = 4, 24, 61
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of random tokens, of which the later ones have fewer labels, and end in padding."""

    def __init__(self, count: int) -> None:
        self.ids = torch.randint(VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids, mask = self.ids[row], (torch.arange(LENGTH) < LENGTH - row % 3).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def tiny() -> PreTrainedModel:
    torch.manual_seed(11)
    return LlamaForCausalLM(CONFIG).to(torch.float64).train()


def groups(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Parameters in two groups, as programs make them."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if "norm" not in name], "weight_decay": 0.1},
        {"params": [p for name, p in named if "norm" in name], "weight_decay": 0.0},
    ]


Trained = tuple[list[float], dict[str, Tensor], Tensor]


def boosted(kind: str, given: dict[str, Any], folder: str) -> Trained:
    """Losses of three steps of two micro-batches, the weights after them, and then logits."""
    colossalai.launch_from_torch(seed=3)
    try:
        plugin = {"Gemini": GeminiPlugin, "Hybrid": HybridParallelPlugin}[kind](precision="fp32", max_norm=0.5, **given)
        booster = Booster(plugin=plugin)
        model = tiny()
        optimizer = HybridAdam(groups(model), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        loader = plugin.prepare_dataloader(Rows(6 * ROWS), batch_size=ROWS // plugin.dp_size)
        model, optimizer, _, loader, scheduler = booster.boost(model, optimizer, None, loader, scheduler)
        losses = []
        for number, batch in enumerate(loader):
            loss = model(**batch)[0]
            booster.backward(loss / 2, optimizer)
            losses.append(loss.item())
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
        weights = whole_tensors(model.unwrap(), model.fabric)
        model.eval()
        with torch.no_grad():
            logits = model(Rows(2 * plugin.dp_size).ids).logits
        booster.save_model(model, Path(folder) / "whole", shard=True)
        booster.save_model(model, Path(folder) / "one.safetensors")
        fresh, *_ = booster.boost(LlamaForCausalLM(CONFIG).double())
        for source in ("whole", "one.safetensors"):
            booster.load_model(fresh, Path(folder) / source)
            for name, whole in whole_tensors(fresh.unwrap(), fresh.fabric).items():
                assert torch.equal(whole, weights[name]), f"{name} of {source}"
        return losses, weights, logits
    finally:
        PROCESS.leave()


def on_one_device() -> Trained:
    """The same by transformers and torch alone."""
    model, rows = tiny(), Rows(6 * ROWS)
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    losses = []
    for number in range(6):
        taken = [rows[number * ROWS + i] for i in range(ROWS)]
        batch = {name: torch.stack([row[name] for row in taken]) for name in taken[0]}
        loss = model(**batch).loss
        (loss / 2).backward()
        losses.append(loss.item())
        if number % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    with torch.no_grad():
        logits = model.eval()(Rows(2).ids).logits
    return losses, {name: p.detach() for name, p in model.named_parameters()}, logits


SEQUENCE = {"enable_sequence_parallelism": True, "pp_size": 1}
CASES: list[tuple[int, str, dict[str, Any]]] = [
    (4, "Hybrid", {**SEQUENCE, "tp_size": 2, "sp_size": 2, "sequence_parallelism_mode": "ring_attn"}),
    (2, "Hybrid", {**SEQUENCE, "tp_size": 1, "sp_size": 2, "sequence_parallelism_mode": "all_to_all", "zero_stage": 1}),
    (2, "Hybrid", {**SEQUENCE, "tp_size": 2, "sequence_parallelism_mode": "split_gather"}),
    (2, "Gemini", {}),
]


@pytest.mark.parametrize(("world", "kind", "given"), CASES, ids=lambda case: str(case)[:12])
def test_a_program_trains_as_on_one_device(
    pool: Pool, tmp_path: Path, world: int, kind: str, given: dict[str, Any]
) -> None:
    """Catches a loss of one part, gradients averaged or summed twice, an optimizer that steps parameters which the
    model no longer has, a scheduler it no longer hears, and weights that come back from a file in other places."""
    found = pool.run(world, boosted, kind, given, str(tmp_path), timeout_seconds=150)
    losses, weights, logits = on_one_device()
    for mine in found:
        assert_close(torch.tensor(mine[0]), torch.tensor(losses), tolerance=1e-6)
        for name, whole in mine[1].items():
            assert_close(whole, weights[name], tolerance=1e-5)
        assert_close(mine[2][:2], logits, tolerance=1e-5)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "whole").config.vocab_size == VOCAB


def refusals(folder: str) -> list[str]:
    said = []

    def refused(kind: type[Exception], call: Any, *args: Any, **given: Any) -> None:
        with pytest.raises(kind) as caught:
            call(*args, **given)
        said.append(str(caught.value))

    colossalai.launch_from_torch()
    refused(DialectError, HybridParallelPlugin, tp_size=2, pp_size=1, sp_size=2)
    plugin = HybridParallelPlugin(1, 1, enable_flash_attention=True, precision="fp32")
    said += [note.why for note in plugin.notes if note.option == "enable_flash_attention" and note.verdict != "mapped"]
    booster, model = Booster(plugin=plugin), tiny()
    stepper = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, *_ = booster.boost(model, stepper)
    ids = Rows(2).ids
    refused(ConfigError, model, ids, labels=ids, position_ids=ids)
    refused(ConfigError, model, ids)
    refused(DataError, model, ids, labels=ids, attention_mask=ids.new_zeros(ids.shape))
    booster.backward(model(ids, labels=ids).loss, optimizer)
    optimizer.step()
    refused(ConfigError, booster.backward, model(ids, labels=ids).loss, optimizer)
    refused(ConfigError, booster.execute_pipeline, iter([]), model, None)
    torch.save({}, Path(folder) / "empty.pt")
    (Path(folder) / "text.pt").write_text("no weights")
    for name in ("empty.pt", "text.pt", "absent"):
        refused(CheckpointError, booster.load_model, model, Path(folder) / name)
    booster.save_model(model, Path(folder) / "model.bin")
    booster.load_model(model, Path(folder) / "model.bin")
    refused(ConfigError, HybridAdam, [], nvme_offload_fraction=0.5)
    refused(AttributeError, getattr, colossalai, "initialize")
    PROCESS.leave()
    return said


def test_what_cannot_be_is_refused_in_a_sentence(pool: Pool, tmp_path: Path) -> None:
    """Catches an argument accepted and ignored, and a mistake that ends in a traceback from deep inside."""
    found = pool.run(1, refusals, str(tmp_path))[0]
    wanted = [
        "sp_size 2 without",
        "flash-attn is not installed",
        "not position_ids",
        "Logits have no gradients",
        "leaves out has a label",
        "zero_grad() after each step",
        "pp_size above 1",
        "is missing in",
        "cannot be read as weights",
        "cannot be read as weights",
        "HybridAdam is AdamW",
        "docs/compat.md",
    ]
    assert len(found) == len(wanted)
    assert [(word, said) for word, said in zip(wanted, found, strict=True) if word not in said] == []
