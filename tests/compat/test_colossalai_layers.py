"""Layers under Colossal-AI's names: split over each tensor mode they are the layers of one device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

import seqloom.compat.colossalai.nn as col_nn
from close import assert_close
from pool import Pool
from seqloom.compat import colossalai
from seqloom.compat.colossalai.context import ParallelMode
from seqloom.compat.colossalai.core import global_context as gpc
from seqloom.compat.colossalai.state import PROCESS
from seqloom.errors import ConfigError, DialectError

Config = dict[str, Any]
DIM, ROWS, LENGTH = 16, 8, 3

CUTS = {
    "1d": [],
    "2d": [(0, "2D_COL"), (-1, "2D_ROW")],
    "2.5d": [(0, "2P5D_DEP"), (0, "2P5D_COL"), (-1, "2P5D_ROW")],
    "3d": [(0, "3D_WEIGHT"), (0, "3D_INPUT"), (-1, "3D_OUTPUT")],
}
MODES: list[Config] = [
    {"size": 2, "mode": "1d"},
    {"size": 4, "mode": "2d"},
    {"size": 8, "mode": "2.5d", "depth": 2},
    {"size": 8, "mode": "3d"},
]


def cut(x: Tensor, mode: str) -> Tensor:
    """This rank's part, as the tutorials cut it."""
    for dim, name in CUTS[mode]:
        group = ParallelMode[f"PARALLEL_{name}"]
        x = x.chunk(gpc.get_world_size(group), dim)[gpc.get_local_rank(group)]
    return x


class Layers(nn.Module):
    """Everything that `nn` offers, the norm and dropout on both sides."""

    def __init__(self, layers: Any, dropout: float) -> None:
        super().__init__()
        self.embedding = layers.Embedding(24, DIM, dtype=torch.float64)
        self.norm = layers.LayerNorm(DIM, dtype=torch.float64)
        self.up = layers.Linear(DIM, 4 * DIM, dtype=torch.float64)
        self.between = layers.Dropout(dropout)
        self.inner_norm = layers.LayerNorm(4 * DIM, dtype=torch.float64)
        self.down = layers.Linear(4 * DIM, DIM, dtype=torch.float64)
        self.dropout = layers.Dropout(dropout)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(ids) + x)
        return self.dropout(self.down(self.inner_norm(self.between(gelu(self.up(hidden))))))


class TorchLayers:
    """torch's own layers under the same names."""

    @staticmethod
    def Embedding(*sizes: int, dtype: torch.dtype) -> nn.Module:
        return nn.Embedding(*sizes, dtype=dtype)

    @staticmethod
    def LayerNorm(width: int, dtype: torch.dtype) -> nn.Module:
        return nn.LayerNorm(width, dtype=dtype)

    Linear, Dropout = nn.Linear, nn.Dropout


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randint(24, (ROWS, LENGTH), generator=generator),
        torch.randn(ROWS, LENGTH, DIM, dtype=torch.float64, generator=generator),
    )


Part = tuple[Tensor, Tensor, dict[str, tuple[Any, Tensor]]]


def trained(tensor: Config, dropout: float) -> Part:
    """This rank's output of the second of two passes, the numbers of its elements in the whole, and each gradient
    with its place."""
    colossalai.launch(config={"parallel": {"pipeline": 1, "tensor": tensor}}, seed=7)
    try:
        model = Layers(col_nn, dropout)
        ids, x = inputs()
        model(ids, cut(x, tensor["mode"]))
        out = model(ids, cut(x, tensor["mode"]))
        out.square().sum().backward()
        numbers = torch.arange(x.numel(), dtype=torch.float64).view(x.shape)
        found = {name: (parameter.slot, parameter.grad) for name, parameter in model.named_parameters()}
        return out.detach(), cut(numbers, tensor["mode"]).long(), found
    finally:
        PROCESS.leave()


def on_one_device() -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)
    model = Layers(TorchLayers, 0.0)
    out = model(*inputs())
    out.square().sum().backward()
    return out.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assembled(parts: list[Part]) -> Tensor:
    whole = torch.full((ROWS * LENGTH * DIM,), float("nan"), dtype=torch.float64)
    for part, numbers, _ in parts:
        whole[numbers.flatten()] = part.flatten()
    return whole.view(ROWS, LENGTH, DIM)


@pytest.mark.parametrize("tensor", MODES, ids=lambda tensor: tensor["mode"])
def test_layers_of_each_mode_are_those_of_one_device(pool: Pool, tensor: Config) -> None:
    """Catches a direction that does not alternate, a part at another place, and a gradient that lacks other rows."""
    world = tensor["size"]
    found = pool.run(world, trained, tensor, 0.0)
    out, gradients = on_one_device()
    assert_close(assembled(found), out, tolerance=1e-12, ranks=world)
    for _, _, mine in found:
        for name, (slot, part) in mine.items():
            whole = gradients[name].mT if name in ("up.weight", "down.weight") else gradients[name]
            assert slot.shape == whole.shape
            there = tuple(slice(first, first + size) for first, size in zip(slot.offset, part.shape, strict=True))
            assert_close(part, whole[there], tolerance=1e-12, ranks=world)


