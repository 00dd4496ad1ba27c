"""The one linear: local shapes, equality with one device, and bytes, on every grid."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from close import assert_close
from pool import Pool
from seqloom.errors import DataError
from seqloom.fabric import Axis, Fabric, all_reduce_
from seqloom.plan import Plan, Side, chunks
from seqloom.tensor import ParallelDropout, ParallelLinear, Siblings, TensorGroup, whole
from tensor.grids import GRIDS, NUM_TOKENS, ROWS, batch, bound, positions, world_of

OVERLAPS = (
    "",
    " tensor_overlap=ring",
    " tensor_overlap=none",
    " regather=false",
    " tensor_overlap=ring regather=false",
)
ONE_D = [f"tensor={n}{sp}{o}" for n in (2, 3, 4) for sp in ("", " sequence_parallel=false") for o in OVERLAPS]
OTHERS = [text + more for text in GRIDS if "kind" in text for more in ("", " regather=false", " tensor_overlap=none")]


def part(x: Tensor, side: Side, axes: dict[str, Axis]) -> Tensor:
    """This rank's part of [..., tokens, hidden], evenly split, as a module without a shard takes it."""
    for dim, names in ((-2, side.tokens), (-1, (side.hidden,) if side.hidden else ())):
        for name in names:
            x = x.split(list(chunks(x.shape[dim], axes[name].size)), dim)[axes[name].rank]
    return x


class MLP(nn.Module):
    """Two linears with a GELU between and a dropout after, of whatever kind."""

    def __init__(self, first: nn.Module, second: nn.Module, dropout: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.dropout = first, second, dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.second(nn.functional.gelu(self.first(x))))


def pair(text: str, dim: int, inner: int, p: float = 0.0, bias: bool = True) -> tuple[Fabric, TensorGroup, MLP, MLP]:
    """A fabric and its group, an MLP split over it, and the same on one device."""
    fabric = Fabric.build(Plan.parse(text))
    group, alone = TensorGroup.of(fabric), TensorGroup.of(Fabric.sketch(Plan()))
    torch.manual_seed(0)
    one, two = (nn.Linear(a, b, bias, dtype=torch.float64) for a, b in ((dim, inner), (inner, dim)))
    split = [
        ParallelLinear(group, group.grid.linear(way), linear.weight, linear.bias, direction=way)
        for linear, way in ((one, "colwise"), (two, "rowwise"))
    ]
    dropouts = [ParallelDropout(p, g, "outer", 0, dim) for g in (group, alone)]
    return fabric, group, MLP(*split, dropouts[0]), MLP(one, two, dropouts[1])


def summed_gradients(split: nn.Module, fabric: Fabric) -> dict[str, Tensor]:
    """Whole gradients by name, each summed once over the axes on which its parameter is replicated."""
    found = {}
    for name, parameter in split.named_parameters():
        for axis in parameter.sum_axes:
            all_reduce_(parameter.grad.to_local(), fabric.grid[axis])
        found[name] = whole(parameter.grad, fabric.grid)
    return found


def both(
    text: str, shape: tuple[int, ...], inner: int, p: float
) -> tuple[list[tuple[Tensor, Tensor]], dict[str, tuple[int, ...]]]:
    """(found, expected) of output and all gradients, and the local shapes, weights as [in, out]."""
    fabric, group, split, one = pair(text, shape[-1], inner, p)
    outer = group.grid.outer
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = one(x)
    weighing = torch.randn_like(y)
    (y * weighing).sum().backward()
    mine = part(x.detach(), outer, fabric.grid).clone().requires_grad_()
    hidden = split.first(mine)
    out = split(mine)
    (out * part(weighing, outer, fabric.grid)).sum().backward()
    shapes = {
        "W1": tuple(split.first.weight.to_local().T.shape),
        "W2": tuple(split.second.weight.to_local().T.shape),
        "input": tuple(mine.shape),
        "out1": tuple(hidden.shape),
        "out2": tuple(out.shape),
    }
    found = summed_gradients(split, fabric)
    fabric.close()
    pairs = [(out, part(y, outer, fabric.grid)), (mine.grad, part(x.grad, outer, fabric.grid))]
    pairs += [(found[name], parameter.grad) for name, parameter in one.named_parameters()]
    return [(a.detach(), b.detach()) for a, b in pairs], shapes


