"""FlexAttention (arXiv 2412.05496) as built into torch, on CUDA: whatever the fused kernels have not.

`torch.nn.attention.flex_attention`, compiled. The soft cap and ALiBi are its score function, `causal`,
`allowed` and dropout its mask function; blocks of 128 x 128 pairs that `allowed` leaves empty are
skipped. The blocks are counted some rows at a time, so memory grows with (n / 128) (m / 128), not n m.

Its backward is autograd's, of its own partial result. With out and lse final for the whole row, out_b
and lse_b this tile's, w = exp(lse_b - lse):

    out = sum_b w_b out_b, hence    d out_b = w dout    d lse_b = w (dout out_b - dout out)

Dropout would also thin the sum under the softmax if it were a mask alone. So with dropout there are
two passes, one over the scores that stay (out_s, lse_s) and one over all (lse_b):

    out_b = exp(lse_s - lse_b) / (1 - p) out_s, hence with u = exp(lse_s - lse) / (1 - p)
    d out_s = u dout    d lse_s = u (dout out_s)    d lse_b = - w (dout out)

torch has no backward of it on the CPU.
"""

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from seqloom.attention.dropout import keeps
from seqloom.attention.kernels.call import Call, Kernel
from seqloom.attention.kernels.limits import first, installed, lacks_gpu, lacks_type

BLOCK = 128
"""Queries and keys of one block of the mask."""

PAIRS_AT_ONCE = 2**24
"""Pairs of which `allowed` is asked at once."""

