"""DeepSpeed-Ulysses: trade tokens for heads before attention and back after it (arXiv 2309.14509).

Between layers a rank holds n tokens of all heads; inside attention all P n tokens of its Ulysses
group for 1/P of the heads. What travels: q, k and v in one all-to-all, the output in another, and
the same two in backward. Limits: P divides the query heads and the key/value heads.

| place          | q                    | k, v                 | out                  |
|----------------|----------------------|----------------------|----------------------|
| outside        | [rows, Hq, n, D]     | [rows, Hk, n, D]     | [rows, Hq, n, D]     |
| inside         | [rows, Hq/P, P n, D] | [rows, Hk/P, P n, D] | [rows, Hq/P, P n, D] |
| on the wire    | [P, n, rows, h, D]   | h = heads a rank takes of all tensors together |
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqloom.fabric import Axis, trade


def _to_heads(tensors: tuple[Tensor, ...], axis: Axis) -> tuple[Tensor, ...]:
    """[rows, H, n, D] each -> [rows, H / P, P n, D] each, in one exchange."""
    parts = axis.size
    heads = [x.shape[1] // parts for x in tensors]
    rows, _, tokens, width = tensors[0].shape
    leaving = tensors[0].new_empty(parts, tokens, rows, sum(heads), width)
    for x, place in zip(tensors, leaving.split(heads, 3), strict=True):
        place.copy_(x.unflatten(1, (parts, -1)).permute(1, 3, 0, 2, 4))
    arrived = trade(leaving, axis).flatten(0, 1)  # [P n, rows, h, D]: the sources' tokens in order
    return tuple(part.permute(1, 2, 0, 3) for part in arrived.split(heads, 2))


def _to_tokens(tensors: tuple[Tensor, ...], axis: Axis) -> tuple[Tensor, ...]:
    """[rows, H / P, P n, D] each -> [rows, H, n, D] each, in one exchange; the inverse of `_to_heads`."""
    parts = axis.size
    heads = [x.shape[1] for x in tensors]
    rows, _, tokens, width = tensors[0].shape
    leaving = tensors[0].new_empty(tokens, rows, sum(heads), width)
    for x, place in zip(tensors, leaving.split(heads, 2), strict=True):
        place.copy_(x.permute(2, 0, 1, 3))
    arrived = trade(leaving.unflatten(0, (parts, -1)), axis)  # [P, n, rows, h, D]: P is the head group
    return tuple(part.permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2) for part in arrived.split(heads, 3))


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.axis = axis
        return _to_heads(tensors, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_to_tokens(grads, ctx.axis)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.axis = axis
        return _to_tokens(tensors, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_to_heads(grads, ctx.axis)


def to_heads(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """Trade tokens for heads. Forward: one all-to-all of q, k, v. Backward: the inverse, of their gradients."""
    return (q, k, v) if axis.size == 1 else _ToHeads.apply(axis, q, k, v)


def to_tokens(out: Tensor, axis: Axis) -> Tensor:
    """Trade heads back for tokens. Forward: one all-to-all. Backward: the inverse, of the gradient."""
    return out if axis.size == 1 else _ToTokens.apply(axis, out)[0]
