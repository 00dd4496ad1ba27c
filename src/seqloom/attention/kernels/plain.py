"""Attention by matrix products, on any device and in any float type; it honours everything.

Scores are made for a block of rows, heads and queries at a time, so memory does not grow with the
tile: some five arrays of `SCORES_AT_ONCE` bytes, ten of the double size with dropout. Scores, sums and
results are in float32, or float64 for float64. Keys beyond a block's last query are not touched in a
causal tile.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from seqloom.attention.dropout import keep
from seqloom.attention.kernels.call import Call, Kernel

SCORES_AT_ONCE, ON_THE_CPU = 64 * 2**20, 4 * 2**20
"""Bytes of scores made at once; on the CPU few enough to stay in its cache, 2 to 4 times as fast."""

QUERIES_AT_LEAST = 64
"""Queries of a block, where that many still fit for one head: fewer make matrix products slow."""


class Block(NamedTuple):
    """Part of a tile: some rows, some key heads with all their query heads, some queries, the first `keys` keys."""

    rows: slice
    heads: slice
    queries: slice
    keys: int
    groups: int

    def of_queries(self, x: Tensor) -> Tensor:
        """x [rows, Hq, n, ...] as [rows, Hk, G, n, ...] of this block, in the type of scores."""
        part = x[self.rows].unflatten(1, (-1, self.groups))[:, self.heads, :, self.queries]
        return part.to(torch.promote_types(x.dtype, torch.float32))

    def of_keys(self, x: Tensor) -> Tensor:
        """x [rows, Hk, m, D] as [rows, Hk, keys, D] of this block, in the type of scores."""
        return x[self.rows, self.heads, : self.keys].to(torch.promote_types(x.dtype, torch.float32))


def _blocks(q: Tensor, k: Tensor, causal: bool) -> Iterator[Block]:
    """The tile in blocks whose scores fit in `SCORES_AT_ONCE`."""
    rows, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    groups = heads // kv_heads
    at_once = ON_THE_CPU if q.device.type == "cpu" else SCORES_AT_ONCE
    fits = at_once // (torch.promote_types(q.dtype, torch.float32).itemsize * groups * max(keys, 1))
    few = min(queries, QUERIES_AT_LEAST)
    head_step = max(1, min(kv_heads, fits // max(few, 1)))
    row_step = max(1, min(rows, fits // max(few * head_step, 1)))
    query_step = max(1, min(queries, fits // (head_step * row_step)))
    for row in range(0, rows, row_step):
        for head in range(0, kv_heads, head_step):
            for query in range(0, queries, query_step):
                stop = min(query + query_step, queries)
                seen = min(stop, keys) if causal else keys
                yield Block(slice(row, row + row_step), slice(head, head + head_step), slice(query, stop), seen, groups)


def _scores(q: Tensor, k: Tensor, call: Call, block: Block) -> tuple[Tensor, Tensor | None]:
    """Scores [rows, Hk, G, n, keys] of a block, -inf where nothing is seen, and the slope of the soft cap.

    q: [rows, Hk, G, n, D] and k: [rows, Hk, keys, D] of the block.
    """
    # One product for all query heads of a key head: a broadcast product would copy k for each.
    scores = torch.matmul(q.flatten(2, 3), k.transpose(-1, -2)).unflatten(2, q.shape[2:4]).mul_(call.scale)
    slope = None
    if call.softcap is not None:
        bent = scores.div_(call.softcap).tanh_()
        slope = 1 - bent.square()
        scores = bent * call.softcap
    if call.slopes is not None:
        distance = _positions(call.k_positions)[: block.keys] - _positions(call.q_positions)[block.queries, None]
        slopes = call.slopes.to(scores).unflatten(0, (-1, block.groups))[block.heads, :, None, None]
        scores.addcmul_(slopes, distance.to(scores.dtype))
    hidden = _hidden(call, block, scores.device)
    return (scores if hidden is None else scores.masked_fill_(hidden, float("-inf"))), slope


def tile_scores(q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """The scores [rows, Hq, n, m] of a whole tile, -inf where nothing is seen, and the slope of the soft cap.

    q: [rows, Hq, n, D]; k: [rows, Hk, m, D].
    """
    everything = slice(None)
    block = Block(everything, everything, slice(0, q.shape[2]), k.shape[2], q.shape[1] // k.shape[1])
    found, slope = _scores(block.of_queries(q), block.of_keys(k), call, block)
    return found.flatten(1, 2), None if slope is None else slope.flatten(1, 2)


def _hidden(call: Call, block: Block, device: torch.device) -> Tensor | None:
    """[n, keys]: which pairs of a block are not visible, or None where all are."""
    hidden = None
    if call.causal:
        i = torch.arange(block.queries.start, block.queries.stop, device=device)
        hidden = torch.arange(block.keys, device=device) > i[:, None]
    if call.allowed is not None:
        queries = _positions(call.q_positions)[block.queries, None]
        refused = ~call.allowed(queries, _positions(call.k_positions)[None, : block.keys])
        hidden = refused if hidden is None else hidden | refused
    return hidden


def _positions(given: Tensor | None) -> Tensor:
    if given is None:
        raise ValueError("a call with slopes, dropout or allowed needs q_positions and k_positions")
    return given


def _kept(call: Call, block: Block, scores: Tensor) -> Tensor | None:
    """keep / (1 - dropout), [rows, Hk, G, n, keys] in the type of scores, or None without dropout."""
    if not call.dropout:
        return None
    if call.dropout_keys is None:
        raise ValueError("a call with dropout needs dropout_keys")
    keys = call.dropout_keys[block.rows].unflatten(1, (-1, block.groups))[:, block.heads]
    queries, positions = _positions(call.q_positions)[block.queries], _positions(call.k_positions)[: block.keys]
    stays = keep(keys.flatten(1, 2), queries, positions, call.dropout).view(scores.shape)
    return stays.to(scores.dtype).div_(1 - call.dropout)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 in rows that see nothing (lse -inf); overwrites scores."""
    return scores.sub_(lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp_()


def absent(device: torch.device) -> str | None:
    """It runs everywhere."""
    return None


def lacks(call: Call, q: Tensor, v: Tensor) -> str | None:
    """It honours every call on floating-point numbers."""
    return None if q.is_floating_point() else "only floating-point types"


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """See `seqloom.attention.kernels.call`; out is in float32 or float64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros((*q.shape[:3], v.shape[-1]), dtype=dtype)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=dtype)
    for block in _blocks(q, k, call.causal):
        scores, _ = _scores(block.of_queries(q), block.of_keys(k), call, block)
        sums = torch.logsumexp(scores, -1)
        p = _probabilities(scores, sums)
        kept = _kept(call, block, p)
        if kept is not None:
            p *= kept
        result = torch.matmul(p.flatten(2, 3), block.of_keys(v)).unflatten(2, p.shape[2:4])
        # of_queries gives views here: out and lse are in the type of scores already.
        block.of_queries(out).copy_(result)
        block.of_queries(lse).copy_(sums)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """See `seqloom.attention.kernels.call`; gradients are in float32 or float64."""
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.promote_types(q.dtype, torch.float32)) for x in (q, k, v))
    for block in _blocks(q, k, call.causal):
        queries, keys, values = block.of_queries(q), block.of_keys(k), block.of_keys(v)
        grad = block.of_queries(dout)
        scores, slope = _scores(queries, keys, call, block)
        p = _probabilities(scores, block.of_queries(lse))
        dp = torch.matmul(grad.flatten(2, 3), values.transpose(-1, -2)).unflatten(2, grad.shape[2:4])
        kept = _kept(call, block, p)
        if kept is not None:
            dp *= kept
        ds = dp.sub_((grad * block.of_queries(out)).sum(-1, keepdim=True)).mul_(p).mul_(call.scale)
        if slope is not None:
            ds *= slope
        if kept is not None:
            p *= kept
        block.of_queries(dq).copy_(torch.matmul(ds.flatten(2, 3), keys).unflatten(2, ds.shape[2:4]))
        # A key head serves all query heads of its group: their queries are the inner dim of the product.
        block.of_keys(dk).add_(torch.matmul(ds.flatten(2, 3).transpose(-1, -2), queries.flatten(2, 3)))
        block.of_keys(dv).add_(torch.matmul(p.flatten(2, 3).transpose(-1, -2), grad.flatten(2, 3)))
    return dq, dk, dv


PLAIN = Kernel("plain", absent, lacks, forward, backward)
