"""Ring self-attention of 2021: a ring of q k^T, the softmax over full rows, a ring of the weights times v.

What travels: k around the ring, then v; in backward v and k again, their gradients behind them, P-1
hops each. Bytes equal the ring's. Memory: every rank holds the scores of its queries against all
keys, [rows, Hq, n, N] in the accumulation type, and keeps the weights for backward: N^2 / P of them,
where `exchange=ring` keeps none. It is here for comparison and teaching; masks and layouts are honoured
as everywhere.

| tensor        | shape                |
|---------------|----------------------|
| q, out        | [rows, Hq, n, D]     |
| k, v          | [rows, Hk, n, D]     |
| weights       | [rows, Hq, n, N]     |

Source: Sequence Parallelism (arXiv 2105.13120), section 3.2. Differs from the paper: scores of pairs
that the mask hides are not computed, and keys of the whole ring lie in the order of its ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqloom.attention import ring
from seqloom.attention.blocks import Gradient, Trip, Visit, by_heads, by_tokens, sink_gradient
from seqloom.attention.dropout import keep
from seqloom.attention.kernels import Call
from seqloom.attention.kernels.plain import tile_scores
from seqloom.attention.local import Scoring, accumulation_type, cut, gathered
from seqloom.geometry import Span, Tile
from seqloom.sequence import SequenceShard


class RingSelfAttention(torch.autograd.Function):
    """Attention in two rings. Forward: k shifts, then v. Backward: v and then k shift, their gradients behind them."""

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
    ) -> Tensor:
        """Returns out, in the type of q."""
        reads = scoring.reads
        if reads is None:
            reads = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])
        rings = ctx.rings = _Rings(sequence, window, scoring, reads)
        # The weights are kept with what they gave: to make them again k would have to go around again.
        out, lse, weights, *bends = sequence.keep(lambda: rings.forward(q, k, v, sinks))
        ctx.save_for_backward(q, k, v, out, lse, weights, bends[0] if bends else None, sinks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """From dout like out; returns the gradients of q, k, v and sinks."""
        with torch.autocast(grads[0].device.type, enabled=False):  # as in forward
            return _backward(ctx, grads[0])


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, weights, bends, sinks = ctx.saved_tensors
    rings, dtype = ctx.rings, weights.dtype
    dout = grad_out.to(dtype)
    delta = (dout * out).sum(-1, keepdim=True)
    errors = torch.zeros_like(weights)  # the gradient of q k^T
    trips = [rings.trip(x) for x in (k, v)]
    for tile, call, values, into in rings.tiles(ring.returns(trips[1])):
        grad, p = cut(dout, tile.rows, tile.q), weights[tile.place]
        dp = _dropped(grad @ values.to(dtype).transpose(-1, -2), call)
        errors[tile.place] = p * (dp - cut(delta, tile.rows, tile.q)) * call.scale
        into.add_(gathered(_dropped(p, call).transpose(-1, -2) @ grad, rings.reads, v.shape[1]))
    if bends is not None:
        errors *= bends
    dq = torch.zeros_like(q, dtype=dtype)
    for tile, _, keys, into in rings.tiles(ring.returns(trips[0])):
        error = errors[tile.place]
        cut(dq, tile.rows, tile.q).add_(error @ keys.to(dtype))
        queries = cut(q, tile.rows, tile.q).to(dtype)
        into.add_(gathered(error.transpose(-1, -2) @ queries, rings.reads, k.shape[1]))
    dk, dv = (trip.home.totals[0].finish().to(q.dtype) for trip in trips)
    return dq.to(q.dtype), dk, dv, sink_gradient(dout, out, lse, sinks), None, None, None


@dataclass(frozen=True)
class _RowTile:
    """A tile of some rows, and where its scores lie among those of all keys."""

    rows: slice
    tile: Tile
    first_column: int

    @property
    def q(self) -> Span:
        return self.tile.q

    @property
    def place(self) -> tuple[slice, slice, slice, slice]:
        q, k = self.tile.q, self.tile.k
        columns = slice(self.first_column + k.start, self.first_column + k.stop)
        return self.rows, slice(None), slice(q.start, q.stop), columns

    def hidden(self, device: torch.device) -> Tensor:
        """[n, m] bool: the pairs beyond the tile's diagonals."""
        i, j = (torch.arange(span.start, span.stop, device=device) for span in (self.tile.q, self.tile.k))
        apart = i[:, None] - j
        hidden = torch.zeros_like(apart, dtype=torch.bool)
        if self.tile.low is not None:
            hidden |= apart < self.tile.low
        if self.tile.high is not None:
            hidden |= apart > self.tile.high
        return hidden


@dataclass(frozen=True, eq=False)
class _Rings:
    """What the four rings of a layer share. reads [Hq]: the key/value head of each query head."""

    sequence: SequenceShard
    window: int | None
    scoring: Scoring
    reads: Tensor

    def trip(self, x: Tensor) -> Trip:
        """k or v [rows, Hk, n, D] around the ring, alone."""
        block = by_tokens(x)
        return Trip(block, self.sequence, self.window, Gradient(block))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, ...]:
        """(out, lse, weights), and the slopes of the soft cap where there is one."""
        shape, dtype = (*q.shape[:3], sum(self.sequence.ring_tokens)), accumulation_type(q.dtype)
        weights = q.new_full(shape, float("-inf"), dtype=dtype)
        bends = [] if self.scoring.softcap is None else [q.new_zeros(shape, dtype=dtype)]
        for tile, call, keys, _ in self.tiles(ring.visits(self.trip(k))):
            score, bend = tile_scores(cut(q, tile.rows, tile.q), keys, call)
            weights[tile.place] = score.masked_fill(tile.hidden(q.device), float("-inf"))
            if bends:
                bends[0][tile.place] = bend
        lse = weights.logsumexp(-1)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.to(dtype)[:, None])
        # A query that sees nothing has an lse of -inf, and weights of 0.
        weights.sub_(lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp_()
        out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=dtype)
        for tile, call, values, _ in self.tiles(ring.visits(self.trip(v))):
            cut(out, tile.rows, tile.q).add_(_dropped(weights[tile.place], call) @ values.to(dtype))
        return out.to(q.dtype), lse, weights, *bends

    def tiles(self, visits: Iterator[Visit]) -> Iterator[tuple[_RowTile, Call, Tensor, Tensor]]:
        """(tile, call, keys or values of every query head, view of their gradient) of each tile that comes by."""
        tokens = self.sequence.ring_tokens
        firsts = (0, *accumulate(tokens))
        for visit in visits:
            (block,) = by_heads(visit.block)
            gradient = block if visit.gradient is None else visit.gradient.totals[0].finish()
            for group in visit.work:
                rows = slice(group.rows.start, group.rows.stop)
                for tile in group.tiles:
                    call = self.scoring.call(Tile(tile.q, tile.k), rows, group.allowed, visit.places)
                    every = cut(block, rows, tile.k)[:, self.reads]
                    yield _RowTile(rows, tile, firsts[visit.owner]), call, every, cut(gradient, rows, tile.k)


def _dropped(weights: Tensor, call: Call) -> Tensor:
    """Weights, or their gradients, under the tile's dropout."""
    if not call.dropout:
        return weights
    kept = keep(call.dropout_keys, call.q_positions, call.k_positions, call.dropout)
    return weights * kept / (1 - call.dropout)
