"""Who holds which box, and the whole made of any boxes."""

import pytest
import torch
from torch import Tensor, nn

from pool import Pool
from seqloom.errors import ModelError
from seqloom.fabric import Fabric
from seqloom.model import assemble, count_copies, pieces, whole_tensors
from seqloom.plan import Plan
from seqloom.tensor import Slot

ROWS = {"table": (7, 5), "left": (3, 4), "right": (3, 4), "scale": (), "late": (2, 3)}


def wholes() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return {name: torch.randn(shape) for name, shape in ROWS.items()}


class Shares(nn.Module):
    """As rank `rank` of four might hold a model: parts of columns, shares of their rows, a stage's parameters."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        full, column, row = wholes(), rank % 2, rank // 2
        columns = (slice(0, 3), slice(3, 5))[column]
        rows = (slice(0, 5), slice(5, 7))[row]
        self.table = nn.Parameter(full["table"][rows, columns].clone())
        self.table.slot, self.table.zero_rows = Slot((7, 5), (0, columns.start)), rows.start
        for name in ("left", "right"):  # parts of one packed tensor; rank 3 has no row of them
            held = full[name][(rank, slice(None)) if rank < 3 else 0].reshape(-1, 4)[: int(rank < 3)]
            parameter = nn.Parameter(held.clone())
            parameter.slot, parameter.zero_rows = Slot((3, 4), (0, 0)), rank
            self.register_parameter(name, parameter)
        self.packed = {"both": (("left", "right"), 0)}
        self.scale = nn.Parameter(full["scale"].clone())
        if rank > 1:  # the first and the last stage of a tied model
            self.register_parameter("late" if rank == 2 else "head", nn.Parameter(full["late"].clone()))
            self._tied_names = {"head": "late"}


def gathered() -> tuple[dict[str, Tensor], list[tuple[str, tuple[int, ...]]], dict[str, int]]:
    fabric = Fabric.build(Plan(data=4))
    model = Shares(fabric.rank)
    count_copies(model, fabric)
    for parameter in model.parameters():
        parameter.grad = 3 * parameter.detach()
    found, gradients = whole_tensors(model, fabric), whole_tensors(model, fabric, "gradient")
    assert found.keys() == gradients.keys()
    assert all(torch.equal(3 * found[name], gradients[name]) for name in found)
    given = [(name, tuple(tensor.shape)) for name, tensor in assemble(pieces(model), fabric, target=1)]
    assert fabric.rank != 1 or given == [(name, tuple(tensor.shape)) for name, tensor in found.items()]
    return found, given, {name: parameter.copies for name, parameter in model.named_parameters()}


def test_any_boxes_become_the_whole(pool: Pool) -> None:
    """Catches offsets of shares or of packed parts that are forgotten, a rank without rows or without the parameter, a
    tied head under a name of its own, and copies counted by what a plan says instead of who holds them."""
    expected = wholes()
    expected["both"] = torch.cat([expected.pop("left"), expected.pop("right")])
    answers = pool.run(4, gathered)
    for rank, (found, given, copies) in enumerate(answers):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert [shape == (0,) for _, shape in given] == [rank != 1] * 4
        assert copies["scale"] == 4 and copies["table"] == copies["left"] == 1
        assert copies.get("late", 2) == copies.get("head", 2) == 2


def in_part() -> None:
    fabric = Fabric.build(Plan(data=2))
    model = nn.Linear(3, 2, bias=False)
    model.weight.slot = Slot((4, 3), (0, 0))
    whole_tensors(model, fabric)


def test_a_missing_box_is_told(pool: Pool) -> None:
    """Catches memory that was never written, handed out as weights."""
    with pytest.raises(ModelError, match=r"Some ranks hold weight and others nothing of it, so its \[4, 3\] are not"):
        pool.run(2, in_part)
