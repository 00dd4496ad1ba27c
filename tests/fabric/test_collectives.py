"""Every collective: what arrives, its adjoint, the bytes it counts, and how it fails."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from close import assert_close
from pool import Pool
from seqloom import fabric as collectives
from seqloom.errors import CommunicationError
from seqloom.fabric import Axis, Fabric, Meter
from seqloom.plan import Plan

WORLD = 3
ITEMS = 4

DIFFERENTIABLE: dict[str, Callable[[Tensor, Axis], Tensor]] = {
    "shift by 1": collectives.shift,
    "shift by 2": lambda x, axis: collectives.shift(x, axis, 2),
    "shift back": lambda x, axis: collectives.shift(x, axis, -1),
    "all_gather": collectives.all_gather,
    "all_to_all": lambda x, axis: torch.stack(collectives.all_to_all(list(x), [(ITEMS,)] * WORLD, axis)),
}
"""By name, each on a tensor [WORLD, ITEMS]."""


def traded(x: Tensor, axis: Axis) -> None:
    """An all-to-all of the rows of x."""
    collectives.start_trade([[part] for part in x], [[part] for part in torch.empty_like(x)], axis).wait()


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def strided(rank: int) -> Tensor:
    """[WORLD, ITEMS], transposed in memory: a collective that sends memory rather than elements would scramble it."""
    return noise((ITEMS, WORLD), rank).T


def products(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(<A x, y>, <x, A' y>, A x) of this rank, x and y different on every rank."""
    axis = Fabric.build(Plan(ring=WORLD)).ring
    x = strided(axis.rank).requires_grad_()
    out = DIFFERENTIABLE[name](x, axis)
    y = noise(tuple(out.shape)[::-1], 10 + axis.rank).permute(*range(out.dim() - 1, -1, -1))
    out.backward(y)
    assert x.grad is not None
    return (out * y).sum().detach(), (x * x.grad).sum().detach(), out.detach()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_adjoint(pool: Pool, name: str) -> None:
    """Catches a backward that averages, drops a rank's part, or goes the wrong way round: <A x, y> = <x, A' y>."""
    results = pool.run(WORLD, products, name)
    forward, backward = (torch.stack([r[i] for r in results]).sum() for i in (0, 1))
    assert_close(backward, forward, tolerance=1e-13, ranks=WORLD)
    # The dot products agree too if both are wrong alike, so what arrives is checked against its definition.
    given = [strided(rank) for rank in range(WORLD)]
    for rank, (_, _, out) in enumerate(results):
        expected = {
            "shift by 1": given[(rank - 1) % WORLD],
            "shift by 2": given[(rank - 2) % WORLD],
            "shift back": given[(rank + 1) % WORLD],
            "all_gather": torch.stack(given),
            "all_to_all": torch.stack([x[rank] for x in given]),
        }[name]
        assert torch.equal(out, expected)


def reduced(op: str) -> tuple[Tensor, Tensor]:
    axis = Fabric.build(Plan(ring=WORLD)).ring
    tensor = noise((ITEMS,), axis.rank)
    assert collectives.all_reduce_(tensor, axis, op) is tensor
    parts = noise((WORLD, ITEMS), axis.rank)
    return tensor, collectives.start_reduce_scatter(parts, axis).wait()


@pytest.mark.parametrize("op", ["sum", "max", "min"])
def test_reductions(pool: Pool, op: str) -> None:
    """Catches a mean in place of a sum, an operation taken for another, and a part reduced for the wrong rank."""
    given = torch.stack([noise((ITEMS,), rank) for rank in range(WORLD)])
    parts = torch.stack([noise((WORLD, ITEMS), rank) for rank in range(WORLD)])
    expected = {"sum": given.sum(0), "max": given.amax(0), "min": given.amin(0)}[op]
    for rank, (total, part) in enumerate(pool.run(WORLD, reduced, op)):
        assert_close(total, expected, tolerance=1e-14, ranks=WORLD)
        assert_close(part, parts[:, rank].sum(0), tolerance=1e-14, ranks=WORLD)


def broadcast_from(source: int) -> Tensor:
    axis = Fabric.build(Plan(ring=WORLD)).ring
    return collectives.broadcast_(noise((ITEMS,), axis.rank), axis, source)


@pytest.mark.parametrize("source", range(WORLD))
def test_broadcast(pool: Pool, source: int) -> None:
    """Catches a source taken for a global rank, or always 0."""
    assert all(torch.equal(x, noise((ITEMS,), source)) for x in pool.run(WORLD, broadcast_from, source))


def on_one_axis_of_a_grid() -> tuple[Tensor, Tensor]:
    """Collectives whose group is not the world, on the slow axis of a grid that is not square."""
    grid = Fabric.build(Plan(ring=3, ulysses=2))
    mine = torch.tensor([float(grid.rank)])
    return collectives.broadcast_(mine.clone(), grid.ring, 1), collectives.shift(mine, grid.ring)


def test_ranks_are_those_of_the_axis(pool: Pool) -> None:
    """Catches global ranks used where ranks of the group are meant; they agree wherever the group is the world."""
    for rank, (sent, shifted) in enumerate(pool.run(6, on_one_axis_of_a_grid)):
        assert (sent.item(), shifted.item()) == (2 + rank % 2, (rank - 2) % 6)


def two_in_flight() -> tuple[float, float]:
    axis = Fabric.build(Plan(ring=WORLD)).ring
    block, gradient = torch.tensor([10.0 + axis.rank]), torch.tensor([20.0 + axis.rank])
    first = collectives.start_shift([block], axis, tag=1)
    second = collectives.start_shift([gradient], axis, tag=2)
    return second.wait()[0].item(), first.wait()[0].item()