COMBINATIONS = 64
"""Options and types, of all models in a process together, that are compiled before torch gives up."""

Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _score(call: Call, dtype: torch.dtype) -> Score | None:
    """The score function: soft cap first, then ALiBi."""
    cap, q_positions, k_positions = call.softcap, call.q_positions, call.k_positions
    if cap is None and call.slopes is None:
        return None
    slopes = None if call.slopes is None else call.slopes.detach().to(torch.promote_types(dtype, torch.float32))

    def score(s: Tensor, row: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if cap is not None:
            s = cap * torch.tanh(s / cap)
        if slopes is not None:
            s = s + slopes[head] * (k_positions[j] - q_positions[i])
        return s

    return score


def _visible(call: Call, dropped: bool) -> Visible | None:
    """The mask function, or None where every pair is visible."""
    causal, allowed, p, keys = call.causal, call.allowed, call.dropout, call.dropout_keys
    q_positions, k_positions = call.q_positions, call.k_positions
    if not (causal or allowed is not None or dropped):
        return None

    def visible(row: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = i >= j if causal else i >= 0
        if allowed is not None:
            seen = seen & allowed(q_positions[i], k_positions[j])
        if dropped:
            seen = seen & keeps(keys[row, head], q_positions[i], k_positions[j], p)
        return seen

    return visible


def _some_and_all(call: Call, n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each block of pairs, whether some is visible and whether all are: two bools [blocks of n, blocks of m]."""
    some, every = [], []
    columns = -(-m // BLOCK) * BLOCK
    step = max(1, PAIRS_AT_ONCE // (BLOCK * columns)) * BLOCK
    for start in range(0, n, step):
        i, j = torch.arange(start, min(start + step, n), device=device)[:, None], torch.arange(m, device=device)
        seen = (i >= j) if call.causal else torch.ones(i.shape[0], m, dtype=torch.bool, device=device)
        if call.allowed is not None:
            seen = seen & call.allowed(call.q_positions[i], call.k_positions[None, :])
        # Beyond the tile nothing is visible, so that a block over the edge is never full.
        seen = torch.nn.functional.pad(seen, (0, columns - m, 0, -i.shape[0] % BLOCK))
        blocks = seen.view(-1, BLOCK, columns // BLOCK, BLOCK)
        some.append(blocks.any(3).any(1))
        every.append(blocks.all(3).all(1))
    return torch.cat(some), torch.cat(every)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are set, and their columns first: [1, 1, R] and [1, 1, R, C] int32."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).to(torch.int32)[None, None], order.to(torch.int32)[None, None]


def _block_mask(call: Call, n: int, m: int, device: torch.device, dropped: bool) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    visible = _visible(call, dropped)
    if visible is None:
        return None
    some, every = _some_and_all(call, n, m, device)
    full = torch.zeros_like(every) if dropped else every  # a coin is thrown for every pair
    return BlockMask.from_kv_blocks(*_listed(some & ~full), *_listed(full), BLOCK, visible, (n, m))


@cache
def _compiled() -> Any:
    """FlexAttention compiled; each combination of options and types is compiled once, lengths stay variable.

    As a full graph, since past the limit of combinations torch would otherwise go on uncompiled, with
    all n m scores in memory and one warning.
    """
    from torch.nn.attention.flex_attention import flex_attention

    limits = {"recompile_limit": COMBINATIONS} if "recompile_limit" in signature(torch.compile).parameters else {}
    return torch.compile(flex_attention, fullgraph=True, **limits)


def _attend(q: Tensor, k: Tensor, v: Tensor, score: Score | None, mask: Any, scale: float) -> tuple[Tensor, Tensor]:
    """One pass: out [rows, Hq, n, Dv] and its log-sum-exp [rows, Hq, n]."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    attend = _compiled() if q.is_cuda else flex_attention
    grouped = q.shape[1] != k.shape[1]
    out, aux = attend(
        q, k, v, score_mod=score, block_mask=mask, scale=scale, enable_gqa=grouped, return_aux=AuxRequest(lse=True)
    )
    return out, aux.lse


def _weight(part: Tensor, whole: Tensor) -> Tensor:
    """exp(part - whole), 0 where part is -inf though the whole be too."""
    return torch.exp(part - whole).masked_fill(part.isneginf(), 0.0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """sum(a b) over the last dim, in float32 at least."""
    return (a.to(torch.promote_types(a.dtype, torch.float32)) * b).sum(-1)


def absent(device: torch.device) -> str | None:
    """It needs a GPU and Triton."""
    return lacks_gpu(device) or (None if installed("triton") else "triton is not installed")


def lacks(call: Call, q: Tensor, v: Tensor) -> str | None:
    """Everything but float64 and very narrow heads."""
    narrow = "heads of width 16 at least" if min(q.shape[-1], v.shape[-1]) < 16 else None
    return first(lacks_type(q.dtype, (torch.float32, torch.float16, torch.bfloat16)), narrow)


def _passes(q: Tensor, k: Tensor, v: Tensor, call: Call) -> list[tuple[Tensor, Tensor]]:
    """(out, lse) over all visible scores, after it with dropout those over the scores that stay."""
    score, shape = _score(call, q.dtype), (q.shape[2], k.shape[2], q.device)
    dropped = (False, True) if call.dropout else (False,)
    return [_attend(q, k, v, score, _block_mask(call, *shape, each), call.scale) for each in dropped]


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """See `seqloom.attention.kernels.call`; out is in the type of q."""
    (out, lse), *thinned = _passes(q, k, v, call)
    for stay, stay_lse in thinned:
        out = (stay * (_weight(stay_lse, lse) / (1 - call.dropout))[..., None]).to(q.dtype)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """See `seqloom.attention.kernels.call`; gradients are in the type of q."""
    inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        (part, part_lse), *thinned = _passes(*inputs, call)
    with torch.no_grad():
        weight = _weight(part_lse, lse)
        whole = _dot(dout, out)
        if not thinned:
            share = _dot(dout, part) - whole
            ends = [(part, weight[..., None] * dout), (part_lse, weight * share)]
        else:
            stay, stay_lse = thinned[0]
            stays = _weight(stay_lse, lse) / (1 - call.dropout)
            ends = [
                (stay, stays[..., None] * dout),
                (stay_lse, stays * _dot(dout, stay)),
                (part_lse, -weight * whole),
            ]
        grads = [grad.to(result.dtype) for result, grad in ends]
    dq, dk, dv = torch.autograd.grad([result for result, _ in ends], inputs, grads)
    return dq, dk, dv


FLEX = Kernel("flex", absent, lacks, forward, backward)
