"""The regions against what they mean on one device: forward, gradients, bytes, lower types."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from close import assert_close
from pool import Pool
from seqloom.errors import DataError
from seqloom.fabric import Axis, Fabric
from seqloom.geometry import even_bounds
from seqloom.plan import Plan
from seqloom.tensor import regions

UNEVEN = {2: (5, 2), 3: (0, 4, 3), 4: (3, 0, 1, 3)}
ROWS, TOKENS, WIDTH = 2, 7, 3


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shaped(dim: int, size: int, seed: int) -> Tensor:
    """[ROWS, TOKENS, WIDTH] with `size` along `dim`, not contiguous."""
    shape = [ROWS, TOKENS, WIDTH]
    shape[dim] = size
    return noise(tuple(reversed(shape)), seed).permute(2, 1, 0)


def even(size: int, parts: int) -> tuple[int, ...]:
    bounds = even_bounds(size, parts)
    return tuple(stop - start for start, stop in pairwise(bounds))


def ran(call: Callable[[Tensor, Axis], Tensor], x: Tensor, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """Output, its cotangent, and the gradient of x."""
    x = x.clone().requires_grad_()
    out = call(x, axis)
    cotangent = noise(tuple(out.shape), 50 + axis.rank)
    out.backward(cotangent)
    assert x.grad is not None
    return out.detach(), cotangent, x.grad


def all_regions(dim: int, sizes: tuple[int, ...] | None, size: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Every region on this rank; what all hold alike has seed 1, what differs seed 10 + rank."""
    axis = Fabric.build(Plan(tensor=torch.distributed.get_world_size())).tensor
    mine = (sizes or even(size, axis.size))[axis.rank]
    same, own, part = shaped(dim, size, 1), shaped(dim, size, 10 + axis.rank), shaped(dim, mine, 10 + axis.rank)
    gather = regions.gather_from_sequence_parallel_region
    return {
        "scatter": ran(lambda x, a: regions.scatter_to_sequence_parallel_region(x, a, dim, sizes), same, axis),
        "gather": ran(lambda x, a: gather(x, a, dim, sizes), part, axis),
        "gather, same": ran(lambda x, a: gather(x, a, dim, sizes, tensor_parallel_output_grad=False), part, axis),
        "sum parts": ran(lambda x, a: regions.reduce_scatter_to_sequence_parallel_region(x, a, dim, sizes), own, axis),
        "copy": ran(regions.copy_to_tensor_region, same, axis),
        "reduce": ran(regions.reduce_from_tensor_region, own, axis),
    }


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_meaning(pool: Pool, world: int, dim: int, uneven: bool) -> None:
    """Catches a gradient summed where it should be split or the reverse, parts out of order, an empty part mixed up."""
    sizes = UNEVEN[world] if uneven else None
    cuts = sizes or even(TOKENS, world)
    found = pool.run(world, all_regions, dim, sizes, TOKENS)
    outs = {name: [rank[name][0] for rank in found] for name in found[0]}
    given = {name: [rank[name][1] for rank in found] for name in found[0]}
    same = shaped(dim, TOKENS, 1)
    parts = [shaped(dim, n, 10 + rank) for rank, n in enumerate(cuts)]
    total = sum(shaped(dim, TOKENS, 10 + rank) for rank in range(world))
    for rank in range(world):

        def cut(x: Tensor, rank: int = rank) -> Tensor:
            return x.split(list(cuts), dim)[rank]

        expected = {
            "scatter": (cut(same), torch.cat(given["scatter"], dim)),
            "gather": (torch.cat(parts, dim), cut(sum(given["gather"]))),
            "gather, same": (torch.cat(parts, dim), cut(given["gather, same"][rank])),
            "sum parts": (cut(total), torch.cat(given["sum parts"], dim)),
            "copy": (same, sum(given["copy"])),
            "reduce": (total, given["reduce"][rank]),
        }
        for name, (out, grad) in expected.items():
            for got, wanted in ((outs[name][rank], out), (found[rank][name][2], grad)):
                if wanted.numel():
                    assert_close(got, wanted, tolerance=1e-14, ranks=world)
                assert got.shape == wanted.shape