@pytest.mark.parametrize("tensor", [MODES[0], MODES[3]], ids=lambda tensor: tensor["mode"])
def test_dropout_draws_what_one_device_draws(pool: Pool, tensor: Config) -> None:
    """Catches coins that depend on the mode, on the order in which 3d numbers its rows, or are the same each step."""
    world = tensor["size"]
    found = pool.run(world, trained, tensor, 0.3)
    ((out, _, _),) = pool.run(1, trained, {"size": 1, "mode": "1d"}, 0.3)
    assert 0.2 < (out == 0).double().mean() < 0.4
    assert_close(assembled(found), out, tolerance=1e-12, ranks=world)


CLASSES = 10


def classified(tensor: Config) -> tuple[float, dict[str, tuple[Any, Tensor]]]:
    """The loss of class scores, and the gradients; targets with rows left out, classes that ranks share unevenly."""
    colossalai.launch(config={"parallel": {"pipeline": 1, "tensor": tensor}}, seed=7)
    try:
        layers = nn.ModuleList(
            [
                col_nn.Linear(DIM, 32, dtype=torch.float64, weight_initializer=filled),
                col_nn.Linear(32, DIM, dtype=torch.float64),
            ]
        )
        layers.append(col_nn.Classifier(DIM, CLASSES, dtype=torch.float64))
        loss = col_nn.CrossEntropyLoss(label_smoothing=0.1)
        ids, x = inputs()
        own = col_nn.partition_batch(x)
        assert own.shape[0] == cut(x, tensor["mode"]).shape[0]
        hidden = layers[1](gelu(layers[0](cut(x, tensor["mode"]))))
        found = loss(layers[2](hidden), targets(ids))
        found.backward()
        return found.item(), {name: (p.slot, p.grad) for name, p in layers.named_parameters()}
    finally:
        PROCESS.leave()


def filled(weight: Tensor, *, fan_in: int, fan_out: int) -> None:
    with torch.no_grad():
        weight.copy_(torch.linspace(-1, 1, fan_in * fan_out, dtype=weight.dtype).view(fan_out, fan_in))


def targets(ids: Tensor) -> Tensor:
    return (ids % CLASSES).masked_fill(ids > 20, -100)


@pytest.mark.parametrize("tensor", MODES[:2] + MODES[3:], ids=lambda tensor: tensor["mode"])
def test_the_loss_of_class_scores_is_that_of_one_device(pool: Pool, tensor: Config) -> None:
    """Catches a mean over this rank's rows, targets of other rows, and scores whose gradient is counted twice."""
    world = tensor["size"]
    torch.manual_seed(7)
    layers = nn.ModuleList(nn.Linear(*sizes, dtype=torch.float64) for sizes in ((DIM, 32), (32, DIM), (DIM, CLASSES)))
    filled(layers[0].weight, fan_in=DIM, fan_out=32)
    ids, x = inputs()
    scores = layers[2](layers[1](gelu(layers[0](x)))).flatten(0, 1)
    loss = nn.functional.cross_entropy(scores, targets(ids).flatten(), label_smoothing=0.1)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in layers.named_parameters()}
    for found, mine in pool.run(world, classified, tensor):
        assert_close(found, loss.item(), tolerance=1e-12, ranks=world)
        for name, (slot, part) in mine.items():
            whole = gradients[name].mT if name.endswith("weight") else gradients[name]
            there = tuple(slice(first, first + size) for first, size in zip(slot.offset, part.shape, strict=True))
            if part.numel():
                assert_close(part, whole[there], tolerance=1e-11, ranks=world)


def refusals(file: str) -> list[str]:
    said = []

    def refused(kind: type[Exception], call: Any, *args: Any, **given: Any) -> None:
        with pytest.raises(kind) as caught:
            call(*args, **given)
        said.append(str(caught.value))

    refused(ConfigError, col_nn.Linear, 4, 4)
    refused(DialectError, colossalai.launch, {"parallel": {"tensor": {"size": 2, "mode": "2d"}}})
    PROCESS.leave()
    colossalai.launch({"parallel": {"data": 7, "tensor": {"size": 2, "mode": "1d"}}})
    refused(ConfigError, colossalai.launch)
    refused(ConfigError, gpc.get_local_rank, ParallelMode.PARALLEL_2D_ROW)
    refused(ConfigError, col_nn.Linear, 3, 4)
    refused(AttributeError, getattr, col_nn, "PatchEmbedding")
    col_nn.Linear(4, 4)
    refused(ConfigError, col_nn.Classifier, 4, 4)
    PROCESS.leave()
    colossalai.launch(file)
    said.append(str(PROCESS.arranged.plan))
    torch.distributed.barrier()
    PROCESS.leave()
    return said


def test_what_cannot_be_is_refused_in_a_sentence(pool: Pool, tmp_path: Path) -> None:
    """Catches layers split over groups that nobody made, a traceback for a way out, and a file that is run."""
    file = tmp_path / "config.py"
    file.write_text("import os\nos._exit(3)\nparallel = dict(pipeline=1, tensor=dict(size=2, mode='1d'))\n")
    found = pool.run(2, refusals, str(file))[0]
    wanted = ["launch", "2d takes size = q x q", "twice", "CONFIG says 1d", "multiple of 2", "no 'PatchEmbedding'"]
    wanted += ["one of a pair is missing", "tensor=2 sequence_parallel=false"]
    assert len(found) == len(wanted)
    assert all(word in sentence for word, sentence in zip(wanted, found, strict=True))
