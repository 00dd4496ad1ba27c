"""Whole tensors by their Hugging Face names, and what `save_pretrained` writes of a split model."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from model.dense import TOKENS, batch_of, build, dense_loss, gradients
from pool import Pool
from seqloom.errors import ModelError
from seqloom.fabric import Fabric
from seqloom.model import Float64Islands, count_copies, lasting, parallelize, sum_gradients, token_loss, whole_tensors
from seqloom.plan import Plan, Side, fit, read_config
from seqloom.sequence import shard_batch
from seqloom.tensor import TensorGroup, split

GRIDS = {
    "tensor=3": {"tensor": 0},
    "tensor=6 tensor_kind=2d grid=3x2": {"row": 1, "col": 0},
    "tensor=8 tensor_kind=2.5d depth=2": {"row": 0, "col": 1},
    "tensor=8 tensor_kind=3d": {"output": 1, "input": 0, "weight": 0},
}
"""By plan the dim of a weight that each axis splits, where it splits one."""

SHAPES = {"weight": (7, 11), "packed_0": (5, 4), "packed_1": (5, 4), "norm": (9,), "single": (1, 2)}


def wholes() -> dict[str, Tensor]:
    torch.manual_seed(4)
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}


class Held(nn.Module):
    """One parameter of each kind, split by hand over sizes that nothing divides."""

    def __init__(self, fabric: Fabric, shards: dict[str, int | None]) -> None:
        super().__init__()
        group, side = TensorGroup.of(fabric), Side(tuple(fabric.grid), None)
        for name, tensor in wholes().items():
            self.register_parameter(name, split(tensor, group, {} if name == "norm" else shards, side))
        self.tied, self.plain = self.weight, nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.packed = {"packed": (("packed_0", "packed_1"), 1)}
        self.register_buffer("lasting", torch.arange(2.0))
        self.register_buffer("passing", torch.arange(3.0), persistent=False)


def whole_of(text: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    fabric = Fabric.build(Plan.parse(text))
    held = Held(fabric, GRIDS[text])
    for parameter in held.parameters():
        parameter.grad = parameter.detach() * 2
    held.norm.grad = None
    outer = nn.ModuleDict({"inside": held})
    found = whole_tensors(outer, fabric), whole_tensors(outer, fabric, "gradient")
    count_copies(outer, fabric)
    assert held.plain.copies == held.norm.copies == fabric.world.size
    fabric.close()
    return *found, list(lasting(held))


@pytest.mark.parametrize("text", GRIDS)
def test_parts_become_the_whole(pool: Pool, text: str) -> None:
    """Catches parts laid end to end in another order than they were cut, along another dim, or of a rank that holds
    none; and packed ones under names that no Hugging Face model knows."""
    expected = {f"inside.{name}": tensor for name, tensor in wholes().items()}
    expected["inside.packed"] = torch.cat([expected.pop("inside.packed_0"), expected.pop("inside.packed_1")], 1)
    expected["inside.plain"] = torch.ones(3, dtype=torch.float64)
    for parameters, found, named in pool.run(Plan.parse(text).world_size, whole_of, text):
        assert parameters.keys() == expected.keys()
        assert all(torch.equal(parameters[name], expected[name]) for name in expected)
        assert found.keys() == expected.keys() - {"inside.norm"}
        assert all(torch.equal(found[name], 2 * expected[name]) for name in found)
        assert named == [*SHAPES, "plain", "lasting"]


FAMILIES = [
    ("llama", "tensor=3"),
    ("qwen2", "tensor=4 tensor_kind=2d"),  # tied
    ("qwen3", "tensor=4 tensor_kind=3d grid=2x2x1"),
    ("gpt2", "tensor=2 sequence_parallel=false"),  # tied and packed
    ("bloom", "data=2 tensor=2"),
    ("gemma2", "ring=2"),  # nothing is split
]


def config_of(family: str, text: str) -> dict[str, Any]:
    return fit(read_config(family), Plan.parse(text), TOKENS)


def saved(family: str, text: str, folder: Path, *options: str) -> None:
    fabric = Fabric.build(Plan.parse(text))
    model = parallelize(build(family, **config_of(family, text)), fabric)
    if options:
        model.save_pretrained(folder, **dict.fromkeys(options, True))
    else:
        model.save_pretrained(str(folder))
    assert (folder / "model.safetensors").exists()  # on every rank that returns


@pytest.mark.parametrize(("family", "text"), FAMILIES)
def test_saved_weights_are_ordinary(pool: Pool, tmp_path: Path, family: str, text: str) -> None:
    """Catches a folder with one rank's part, names or shapes of the split model, tied weights written twice, a
    configuration of one rank's heads, and several ranks that write one file."""
    pool.run(Plan.parse(text).world_size, saved, family, text, tmp_path / "split")
    dense = build(family, **config_of(family, text))
    dense.save_pretrained(tmp_path / "dense")
    assert {path.name for path in (tmp_path / "split").iterdir()} == {p.name for p in (tmp_path / "dense").iterdir()}
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("split", "dense"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("split", "dense")]
    assert configs[0] == configs[1]
    with torch.device("cpu"):
        again = type(dense).from_pretrained(tmp_path / "split", dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize(("option", "text"), [("state_dict", "data=2"), ("distributed_checkpoint", "tensor=2")])
def test_a_state_of_parts_is_refused(pool: Pool, tmp_path: Path, option: str, text: str) -> None:
    """Catches local shards that are written as if they were the weights."""
    with pytest.raises(ModelError, match=f"was given {option}, but under '{text}' it gathers the whole weights"):
        pool.run(2, saved, "llama", text, tmp_path, option)
    assert not list(tmp_path.iterdir())


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    """Catches a copy that saves the original, or one that its save_pretrained keeps from being made."""
    model = parallelize(build("llama"), Fabric.build(Plan()))
    twin = copy.deepcopy(model)
    twin.lm_head.weight.data.zero_()
    twin.save_pretrained(tmp_path)
    assert not load_file(tmp_path / "model.safetensors")["lm_head.weight"].any()


def whole_gradients(family: str, text: str) -> dict[str, float]:
    """How far each whole gradient is from one device's."""
    fabric, config = Fabric.build(Plan.parse(text)), config_of(family, text)
    batch = batch_of(2)
    with Float64Islands():
        dense, model = build(family, **config), parallelize(build(family, **config), fabric)
        dense_loss(dense, batch).backward()
        expected = gradients(dense)
        token_loss(model, *shard_batch(batch, fabric)).backward()
        sum_gradients(model, fabric)
    found = whole_tensors(model, fabric, "gradient")
    assert found.keys() == expected.keys()
    size = torch.stack([g.norm() for g in expected.values()]).norm()
    dist.barrier()
    return {name: float((found[name] - g).norm() / max(g.norm(), 1e-6 * size)) for name, g in expected.items()}


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("gpt2", "tensor=2 data=2"),
        ("gemma2", "tensor=4 tensor_kind=2d"),
        ("qwen3", "tensor=8 tensor_kind=2.5d depth=2"),
    ],
)
def test_gradients_of_a_model(pool: Pool, family: str, text: str) -> None:
    """Catches gradients that are parts of a sum, or of other weights than their names say."""
    for errors in pool.run(Plan.parse(text).world_size, whole_gradients, family, text):
        assert max(errors.values()) < 1e-10, max(errors, key=lambda name: errors[name])