def mlp(sequence_parallel: bool) -> tuple[Tensor, ...]:
    """An MLP with a column-parallel and a row-parallel weight, its input used twice; all gradients."""
    axis = Fabric.build(Plan(tensor=torch.distributed.get_world_size())).tensor
    x, up, down, target = mlp_inputs()
    mine = [w.chunk(axis.size, dim)[axis.rank].clone().requires_grad_() for w, dim in ((up, 0), (down, 1))]
    if sequence_parallel:
        x = x.split(even(TOKENS, axis.size), 1)[axis.rank].clone().requires_grad_()
        target = target.split(even(TOKENS, axis.size), 1)[axis.rank]
        sizes = even(TOKENS, axis.size)
        whole = regions.gather_from_sequence_parallel_region(x, axis, sizes=sizes)
        y = regions.reduce_scatter_to_sequence_parallel_region(gelu(whole @ mine[0].T) @ mine[1].T, axis)
    else:
        x = x.clone().requires_grad_()
        whole = regions.copy_to_tensor_region(x, axis)
        y = regions.reduce_from_tensor_region(gelu(whole @ mine[0].T) @ mine[1].T, axis)
    (y * target + x.square()).sum().backward()
    return y.detach(), x.grad, mine[0].grad, mine[1].grad


def mlp_inputs() -> list[Tensor]:
    return [
        noise((ROWS, TOKENS, WIDTH), 1),
        noise((12, WIDTH), 2),
        noise((WIDTH, 12), 3),
        noise((ROWS, TOKENS, WIDTH), 4),
    ]


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_an_mlp_between_regions(pool: Pool, world: int, sequence_parallel: bool) -> None:
    """Catches a pair of regions that do not fit each other: gradients P times too large, or of one rank alone."""
    x, up, down, target = mlp_inputs()
    leaves = [one.clone().requires_grad_() for one in (x, up, down)]
    y = gelu(leaves[0] @ leaves[1].T) @ leaves[2].T
    (y * target + leaves[0].square()).sum().backward()
    found = list(zip(*pool.run(world, mlp, sequence_parallel), strict=True))
    if sequence_parallel:
        out, grad = torch.cat(found[0], 1), torch.cat(found[1], 1)
    else:
        out, grad = found[0][-1], found[1][-1]
    for got, wanted in (
        (out, y),
        (grad, leaves[0].grad),
        (torch.cat(found[2], 0), leaves[1].grad),
        (torch.cat(found[3], 1), leaves[2].grad),
    ):
        assert_close(got, wanted, tolerance=1e-12, ranks=world)


