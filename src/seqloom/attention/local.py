"""Attention of one rank's queries on one block of keys, tile by tile, and the merging of results.

Partial results are held in at least float32: a ring of any degree then rounds as often as one call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqloom.attention.kernels import Kernel, choose
from seqloom.geometry import Span, Tile
from seqloom.sequence import RowTiles


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: the type of partial results and of travelling gradients."""
    return torch.promote_types(dtype, torch.float32)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint sets of keys into attention over their union.

    out: [..., n, D], lse: [..., n]. With softmax weights e^a / (e^a + e^b) = sigmoid(a - b),
    out = out_a - sigmoid(b - a) (out_a - out_b); a set that saw nothing has lse -inf and weight 0.
    """
    share = torch.sigmoid(lse_b - lse_a)[..., None]
    return out_a - share * (out_a - out_b), torch.logaddexp(lse_a, lse_b)


@dataclass
class Partial:
    """The attention of queries [rows, Hq, n, D] over the keys met so far.

    lse is -inf where a query has met none; out and lse are in the accumulation type.
    """

    out: Tensor
    lse: Tensor
    fresh: bool = True

    @classmethod
    def empty(cls, q: Tensor) -> "Partial":
        """Nothing met yet."""
        dtype = accumulation_type(q.dtype)
        return cls(torch.zeros_like(q, dtype=dtype), q.new_full(q.shape[:-1], float("-inf"), dtype=dtype))

    def meet(self, rows: Span, queries: Span, out: Tensor, lse: Tensor) -> None:
        """Merge in the result of `queries` of `rows` over further keys."""
        if self.fresh and out.shape == self.out.shape:
            self.out, self.lse, self.fresh = out.to(self.out.dtype), lse, False
            return
        self.fresh = False
        place = (slice(rows.start, rows.stop), slice(None), slice(queries.start, queries.stop))
        merged_out, merged_lse = merge(self.out[place], self.lse[place], out, lse)
        self.out[place].copy_(merged_out)
        self.lse[place].copy_(merged_lse)


def attend(
    q: Tensor, k: Tensor, v: Tensor, work: Sequence[RowTiles], scale: float, into: Partial, kernel: Kernel | None = None
) -> None:
    """Let the queries meet one block of keys: every tile of `work` is computed and merged into `into`.

    q: [rows, Hq, n, D]; k, v: [rows, Hk, m, D].
    """
    kernel = kernel or choose(q)
    for group in work:
        rows = slice(group.rows.start, group.rows.stop)
        for tile in group.tiles:
            queries, keys = _cut(q, rows, tile.q), (_cut(x, rows, tile.k) for x in (k, v))
            out, lse = kernel.forward(queries, *keys, _causal(tile), scale)
            into.meet(group.rows, tile.q, out, lse)


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    final: tuple[Tensor, Tensor],
    work: Sequence[RowTiles],
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
    kernel: Kernel | None = None,
) -> None:
    """Add the gradients of every tile of `work` to `grads` = (dq, dk, dv), in the accumulation type.

    final: out and log-sum-exp of the queries over *all* keys, out in the type of q.
    """
    kernel = kernel or choose(q)
    dq, dk, dv = grads
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()  # a sum's gradient is one number, expanded
    for group in work:
        rows = slice(group.rows.start, group.rows.stop)
        for tile in group.tiles:
            queries, result, sums, grad = (_cut(x, rows, tile.q) for x in (q, *final, dout))
            keys, values = (_cut(x, rows, tile.k) for x in (k, v))
            parts = kernel.backward(grad, queries, keys, values, result, sums, _causal(tile), scale)
            for total, span, part in zip((dq, dk, dv), (tile.q, tile.k, tile.k), parts, strict=True):
                _cut(total, rows, span).add_(part)


def _cut(x: Tensor, rows: slice, span: Span) -> Tensor:
    """x[rows, :, span] of a tensor [rows, heads, tokens, ...], as a view."""
    return x[rows, :, span.start : span.stop]


def _causal(tile: Tile) -> bool:
    if not (tile.full or tile.causal):
        raise NotImplementedError(f"no kernel for {tile}: only rectangles and aligned causal squares have one")
    return tile.causal
