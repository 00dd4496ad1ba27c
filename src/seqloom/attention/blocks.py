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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqloom.attention.local import Partial, Places, Scoring, Total, accumulation_type, attend, attend_backward
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
    places: as `attend` takes them. gradient: in backward, what takes its gradient. first_row: the
    row that the block begins with.
    """

    owner: int
    work: tuple[RowTiles, ...]
    block: Block
    places: Places
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
    home: Gradient | None = None

    def visit(self, owner: int, block: Block, gradient: Gradient | None = None) -> Visit:
        """The block of ring rank `owner`, whole."""
        work = self.sequence.work(self.window)[owner]
        return Visit(owner, work, block, self.places(owner, block[0].device), gradient)

    def places(self, owner: int, device: torch.device) -> Places:
        """The positions of this rank's queries and of the keys of ring rank `owner`."""
        return lambda: (
            self.sequence.positions(self.sequence.ring.rank, device),
            self.sequence.positions(owner, device),
        )

    def room(self, owner: int, dtype: torch.dtype, used: Block | None = None) -> Block:
        """Buffers for the block of ring rank `owner` or its gradient: those of `used` where they are as large.

        Fresh memory costs several times a copy into memory that is there.
        """
        shapes = [(x.shape[0], self.sequence.ring_tokens[owner], *x.shape[2:]) for x in self.own]
        if used is not None and [tuple(x.shape) for x in used] == shapes:
            return used
        return tuple(self.own[0].new_empty(shape, dtype=dtype) for shape in shapes)


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
        if q.untyped_storage().nbytes() > q.numel() * q.element_size():
            # Cut from one projection of q, k and v: kept for backward, it would keep all of that.
            (q,) = by_heads(by_tokens(q))

        def meet() -> tuple[Tensor, Tensor]:
            met = Partial(q, v.shape[3], sinks)
            for visit in exchange.visits(Trip(own, sequence, window)):
                attend(q, *by_heads(visit.block), visit.work, scoring, met, visit.places, visit.first_row)
            whole, lse = met.finish()
            return whole.to(q.dtype), lse

        out, lse = sequence.keep(meet)
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
        home = Gradient((k, v))
        with torch.autocast(q.device.type, enabled=False):  # as in forward
            for visit in ctx.exchange.returns(Trip((k, v), ctx.sequence, ctx.window, home)):
                attend_backward(
                    dout,
                    q,
                    *by_heads(visit.block),
                    (out, lse),
                    visit.work,
                    ctx.scoring,
                    (dq, *visit.gradient.totals),
                    visit.places,
                    visit.first_row,
                )
        dk, dv = (total.finish().to(q.dtype) for total in home.totals)
        return dq.finish().to(q.dtype), dk, dv, sink_gradient(dout, out, lse, sinks), None, None, None, None


def sink_gradient(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor | None:
    """[Hq]: a sink takes the weight e^(sink - lse) from keys with values and gives none back."""
    if sinks is None:
        return None
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    # A sink of -inf is none, even for a query that sees nothing else.
    weight = torch.exp(sinks.to(lse.dtype)[:, None] - lse.masked_fill(lse.isneginf(), 0.0))
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)
