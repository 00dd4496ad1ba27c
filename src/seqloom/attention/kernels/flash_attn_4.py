"""FlashAttention-4 in CuTe, the package flash-attn-4 (Dao-AILab/flash-attention, folder flash_attn/cute).

`flash_attn.cute.interface._flash_attn_fwd` and `_flash_attn_bwd` as of early 2026: tensors [rows,
tokens, heads, D], the last dim laid out in memory; heads of K may be fewer; the log-sum-exp
[rows, Hq, n] in float32. Its backward ignores a soft cap without a word, so none is given to it.
"""

from typing import Any

import torch
from torch import Tensor

from seqloom.attention.kernels.call import Call, Kernel
from seqloom.attention.kernels.limits import (
    first,
    installed,
    lacks_determinism,
    lacks_extras,
    lacks_gpu,
    lacks_type,
    lacks_width,
)
from seqloom.attention.kernels.width import common_width, cut, widen

NARROWEST, ALIGNED, WIDEST = 64, 32, 128
"""Head widths it was made for: 64, 96 and 128."""


def _interface() -> Any:
    from flash_attn.cute import interface

    return interface


def _width(q: Tensor, v: Tensor) -> int:
    return max(NARROWEST, common_width(q, v, ALIGNED))


def absent(device: torch.device) -> str | None:
    """It needs its package and a Hopper or Blackwell GPU."""
    reason = first(lacks_gpu(device, range(9, 12)), lacks_determinism())
    return reason or (None if installed("flash_attn.cute.interface") else "flash-attn-4 is not installed")


def lacks(call: Call, q: Tensor, v: Tensor) -> str | None:
    """float16 or bfloat16, heads of width 128 at most, and nothing beside the softmax."""
    return first(lacks_type(q.dtype), lacks_extras(call), lacks_width(_width(q, v), WIDEST))


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """See `seqloom.attention.kernels.call`; out is in the type of q."""
    width = _width(q, v)
    out, lse, *_ = _interface()._flash_attn_fwd(
        *(widen(x, width).transpose(1, 2) for x in (q, k, v)),
        softmax_scale=call.scale,
        causal=call.causal,
        return_lse=True,
    )
    return cut(out.transpose(1, 2), v.shape[-1]), lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """See `seqloom.attention.kernels.call`; gradients are in the type of q."""
    width = _width(q, v)
    named = (("q", q), ("k", k), ("v", v), ("out", out.to(q.dtype)), ("dout", dout.to(q.dtype)))
    dq, dk, dv, *_ = _interface()._flash_attn_bwd(
        **{name: widen(x, width).transpose(1, 2) for name, x in named},
        lse=lse.contiguous(),
        softmax_scale=call.scale,
        causal=call.causal,
    )
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    return cut(dq, q.shape[-1]), cut(dk, k.shape[-1]), cut(dv, v.shape[-1])


FLASH_ATTN_4 = Kernel("flash_attn_4", absent, lacks, forward, backward)
