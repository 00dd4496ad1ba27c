"""The same algorithms in the fewest lines, composed of differentiable pieces; slow, for tests and reading.

Each holds a block of scores at a time and keeps what autograd needs; nothing here has a backward of
its own. Masks are read token by token from their definition, not from tiles.
"""

import torch
from torch import Tensor

from seqloom.attention.local import merge
from seqloom.fabric import Axis, all_gather, all_to_all, shift
from seqloom.geometry import Span
from seqloom.sequence import SequenceShard


def dense_mask(sequence: SequenceShard, queries: tuple[Span, ...], keys: tuple[Span, ...]) -> Tensor:
    """[rows, 1, n, m] bool: which of the keys' positions each query's position may see."""
    i, j = ([p for span in spans for p in range(*span)] for spans in (queries, keys))
    return torch.tensor([[[[mask.visible(q, k) for k in j] for q in i]] for mask in sequence.masks])


def block_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v and the log-sum-exp; 0 and -inf for a query that sees nothing.

    q: [rows, Hq, n, D]; k, v: [rows, Hk, m, D]; visible: [rows, 1, n, m].
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible, float("-inf"))
    sees = visible.any(-1)
    # A row without keys takes a harmless row of zeros, so that no NaN enters its gradient.
    safe = scores.masked_fill(~sees[..., None], 0.0)
    out = (safe.softmax(-1) @ v).masked_fill(~sees[..., None], 0.0)
    return out, safe.logsumexp(-1).masked_fill(~sees, float("-inf"))


def ring_attention(q: Tensor, k: Tensor, v: Tensor, sequence: SequenceShard, scale: float) -> Tensor:
    """Attention over the ring: every step meets the block of the rank before, then passes it on."""
    ring, spans = sequence.ring, sequence.layout.ring_spans
    block = torch.stack((k, v))
    out, lse = None, None
    for step in range(ring.size):
        keys, values = block
        visible = dense_mask(sequence, spans[ring.rank], spans[(ring.rank - step) % ring.size])
        new_out, new_lse = block_attention(q, keys, values, visible, scale)
        out, lse = (new_out, new_lse) if out is None else _merge_seen(out, lse, new_out, new_lse)
        if step + 1 < ring.size:
            block = shift(block, ring)
    # Even a rank that sees nothing of a block keeps its shifts in the graph, or backward would hang.
    return out + 0 * block.sum()


def gather_attention(q: Tensor, k: Tensor, v: Tensor, sequence: SequenceShard, scale: float) -> Tensor:
    """Attention on all keys of the ring, gathered."""
    spans = sequence.layout.ring_spans
    keys, values = all_gather(torch.stack((k, v)), sequence.ring).movedim(0, -3).flatten(-3, -2)
    everywhere = tuple(span for rank in spans for span in rank)
    visible = dense_mask(sequence, spans[sequence.ring.rank], everywhere)
    return block_attention(q, keys, values, visible, scale)[0]


def ulysses(x: Tensor, axis: Axis, *, to_heads: bool) -> Tensor:
    """Trade the tokens of [rows, H, n, D] for heads, or back."""
    scattered, gathered = (1, 2) if to_heads else (2, 1)
    parts = torch.stack(x.chunk(axis.size, scattered))
    return torch.cat(list(all_to_all(parts, axis)), gathered)


def attention(q: Tensor, k: Tensor, v: Tensor, sequence: SequenceShard, *, scale: float | None = None) -> Tensor:
    """What `seqloom.attention.attention` computes, from the pieces above."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (ulysses(x, sequence.ulysses, to_heads=True) for x in (q, k, v))
    inner = {"ring": ring_attention, "gather": gather_attention}[sequence.exchange]
    return ulysses(inner(q, k, v, sequence, scale), sequence.ulysses, to_heads=False)


def _merge_seen(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`merge` where both sides saw something, the side that did elsewhere: -inf has no gradient."""
    only_a, only_b = lse_b.isneginf(), lse_a.isneginf()
    merged_out, merged_lse = merge(out_a, lse_a.masked_fill(only_b, 0.0), out_b, lse_b.masked_fill(only_a, 0.0))
    out = torch.where(only_b[..., None], out_b, torch.where(only_a[..., None], out_a, merged_out))
    return out, torch.where(only_b, lse_b, torch.where(only_a, lse_a, merged_lse))