def hold(results: list[Any], ranks: int) -> None:
    """Hold every pair of every rank to 1e-12."""
    for pairs, _ in results:
        for found, expected in pairs:
            assert_close(found, expected, tolerance=1e-12, ranks=ranks)


TUTORIAL = {
    "tensor=2 sequence_parallel=false": ((256, 512), (512, 256), (16, 256), (16, 512), (16, 256)),
    "tensor=4 sequence_parallel=false": ((256, 256), (256, 256), (16, 256), (16, 256), (16, 256)),
    "tensor=4 tensor_kind=2d": ((128, 512), (512, 128), (8, 128), (8, 512), (8, 128)),
    "tensor=8 tensor_kind=2.5d depth=2": ((128, 512), (512, 128), (4, 128), (4, 512), (4, 128)),
    "tensor=8 tensor_kind=3d": ((128, 256), (512, 64), (4, 128), (4, 512), (4, 128)),
}
"""Colossal-AI's tutorial: an MLP 256 -> 1024 -> 256 on an input of 16 x 256. W1, W2, input, out1, out2 of a rank."""


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("text", TUTORIAL)
def test_tutorial_mlp(pool: Pool, text: str, p: float) -> None:
    """A grid that cuts another dim than its users know, or whose dropout, sums or biases differ from one device."""
    world = world_of(text)
    results = pool.run(world, both, text, (16, 256), 1024, p)
    hold(results, world)
    for _, shapes in results:
        assert tuple(shapes.values()) == TUTORIAL[text]


@pytest.mark.parametrize("text", [*ONE_D, *OTHERS])
def test_equals_one_device(pool: Pool, text: str) -> None:
    """A schedule, a kept input or a rectangle that computes something else; widths that do not divide."""
    grid = Plan.parse(text).tensor_grid
    tokens = 2
    for size in grid.sizes:
        tokens *= size
    hold(pool.run(world_of(text), both, text, (2, tokens, 22), 46, 0.0), world_of(text))


