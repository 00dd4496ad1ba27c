"""Attention with all keys and values gathered first (Llama 3, arXiv 2407.21783, section 3.3.2).

What travels: one all-gather of k and v, again in backward rather than kept, and one reduce-scatter
of their gradients in the accumulation type. Bytes sent per rank equal the ring's. Memory: k and v of
the whole sequence for the length of one layer. Shapes as in `seqloom.attention.ring`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqloom.attention.local import Partial, accumulation_type, attend, attend_backward
from seqloom.fabric import start_all_gather, start_reduce_scatter
from seqloom.sequence import SequenceShard


class GatherAttention(torch.autograd.Function):
    """Attention on gathered keys. Forward: all-gather. Backward: all-gather, then reduce-scatter (sum)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequence: SequenceShard, scale: float) -> Tensor:
        """q: [rows, Hq, n, D]; k, v: [rows, Hk, n, D]. Returns out like q."""
        block = torch.stack((k, v))
        met = Partial.empty(q)
        for owner, (keys, values) in enumerate(start_all_gather(block, sequence.ring).wait()):
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
        dtype = accumulation_type(q.dtype)
        dq = torch.zeros_like(q, dtype=dtype)
        blocks = start_all_gather(block, ctx.sequence.ring).wait()
        gradients = torch.zeros_like(blocks, dtype=dtype)
        for owner, (keys, values) in enumerate(blocks):
            work, parts = ctx.sequence.work[owner], (dq, *gradients[owner])
            attend_backward(grads[0], q, keys, values, (out, lse), work, ctx.scale, parts)
        dk, dv = start_reduce_scatter(gradients, ctx.sequence.ring).wait().to(q.dtype)
        return dq.to(q.dtype), dk, dv, None, None
