"""The one way into attention: Ulysses outside, ring or gather inside, either of degree 1."""

from typing import Any

import torch
from torch import Tensor

from seqloom.attention.gather import GatherAttention
from seqloom.attention.ring import RingAttention
from seqloom.attention.ulysses import to_heads, to_tokens
from seqloom.errors import DataError
from seqloom.geometry import total
from seqloom.sequence import SequenceShard

EXCHANGES: dict[str, Any] = {"ring": RingAttention, "gather": GatherAttention}


def attention(q: Tensor, k: Tensor, v: Tensor, sequence: SequenceShard, *, scale: float | None = None) -> Tensor:
    """Exact attention of this rank's tokens on the whole sequence, under the sequence's mask.

    q: [rows, Hq, local_tokens, D]; k, v: [rows, Hk, local_tokens, D], Hk dividing Hq; they hold the
    tokens of `sequence.spans`, in order. scale: of the scores, D ** -0.5 by default. Returns out
    like q. Every rank of the ring and Ulysses axes calls it together. Raises DataError for tensors
    that are not what the sequence holds: their slices would clip without a word.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        # As torch does for its own attention; rotary angles leave q and k in float32 but v in the lower type.
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    _check(q, k, v, sequence)
    # Fused kernels read the last dim as if it were laid out in memory.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    with torch.autocast(device, enabled=False):
        q, k, v = to_heads(q, k, v, sequence.ulysses)
        out = EXCHANGES[sequence.exchange].apply(q, k, v, sequence, scale)
        return to_tokens(out, sequence.ulysses)


def _check(q: Tensor, k: Tensor, v: Tensor, sequence: SequenceShard) -> None:
    held = (len(sequence.masks), total(sequence.spans), q.shape[3], q.dtype)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if (x.shape[0], x.shape[2], x.shape[3], x.dtype) != held:
            raise DataError(
                f"{name} is {list(x.shape)} in {x.dtype}, but the sequence shard holds {held[0]} rows of {held[1]} "
                f"tokens and q has width {held[2]} in {held[3]}; pass tensors of the batch that came with the shard."
            )
    heads, kv_heads, degree = q.shape[1], k.shape[1], sequence.ulysses.size
    if v.shape[1] != kv_heads or heads % kv_heads or heads % degree or kv_heads % degree:
        raise DataError(
            f"{heads} query, {kv_heads} key and {v.shape[1]} value heads do not fit: key and value heads must be as "
            f"many, divide the query heads, and be divisible by ulysses={degree}."
        )