def siblings(text: str) -> tuple[list[tuple[Tensor, Tensor]], None]:
    """A gated MLP on an uneven sequence, its two inner linears computed together; (found, expected) pairs."""
    given = batch(64)
    fabric, group, _ = bound(text, given)
    torch.manual_seed(0)
    gate, up, down = (nn.Linear(a, b, dtype=torch.float64) for a, b in ((22, 46), (22, 46), (46, 22)))
    x = torch.randn(ROWS, NUM_TOKENS, 22, dtype=torch.float64, requires_grad=True)

    def gated(parts: list[nn.Module]) -> Callable[[Tensor], Tensor]:
        return lambda x: parts[2](nn.functional.silu(parts[0](x)) * parts[1](x))

    y = gated([gate, up, down])(x)
    weighing = torch.randn_like(y)
    (y * weighing).sum().backward()

    class Split(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return gated([self.gate, self.up, self.down])(hidden_states)

    split = Split()
    for name, linear, way in (("gate", gate, "colwise"), ("up", up, "colwise"), ("down", down, "rowwise")):
        moves = group.grid.linear(way)
        setattr(split, name, ParallelLinear(group, moves, linear.weight, linear.bias, direction=way))
    Siblings(split, [split.gate, split.up])
    axis = group.grid.outer.hidden
    rows = slice(None) if fabric.data.size == 1 else slice(fabric.data.rank, fabric.data.rank + 1)

    def mine(x: Tensor) -> Tensor:
        held = x.detach()[rows].index_select(1, positions(group.shard.tokens.outer))
        return part(held, Side((), axis), fabric.grid).clone()

    here = mine(x).requires_grad_()
    fabric.meter.reset()
    out = split(hidden_states=here)
    (out * mine(weighing)).sum().backward()
    for parameter in split.parameters():
        all_reduce_(parameter.grad.to_local(), fabric.replicas)
    found = summed_gradients(split, fabric)
    fabric.close()
    expected = {
        f"{name}.{key}": p.grad
        for name, linear in (("gate", gate), ("up", up), ("down", down))
        for key, p in linear.named_parameters()
    }
    pairs = [(out, mine(y)), (here.grad, mine(x.grad)), *((found[name], expected[name]) for name in expected)]
    return [(a.detach(), b.detach()) for a, b in pairs], None


@pytest.mark.parametrize("text", [*GRIDS, *(f"{text} tensor_overlap=ring" for text in GRIDS if "kind" not in text)])
def test_siblings_on_an_awkward_length(pool: Pool, text: str) -> None:
    """Linears that share one gathered input lose a part of its gradient, or tokens where lengths are uneven."""
    hold(pool.run(world_of(text), siblings, text), world_of(text))


def elements(text: str, tokens: int, width: int, out: int, direction: str) -> dict[str, float]:
    """Elements this rank sends per axis in forward and backward of one linear without a bias."""
    fabric = Fabric.build(Plan.parse(text))
    group = TensorGroup.of(fabric)
    moves = group.grid.linear(direction)
    weight = nn.Parameter(torch.randn(out, width))
    linear = ParallelLinear(group, moves, weight, None, direction=direction)
    source = group.grid.outer if direction == "colwise" else group.grid.inner
    x = part(torch.randn(tokens, width), source, fabric.grid).clone().requires_grad_()
    fabric.meter.reset()
    linear(x).sum().backward()
    sent = {axis: count / 4 for axis, count in fabric.meter.sent.items()}
    if "depth" in fabric.grid:
        all_reduce_(linear.weight.grad.to_local(), fabric.grid["depth"])
    depth = {"depth sum": fabric.meter.sent.get("depth", 0) / 4}
    fabric.close()
    return {"linear": sum(sent.values()), **depth}


M, K, N = 48, 24, 60
Q = 2


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("direction", ["colwise", "rowwise"])
@pytest.mark.parametrize(
    ("text", "depth"),
    [("tensor=4 tensor_kind=2d", 1), ("tensor=8 tensor_kind=2.5d depth=2", 2), ("tensor=8 tensor_kind=3d", 0)],
)
def test_elements_of_a_linear(pool: Pool, text: str, depth: int, direction: str, kept: bool) -> None:
    """A linear of 2d, 2.5d or 3d that sends more than the closed forms: a blanket gather, a doubled move."""
    results = pool.run(world_of(text), elements, f"{text} regather={str(not kept).lower()}", M, K, N, direction)
    if depth == 0:
        moved = 2 * (M * K + K * N + M * N) if kept else 3 * M * K + 3 * K * N + 2 * M * N
        expected = (Q - 1) * moved / Q**3
    elif direction == "colwise":
        expected = (2 if kept else 3) * (Q - 1) * (M * K / depth + K * N) / Q**2
    else:  # the input stays
        expected = (Q - 1) * (2 * M * N / depth + (2 if kept else 3) * K * N) / Q**2
    for sent in results:
        assert sent["linear"] == expected
        assert sent["depth sum"] == (2 * (depth - 1) / depth * K * N / Q**2 if depth > 1 else 0)


def rounded(text: str) -> float:
    """The error of an MLP's output in bfloat16 against float64, over that of one device in bfloat16."""
    fabric, _, split, one = pair(text, 64, 256)
    x = torch.randn(32, 64, dtype=torch.float64)
    truth = one(x)
    split, one = split.to(torch.bfloat16), one.to(torch.bfloat16)
    mine = part(x, split.first.group.grid.outer, fabric.grid).bfloat16()
    expected = part(truth, split.first.group.grid.outer, fabric.grid)
    error = (split(mine).double() - expected).norm() / expected.norm()
    own = (one(x.bfloat16()).double() - truth).norm() / truth.norm()
    fabric.close()
    return float(error / own)


@pytest.mark.parametrize("text", ["tensor=8", "tensor=8 sequence_parallel=false", "tensor=8 tensor_kind=2d grid=1x8"])
def test_sums_of_lower_types_are_rounded_once(pool: Pool, text: str) -> None:
    """Partial sums that are rounded to bfloat16 at every rank: the error grows with the degree."""
    assert max(pool.run(8, rounded, text)) < 1.5


def frozen(text: str) -> dict[str, int]:
    """Bytes sent in backward by an MLP whose linears are frozen, or whose input is."""
    fabric, group, split, _ = pair(text, 22, 46)
    sent = {}
    for what in ("weights", "input", "nothing"):
        split.requires_grad_(what != "weights")
        x = part(torch.randn(12, 22, dtype=torch.float64), group.grid.outer, fabric.grid).clone()
        out = split(x.requires_grad_(what != "input"))
        fabric.meter.reset()
        out.sum().backward()
        sent[what] = sum(fabric.meter.sent.values())
    fabric.close()
    return sent


@pytest.mark.parametrize(
    "text", ["tensor=3", "tensor=3 tensor_overlap=ring", "tensor=4 tensor_kind=2d", "tensor=8 tensor_kind=3d"]
)
def test_what_is_frozen_sends_less(pool: Pool, text: str) -> None:
    """A gather begun for a gradient that nobody asks for, and never waited for."""
    for sent in pool.run(world_of(text), frozen, text):
        assert 0 < sent["weights"] < sent["nothing"] and 0 < sent["input"] < sent["nothing"]


def few(text: str) -> list[tuple[Tensor, Tensor]]:
    """An MLP over fewer tokens than ranks."""
    return both(text, (1, 22), 46, 0.0)[0]


@pytest.mark.parametrize(
    "text", ["tensor=3 sequence_parallel=false tensor_overlap=ring", "tensor=4 sequence_parallel=false"]
)
def test_fewer_tokens_than_ranks(pool: Pool, text: str) -> None:
    """A ring step between two ranks without a token, which has nothing to send."""
    for pairs in pool.run(world_of(text), few, text):
        for found, expected in pairs:
            assert_close(found, expected, tolerance=1e-12, ranks=world_of(text))


def uneven(text: str) -> None:
    """A linear by itself whose tokens do not divide."""
    fabric, _, split, _ = pair(text, 22, 46)
    try:
        split.second(torch.randn(5, 23, dtype=torch.float64))
    finally:
        fabric.close()


def test_uneven_tokens_of_a_lone_linear_are_refused(pool: Pool) -> None:
    """Ranks that would disagree about sizes, and hang."""
    with pytest.raises(DataError, match="5 tokens cannot be split evenly over 2 ranks of tensor"):
        pool.run(2, uneven, "tensor=2")


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        ((8, 22), torch.float32, "The input is in torch.float32, but the weights are in torch.float64"),
        ((8, 21), torch.float64, r"The input is \[8, 21\], but this rank holds \[..., 8, 22\]"),
        ((22,), torch.float64, r"The input is \[22\], but this rank holds \[..., tokens, 22\]"),
    ],
)
def test_an_input_that_is_not_this_ranks_part_is_refused(shape: tuple[int, ...], dtype: torch.dtype, said: str) -> None:
    """Weights rounded to the input's type, or parts of other sizes that would not meet."""
    group = TensorGroup.of(Fabric.sketch(Plan(tensor=2)))
    linear = ParallelLinear(
        group, group.grid.linear("colwise"), torch.zeros(46, 22, dtype=torch.float64), None, direction="colwise"
    )
    with pytest.raises(DataError, match=said):
        linear(torch.zeros(shape, dtype=dtype, device="meta"))