def metered() -> dict[str, tuple[int, int]]:
    """Bytes sent forward and backward by each region, of 12 tokens x 5 float64."""
    fabric = Fabric.build(Plan(tensor=torch.distributed.get_world_size()))
    axis, found = fabric.tensor, {}
    for name, call, size in (
        ("scatter", regions.scatter_to_sequence_parallel_region, 12),
        ("gather", lambda x, a: regions.gather_from_sequence_parallel_region(x, a, 1, (12 // a.size,) * a.size), 1),
        ("gather, same", lambda x, a: regions.gather_from_sequence_parallel_region(x, a, 1, None, False), 1),
        ("sum parts", regions.reduce_scatter_to_sequence_parallel_region, 12),
        ("copy", regions.copy_to_tensor_region, 12),
        ("reduce", regions.reduce_from_tensor_region, 12),
    ):
        x = torch.zeros(1, 12 // axis.size if size == 1 else size, 5, dtype=torch.float64, requires_grad=True)
        out = call(x, axis)
        forward = fabric.meter.sent.get("tensor", 0)
        fabric.meter.reset()
        out.sum().backward()
        found[name] = (forward, fabric.meter.sent.get("tensor", 0))
        fabric.meter.reset()
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_bytes(pool: Pool, world: int) -> None:
    """Catches an all-reduce where half of it would do, and a gradient that travels though every rank has it."""
    half = (world - 1) * (12 // world) * 5 * 8
    for found in pool.run(world, metered):
        assert found == {
            "scatter": (0, half),
            "gather": (half, half),
            "gather, same": (half + 8 * (world - 1), 0),  # the sizes are exchanged
            "sum parts": (half, half),
            "copy": (0, 2 * half),
            "reduce": (2 * half, 0),
        }


def lower(value: float) -> list[float]:
    """256 on rank 0 and `value` elsewhere, summed in bfloat16 by every region that sums."""
    fabric = Fabric.build(Plan(tensor=torch.distributed.get_world_size()))
    axis = fabric.tensor
    mine = torch.full((1, 6, 1), 256.0 if axis.rank == 0 else value, dtype=torch.bfloat16)
    found = [
        regions.reduce_from_tensor_region(mine, axis),
        regions.reduce_scatter_to_sequence_parallel_region(mine, axis),
    ]
    sent = fabric.meter.sent["tensor"]
    assert sent == 3 * (axis.size - 1) * (6 // axis.size) * 2, sent
    for call in (regions.copy_to_tensor_region, regions.gather_from_sequence_parallel_region):
        x = torch.zeros_like(mine if call is regions.copy_to_tensor_region else mine[:, : 6 // axis.size])
        out = call(x.requires_grad_(), axis)
        out.backward(mine)
        found.append(x.grad)
    assert all(x.dtype == torch.bfloat16 for x in found)
    return [float(x.unique()) for x in found]


def test_lower_types_are_summed_in_float32(pool: Pool) -> None:
    """Catches sums in bfloat16, in which 256 + 1 is 256 however often: and the bytes are still those of bfloat16."""
    assert pool.run(3, lower, 1.0) == [[258.0] * 4] * 3


def test_one_rank_is_the_identity() -> None:
    """Catches copies, or collectives without a group, where nothing is split."""
    axis, x = Fabric.build(Plan()).tensor, noise((1, 4, 2), 0)
    for call in (
        regions.scatter_to_sequence_parallel_region,
        regions.gather_from_sequence_parallel_region,
        regions.reduce_scatter_to_sequence_parallel_region,
        regions.copy_to_tensor_region,
        regions.reduce_from_tensor_region,
    ):
        assert call(x, axis) is x


def test_a_sketch_has_the_shapes() -> None:
    """Catches a collective on the meta device, where there are no processes, and shapes that are not the rank's."""
    axis = Fabric.sketch(Plan(tensor=3), rank=2).tensor
    for call, size, out in (
        (lambda x: regions.scatter_to_sequence_parallel_region(x, axis), 7, 3),
        (lambda x: regions.scatter_to_sequence_parallel_region(x, axis, 1, (5, 1, 1)), 7, 1),
        (lambda x: regions.gather_from_sequence_parallel_region(x, axis), 2, 6),
        (lambda x: regions.gather_from_sequence_parallel_region(x, axis, 1, (1, 5, 2), False), 2, 8),
        (lambda x: regions.reduce_scatter_to_sequence_parallel_region(x, axis), 7, 3),
        (lambda x: regions.copy_to_tensor_region(x, axis), 7, 7),
        (lambda x: regions.reduce_from_tensor_region(x, axis), 7, 7),
    ):
        x = torch.empty(2, size, 3, device="meta", requires_grad=True)
        made = call(x)
        made.sum().backward()
        assert made.shape == (2, out, 3) and x.grad.shape == x.shape


def test_a_part_is_no_view_of_the_whole(pool: Pool) -> None:
    """Catches a split that keeps all ranks' activations in memory: what sequence parallelism is there to save."""
    assert pool.run(2, bytes_kept) == [4 * 8] * 2


def bytes_kept() -> int:
    axis = Fabric.build(Plan(tensor=2)).tensor
    return regions.scatter_to_sequence_parallel_region(noise((1, 8, 1), 0), axis).untyped_storage().nbytes()


@pytest.mark.parametrize("sizes", [(3, 3, 3), (4, 3), (7, 0, 1)])
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, ...]) -> None:
    """Catches tokens cut off, or one part repeated over another's place, where a size is wrong."""
    axis = Fabric.sketch(Plan(tensor=3)).tensor
    for call in (regions.scatter_to_sequence_parallel_region, regions.reduce_scatter_to_sequence_parallel_region):
        with pytest.raises(DataError, match=r"sizes .* give one size a rank"):
            call(noise((1, 7, 1), 0), axis, 1, sizes)
    with pytest.raises(DataError, match=r"Rank 0 of 3 of axis tensor holds 1 along dim 1"):
        regions.gather_from_sequence_parallel_region(noise((1, 1, 1), 0), axis, 1, sizes)
