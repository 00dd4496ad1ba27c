"""Ring attention: keys and values travel around the ring of ranks while queries stay.

What travels: k and v as one block, P-1 hops forward and again backward; in backward the gradient of
each block follows it, P-1 hops in the accumulation type, started by the block's first stop and ended
by its owner. The next block is in flight while the present one is computed with (double buffer).

Bytes sent per rank: `seqloom.planner.attention_bytes`. FLOPs: this rank's tiles, even under `zigzag`.
Memory: three blocks of k and v, and in backward up to four of their gradients. Limits: the same
number of tokens on every ring rank.

| tensor  | shape                 |
|---------|-----------------------|
| q, out  | [rows, Hq, n, D]      |
| k, v    | [rows, Hk, n, D]      |
| block   | [2, rows, Hk, n, D]   |

Source: Ring Attention (arXiv 2310.01889), section 3; backward from the final log-sum-exp as in
FlashAttention-2. Differs from the paper: kv gradients skip their owner's hop (P-1, not P).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqloom.attention.local import Partial, accumulation_type, attend, attend_backward
from seqloom.fabric import Axis, Pending, start_shift
from seqloom.sequence import SequenceShard

BLOCKS, GRADIENTS = 1, 2  # tags: a block and a gradient are on their way at once


def circulate(own: Tensor, ring: Axis) -> Iterator[tuple[int, Tensor]]:
    """Yield (owner, block) for every rank's block, one's own first, with the next one in flight.

    A yielded block may be overwritten after the iterator goes on.
    """
    block, spare = own, None
    for step in range(ring.size):
        going_on = step + 1 < ring.size
        pending = start_shift(block, ring, spare, tag=BLOCKS) if going_on else None
        yield (ring.rank - step) % ring.size, block
        if pending:
            spare = None if block is own else block
            block = pending.wait()


class RingAttention(torch.autograd.Function):
    """Attention over a ring. Forward: blocks shift. Backward: blocks shift again, gradients behind them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequence: SequenceShard, scale: float) -> Tensor:
        """q: [rows, Hq, n, D]; k, v: [rows, Hk, n, D]. Returns out like q."""
        block = torch.stack((k, v))
        met = Partial.empty(q)
        for owner, (keys, values) in circulate(block, sequence.ring):
            attend(q, keys, values, sequence.work[owner], scale, met)
        out = met.out.to(q.dtype)
        ctx.save_for_backward(q, block, out, met.lse)
        ctx.sequence, ctx.scale = sequence, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """From dout like q; returns the gradients of q, k, v."""
        q, block, out, lse = ctx.saved_tensors
        ring, dtype = ctx.sequence.ring, accumulation_type(q.dtype)
        dq = torch.zeros_like(q, dtype=dtype)
        home = torch.zeros_like(block, dtype=dtype)
        travelling: Pending | None = None
        for owner, (keys, values) in circulate(block, ring):
            gradient = home if owner == ring.rank else torch.zeros_like(home)
            work, parts = ctx.sequence.work[owner], (dq, *gradient)
            attend_backward(grads[0], q, keys, values, (out, lse), work, ctx.scale, parts)
            if owner != ring.rank:
                if travelling:
                    gradient += travelling.wait()
                travelling = start_shift(gradient, ring, tag=GRADIENTS)
        if travelling:
            home += travelling.wait()
        dk, dv = home.to(q.dtype)
        return dq.to(q.dtype), dk, dv, None, None
