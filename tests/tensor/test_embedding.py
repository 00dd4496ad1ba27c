"""Embeddings split by vocabulary and width against one table, on every grid."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from close import assert_close
from pool import Pool
from seqloom.errors import DataError, ModelError
from seqloom.fabric import Fabric, all_reduce_
from seqloom.plan import Moves, Plan, Side
from seqloom.tensor import ParallelEmbedding, PositionEmbedding, TensorGroup, local, split, whole
from tensor.grids import GRIDS, NUM_TOKENS, ROWS, batch, bound, positions, world_of

VOCABULARY, WIDTH, PADDING = 13, 7, 3


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def part_of_width(x: Tensor, group: TensorGroup) -> Tensor:
    """The channels of x [..., width] that the outer side holds on this rank."""
    axis = group.axes.get(group.grid.outer.hidden or "")
    return x if axis is None else x.split(-(-WIDTH // axis.size), -1)[axis.rank]


def made(group: TensorGroup, table: Tensor, moves: Moves, **options: Any) -> ParallelEmbedding:
    grid = group.grid
    side = Side((*grid.outer.tokens, *grid.inner.tokens), grid.inner.hidden)
    return ParallelEmbedding(group, split(table, group, moves.shards, side), moves, *table.shape, **options)


def summed(parameter: nn.Parameter, fabric: Fabric) -> Tensor:
    """The whole gradient, as the gradient rule makes it."""
    grad = local(parameter.grad)
    for axis in (fabric.replicas, *(fabric.grid[name] for name in parameter.sum_axes)):
        all_reduce_(grad, axis)
    return whole(parameter.grad, fabric.grid)


def embedded(plan: str, tied: bool, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Output beside what it should be, and the whole gradient of two uses in one graph."""
    fabric, group, shard = bound(plan, batch(VOCABULARY))
    table = noise((VOCABULARY, WIDTH), 1).requires_grad_()
    module = made(group, table, group.grid.embedding(tied=tied), **options)
    out = module(shard.input_ids)
    places = positions(group.shard.tokens.outer)
    rows = slice(group.shard.first_row - 5, group.shard.first_row - 5 + len(out))
    wanted = part_of_width(reference(options)[0][rows][:, places], group)
    cotangent = part_of_width(noise((ROWS, NUM_TOKENS, WIDTH), 2)[rows][:, places], group)
    ((out * cotangent).sum() + (module(shard.input_ids) * cotangent).sum()).backward()
    return out.detach(), wanted, summed(module.weight, fabric)


