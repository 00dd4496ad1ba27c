"""Attention of one rank's queries on one block of keys, tile by tile, and the merging of results.

Partial results are held in at least float32: a ring of any degree then rounds as often as one call.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqloom.attention.kernels import Call, choose
from seqloom.geometry import Span, Tile
from seqloom.sequence import RowTiles


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: the type of partial results and of travelling gradients."""
    return torch.promote_types(dtype, torch.float32)


Places = Callable[[], tuple[Tensor, Tensor]]
"""Gives the positions [n] of a block of queries and [m] of a block of keys; asked only where a rule needs them."""


@dataclass(frozen=True, eq=False)
class Scoring:
    """How the scores of the heads computed here become weights; the same for every tile of a layer.

    scale, softcap, slopes [Hq], dropout, dropout_keys [rows, Hq]: as in `Call`. reads [Hq] int64: the
    key/value head of each query head, where they are no regular groups.
    """

    scale: float
    softcap: float | None = None
    slopes: Tensor | None = None
    dropout: float = 0.0
    dropout_keys: Tensor | None = None
    reads: Tensor | None = None

    def calls(self, work: Sequence[RowTiles], places: Places) -> Iterator[tuple[Tile, slice, Call]]:
        """(piece, rows, call) for each piece of the tiles of `work`."""
        for group in work:
            rows = slice(group.rows.start, group.rows.stop)
            for tile in group.tiles:
                for piece in tile.pieces():
                    yield piece, rows, self.call(piece, rows, group.allowed, places)

    def call(self, piece: Tile, rows: slice, allowed: Callable[[Any, Any], Any] | None, places: Places) -> Call:
        """What the kernel is asked for on one piece of a tile."""
        if allowed is None and self.slopes is None and not self.dropout:
            return Call(self.scale, not piece.full, self.softcap)
        q_positions, k_positions = (
            _oriented(piece, block[span.start : span.stop], 0)
            for block, span in zip(places(), (piece.q, piece.k), strict=True)
        )
        return Call(
            scale=self.scale,
            causal=not piece.full,
            softcap=self.softcap,
            slopes=self.slopes,
            q_positions=q_positions,
            k_positions=k_positions,
            allowed=None if allowed is None else lambda q, k: torch.as_tensor(allowed(q, k), device=q.device).bool(),
            dropout=self.dropout,
            dropout_keys=None if self.dropout_keys is None else self.dropout_keys[rows],
        )


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint sets of keys into attention over their union.

    out: [..., n, D], lse: [..., n]. With softmax weights e^a / (e^a + e^b) = sigmoid(a - b),
    out = out_a - sigmoid(b - a) (out_a - out_b); a set that saw nothing has lse -inf and weight 0.
    """
    return torch.lerp(out_a, out_b, _share(lse_a, lse_b)), torch.logaddexp(lse_a, lse_b)


def _share(lse_a: Tensor, lse_b: Tensor) -> Tensor:
    """The weight of b; 0 where neither saw anything."""
    neither = lse_a.isneginf() & lse_b.isneginf()
    return torch.sigmoid(lse_b - lse_a).masked_fill(neither, 0.0)[..., None]


class Partial:
    """The attention of queries [rows, Hq, n, Dk] over the keys met so far.

    `finish` gives out [rows, Hq, n, Dv] and lse [rows, Hq, n] in the accumulation type; where a query
    met nothing they are 0 and -inf. sinks [Hq]: scores of a key that every query sees and that has no
    value (attention sinks as in gpt-oss, arXiv 2508.10925, section 2.3).
    """

    def __init__(self, q: Tensor, value_width: int, sinks: Tensor | None = None) -> None:
        self.out: Tensor | None = None
        self.lse: Tensor | None = None
        self._q, self._width, self._sinks = q, value_width, sinks

    def meet(self, rows: slice, queries: Span, out: Tensor, lse: Tensor) -> None:
        """Merge in the result of `queries` of `rows` over further keys."""
        if self.out is None and self._sinks is None and lse.shape == self._q.shape[:-1]:
            self.out, self.lse = out.to(accumulation_type(out.dtype)), lse
            return
        whole_out, whole_lse = self.finish()
        place = (rows, slice(None), slice(queries.start, queries.stop))
        met_out, met_lse = whole_out[place], whole_lse[place]
        met_out.lerp_(out.to(met_out.dtype), _share(met_lse, lse))
        met_lse.copy_(torch.logaddexp(met_lse, lse))

    def finish(self) -> tuple[Tensor, Tensor]:
        """out and lse, of all queries."""
        if self.out is None or self.lse is None:
            dtype = accumulation_type(self._q.dtype)
            rows, heads, tokens, _ = self._q.shape
            self.out = self._q.new_zeros((rows, tokens, heads, self._width), dtype=dtype).transpose(1, 2)
            self.lse = self._q.new_full(self._q.shape[:-1], float("-inf"), dtype=dtype)
            if self._sinks is not None:
                self.lse.copy_(self._sinks.to(dtype)[:, None].expand_as(self.lse))
        return self.out, self.lse


class Total:
    """A sum of parts, each over some rows and tokens of [rows, heads, tokens, D]."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device
        self._sum: Tensor | None = None

    def add(self, rows: slice, span: Span, part: Tensor) -> None:
        """Add `part` at those rows and tokens; it is not used any further by who gives it."""
        if self._sum is None and part.shape == self._shape:
            self._sum = part.to(self._dtype)
            return
        cut(self.finish(), rows, span).add_(part)

    def finish(self) -> Tensor:
        """The sum; zeros where nothing was added."""
        if self._sum is None:
            rows, heads, tokens, width = self._shape  # zeros lie in memory token by token, as they travel
            shape = (rows, tokens, heads, width)
            self._sum = torch.zeros(shape, dtype=self._dtype, device=self._device).transpose(1, 2)
        return self._sum


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    work: Sequence[RowTiles],
    scoring: Scoring,
    into: Partial,
    places: Places,
    first_row: int = 0,
) -> None:
    """Let the queries meet one block of keys: every tile of `work` is computed and merged into `into`.

    q: [rows, Hq, n, Dk]; k: [rows, Hk, m, Dk]; v: [rows, Hk, m, Dv]. places: gives the positions of the
    n queries and the m keys. first_row: the row of q that k and v begin with.
    """
    if scoring.reads is not None:
        k, v = k[:, scoring.reads], v[:, scoring.reads]
    for piece, rows, call in scoring.calls(work, places):
        kv_rows = slice(rows.start - first_row, rows.stop - first_row)
        parts = (cut(q, rows, piece.q), cut(k, kv_rows, piece.k), cut(v, kv_rows, piece.k))
        queries, keys, values = (_oriented(piece, part) for part in parts)
        out, lse = choose(queries, values, call).forward(queries, keys, values, call)
        into.meet(rows, piece.q, _oriented(piece, out), _oriented(piece, lse))


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    final: tuple[Tensor, Tensor],
    work: Sequence[RowTiles],
    scoring: Scoring,
    grads: tuple[Total, Total, Total],
    places: Places,
    first_row: int = 0,
) -> None:
    """Add the gradients of every tile of `work` to `grads` = (dq, dk, dv), in the accumulation type.

    final: out and log-sum-exp of the queries over *all* keys, out in the type of q. The rest as in `attend`.
    """
    kv_heads = k.shape[1]
    if scoring.reads is not None:
        k, v = k[:, scoring.reads], v[:, scoring.reads]
    for piece, rows, call in scoring.calls(work, places):
        kv_rows = slice(rows.start - first_row, rows.stop - first_row)
        queries, grad, out, lse = (_oriented(piece, cut(x, rows, piece.q)) for x in (q, dout, *final))
        keys, values = (_oriented(piece, cut(x, kv_rows, piece.k)) for x in (k, v))
        parts = choose(queries, values, call).backward(grad, queries, keys, values, out, lse, call)
        dq, dk, dv = (_oriented(piece, part) for part in parts)
        if scoring.reads is not None:
            dk, dv = (gathered(part, scoring.reads, kv_heads) for part in (dk, dv))
        grads[0].add(rows, piece.q, dq)
        grads[1].add(kv_rows, piece.k, dk)
        grads[2].add(kv_rows, piece.k, dv)


def cut(x: Tensor, rows: slice, span: Span) -> Tensor:
    """x[rows, :, span] of a tensor [rows, heads, tokens, ...], as a view."""
    return x[rows, :, span.start : span.stop]


def _oriented(piece: Tile, x: Tensor, dim: int = 2) -> Tensor:
    """An upper triangle read from both ends is a lower one, which kernels know; anything else stays as it is."""
    return x.flip(dim) if piece.anticausal else x


def gathered(part: Tensor, reads: Tensor, kv_heads: int) -> Tensor:
    """The gradient of each key/value head: the sum over the query heads that read it."""
    shape = (part.shape[0], kv_heads, *part.shape[2:])
    wide = part.to(accumulation_type(part.dtype))
    return torch.zeros(shape, dtype=wide.dtype, device=part.device).index_add_(1, reads, wide)
