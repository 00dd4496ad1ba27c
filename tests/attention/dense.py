"""Attention of one tile and of several, by its definition, with autograd's pieces and heads repeated."""

from collections.abc import Sequence

import torch
from torch import Tensor

from close import assert_close
from seqloom.attention.dropout import keep
from seqloom.attention.kernels import Call, Kernel

HEADS, KV_HEADS, ROWS = 6, 2, 2


def weights(q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor | float]:
    """Scores [rows, Hq, n, m], -inf where nothing is seen, and keep / (1 - p); each term as in its paper."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.slopes is not None:
        scores = scores + call.slopes[:, None, None] * (call.k_positions[None, :] - call.q_positions[:, None])
    if call.causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    if call.allowed is not None:
        seen = [[bool(call.allowed(i, j)) for j in call.k_positions.tolist()] for i in call.q_positions.tolist()]
        scores = scores.masked_fill(~torch.tensor(seen), float("-inf"))
    if not call.dropout:
        return scores, 1.0
    kept = keep(call.dropout_keys, call.q_positions, call.k_positions, call.dropout)
    return scores, kept.to(q.dtype) / (1 - call.dropout)


def attention(q: Tensor, ks: Sequence[Tensor], vs: Sequence[Tensor], calls: Sequence[Call]) -> tuple[Tensor, Tensor]:
    """out and lse of queries over the keys of all tiles; 0 and -inf where a query sees nothing."""
    parts = [weights(q, k, call) for k, call in zip(ks, calls, strict=True)]
    scores = torch.cat([each for each, _ in parts], -1)
    kept = torch.cat([torch.ones_like(each) * kept for each, kept in parts], -1)
    v = torch.cat([each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in vs], 2)
    blind = scores.isneginf().all(-1)
    p = scores.masked_fill(blind[..., None], 0.0).softmax(-1).masked_fill(blind[..., None], 0.0)
    return (p * kept) @ v, scores.logsumexp(-1)


def random(*shape: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64)


def inputs(queries: int, keys: int, width: int = 16, v_width: int = 16, heads: int = HEADS) -> tuple[Tensor, ...]:
    """dout, q, k, v of two rows in float64, heads in groups of three, each cut out of a larger tensor."""
    torch.manual_seed(queries + keys)
    dout, q = random(ROWS, heads, queries + 2, v_width), random(ROWS, heads, queries + 2, width)
    k, v = random(ROWS, heads // 3, keys + 3, width), random(ROWS, heads // 3, keys + 3, v_width)
    return dout[:, :, 1:-1], q[:, :, 2:], k[:, :, 1:-2], v[:, :, 3:]


def compare_tile(kernel: Kernel, call: Call, tensors: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    """The kernel on one tile that is the whole row."""
    dout, *qkv = tensors
    whole = [x.clone().requires_grad_() for x in qkv]
    expected, expected_lse = attention(whole[0], whole[1:2], whole[2:], [call])
    expected.backward(dout)
    with torch.no_grad():
        out, lse = kernel.forward(*qkv, call)
        grads = kernel.backward(dout, *qkv, out, lse, call)
    _compare((out, *grads), (expected, *(x.grad for x in whole)), lse, expected_lse, tolerance)


def compare_tiles(kernel: Kernel, calls: Sequence[Call], tensors: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    """The kernel on tiles that share the keys evenly, each backward from the final out and lse."""
    dout, q, k, v = tensors
    ks, vs = (list(x.chunk(len(calls), 2)) for x in (k, v))
    whole = [x.clone().requires_grad_() for x in (q, *ks, *vs)]
    wide_ks, wide_vs = whole[1 : 1 + len(calls)], whole[1 + len(calls) :]
    expected, expected_lse = attention(whole[0], wide_ks, wide_vs, calls)
    expected.backward(dout)
    with torch.no_grad():
        parts = [kernel.forward(q, *pair, call) for *pair, call in zip(ks, vs, calls, strict=True)]
        lse = torch.stack([each for _, each in parts]).logsumexp(0)
        shares = [(each - lse).exp().nan_to_num(0.0)[..., None] for _, each in parts]
        out = sum(share * each for share, (each, _) in zip(shares, parts, strict=True))
        grads = [kernel.backward(dout, q, *pair, out, lse, call) for *pair, call in zip(ks, vs, calls, strict=True)]
    dq, dks, dvs = zip(*grads, strict=True)
    found = (out, sum(dq), torch.cat(dks, 2), torch.cat(dvs, 2))
    wanted = (whole[0].grad, torch.cat([x.grad for x in wide_ks], 2), torch.cat([x.grad for x in wide_vs], 2))
    _compare(found, (expected, *wanted), lse, expected_lse, tolerance)


def _compare(
    found: Sequence[Tensor], wanted: Sequence[Tensor], lse: Tensor, expected_lse: Tensor, tolerance: float
) -> None:
    blind = expected_lse.isneginf()
    assert torch.equal(lse.isneginf(), blind)
    assert_close(lse.masked_fill(blind, 0.0), expected_lse.masked_fill(blind, 0.0), tolerance=tolerance)
    for actual, expected in zip(found, wanted, strict=True):
        assert_close(actual, expected, tolerance=tolerance)
