"""The papers' algorithms against one device, and the one linear against them."""

import pytest
import torch
from torch import Tensor

from close import assert_close
from pool import Pool
from seqloom.fabric import Fabric
from seqloom.plan import Plan
from seqloom.tensor import TensorGroup, local, split
from seqloom.tensor.linear import Call, parallel_linear
from seqloom.tensor.specification import linear_3d, summa_linear

ROWS, TOKENS, WIDTH, OUT = 2, 8, 4, 12


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def part(x: Tensor, group: TensorGroup, side: str) -> Tensor:
    """This rank's [rows, tokens, hidden] of a side."""
    held = getattr(group.grid, side)
    for name in held.tokens:
        x = x.chunk(group.axes[name].size, -2)[group.axes[name].rank]
    return x.chunk(group.axes[held.hidden].size, -1)[group.axes[held.hidden].rank].clone()


def both_ways(plan: str) -> list[list[Tensor]]:
    """Output, dx and dw: as the paper says, by the one linear, and what one device has of them."""
    group = TensorGroup.of(Fabric.build(Plan.parse(plan)))
    axes, moves = group.axes, group.grid.linear("colwise")
    x, weight, cotangent = noise((ROWS, TOKENS, WIDTH), 1), noise((OUT, WIDTH), 2), noise((ROWS, TOKENS, OUT), 3)
    found = []
    for spec in (True, False):
        mine = part(x, group, "outer").requires_grad_()
        rows = local(split(weight, group, moves.shards, group.grid.outer)).detach().clone().requires_grad_()
        if not spec:
            tokens = TOKENS // group.grid.tokens * (1 if moves.y is None else axes[moves.y.axis].size)
            transfers = (
                group.collecting(moves.x, mine, WIDTH),
                (group.weight(moves, weight.shape),),
                (group.scattering(moves.y, tokens, OUT),),
            )
            (out,) = parallel_linear(mine, [rows], Call(*transfers))
        elif group.grid.kind == "2d":
            out = summa_linear(mine, rows, axes["row"], axes["col"])
        else:
            out = linear_3d(mine, rows, axes["input"], axes["weight"], axes["output"])
        out.backward(part(cotangent, group, "inner"))
        found.append([out.detach(), mine.grad, rows.grad])
    leaves = [one.clone().requires_grad_() for one in (x, weight)]
    whole = leaves[0] @ leaves[1].T
    whole.backward(cotangent)
    dweight = local(split(leaves[1].grad, group, moves.shards, group.grid.outer))
    found.append([part(whole.detach(), group, "inner"), part(leaves[0].grad, group, "outer"), dweight.detach()])
    return found


@pytest.mark.parametrize("plan", ["tensor=4 tensor_kind=2d", "tensor=8 tensor_kind=3d"])
def test_the_one_linear_equals_the_papers(pool: Pool, plan: str) -> None:
    """Catches a linear that agrees with itself on another layout than the paper's, forward or in either gradient."""
    world = Plan.parse(plan).tensor
    for paper, ours, device in pool.run(world, both_ways, plan):
        for stated, made, wanted in zip(paper, ours, device, strict=True):
            assert_close(stated, wanted, tolerance=1e-13, ranks=world)
            assert_close(made, stated, tolerance=1e-13, ranks=world)


def metered() -> dict[str, int]:
    """Bytes of SUMMA's forward pass on this rank."""
    fabric = Fabric.build(Plan(tensor=4, tensor_kind="2d"))
    x, weight = torch.zeros(1, 4, 2, dtype=torch.float64), torch.zeros(6, 2, dtype=torch.float64)
    summa_linear(x, weight, fabric.grid["row"], fabric.grid["col"])
    return fabric.meter.sent


def test_blocks_are_broadcast_once(pool: Pool) -> None:
    """Catches a specification that gathers, as what it is compared with does: each rank broadcasts its blocks."""
    assert pool.run(4, metered) == [{"row": 6 * 2 * 8, "col": 4 * 2 * 8}] * 4
