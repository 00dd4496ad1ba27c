"""The one way into attention: Ulysses outside, an exchange over the ring inside, either of degree 1."""

from math import inf

import torch
from torch import Tensor

from seqloom.attention.blocks import BlockAttention, Exchange
from seqloom.attention.dropout import keys as dropout_keys
from seqloom.attention.fetch import GATHER, NEEDED
from seqloom.attention.local import Scoring
from seqloom.attention.ring import RING
from seqloom.attention.rsa import RingSelfAttention
from seqloom.attention.ulysses import to_heads, to_tokens
from seqloom.errors import DataError, counted
from seqloom.geometry import HeadSplit, Span, total
from seqloom.sequence import SequenceShard

EXCHANGES: dict[str, Exchange] = {"ring": RING, "gather": GATHER, "needed": NEEDED}
"""By `Plan.exchange`; `rsa` holds scores rather than blocks and stands beside them."""


def attention(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: SequenceShard,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    layer: int | None = None,
) -> Tensor:
    """Exact attention of this rank's tokens on the whole sequence, under the sequence's masks.

    q: [rows, Hq, local_tokens, Dk]; k: [rows, Hk, local_tokens, Dk]; v: [rows, Hk, local_tokens, Dv],
    Hk dividing Hq; they hold the tokens of `sequence.spans`, in order. Returns [rows, Hq, local_tokens, Dv].

    scale: of the scores, Dk ** -0.5 by default. window: the layer's own, on top of the masks'.
    softcap: scores become cap tanh(score / cap) (Gemma 2, arXiv 2408.00118). slopes [Hq]: ALiBi, added
    is slope (k - q) of the positions (arXiv 2108.12409). sinks [Hq]: scores of a key without a value
    that every query sees (gpt-oss). dropout: probability that a weight is dropped, drawn for each
    (sample, layer, head, query, key) whatever the plan; layer: the number of this layer, which it needs.

    Every rank of the ring and Ulysses axes calls it together. Raises DataError for tensors that are
    not what the sequence holds: their slices would clip without a word.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        # As torch does for its own attention; rotary angles leave q and k in float32 but v in the lower type.
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    _check(q, k, v, sequence)
    _check_options(q.shape[1], sequence, scale, softcap, slopes, sinks, dropout, layer)
    # Fused kernels read the last dim as if it were laid out in memory.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    ulysses = sequence.ulysses
    split = HeadSplit(q.shape[1], k.shape[1], ulysses.size)
    heads = split.queries(ulysses.rank)
    here = slice(heads.start, heads.stop)
    reads = split.reads(ulysses.rank)
    scoring = Scoring(
        scale=scale,
        softcap=softcap,
        slopes=None if slopes is None else slopes[here],
        dropout=dropout,
        dropout_keys=_dropout_keys(sequence, layer, heads, q) if dropout else None,
        reads=None
        if reads is None
        else sequence.once(("reads", reads, q.device), lambda: torch.tensor(reads, device=q.device)),
    )
    with torch.autocast(device, enabled=False):
        q, k, v = to_heads(q, k, v, split, sequence)
        given = (q, k, v, None if sinks is None else sinks[here], sequence, window, scoring)
        if sequence.exchange == "rsa":
            out = RingSelfAttention.apply(*given)
        else:
            out = BlockAttention.apply(*given, EXCHANGES[sequence.exchange])
        return to_tokens(out, split, sequence)


def _dropout_keys(sequence: SequenceShard, layer: int | None, heads: Span, q: Tensor) -> Tensor:
    """What the coins of this rank's heads, of those in q, are drawn from: their numbers in the whole model."""
    samples = range(sequence.first_row, sequence.first_row + len(sequence.masks))
    first = sequence.head_rank * q.shape[1]
    numbers = range(first + heads.start, first + heads.stop)
    return sequence.once(
        ("dropout", layer, numbers, q.device), lambda: dropout_keys(sequence.seed, samples, layer, numbers, q.device)
    )


def _check(q: Tensor, k: Tensor, v: Tensor, sequence: SequenceShard) -> None:
    held = (len(sequence.masks), total(sequence.spans), q.dtype)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if (x.shape[0], x.shape[2], x.dtype) != held:
            raise DataError(
                f"{name} is {list(x.shape)} in {x.dtype}, but the sequence shard holds {counted(held[0], 'row')} of "
                f"{counted(held[1], 'token')} and q is in {held[2]}; pass tensors of the batch that came with the "
                "shard."
            )
    heads, kv_heads, degree = q.shape[1], k.shape[1], sequence.ulysses.size
    if k.shape[3] != q.shape[3]:
        raise DataError(
            f"q has width {q.shape[3]} but k {k.shape[3]}; their products need one width (v may have another)."
        )
    if v.shape[1] != kv_heads or heads % kv_heads or degree > heads:
        raise DataError(
            f"{heads} query, {kv_heads} key and {v.shape[1]} value heads do not fit ulysses={degree}: key and value "
            "heads must be as many and divide the query heads, and there must be a query head for each Ulysses rank."
        )


def _check_options(
    heads: int,
    sequence: SequenceShard,
    scale: float,
    softcap: float | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    dropout: float,
    layer: int | None,
) -> None:
    for name, x in (("slopes", slopes), ("sinks", sinks)):
        if x is not None and tuple(x.shape) != (heads,):
            raise DataError(
                f"{name} are {list(x.shape)}, but the model has {counted(heads, 'query head')}; give one number a head."
            )
    if slopes is not None and slopes.requires_grad:
        raise DataError("slopes that are learned would get no gradient; give them detached, as ALiBi has them.")
    for name, number in (("scale", scale), ("soft cap", softcap)):
        if number is not None and (not isinstance(number, float | int) or not 0 < number < inf):
            raise DataError(f"A {name} of {number} is not possible; it is a number above 0, not a learned one.")
    if dropout and (layer is None or sequence.first_row is None):
        raise DataError(
            "Dropout draws by layer and by the row's number in the run's data, so that no two draw alike; "
            "give attention layer=... and the batch first_row=..., counting on from batch to batch."
        )
    if not 0 <= dropout < 1:
        raise DataError(f"A dropout of {dropout} is not possible; it is at least 0 and below 1.")
