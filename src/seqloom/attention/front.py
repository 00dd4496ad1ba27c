"""The one way into attention: Ulysses outside, ring or gather inside, either of degree 1."""

from typing import Any

import torch
from torch import Tensor

from seqloom.attention.gather import GatherAttention
from seqloom.attention.ring import RingAttention
from seqloom.attention.ulysses import to_heads, to_tokens
from seqloom.sequence import SequenceShard

EXCHANGES: dict[str, Any] = {"ring": RingAttention, "gather": GatherAttention}


def attention(q: Tensor, k: Tensor, v: Tensor, sequence: SequenceShard, *, scale: float | None = None) -> Tensor:
    """Exact attention of this rank's tokens on the whole sequence, under the sequence's mask.

    q: [rows, Hq, local_tokens, D]; k, v: [rows, Hk, local_tokens, D], Hk dividing Hq; they hold the
    tokens of `sequence.spans`, in order. scale: of the scores, D ** -0.5 by default. Returns out
    like q. Every rank of the ring and Ulysses axes calls it together.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    device = q.device.type
    if torch.is_autocast_enabled(device):
        # As torch does for its own attention; rotary angles leave q and k in float32 but v in the lower type.
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    with torch.autocast(device, enabled=False):
        q, k, v = to_heads(q, k, v, sequence.ulysses)
        out = EXCHANGES[sequence.exchange].apply(q, k, v, sequence, scale)
        return to_tokens(out, sequence.ulysses)
