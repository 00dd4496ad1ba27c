"""Dense attention of a whole batch on one device."""

import torch
from torch import Tensor

from seqloom.sequence import Batch


def dense_attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float | None = None) -> Tensor:
    """softmax(q k^T) v under the batch's mask, with the mask written out from its definition."""
    tokens = q.shape[2]
    visible = torch.tensor(
        [[[batch.mask(row).visible(i, j) for j in range(tokens)] for i in range(tokens)] for row in range(q.shape[0])]
    )
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1) @ v
