"""Attention of one query block on one key block that also returns the log-sum-exp of the scores.

Every kernel computes, for one tile that is full or an aligned causal square,

    out = softmax(scale q k^T) v          lse = log sum exp(scale q k^T)

and its backward from the *final* out and lse of the whole row, so that the gradients of tiles add up:

    p = exp(scale q k^T - lse)    ds = p (dout v^T - rowsum(dout out))
    dq = scale ds k     dk = scale ds^T q     dv = p^T dout

| tensor | shape            | type                                   |
|--------|------------------|----------------------------------------|
| q, out | [rows, Hq, n, D] | of the model; out at least as given     |
| k, v   | [rows, Hk, m, D] | of the model; Hk divides Hq (groups)    |
| lse    | [rows, Hq, n]    | float32, float64 for float64            |

Source: FlashAttention-2 (arXiv 2307.08691), sections 2.3 and 3.1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024
"""Query rows the plain kernel scores at once; bounds its memory to this many rows of scores."""


class Kernel(NamedTuple):
    """A forward (q, k, v, causal, scale) -> (out, lse) and its backward (dout, q, k, v, out, lse, causal, scale)."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor]]


def choose(q: Tensor) -> Kernel:
    """The fastest kernel for the device of `q`."""
    return CPU_FUSED if q.device.type == "cpu" else PLAIN


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, scale=scale
    )


CPU_FUSED = Kernel("cpu_fused", _cpu_forward, _cpu_backward)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[rows, H, n, D] as [rows, groups, H / groups, n, D], in the accumulation type."""
    return x.unflatten(1, (groups, -1)).to(torch.promote_types(x.dtype, torch.float32))


def _probabilities(q: Tensor, k: Tensor, lse: Tensor | None, first: int | None, scale: float) -> tuple[Tensor, Tensor]:
    """exp(scores - lse) of grouped q against k; `first` is the number of q's first row, None if all is visible."""
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    if first is not None:
        i = torch.arange(first, first + q.shape[-2], device=q.device)
        scores = scores.masked_fill(torch.arange(k.shape[-2], device=q.device) > i[:, None], float("-inf"))
    lse = torch.logsumexp(scores, -1) if lse is None else lse
    return torch.exp(scores - lse[..., None]), lse


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    groups = k.shape[1]
    keys, values = _grouped(k, groups), _grouped(v, groups)
    outs, sums = [], []
    for first in range(0, q.shape[2], ROWS_AT_ONCE):
        rows = _grouped(q[:, :, first : first + ROWS_AT_ONCE], groups)
        p, lse = _probabilities(rows, keys, None, first if causal else None, scale)
        outs.append(torch.matmul(p, values).flatten(1, 2))
        sums.append(lse.flatten(1, 2))
    return torch.cat(outs, 2), torch.cat(sums, 2)


def _plain_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    groups = k.shape[1]
    keys, values = _grouped(k, groups), _grouped(v, groups)
    dq, dk, dv = [], torch.zeros_like(keys), torch.zeros_like(values)
    for first in range(0, q.shape[2], ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        rows, grad, result = (_grouped(x[:, :, part], groups) for x in (q, dout, out))
        sums = lse[:, :, part].unflatten(1, (groups, -1))
        p, _ = _probabilities(rows, keys, sums, first if causal else None, scale)
        ds = p * (torch.matmul(grad, values.transpose(-1, -2)) - (grad * result).sum(-1, keepdim=True)) * scale
        dq.append(torch.matmul(ds, keys).flatten(1, 2))
        # A key head serves all query heads of its group, so its gradient sums over them (dim 2).
        dk += torch.matmul(ds.transpose(-1, -2), rows).sum(2, keepdim=True)
        dv += torch.matmul(p.transpose(-1, -2), grad).sum(2, keepdim=True)
    return torch.cat(dq, 2), dk.flatten(1, 2), dv.flatten(1, 2)


PLAIN = Kernel("plain", _plain_forward, _plain_backward)
