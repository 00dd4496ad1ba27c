"""Tiles put together on one rank: merging, rows of different masks, and what the front does to tensors first."""

import pytest
import torch

from attention.dense import inputs
from close import assert_close
from seqloom.attention import attention
from seqloom.attention.kernels import PLAIN, Call
from seqloom.attention.local import Partial, Scoring, Total, attend, attend_backward, merge
from seqloom.fabric import Fabric
from seqloom.geometry import Mask, Span, Tile
from seqloom.plan import Plan
from seqloom.sequence import Batch, RowTiles, shard_batch

SCALE = 0.3


def test_merge_is_attention_over_the_union() -> None:
    """Catches weights that do not sum to 1, or that go to the wrong side."""
    _, q, k, v = inputs(6, 10)
    expected, expected_lse = PLAIN.forward(q, k, v, Call(SCALE))
    parts = [PLAIN.forward(q, k[:, :, a:b], v[:, :, a:b], Call(SCALE)) for a, b in ((0, 3), (3, 10))]
    for first, second in (parts, parts[::-1]):
        out, lse = merge(*first, *second)
        assert_close(out, expected, tolerance=1e-13)
        assert_close(lse, expected_lse, tolerance=1e-13)


def test_merge_with_nothing() -> None:
    """Catches NaN, or half the weight, where one side saw no key (lse -inf), whatever its out; and overflow."""
    out, lse = torch.tensor([[1.0, 2.0]]), torch.tensor([0.5])
    rubbish, nothing = torch.tensor([[7.0, -9.0]]), torch.tensor([float("-inf")])
    for sides in (((out, lse), (rubbish, nothing)), ((rubbish, nothing), (out, lse))):
        merged, total = merge(*sides[0], *sides[1])
        assert_close(merged, out, tolerance=1e-6)
        assert torch.equal(total, lse)
    merged, total = merge(out, nothing, rubbish, nothing)
    assert bool(merged.isfinite().all()) and torch.equal(total, nothing)
    huge, huge_lse = torch.tensor([[3.0, 4.0]]), torch.tensor([1e4])
    merged, total = merge(out, lse, huge, huge_lse)
    assert torch.equal(merged, huge) and torch.equal(total, huge_lse)


@pytest.mark.parametrize("first", [0, 1])
def test_a_query_that_meets_keys_late(first: int) -> None:
    """Catches the first block met taken for the whole: some queries see nothing of it, and merge with -inf later."""
    _, q, k, v = inputs(8, 8)
    blocks = [
        (Span(0, 4), (Tile(Span(2, 8), Span(0, 4)),)),  # queries 2.. see keys 0..4
        (Span(4, 8), (Tile(Span(0, 8), Span(0, 4)),)),  # everyone sees keys 4..8
    ]
    met = Partial(q, v.shape[-1])
    for keys, tiles in (blocks[first], blocks[1 - first]):
        part = slice(keys.start, keys.stop)
        places = (torch.arange(8), torch.arange(*keys))
        attend(
            q,
            k[:, :, part],
            v[:, :, part],
            [RowTiles(Span(0, 2), tiles)],
            Scoring(SCALE),
            met,
            lambda places=places: places,
        )
    places = torch.arange(8)
    call = Call(SCALE, q_positions=places, k_positions=places, allowed=lambda i, j: (i >= 2) | (j >= 4))
    for actual, expected in zip(met.finish(), PLAIN.forward(q, k, v, call), strict=True):
        assert_close(actual, expected, tolerance=1e-13)


def test_rows_of_different_documents() -> None:
    """Catches rows that take each other's mask, and tiles merged or added at the wrong place."""
    dout, *qkv = inputs(20, 20)
    masks = (Mask(documents=(3, 1, 9, 7)), Mask(documents=(11, 9), window=4))
    span = [Span(0, 20)]
    work = [RowTiles(Span(row, row + 1), mask.tiles(span, span)) for row, mask in enumerate(masks)]
    places = (torch.arange(20), torch.arange(20))
    met, grads = Partial(qkv[0], 16), tuple(Total(x.shape, x.dtype, x.device) for x in qkv)
    attend(*qkv, work, Scoring(SCALE), met, lambda places=places: places)
    attend_backward(dout, *qkv, met.finish(), work, Scoring(SCALE), grads, lambda: places)
    for row, mask in enumerate(masks):
        seen = torch.tensor([[mask.visible(i, j) for j in range(20)] for i in range(20)])
        call = Call(SCALE, q_positions=places[0], k_positions=places[1], allowed=lambda i, j, seen=seen: seen[i, j])
        part = [x[row : row + 1] for x in (dout, *qkv)]
        out, lse = PLAIN.forward(*part[1:], call)
        assert_close(met.finish()[0][row : row + 1], out, tolerance=1e-13)
        for actual, expected in zip(grads, PLAIN.backward(*part, out, lse, call), strict=True):
            assert_close(actual.finish()[row : row + 1], expected, tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors_laid_out_in_any_order(dtype: torch.dtype) -> None:
    """Catches a last dim that is not laid out in memory, which the fused kernel would read as if it were."""
    _, shard = shard_batch(Batch.from_tokens(torch.zeros(1, 16, dtype=torch.int64)), Fabric.build(Plan()))
    torch.manual_seed(0)
    plain = [torch.randn(1, 4, 16, 8, dtype=dtype).requires_grad_() for _ in range(3)]
    turned = [x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for x in plain]
    outs = [attention(*tensors, shard) for tensors in (plain, turned)]
    for out in outs:
        out.sum().backward()
    assert torch.equal(*outs)
    for one, other in zip(plain, turned, strict=True):
        assert torch.equal(one.grad, other.grad) and one.grad.norm() > 0


def test_a_second_derivative_is_refused() -> None:
    """Catches a gradient penalty that vanishes in silence: the backward passes have no backward of their own."""
    _, shard = shard_batch(Batch.from_tokens(torch.zeros(1, 8, dtype=torch.int64)), Fabric.build(Plan()))
    q, k, v = (torch.randn(1, 2, 8, 4).requires_grad_() for _ in range(3))
    (grad,) = torch.autograd.grad(attention(q, k, v, shard).pow(2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
