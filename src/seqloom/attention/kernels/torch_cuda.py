"""PyTorch's fused attention for CUDA: FlashAttention-2 as built into torch, and cuDNN's.

`aten::_scaled_dot_product_flash_attention` and `aten::_scaled_dot_product_cudnn_attention` with their
backwards, schemas of torch 2.11 to 2.13. Both take grouped heads as they are (k and v are not
expanded), return a log-sum-exp in float32, and take the final one in backward.

Flash reads the log-sum-exp as one block of memory without looking at its strides, so a cut of a larger
one is copied first. Head widths are brought to a multiple of 8, which torch does outside these operators.
cuDNN compiles a graph for each new pair of lengths, so it is kept to lengths that are multiples of
`STEP`: shards are, documents seldom.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from seqloom.attention.kernels.call import Call, Kernel
from seqloom.attention.kernels.limits import first, lacks_determinism, lacks_extras, lacks_gpu, lacks_type, lacks_width
from seqloom.attention.kernels.width import common_width, cut, widen

ALIGNED = 8
"""Head widths are multiples of this."""

STEP = 128
"""Lengths for which a cuDNN graph is made."""

OPS: Any = torch.ops.aten


def _flash_absent(device: torch.device) -> str | None:
    return lacks_gpu(device, range(8, 13))


def _flash_lacks(call: Call, q: Tensor, v: Tensor) -> str | None:
    return first(lacks_type(q.dtype), lacks_extras(call), lacks_width(common_width(q, v, ALIGNED), 256))


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    width = common_width(q, v, ALIGNED)
    out, lse, *_ = OPS._scaled_dot_product_flash_attention(
        widen(q, width), widen(k, width), widen(v, width), 0.0, call.causal, False, scale=call.scale
    )
    return cut(out, v.shape[-1]), lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    width = common_width(q, v, ALIGNED)
    dout, wide_q, wide_k, wide_v, out = (widen(x, width) for x in (dout.to(q.dtype), q, k, v, out.to(q.dtype)))
    # The state of the generator is read with dropout only; without any, whatever lies there will do.
    seed, offset = (torch.empty(shape, dtype=torch.uint64, device=q.device) for shape in ((2,), ()))
    dq, dk, dv = OPS._scaled_dot_product_flash_attention_backward(
        dout,
        wide_q,
        wide_k,
        wide_v,
        out,
        lse.contiguous(),
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        call.causal,
        seed,
        offset,
        scale=call.scale,
    )
    return cut(dq, q.shape[-1]), cut(dk, k.shape[-1]), cut(dv, v.shape[-1])


@cache
def _stats_dims(device: torch.device) -> int:
    """Dims of cuDNN's log-sum-exp, 3 or 4 by torch version: its backward wants it as its forward gives it.

    0 where cuDNN attention does not run on the device.
    """
    x = torch.zeros(1, 1, STEP, 64, dtype=torch.float16, device=device)
    try:
        return OPS._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1].dim()
    except RuntimeError:
        return 0


def _cudnn_absent(device: torch.device) -> str | None:
    reason = first(lacks_gpu(device, range(8, 13)), lacks_determinism())
    return reason or (None if _stats_dims(device) else "this torch, cuDNN or GPU has none")


def _cudnn_lacks(call: Call, q: Tensor, v: Tensor) -> str | None:
    reason = first(lacks_type(q.dtype), lacks_extras(call), lacks_width(common_width(q, v, ALIGNED), 128))
    uneven = q.shape[2] % STEP or v.shape[2] % STEP
    return reason or (f"lengths that are multiples of {STEP} only" if uneven else None)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    width = common_width(q, v, ALIGNED)
    out, lse, *_ = OPS._scaled_dot_product_cudnn_attention(
        widen(q, width), widen(k, width), widen(v, width), None, True, 0.0, call.causal, False, scale=call.scale
    )
    return cut(out, v.shape[-1]), lse.view(q.shape[:3])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    width = common_width(q, v, ALIGNED)
    dout, wide_q, wide_k, wide_v, out = (widen(x, width) for x in (dout.to(q.dtype), q, k, v, out.to(q.dtype)))
    stats = lse.contiguous()
    stats = stats[..., None] if _stats_dims(q.device) == 4 else stats
    seed, offset = (torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2))
    dq, dk, dv = OPS._scaled_dot_product_cudnn_attention_backward(
        dout,
        wide_q,
        wide_k,
        wide_v,
        out,
        stats,
        seed,
        offset,
        None,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        call.causal,
        scale=call.scale,
    )
    return cut(dq, q.shape[-1]), cut(dk, k.shape[-1]), cut(dv, v.shape[-1])


TORCH_FLASH = Kernel("torch_flash", _flash_absent, _flash_lacks, _flash_forward, _flash_backward)
CUDNN = Kernel("cudnn", _cudnn_absent, _cudnn_lacks, _cudnn_forward, _cudnn_backward)
