"""The local kernels, alone: two that must agree, and the merging of what they give."""

import pytest
import torch
from torch import Tensor

from close import assert_close
from seqloom.attention import attend, attend_backward, attention, kernels, merge
from seqloom.attention.kernels import CPU_FUSED, PLAIN
from seqloom.attention.local import Partial
from seqloom.fabric import Fabric
from seqloom.geometry import Mask, Span, Tile
from seqloom.plan import Plan
from seqloom.sequence import Batch, RowTiles, shard_batch

SCALE = 0.3


def inputs(heads: int, kv_heads: int, queries: int, keys: int, width: int = 8) -> list[Tensor]:
    """dout, q, k, v of two rows, in float64."""
    torch.manual_seed(queries + keys)
    shapes = [(2, heads, queries, width)] * 2 + [(2, kv_heads, keys, width)] * 2
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def by_definition(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v and the log-sum-exp, from autograd's pieces, heads repeated."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * SCALE
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("kernel", [CPU_FUSED, PLAIN], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(7, 7, True), (1, 1, True), (5, 11, False), (11, 5, False)])
def test_kernel_is_the_definition(
    kernel: kernels.Kernel, heads: int, kv_heads: int, queries: int, keys: int, causal: bool
) -> None:
    """Catches a wrong diagonal, a key head paired with another group's query heads, a scale applied once too few."""
    dout, *qkv = inputs(heads, kv_heads, queries, keys)
    whole = [x.requires_grad_() for x in qkv]
    expected, expected_lse = by_definition(*whole, causal)
    expected.backward(dout)
    with torch.no_grad():
        out, lse = kernel.forward(*qkv, causal, SCALE)
        grads = kernel.backward(dout, *qkv, out, lse, causal, SCALE)
    assert_close(out, expected, tolerance=1e-13)
    assert_close(lse, expected_lse, tolerance=1e-13)
    for actual, x in zip(grads, whole, strict=True):
        if queries == 1:  # a softmax over one key does not move: dq and dk are 0
            assert (actual - x.grad).abs().max() < 1e-14
        else:
            assert_close(actual, x.grad, tolerance=1e-12)
            assert actual.shape == x.shape


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("at_once", [1, 3, 4, 10, 11])
def test_plain_kernel_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch, at_once: int, causal: bool) -> None:
    """Catches a block of rows whose diagonal starts at 0, a last block forgotten, or dK and dV of one block only."""
    dout, *qkv = inputs(6, 2, 11, 11)
    expected, expected_lse = CPU_FUSED.forward(*qkv, causal, SCALE)
    expected_grads = CPU_FUSED.backward(dout, *qkv, expected, expected_lse, causal, SCALE)
    monkeypatch.setattr(kernels, "ROWS_AT_ONCE", at_once)
    out, lse = PLAIN.forward(*qkv, causal, SCALE)
    assert_close(out, expected, tolerance=1e-13)
    assert_close(lse, expected_lse, tolerance=1e-13)
    for actual, wanted in zip(PLAIN.backward(dout, *qkv, out, lse, causal, SCALE), expected_grads, strict=True):
        assert_close(actual, wanted, tolerance=1e-12)


def test_plain_kernel_crosses_its_real_block() -> None:
    """Catches the same at the block size that is shipped."""
    rows = kernels.ROWS_AT_ONCE + 5
    dout, *qkv = inputs(1, 1, rows, rows, 4)
    qkv = [x[:1] for x in qkv]
    expected, expected_lse = CPU_FUSED.forward(*qkv, True, SCALE)
    out, lse = PLAIN.forward(*qkv, True, SCALE)
    assert_close(out, expected, tolerance=1e-13)
    assert_close(lse, expected_lse, tolerance=1e-13)
    assert_close(out[:, :, -5:], expected[:, :, -5:], tolerance=1e-13)
    pairs = zip(
        PLAIN.backward(dout[:1], *qkv, out, lse, True, SCALE),
        CPU_FUSED.backward(dout[:1], *qkv, expected, expected_lse, True, SCALE),
        strict=True,
    )
    for actual, wanted in pairs:
        assert_close(actual, wanted, tolerance=1e-12)


