"""Dropout of activations: the same coins whatever the plan, torch's scale, and refusals."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from close import assert_close
from pool import Pool
from seqloom.errors import DataError, ModelError
from seqloom.fabric import Fabric
from seqloom.geometry import Layout, Mask
from seqloom.plan import Plan, chunks
from seqloom.sequence import SequenceShard
from seqloom.tensor import ParallelDropout, TensorGroup
from seqloom.tensor import dropout as room
from tensor.grids import GRIDS, NUM_TOKENS, ROWS, batch, bound, positions, world_of

WIDTH, P, NUMBER = 7, 0.3, 4


def one_device(seed: int = 11, first_row: int | None = 5) -> TensorGroup:
    """The group of one device with the shard of `grids.batch` bound."""
    fabric = Fabric.sketch(Plan())
    axis = fabric.ring
    shard = SequenceShard(
        (Mask(),) * ROWS, Layout("zigzag", NUM_TOKENS), axis, axis, axis, axis, "ring", seed, first_row
    )
    return replace(TensorGroup.of(fabric), shard=shard)


def activations() -> Tensor:
    """Of all rows, tokens and channels."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, NUM_TOKENS, WIDTH, dtype=torch.float64, generator=draw)


def ran(module: ParallelDropout, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of the sum of output times x."""
    x = x.clone().requires_grad_()
    out = module(x)
    (out * x.detach()).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def dropped(plan: str, side: str, width: int | None) -> list[tuple[Tensor, Tensor]]:
    """Output and gradient of one rank beside those of one device."""
    _, group, _ = bound(plan, batch(9))
    shard = group.shard
    assert shard is not None and shard.first_row is not None
    spans = getattr(shard.tokens, side) if shard.tokens else shard.spans
    rows = slice(shard.first_row - 5, shard.first_row - 5 + len(shard.masks))
    axis = group.axes.get(getattr(group.grid, side).hidden)

    def mine(x: Tensor) -> Tensor:
        x = x[rows][:, positions(spans)]
        return x if axis is None else x.split(list(chunks(WIDTH, axis.size)), -1)[axis.rank]

    found = ran(ParallelDropout(P, group, side, NUMBER, width), mine(activations()))
    wanted = ran(ParallelDropout(P, one_device(), side, NUMBER), activations())
    return [(got, mine(whole)) for got, whole in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("width", [WIDTH, None])
@pytest.mark.parametrize("side", ["outer", "inner"])
@pytest.mark.parametrize("plan", [*GRIDS, "ring=2", "ring=3 ulysses=2 layout=striped", "data=2"])
def test_the_same_elements_whatever_the_plan(pool: Pool, plan: str, side: str, width: int | None) -> None:
    """Catches coins of local positions, channels or rows, and a gradient masked by other coins than the output."""
    for pairs in pool.run(world_of(plan), dropped, plan, side, width):
        for got, wanted in pairs:
            assert torch.equal(got, wanted)
            assert bool((got == 0).any()) and bool((got != 0).any())


def test_what_stays_is_scaled_and_passes_its_gradient() -> None:
    """Catches a scale of 1 - p, none at all, and a gradient through what was dropped."""
    x = activations()
    out, grad = ran(ParallelDropout(P, one_device(), "outer", NUMBER), x)
    kept = out != 0
    assert_close(out[kept], x[kept] / (1 - P), tolerance=1e-15)
    assert torch.equal(grad, out)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rate(p: float) -> None:
    """Catches a comparison the wrong way round, and rows, tokens or channels that share their coins."""
    x = torch.ones(8, 64, 96)
    kept = ParallelDropout(p, replace(one_device(), shard=None), "outer", 0)(x) != 0
    for dim in ((0, 1, 2), (0, 1), (0, 2), (1, 2)):
        counts, size = kept.double().sum(dim), math.prod(kept.shape[i] for i in dim)
        assert (counts - (1 - p) * size).abs().max() < 5 * math.sqrt(size * p * (1 - p))
    neighbours = (kept[1:] ^ kept[:-1], kept[:, 1:] ^ kept[:, :-1], kept[..., 1:] ^ kept[..., :-1])
    for differ in neighbours:
        assert abs(float(differ.double().mean()) - 2 * p * (1 - p)) < 5 * math.sqrt(0.25 / differ.numel())


def test_other_rows_seeds_and_modules_draw_afresh() -> None:
    """Catches two modules, seeds or batches that drop the same elements; and coins that depend on the pass."""
    x = torch.ones(ROWS, NUM_TOKENS, 64)
    base = ParallelDropout(0.5, one_device(), "outer", 1)
    others = [
        ParallelDropout(0.5, one_device(), "outer", 2),
        ParallelDropout(0.5, one_device(seed=12), "outer", 1),
        ParallelDropout(0.5, one_device(first_row=7), "outer", 1),
    ]
    for other in others:
        assert abs(float(((base(x) != 0) ^ (other(x) != 0)).double().mean()) - 0.5) < 0.04
    later = ParallelDropout(0.5, one_device(first_row=6), "outer", 1)(x)
    assert torch.equal(later[0], base(x)[1])  # the row of a number is the same in whatever batch
    assert torch.equal(base(x), base(x))


def test_a_recomputed_layer_drops_the_same() -> None:
    """Catches a mask drawn anew when backward computes the layer again."""
    module = ParallelDropout(0.5, one_device(), "outer", 1)
    x = activations().requires_grad_()
    checkpoint(lambda one: module(one).square(), x, use_reentrant=False, preserve_rng_state=False).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, 8 * x.detach() * (module(x.detach()) != 0), tolerance=1e-14)


def test_evaluation_and_probability_0_change_nothing() -> None:
    """Catches dropout in evaluation; there rows need no numbers."""
    x = activations()
    assert ParallelDropout(P, one_device(first_row=None), "outer", 0).eval()(x) is x
    assert ParallelDropout(0.0, one_device(first_row=None), "outer", 0)(x) is x
    assert not ParallelDropout(1.0, one_device(), "outer", 0)(x).any()


def test_in_pieces_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tokens left out, or counted anew, where the coins of a long sequence are drawn piece by piece."""
    module = ParallelDropout(P, one_device(), "outer", 0)
    whole = module(activations())
    for at_once in (1, 3 * ROWS * WIDTH, 10**9):
        monkeypatch.setattr(room, "AT_ONCE", at_once)
        assert torch.equal(module(activations()), whole)


def without_a_shard(plan: str) -> Tensor:
    """What one rank keeps of ones when nothing says how tokens are split."""
    group = TensorGroup.of(Fabric.build(Plan.parse(plan)))
    tokens = 24 // math.prod(group.axes[name].size for name in group.grid.outer.tokens)
    width = 8 // (group.axes[group.grid.outer.hidden].size if group.grid.outer.hidden else 1)
    return ParallelDropout(P, group, "outer", 0, 8)(torch.ones(tokens, width))


def test_without_a_shard_tokens_are_split_evenly(pool: Pool) -> None:
    """Catches ranks that count their tokens from 0 alike in a module used by itself."""
    whole = ParallelDropout(P, replace(one_device(), shard=None), "outer", 0)(torch.ones(24, 8))
    assert torch.equal(torch.cat(pool.run(3, without_a_shard, "tensor=3")), whole)
    rows = pool.run(4, without_a_shard, "tensor=4 tensor_kind=2d")
    assert torch.equal(torch.cat([torch.cat(rows[:2], -1), torch.cat(rows[2:], -1)]), whole)
    cube = pool.run(8, without_a_shard, "tensor=8 tensor_kind=3d")  # output, input, weight
    assert torch.equal(torch.cat([torch.cat(cube[:4]), torch.cat(cube[4:])], -1), whole)


def test_refusals() -> None:
    """Catches the same mask for every batch, and coins for a tensor whose dims are something else."""
    with pytest.raises(DataError, match="first_row"):
        ParallelDropout(P, one_device(first_row=None), "outer", 0)(activations())
    module = ParallelDropout(P, one_device(), "outer", 0, WIDTH)
    for shape in ((ROWS * NUM_TOKENS, WIDTH), (ROWS, 4, NUM_TOKENS, WIDTH), (4, NUM_TOKENS, WIDTH), (ROWS, 9, WIDTH)):
        with pytest.raises(ModelError, match=r"Dropout number 0 was given .* no activation of the outer side"):
            module(torch.ones(shape))
    with pytest.raises(ModelError, match="holds 7 of 7 channels"):
        module(torch.ones(ROWS, NUM_TOKENS, 8))


def test_what_is_kept_for_backward() -> None:
    """Catches a mask in the activations' type, or x itself kept: one byte an element."""
    kept: list[int] = []

    def note(one: Tensor) -> Tensor:
        kept.append(one.nbytes)
        return one

    x = activations().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda one: one):
        ParallelDropout(P, one_device(), "outer", 0)(x)
    assert kept == [x.numel()]


def test_a_sketch_has_the_shapes() -> None:
    """Catches coins drawn, or widths exchanged, on the meta device."""
    group = TensorGroup.of(Fabric.sketch(Plan(tensor=4, tensor_kind="2d")))
    x = torch.empty(2, 5, 3, device="meta", requires_grad=True)
    out = ParallelDropout(P, group, "outer", 0)(x)
    out.sum().backward()
    assert out.shape == x.shape == x.grad.shape
