"""Head widths that a kernel can take: zeros appended to the narrower of q, k and v.

Zeros in q and k add nothing to a score; zeros in v give zeros in the output, which are cut off again,
and the gradients at appended places are cut off too.
"""

import torch
from torch import Tensor


def common_width(q: Tensor, v: Tensor, multiple: int = 1) -> int:
    """The width all of q, k and v are brought to: the larger one, rounded up to a multiple."""
    width = max(q.shape[-1], v.shape[-1])
    return -(-width // multiple) * multiple


def widen(x: Tensor, width: int) -> Tensor:
    """x [..., D] as [..., width]; x itself where it is that wide."""
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def cut(x: Tensor, width: int) -> Tensor:
    """The first `width` of the last dim, as a view; x itself where it is that wide."""
    return x if x.shape[-1] == width else x[..., :width]