@pytest.mark.parametrize("kernel", [CPU_FUSED, PLAIN], ids=lambda kernel: kernel.name)
def test_types(kernel: kernels.Kernel) -> None:
    """Catches a log-sum-exp in bfloat16, or float64 that sinks to float32."""
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        _, *qkv = inputs(4, 2, 6, 6)
        out, lse = kernel.forward(*(x.to(dtype) for x in qkv), True, SCALE)
        assert lse.dtype == wide
        assert out.dtype in (dtype, wide)


def test_only_known_tiles_are_computed() -> None:
    """Catches a tile of a shape without a kernel computed as if it were another."""
    _, q, k, v = inputs(2, 2, 6, 6)
    for tile in (
        Tile(Span(0, 6), Span(0, 6), low=1),
        Tile(Span(0, 6), Span(0, 3), low=0),
        Tile(Span(0, 6), Span(0, 6), high=2),
    ):
        with pytest.raises(NotImplementedError):
            attend(q, k, v, [RowTiles(Span(0, 2), (tile,))], SCALE, Partial.empty(q))


@pytest.mark.parametrize("kernel", [CPU_FUSED, PLAIN], ids=lambda kernel: kernel.name)
def test_tiles_of_documents(kernel: kernels.Kernel) -> None:
    """Catches rows that take each other's mask, and tiles merged at the wrong place; both kernels through `attend`."""
    dout, *qkv = inputs(4, 2, 20, 20)
    whole = [x.requires_grad_() for x in qkv]
    masks = (Mask(documents=(3, 1, 9, 7)), Mask(documents=(11, 9)))
    span = [Span(0, 20)]
    work = [RowTiles(Span(row, row + 1), mask.tiles(span, span)) for row, mask in enumerate(masks)]
    outs = []
    for row, mask in enumerate(masks):
        visible = torch.tensor([[mask.visible(i, j) for j in range(20)] for i in range(20)])
        part = [x[row : row + 1] for x in whole]
        keys, values = (x.repeat_interleave(2, 1) for x in part[1:])
        scores = (part[0] @ keys.transpose(-1, -2) * SCALE).masked_fill(~visible, float("-inf"))
        outs.append(scores.softmax(-1) @ values)
    expected = torch.cat(outs)
    expected.backward(dout)
    with torch.no_grad():
        met = Partial.empty(qkv[0])
        attend(*qkv, work, SCALE, met, kernel)
        grads = tuple(torch.zeros_like(x) for x in qkv)
        attend_backward(dout, *qkv, (met.out, met.lse), work, SCALE, grads, kernel)
    assert_close(met.out, expected, tolerance=1e-13)
    for actual, x in zip(grads, whole, strict=True):
        assert_close(actual, x.grad, tolerance=1e-12)


def test_merge_is_attention_over_the_union() -> None:
    """Catches weights that do not sum to 1, or that go to the wrong side."""
    _, q, k, v = inputs(2, 2, 6, 10)
    expected, expected_lse = by_definition(q, k, v, False)
    parts = [by_definition(q, k[:, :, a:b], v[:, :, a:b], False) for a, b in ((0, 3), (3, 10))]
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
    huge, huge_lse = torch.tensor([[3.0, 4.0]]), torch.tensor([1e4])
    merged, total = merge(out, lse, huge, huge_lse)
    assert torch.equal(merged, huge) and torch.equal(total, huge_lse)


@pytest.mark.parametrize("first", [0, 1])
def test_a_query_that_meets_keys_late(first: int) -> None:
    """Catches the first block met taken for the whole: some queries see nothing of it, and merge with -inf later."""
    _, q, k, v = inputs(2, 2, 8, 8)
    blocks = [
        (Span(0, 4), (Tile(Span(2, 8), Span(0, 4)),)),  # queries 2.. see keys 0..4
        (Span(4, 8), (Tile(Span(0, 8), Span(0, 4)),)),  # everyone sees keys 4..8
    ]
    met = Partial.empty(q)
    for keys, tiles in (blocks[first], blocks[1 - first]):
        part = slice(keys.start, keys.stop)
        attend(q, k[:, :, part], v[:, :, part], [RowTiles(Span(0, 2), tiles)], SCALE, met)
    visible = torch.ones(8, 8, dtype=torch.bool)
    visible[:2, :4] = False
    scores = (q @ k.transpose(-1, -2) * SCALE).masked_fill(~visible, float("-inf"))
    assert_close(met.out, scores.softmax(-1) @ v, tolerance=1e-13)
    assert_close(met.lse, scores.logsumexp(-1), tolerance=1e-13)


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
