"""Layers under Colossal-AI's names: split over each tensor mode they are the layers of one device."""

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


def trained(tensor: Config, dropout: float) -> tuple[Tensor, dict[str, tuple[Any, Tensor]]]:
    """This rank's output of the second of two passes, and each gradient with its place in the whole."""
    colossalai.launch(config={"parallel": {"pipeline": 1, "tensor": tensor}}, seed=7)
    try:
        model = Layers(col_nn, dropout)
        ids, x = inputs()
        model(ids, cut(x, tensor["mode"]))
        out = model(ids, cut(x, tensor["mode"]))
        out.square().sum().backward()
        return out.detach(), {name: (parameter.slot, parameter.grad) for name, parameter in model.named_parameters()}
    finally:
        PROCESS.leave()


def on_one_device() -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)
    model = Layers(TorchLayers, 0.0)
    out = model(*inputs())
    out.square().sum().backward()
    return out.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def places(tensor: Config) -> list[Tensor]:
    """For each rank the numbers of the elements of the output that it holds."""
    numbers = torch.arange(ROWS * LENGTH * DIM, dtype=torch.float64).view(ROWS, LENGTH, DIM)
    colossalai.launch(config={"parallel": {"pipeline": 1, "tensor": tensor}})
    found = cut(numbers, tensor["mode"]).long()
    PROCESS.leave()
    return [found]


def assembled(parts: list[Tensor], held: list[Tensor]) -> Tensor:
    whole = torch.full((ROWS * LENGTH * DIM,), float("nan"), dtype=torch.float64)
    for part, numbers in zip(parts, held, strict=True):
        whole[numbers.flatten()] = part.flatten()
    return whole.view(ROWS, LENGTH, DIM)


@pytest.mark.parametrize("tensor", MODES, ids=lambda tensor: tensor["mode"])
def test_layers_of_each_mode_are_those_of_one_device(pool: Pool, tensor: Config) -> None:
    """Catches a direction that does not alternate, a part at another place, and a gradient that lacks other rows."""
    world = tensor["size"]
    held = [found[0] for found in pool.run(world, places, tensor)]
    found = pool.run(world, trained, tensor, 0.0)
    out, gradients = on_one_device()
    assert_close(assembled([out for out, _ in found], held), out, tolerance=1e-12, ranks=world)
    for _, mine in found:
        for name, (slot, part) in mine.items():
            whole = gradients[name].mT if name in ("up.weight", "down.weight") else gradients[name]
            assert slot.shape == whole.shape
            there = tuple(slice(first, first + size) for first, size in zip(slot.offset, part.shape, strict=True))
            assert_close(part, whole[there], tolerance=1e-12, ranks=world)


@pytest.mark.parametrize("tensor", [MODES[0], MODES[3]], ids=lambda tensor: tensor["mode"])
def test_dropout_draws_what_one_device_draws(pool: Pool, tensor: Config) -> None:
    """Catches coins that depend on the mode, on the order in which 3d numbers its rows, or are the same each step."""
    world = tensor["size"]
    held = [found[0] for found in pool.run(world, places, tensor)]
    found = pool.run(world, trained, tensor, 0.3)
    ((out, _),) = pool.run(1, trained, {"size": 1, "mode": "1d"}, 0.3)
    assert 0.2 < (out == 0).double().mean() < 0.4
    assert_close(assembled([out for out, _ in found], held), out, tolerance=1e-12, ranks=world)


def refusals() -> list[str]:
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
    PROCESS.leave()
    return said


def test_what_cannot_be_is_refused_in_a_sentence(pool: Pool) -> None:
    """Catches a layer split over groups that nobody made, or a traceback in place of the way out."""
    found = pool.run(2, refusals)[0]
    wanted = ["launch", "2d takes size = q x q", "twice", "CONFIG says 1d", "multiple of 2"]
    assert all(word in sentence for word, sentence in zip(wanted, found, strict=True))
