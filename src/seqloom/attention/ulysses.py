"""DeepSpeed-Ulysses: trade tokens for heads before attention and back after it (arXiv 2309.14509).

Between layers a rank holds its n tokens of all heads; inside attention all N tokens of its Ulysses
group for its part of the heads, as `HeadSplit` deals them. What travels: q, k and v in one all-to-all,
the output in another, and the same two in backward. A key/value head goes to the ranks whose query
heads read it and to no other; where it went to several, its gradients are summed on the way back.
Neither heads nor tokens need to divide by the degree.

| place          | q                 | k                 | v                 | out               |
|----------------|-------------------|-------------------|-------------------|-------------------|
| outside        | [rows, Hq, n, Dk] | [rows, Hk, n, Dk] | [rows, Hk, n, Dv] | [rows, Hq, n, Dv] |
| inside         | [rows, hq, N, Dk] | [rows, hk, N, Dk] | [rows, hk, N, Dv] | [rows, hq, N, Dv] |
| on the wire    | [n, rows, h, D] of each tensor: what a kernel leaves of one row is sent as it lies  |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqloom.attention.local import accumulation_type
from seqloom.fabric import Axis, start_trade
from seqloom.geometry import HeadSplit, Span
from seqloom.sequence import SequenceShard


@dataclass(frozen=True)
class Trade:
    """One exchange of tokens for heads.

    tokens: how many each rank of the axis holds. parts: for each tensor and rank, the heads the rank
    takes of it. heads: of each tensor, all together. The heads of a tensor may go to several ranks.
    """

    axis: Axis
    tokens: tuple[int, ...]
    parts: tuple[tuple[Span, ...], ...]
    heads: tuple[int, ...]

    def to_heads(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """[rows, H, n, D] each -> [rows, h, N, D] each, in one exchange."""
        me = self.axis.rank
        whole = [
            x.new_empty(sum(self.tokens), x.shape[0], parts[me].size, x.shape[3])
            for x, parts in zip(tensors, self.parts, strict=True)
        ]
        arriving = list(zip(*(x.split(self.tokens) for x in whole), strict=True))
        leaving = [self._packed(tensors, rank) if rank != me else [] for rank in range(self.axis.size)]
        pending = start_trade(leaving, arriving, self.axis)
        for x, parts, mine in zip(tensors, self.parts, arriving[me], strict=True):
            mine.copy_(_by_tokens(x[:, parts[me].start : parts[me].stop]))
        pending.wait()
        return tuple(x.permute(1, 2, 0, 3) for x in whole)

    def to_tokens(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """[rows, h, N, D] each -> [rows, H, n, D] each, heads that several ranks hold summed; `to_heads` transposed."""
        me = self.axis.rank
        held = [_by_tokens(x).contiguous() for x in tensors]
        leaving = list(zip(*(x.split(self.tokens) for x in held), strict=True))
        arriving = [
            [
                x.new_empty(self.tokens[me], x.shape[1], parts[rank].size, x.shape[3])
                for x, parts in zip(held, self.parts, strict=True)
            ]
            if rank != me
            else leaving[me]
            for rank in range(self.axis.size)
        ]
        pending = start_trade(leaving, arriving, self.axis)
        whole = [self._room(number, x) for number, x in enumerate(held)]
        pending.wait()
        for number, x in enumerate(whole):
            filled = 0
            for rank, heads in enumerate(self.parts[number]):
                part = arriving[rank][number].permute(1, 2, 0, 3)
                again = max(0, filled - heads.start)  # heads that the rank before held too
                x[:, heads.start : heads.start + again] += part[:, :again]
                x[:, heads.start + again : heads.stop] = part[:, again:]
                filled = heads.stop
        return tuple(x.to(part.dtype) for x, part in zip(whole, held, strict=True))

    def _room(self, number: int, held: Tensor) -> Tensor:
        """[rows, H, n, D] of a tensor; wide where several ranks hold a head, so that their sum is rounded once."""
        shared = sum(part.size for part in self.parts[number]) > self.heads[number]
        shape = (held.shape[1], self.tokens[self.axis.rank], self.heads[number], held.shape[3])
        dtype = accumulation_type(held.dtype) if shared else held.dtype
        return held.new_empty(shape, dtype=dtype).transpose(1, 2)

    def _packed(self, tensors: Sequence[Tensor], rank: int) -> list[Tensor]:
        """The heads that a rank takes of each tensor, as they travel."""
        return [
            _by_tokens(x[:, parts[rank].start : parts[rank].stop]).contiguous()
            for x, parts in zip(tensors, self.parts, strict=True)
        ]


def _by_tokens(x: Tensor) -> Tensor:
    """[rows, h, n, D] as [n, rows, h, D], a view."""
    return x.permute(2, 0, 1, 3)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trade: Trade, sequence: SequenceShard, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.trade = trade
        return sequence.keep(lambda: trade.to_heads(tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.trade.to_tokens(grads)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trade: Trade, sequence: SequenceShard, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.trade = trade
        return sequence.keep(lambda: trade.to_tokens(tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.trade.to_heads(grads)


def to_heads(
    q: Tensor, k: Tensor, v: Tensor, split: HeadSplit, sequence: SequenceShard
) -> tuple[Tensor, Tensor, Tensor]:
    """Trade tokens for heads. Forward: one all-to-all of q, k, v. Backward: the inverse, of their gradients."""
    axis = sequence.ulysses
    if axis.size == 1:
        return q, k, v
    queries = tuple(split.queries(rank) for rank in range(axis.size))
    keys = tuple(split.keys(rank) for rank in range(axis.size))
    trade = Trade(axis, sequence.group_tokens, (queries, keys, keys), (split.heads, split.kv_heads, split.kv_heads))
    return _ToHeads.apply(trade, sequence, q, k, v)


def to_tokens(out: Tensor, split: HeadSplit, sequence: SequenceShard) -> Tensor:
    """Trade heads back for tokens. Forward: one all-to-all. Backward: the inverse, of the gradient."""
    axis = sequence.ulysses
    if axis.size == 1:
        return out
    queries = tuple(split.queries(rank) for rank in range(axis.size))
    return _ToTokens.apply(Trade(axis, sequence.group_tokens, (queries,), (split.heads,)), sequence, out)[0]