def test_two_shifts_in_flight(pool: Pool) -> None:
    """Catches a block delivered as a gradient, or a wait that must come in the order of the starts."""
    for rank, (gradient, block) in enumerate(pool.run(WORLD, two_in_flight)):
        assert (gradient, block) == (20.0 + (rank - 1) % WORLD, 10.0 + (rank - 1) % WORLD)


METERED: dict[str, tuple[Callable[[Tensor, Axis], object], int]] = {
    "all-gather": (lambda x, axis: collectives.start_all_gather(x, axis).wait(), 2 * 12),
    "reduce-scatter": (lambda x, axis: collectives.start_reduce_scatter(x, axis).wait(), 2 * 4),
    "all-to-all": (traded, 2 * 4),
    "all-reduce": (collectives.all_reduce_, 4 * 4),
    "barrier": (lambda _, axis: collectives.barrier(axis), 0),
}
"""Collective on a tensor of 12 elements, and the elements each of 3 ranks sends."""


def count(name: str, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    mesh = Fabric.build(Plan(ring=WORLD))
    call, _ = METERED[name]
    call(torch.ones(WORLD, ITEMS, dtype=dtype), mesh.ring)
    once = mesh.meter.sent
    call(torch.ones(WORLD, ITEMS, dtype=dtype), mesh.ring)
    twice = mesh.meter.sent
    mesh.meter.reset()
    call(torch.ones(WORLD, ITEMS, dtype=dtype), mesh.ulysses)  # of one rank: nothing leaves, not even for itself
    return once, twice, mesh.meter.sent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", METERED)
def test_meter(pool: Pool, name: str, dtype: torch.dtype) -> None:
    """Catches one's own part counted as sent, elements for bytes, a count that does not add up or does not reset."""
    sent = METERED[name][1] * dtype.itemsize
    for once, twice, alone in pool.run(WORLD, count, name, dtype):
        assert once == ({"ring": sent} if sent else {})
        assert twice == ({"ring": 2 * sent} if sent else {})
        assert alone == {}


def count_with_gradients(name: str) -> tuple[dict[str, int], dict[str, int]]:
    mesh = Fabric.build(Plan(ring=WORLD))
    out = DIFFERENTIABLE[name](torch.ones(WORLD, ITEMS, requires_grad=True), mesh.ring)
    forward = mesh.meter.sent
    mesh.meter.reset()
    out.backward(torch.ones_like(out))
    return forward, mesh.meter.sent


@pytest.mark.parametrize(
    ("name", "elements"), [("shift by 1", 12), ("shift back", 12), ("all_gather", 2 * 12), ("all_to_all", 2 * 4)]
)
def test_meter_of_backward(pool: Pool, name: str, elements: int) -> None:
    """Catches a backward that goes by uncounted, or more bytes than its forward."""
    assert pool.run(WORLD, count_with_gradients, name) == [({"ring": 4 * elements}, {"ring": 4 * elements})] * WORLD


def count_broadcast() -> dict[str, int]:
    mesh = Fabric.build(Plan(ring=WORLD))
    collectives.broadcast_(torch.ones(5), mesh.ring, 2)
    return mesh.meter.sent


def test_meter_of_a_broadcast(pool: Pool) -> None:
    """Catches a broadcast counted at its receivers."""
    assert pool.run(WORLD, count_broadcast) == [{}, {}, {"ring": 20}]


def test_meter_hands_out_a_copy() -> None:
    """Catches a reader who changes the count."""
    meter = Meter()
    meter.add("ring", 3)
    meter.sent["ring"] = 7
    assert meter.sent == {"ring": 3}


CALLS: dict[str, Callable[[Axis], object]] = {
    "shift": lambda axis: collectives.start_shift([torch.ones(4)], axis).wait(),
    "all-gather": lambda axis: collectives.start_all_gather(torch.ones(4), axis).wait(),
    "all-to-all": lambda axis: traded(torch.ones(WORLD, 4), axis),
    "all-reduce": lambda axis: collectives.all_reduce_(torch.ones(4), axis),
    "broadcast": lambda axis: collectives.broadcast_(torch.ones(4), axis, 2),
    "barrier": collectives.barrier,
}


def lose_a_peer(name: str) -> str:
    """Rank 2 leaves; the others say what they met."""
    mesh = Fabric.build(Plan(ulysses=WORLD))
    collectives.barrier(mesh.ulysses)
    if mesh.rank == 2:
        dist.destroy_process_group()
        return "left"
    try:
        for _ in range(100):
            CALLS[name](mesh.ulysses)
    except CommunicationError as error:
        return str(error)
    return "noticed nothing"


@pytest.mark.parametrize("name", CALLS)
def test_a_lost_peer_is_named_by_axis(pool: Pool, name: str) -> None:
    """Catches a backend's riddle where the user needs to know which collective on which axis lost a peer."""
    *met, left = pool.run(WORLD, lose_a_peer, name)
    assert left == "left"
    for rank, said in enumerate(met):
        # `rank` is that of the axis; one line, whatever the backend wrote.
        assert said.startswith(f"{name} on axis ulysses failed at rank {rank} of {WORLD}: a peer died"), said
        assert "\n" not in said


def misuse() -> str:
    mesh = Fabric.build(Plan(ring=WORLD))
    said = "accepted"
    try:
        collectives.start_shift([torch.ones(4).expand(2, 4)], mesh.ring)
    except Exception as error:
        said = type(error).__name__
    collectives.barrier(mesh.world)  # who leaves first is a dead peer to the others
    return said


def test_misuse_stays_itself(pool: Pool) -> None:
    """Catches a mistake in the call blamed on a dead peer."""
    assert set(pool.run(WORLD, misuse)) <= {"RuntimeError", "ValueError"}
