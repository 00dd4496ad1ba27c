"""Exact attention of one rank's queries on all blocks of keys, however the blocks reach it.

An exchange is two generators. `visits` yields every block that this rank's queries see something of;
`returns` yields them once more for backward, each with what takes the gradient of its keys and
values, and brings the gradients of this rank's own block home. What travels, and how it overlaps
with the computing between two yields, is the exchange's affair; the arithmetic is here, once.

| tensor                | shape                            |
|-----------------------|----------------------------------|
| q                     | [rows, Hq, n, Dk]                |
| out                   | [rows, Hq, n, Dv]                |
| k, v                  | [rows, Hk, n, Dk], [.., n, Dv]   |
| a block               | k and v as they lie in memory and travel: [rows, n, Hk, D] each |
| sinks                 | [Hq]                             |

Backward runs from the final log-sum-exp, as in FlashAttention-2 (arXiv 2307.08691), section 3.1.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqloom.attention.local import Partial, Scoring, Total, accumulation_type, attend, attend_backward
from seqloom.sequence import RowTiles, SequenceShard

Block = tuple[Tensor, ...]
"""Tensors [rows, tokens, heads, D], contiguous: k and v, or their gradients."""


def by_tokens(*tensors: Tensor) -> Block:
    """[rows, heads, tokens, D] each as it travels: models and kernels mostly have it in that order already."""
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)


def by_heads(block: Block) -> tuple[Tensor, ...]:
    """The tensors of a block as [rows, heads, tokens, D], as views."""
    return tuple(x.transpose(1, 2) for x in block)


class Gradient:
    """The gradient of a block, a sum in the accumulation type of what tiles and other ranks find."""

    def __init__(self, block: Block) -> None:
        dtype = accumulation_type(block[0].dtype)
        self.totals = [Total(x.shape, dtype, x.device) for x in by_heads(block)]

    def add(self, block: Sequence[Tensor]) -> None:
        """Add what another rank has found for the whole block, [rows, tokens, heads, D] each."""
        for total, x in zip(self.totals, by_heads(tuple(block)), strict=True):
            total.finish().add_(x)

    def block(self) -> Block:
        """The sum as it travels."""
        return by_tokens(*(total.finish() for total in self.totals))


@dataclass(frozen=True)
class Visit:
    """One block of keys and values at this rank.

    owner: the ring rank whose it is. work: the tiles between this rank's queries and the block.
    positions: [tokens] of its keys. gradient: in backward, what takes its gradient. first_row: the
    row that the block begins with.
    """

    owner: int
    work: tuple[RowTiles, ...]
    block: Block
    positions: Tensor
    gradient: Gradient | None = None
    first_row: int = 0


@dataclass(frozen=True)
class Trip:
    """What an exchange is given: this rank's block, and how the sequence is spread.

    home: in backward, what the gradient of this rank's own block ends in.
    """

    own: Block
    sequence: SequenceShard
    window: int | None
    home: Gradient = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "home", Gradient(self.own))

    def visit(self, owner: int, block: Block, gradient: Gradient | None = None) -> Visit:
        """The block of ring rank `owner`, whole."""
        positions = self.sequence.positions(owner, block[0].device)
        return Visit(owner, self.sequence.work(self.window)[owner], block, positions, gradient)

    def empty(self, owner: int, dtype: torch.dtype | None = None) -> Block:
        """Room for the block of ring rank `owner`, or in another type for its gradient."""
        tokens = self.sequence.ring_tokens[owner]
        return tuple(x.new_empty((x.shape[0], tokens, *x.shape[2:]), dtype=dtype) for x in self.own)

    def empty_gradient(self, owner: int) -> Block:
        """Room for the gradient of the block of ring rank `owner`."""
        return self.empty(owner, accumulation_type(self.own[0].dtype))


@dataclass(frozen=True)
class Exchange:
    """How ring ranks see each other's keys and values."""

    visits: Callable[[Trip], Iterator[Visit]]
    returns: Callable[[Trip], Iterator[Visit]]


class BlockAttention(torch.autograd.Function):
    """Attention over all blocks. Forward: `exchange.visits`. Backward: `exchange.returns`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        sequence: SequenceShard,
        window: int | None,
        scoring: Scoring,
        exchange: Exchange,
    ) -> Tensor:
        """Returns out, in the type of q."""
        own = by_tokens(k, v)
        met = Partial(q, v.shape[3], sinks)
        places = sequence.positions(sequence.ring.rank, q.device)
        for visit in exchange.visits(Trip(own, sequence, window)):
            keys, values = by_heads(visit.block)
            attend(q, keys, values, visit.work, scoring, met, (places, visit.positions), visit.first_row)
        whole, lse = met.finish()
        out = whole.to(q.dtype)
        ctx.save_for_backward(q, *own, out, lse, sinks)
        ctx.sequence, ctx.window, ctx.scoring, ctx.exchange = sequence, window, scoring, exchange
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """From dout like out; returns the gradients of q, k, v and sinks."""
        q, k, v, out, lse, sinks = ctx.saved_tensors
        dout = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()  # a sum's is one number, expanded
        dq = Total(q.shape, accumulation_type(q.dtype), q.device)
        places = ctx.sequence.positions(ctx.sequence.ring.rank, q.device)
        trip = Trip((k, v), ctx.sequence, ctx.window)
        for visit in ctx.exchange.returns(trip):
            keys, values = by_heads(visit.block)
            attend_backward(
                dout,
                q,
                keys,
                values,
                (out, lse),
                visit.work,
                ctx.scoring,
                (dq, *visit.gradient.totals),
                (places, visit.positions),
                visit.first_row,
            )
        dk, dv = (total.finish().to(q.dtype) for total in trip.home.totals)
        return dq.finish().to(q.dtype), dk, dv, sink_gradient(dout, out, lse, sinks), None, None, None, None


def sink_gradient(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor | None:
    """[Hq]: a sink takes the weight e^(sink - lse) from keys with values and gives none back."""
    if sinks is None:
        return None
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    weight = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)
