"""How far bfloat16 attention is from exact, against the fused kernel of one device."""

import pytest
import torch
from torch import Tensor

from attention.oracle import dense_attention
from close import relative_error
from pool import Pool
from seqloom.attention import attention
from seqloom.fabric import Fabric
from seqloom.plan import Plan
from seqloom.sequence import Batch, shard_batch

TOKENS, WIDTH, HEADS = 128, 16, (8, 8)


def case() -> tuple[list[Tensor], Batch]:
    """q, k, v and dout in bfloat16, and a batch of one causal document a row."""
    batch = Batch.from_tokens(torch.zeros(2, TOKENS, dtype=torch.int64))
    torch.manual_seed(TOKENS)
    shapes = [HEADS[0], HEADS[1], HEADS[1], HEADS[0]]
    return [torch.randn(2, h, TOKENS, WIDTH, dtype=torch.float64).bfloat16() for h in shapes], batch


def exact() -> list[Tensor]:
    """out, dq, dk, dv in float64 from the same rounded inputs."""
    (q, k, v, dout), batch = case()
    whole = [x.double().requires_grad_() for x in (q, k, v)]
    out = dense_attention(*whole, batch)
    out.backward(dout.double())
    return [out.detach(), *(x.grad for x in whole)]


def one_device() -> list[Tensor]:
    """The same by torch's fused kernel in bfloat16."""
    (q, k, v, dout), _ = case()
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*whole, is_causal=True)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in whole)]


def split(text: str, autocast: bool) -> tuple[tuple[int, ...], list[Tensor], dict[str, int]]:
    """This rank's positions, its parts of out, dq, dk, dv, and the bytes it sent forward."""
    fabric = Fabric.build(Plan.parse(text))
    (q, k, v, dout), batch = case()
    _, shard = shard_batch(batch, fabric)
    held = torch.tensor([p for span in shard.spans for p in range(*span)])
    mine = [x[:, :, held].clone() for x in (q, k, v)]
    if autocast:  # as rotary embeddings leave them: q and k in float32, v in bfloat16
        mine = [mine[0].float(), mine[1].float(), mine[2]]
    mine = [x.requires_grad_() for x in mine]
    fabric.meter.reset()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attention(*mine, shard)
    sent = fabric.meter.sent
    out.backward(dout[:, :, held])
    return tuple(held.tolist()), [out.detach(), *(x.grad for x in mine)], sent


def errors_of(
    results: list[tuple[tuple[int, ...], list[Tensor], dict[str, int]]], expected: list[Tensor]
) -> list[float]:
    """Of the four whole tensors, put together from the ranks' parts."""
    whole = [torch.full_like(x, float("nan")) for x in expected]
    for held, parts, _ in results:
        for target, part in zip(whole, parts, strict=True):
            target[:, :, list(held)] = part.double()
    return [relative_error(x, y) for x, y in zip(whole, expected, strict=True)]


@pytest.mark.parametrize(
    "text",
    [
        "ring=2",
        "ring=4",
        "ring=8",
        "ring=8 exchange=gather",
        "ring=8 exchange=needed",
        "ring=4 exchange=rsa",
        "ring=8 inner_ring=2",
        "ring=4 layout=striped",
        "ring=8 layout=contiguous",
        "ring=2 ulysses=4",
        "ulysses=8",
    ],
)
def test_error_does_not_grow_with_the_ring(pool: Pool, text: str) -> None:
    """Catches partial results, or travelling gradients, rounded to bfloat16 at every step of the ring."""
    expected = exact()
    reference = [relative_error(x, y) for x, y in zip(one_device(), expected, strict=True)]
    assert all(1e-4 < error < 2e-2 for error in reference), reference  # rounding is there, and is all there is
    found = errors_of(pool.run(Plan.parse(text).world_size, split, text, False), expected)
    assert all(error <= 1.5 * most for error, most in zip(found, reference, strict=True)), (found, reference)


@pytest.mark.parametrize("text", ["ring=4", "ring=2 exchange=gather", "ulysses=2", "ring=2 ulysses=2"])
def test_autocast_sends_bfloat16(pool: Pool, text: str) -> None:
    """Catches q and k that travel in float32 because rotary embeddings left them so, or meet a v that is not."""
    plan = Plan.parse(text)
    plain = pool.run(plan.world_size, split, text, False)
    cast = pool.run(plan.world_size, split, text, True)
    for (_, plain_parts, plain_sent), (_, parts, sent) in zip(plain, cast, strict=True):
        assert sent == plain_sent and sent
        assert [x.dtype for x in parts] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(plain_parts, parts, strict=True))


def backward_inside(text: str, inside: bool) -> list[Tensor]:
    """out, dq, dk, dv of this rank in float32, with a soft cap, so that the plain kernel computes; backward under
    autocast or after it."""
    fabric = Fabric.build(Plan.parse(text))
    (q, k, v, dout), batch = case()
    _, shard = shard_batch(batch, fabric)
    held = torch.tensor([p for span in shard.spans for p in range(*span)])
    mine = [x[:, :, held].clone().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*mine, shard, softcap=3.0)
        if inside:
            out.backward(dout[:, :, held])
    if not inside:
        out.backward(dout[:, :, held])
    return [out.detach(), *(x.grad for x in mine)]


@pytest.mark.parametrize("text", ["data=1", "ring=2", "ring=2 exchange=needed", "ring=2 exchange=rsa"])
def test_backward_inside_autocast(pool: Pool, text: str) -> None:
    """Catches matrix products of backward rounded to bfloat16 because backward was called inside autocast."""
    world = Plan.parse(text).world_size
    for within, after in zip(
        *(pool.run(world, backward_inside, text, inside) for inside in (True, False)), strict=True
    ):
        assert all(torch.equal(a, b) and a.any() for a, b in zip(within, after, strict=True))
