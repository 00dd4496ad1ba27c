"""The same algorithms in the fewest lines, composed of differentiable pieces; slow, for tests and reading.

Each holds a block of scores at a time and keeps what autograd needs; nothing here has a backward of
its own. Masks are read token by token from their definition, not from tiles. `needed` and `rsa` compute
what `gather` does and have no form of their own here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqloom.attention import dropout as coins
from seqloom.attention.local import merge
from seqloom.fabric import all_gather, all_to_all, shift
from seqloom.geometry import HeadSplit, Span
from seqloom.sequence import SequenceShard

Spans = tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How scores become weights, as `seqloom.attention.attention` takes it, and the query heads that are here."""

    scale: float
    heads: Span
    split: HeadSplit
    window: int | None = None
    softcap: float | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    layer: int = 0


def _positions(spans: Spans) -> Tensor:
    return torch.tensor([p for span in spans for p in range(*span)])


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, sequence: SequenceShard, queries: Spans, keys: Spans, rule: Rule
) -> tuple[Tensor, Tensor]:
    """softmax(score) v and the log-sum-exp; 0 and -inf for a query that sees nothing.

    q: [rows, hq, n, Dk]; k, v: [rows, hk, m, Dk or Dv]; queries, keys: the positions they hold.
    """
    first = rule.split.keys(sequence.ulysses.rank).start
    read = [head // rule.split.group - first for head in range(*rule.heads)]
    i, j = _positions(queries), _positions(keys)
    masks = [mask.within(rule.window) for mask in sequence.masks]
    visible = torch.tensor([[[[mask.visible(a, b) for b in j.tolist()] for a in i.tolist()]] for mask in masks])
    scores = q @ k[:, read].transpose(-1, -2) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if rule.slopes is not None:
        scores = scores + rule.slopes[rule.heads.start : rule.heads.stop, None, None] * (j - i[:, None])
    sees = visible.any(-1)
    # A row without keys takes a harmless row of zeros, so that no NaN enters its gradient.
    safe = scores.masked_fill(~visible, float("-inf")).masked_fill(~sees[..., None], 0.0)
    weights = safe.softmax(-1)
    if rule.dropout:
        samples = range(sequence.first_row, sequence.first_row + len(masks))
        drawn = coins.keys(sequence.seed, samples, rule.layer, range(*rule.heads))
        weights = weights * coins.keep(drawn, i, j, rule.dropout) / (1 - rule.dropout)
    out = (weights @ v[:, read]).masked_fill(~sees[..., None], 0.0)
    return out, safe.logsumexp(-1).masked_fill(~sees, float("-inf"))


def ring_attention(q: Tensor, k: Tensor, v: Tensor, sequence: SequenceShard, rule: Rule) -> tuple[Tensor, Tensor]:
    """Attention over the ring: every step meets the block of the rank before, then passes it on."""
    ring, spans, tokens = sequence.ring, sequence.layout.ring_spans, sequence.ring_tokens
    keys, values = _padded(k, max(tokens)), _padded(v, max(tokens))
    met = None
    for step in range(ring.size):
        owner = (ring.rank - step) % ring.size
        here = keys[:, :, : tokens[owner]], values[:, :, : tokens[owner]]
        new = block_attention(q, *here, sequence, spans[ring.rank], spans[owner], rule)
        met = new if met is None else _merge_seen(*met, *new)
        if step + 1 < ring.size:
            keys, values = shift(keys, ring), shift(values, ring)
    # Even a rank that sees nothing of a block keeps its shifts in the graph, or backward would hang.
    return met[0] + 0 * (keys.sum() + values.sum()), met[1]


def gather_attention(q: Tensor, k: Tensor, v: Tensor, sequence: SequenceShard, rule: Rule) -> tuple[Tensor, Tensor]:
    """Attention on all keys of the ring, gathered."""
    spans, tokens = sequence.layout.ring_spans, sequence.ring_tokens

    def whole(x: Tensor) -> Tensor:
        gathered = all_gather(_padded(x, max(tokens)), sequence.ring)
        return torch.cat([part[:, :, :held] for part, held in zip(gathered, tokens, strict=True)], 2)

    everywhere = tuple(span for rank in spans for span in rank)
    return block_attention(q, whole(k), whole(v), sequence, spans[sequence.ring.rank], everywhere, rule)


def _padded(x: Tensor, tokens: int) -> Tensor:
    return pad(x, (0, 0, 0, tokens - x.shape[2]))


def to_heads(x: Tensor, parts: list[Span], sequence: SequenceShard) -> Tensor:
    """Trade the tokens of [rows, H, n, D] for this rank's part of the heads."""
    axis, tokens = sequence.ulysses, sequence.group_tokens
    shapes = [(x.shape[0], parts[axis.rank].size, held, x.shape[3]) for held in tokens]
    return torch.cat(all_to_all([x[:, part.start : part.stop] for part in parts], shapes, axis), 2)


def to_tokens(x: Tensor, parts: list[Span], sequence: SequenceShard) -> Tensor:
    """Trade this rank's part of the heads back for its tokens."""
    axis, tokens = sequence.ulysses, sequence.group_tokens
    shapes = [(x.shape[0], part.size, tokens[axis.rank], x.shape[3]) for part in parts]
    return torch.cat(all_to_all(x.split(tokens, 2), shapes, axis), 1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, sequence: SequenceShard, *, scale: float | None = None, **options: Any
) -> Tensor:
    """What `seqloom.attention.attention` computes, from the pieces above."""
    axis = sequence.ulysses
    split = HeadSplit(q.shape[1], k.shape[1], axis.size)
    queries, keys = ([part(rank) for rank in range(axis.size)] for part in (split.queries, split.keys))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rule = Rule(scale=scale, heads=queries[axis.rank], split=split, **options)
    q, k, v = (to_heads(x, parts, sequence) for x, parts in ((q, queries), (k, keys), (v, keys)))
    inner = ring_attention if sequence.exchange == "ring" else gather_attention
    out, lse = inner(q, k, v, sequence, rule)
    if rule.sinks is not None:
        sinks = rule.sinks[rule.heads.start : rule.heads.stop, None]
        out = out * torch.sigmoid(lse - sinks)[..., None]
    return to_tokens(out, queries, sequence)


def _merge_seen(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`merge` where both sides saw something, the side that did elsewhere: -inf has no gradient."""
    only_a, only_b = lse_b.isneginf(), lse_a.isneginf()
    merged_out, merged_lse = merge(out_a, lse_a.masked_fill(only_b, 0.0), out_b, lse_b.masked_fill(only_a, 0.0))
    out = torch.where(only_b[..., None], out_b, torch.where(only_a[..., None], out_a, merged_out))
    return out, torch.where(only_b, lse_b, torch.where(only_a, lse_a, merged_lse))