def reference(options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Output and gradient, used twice, of one device."""
    table = noise((VOCABULARY, WIDTH), 1).requires_grad_()
    scale = options.get("scale", 1.0)
    out = embedding(batch(VOCABULARY).tokens, table, options.get("padding_idx")) * scale
    (2 * out * noise((ROWS, NUM_TOKENS, WIDTH), 2)).sum().backward()
    assert table.grad is not None
    return out.detach(), table.grad


@pytest.mark.parametrize("options", [{}, {"padding_idx": PADDING - VOCABULARY, "scale": 2.5}], ids=["", "padding"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("plan", GRIDS)
def test_equals_one_table(pool: Pool, plan: str, tied: bool, options: dict[str, Any]) -> None:
    """Catches rows of another rank's vocabulary, tokens of another rank, a padding row trained, a scale forgotten."""
    _, gradient = reference(options)
    if options:
        assert not gradient[PADDING].any()
    world = world_of(plan)
    for out, wanted, grad in pool.run(world, embedded, plan, tied, options):
        assert_close(out, wanted, tolerance=1e-13, ranks=world)
        assert_close(grad, gradient, tolerance=1e-12, ranks=world)


def wide_apart(vocabulary: int) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of a table of fewer rows than ranks need."""
    fabric, group, shard = bound("tensor=4", batch(vocabulary))
    table = noise((vocabulary, WIDTH), 1).requires_grad_()
    module = made(group, table, group.grid.embedding(tied=False))
    out = module(shard.input_ids)
    out.square().sum().backward()
    return [out.detach(), embedding(shard.input_ids, table)], [summed(module.weight, fabric), len(local(module.weight))]


def test_a_rank_without_rows(pool: Pool) -> None:
    """Catches a lookup in an empty table: of five rows four ranks hold 2, 2, 1 and none."""
    found = pool.run(4, wide_apart, 5)
    table = noise((5, WIDTH), 1).requires_grad_()
    embedding(batch(5).tokens, table).square().sum().backward()
    assert [rank[1][1] for rank in found] == [2, 2, 1, 0]
    for (out, wanted), (grad, _) in found:
        assert torch.equal(out, wanted)
        assert_close(grad, table.grad, tolerance=1e-13, ranks=4)


def in_bfloat16() -> tuple[Tensor, torch.dtype]:
    """The gradient of a row that a thousand tokens read, one each."""
    fabric, group, _ = bound("tensor=2", batch(4))
    module = made(group, torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True), group.grid.embedding(tied=False))
    group.shard = None
    out = module(torch.ones(1, 500, dtype=torch.int64))
    out.sum().backward()
    return summed(module.weight, fabric), out.dtype


def test_gradients_are_summed_in_float32(pool: Pool) -> None:
    """Catches a sum in bfloat16, which ends at 256 ones."""
    for grad, dtype in pool.run(2, in_bfloat16):
        assert dtype == torch.bfloat16
        assert grad.tolist() == [[0, 0], [1000, 1000], [0, 0], [0, 0]]


def metered(plan: str, tied: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by axis, forward and backward: 24 tokens, 24 rows of width 12, in float64."""
    fabric = Fabric.build(Plan.parse(plan))
    group = TensorGroup.of(fabric)
    module = made(group, noise((24, 12), 1).requires_grad_(), group.grid.embedding(tied=tied))
    split_over = fabric.plan.tensor_grid.outer.tokens
    tokens = 24
    for name in split_over:
        tokens //= fabric.grid[name].size
    out = module(torch.zeros(1, tokens, dtype=torch.int64))
    forward = fabric.meter.sent
    fabric.meter.reset()
    out.sum().backward()
    return forward, fabric.meter.sent


BYTES = {
    # ids of 6 tokens and rows of 6 tokens to three others
    ("tensor=4", False): ({"tensor": 3 * 6 * 8 + 3 * 6 * 12 * 8}, {"tensor": 3 * 6 * 12 * 8}),
    ("tensor=4 sequence_parallel=false", False): ({"tensor": 2 * 3 * 24 * 12 * 8 // 4}, {}),
    ("tensor=4 tensor_kind=2d", False): ({"row": 12 * 8 + 12 * 6 * 8}, {"row": 12 * 6 * 8}),
    # the table [12, 6] is gathered, and its gradient summed back; rows travel over the columns
    ("tensor=4 tensor_kind=2d", True): ({"row": 12 * 6 * 8, "col": 12 * 6 * 8}, {"row": 12 * 6 * 8, "col": 12 * 6 * 8}),
    ("tensor=8 tensor_kind=3d", True): (
        {"input": 6 * 8 + 6 * 6 * 8, "weight": 6 * 6 * 8},
        {"input": 6 * 6 * 8, "weight": 6 * 6 * 8},
    ),
}


@pytest.mark.parametrize(("plan", "tied"), BYTES)
def test_bytes(pool: Pool, plan: str, tied: bool) -> None:
    """Catches rows gathered where ids would do, a table that travels without need, an all-reduce for half of one."""
    assert pool.run(world_of(plan), metered, plan, tied) == [BYTES[plan, tied]] * world_of(plan)


def positioned(plan: str) -> tuple[Tensor, Tensor, Tensor]:
    """Learned positions of the outer side, from the inner side's ids, beside what they should be; the gradient."""
    fabric, group, shard = bound(plan, batch(VOCABULARY))
    table = noise((NUM_TOKENS, WIDTH), 1).requires_grad_()
    grid = group.grid
    hidden = {grid.outer.hidden: 1} if grid.outer.hidden else {}
    module = PositionEmbedding(group, split(table, group, hidden, grid.outer))
    out = module(shard.position_ids)
    places = positions(group.shard.tokens.outer)
    cotangent = part_of_width(noise((NUM_TOKENS, WIDTH), 2)[places], group)
    (out * cotangent).sum().backward()
    wanted = part_of_width(table.detach()[places], group).expand(out.shape)
    return out.detach(), wanted, summed(module.weight, fabric)


@pytest.mark.parametrize("plan", [plan for plan in GRIDS if "3d" not in plan])
def test_positions(pool: Pool, plan: str) -> None:
    """Catches positions of the inner side added to the outer side's tokens, and a gradient of one rank's alone."""
    world = world_of(plan)
    for out, wanted, grad in pool.run(world, positioned, plan):
        assert_close(out, wanted, tolerance=1e-13, ranks=world)
        assert_close(grad, ROWS * noise((NUM_TOKENS, WIDTH), 2), tolerance=1e-13, ranks=world)


def test_positions_that_a_rank_does_not_hold_are_refused() -> None:
    """Catches the wrong positions taken on 3d, whose outer tokens are no part of a rank's inner ones."""
    group = TensorGroup.of(Fabric.sketch(Plan(tensor=8, tensor_kind="3d")))
    with pytest.raises(ModelError, match="3d grid do not hold; use another tensor_kind"):
        PositionEmbedding(group, nn.Parameter(torch.zeros(4, 2)))


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_an_id_outside_the_table_is_refused(wrong: int) -> None:
    """Catches an id that no rank looks up, embedded as zeros without a word."""
    group = TensorGroup.of(Fabric.build(Plan()))
    module = made(group, noise((VOCABULARY, WIDTH), 1), group.grid.embedding(tied=False))
    with pytest.raises(DataError, match=rf"run from .*{wrong}.* but the table has 13 rows"):
        module(torch.tensor([[2, wrong]]))
    with pytest.raises(DataError, match="the table has 13 rows"):
        PositionEmbedding(group, module.weight)(torch.tensor([[2, wrong]]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("plan", GRIDS)
def test_a_sketch_has_the_shapes(plan: str, tied: bool) -> None:
    """Catches a collective, or a look at the contents, on the meta device."""
    group = TensorGroup.of(Fabric.sketch(Plan.parse(plan)))
    module = made(group, torch.empty(24, 12, device="meta", requires_grad=True), group.grid.embedding(tied=tied))
    out = module(torch.empty(2, 24, dtype=torch.int64, device="meta"))
    out.sum().backward()
    width = 12 // group.axes[group.grid.outer.hidden].size if group.grid.outer.hidden else 12
    assert out.shape == (2, 24, width) and module.weight.grad.shape == module.weight.shape
