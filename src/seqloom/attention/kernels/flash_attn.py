"""FlashAttention-2, the package flash-attn 2.7 or later (Dao-AILab/flash-attention).

`flash_attn.flash_attn_interface._flash_attn_forward` and `_flash_attn_backward` as in 2.7.0 to 2.8.3:
tensors [rows, tokens, heads, D], any strides but the last; heads of K may be fewer; the log-sum-exp
[rows, Hq, n] in float32, read in backward as one block of memory. The soft cap comes before the
softmax, as here. Its ALiBi counts from the ends of the tile, not from positions, and its dropout from
a generator, so neither is used.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from seqloom.attention.kernels.call import Call, Kernel
from seqloom.attention.kernels.limits import first, installed, lacks_extras, lacks_gpu, lacks_type, lacks_width
from seqloom.attention.kernels.width import common_width, cut, widen

ALIGNED = 8
"""Head widths are multiples of this."""

OLDEST = (2, 7)


def _interface() -> Any:
    from flash_attn import flash_attn_interface

    return flash_attn_interface


def absent(device: torch.device) -> str | None:
    """It needs its package and an NVIDIA GPU of compute capability 8.0 or later."""
    if reason := lacks_gpu(device, range(8, 13)):
        return reason
    # The compiled part, since FlashAttention-4 shares the folder flash_attn.
    if not (installed("flash_attn") and installed("flash_attn_2_cuda")):
        return "flash-attn is not installed"
    try:
        found = version("flash-attn")
    except PackageNotFoundError:
        return "flash-attn's version is unknown"
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    return None if numbers >= OLDEST else f"flash-attn {found} is older than {OLDEST[0]}.{OLDEST[1]}"


def lacks(call: Call, q: Tensor, v: Tensor) -> str | None:
    """float16 or bfloat16, heads of width 256 at most; a soft cap, no ALiBi, dropout or callable mask."""
    return first(lacks_type(q.dtype), lacks_extras(call, ("softcap",)), lacks_width(common_width(q, v, ALIGNED), 256))


def _options(call: Call) -> dict[str, Any]:
    return {
        "dropout_p": 0.0,
        "softmax_scale": call.scale,
        "causal": call.causal,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": call.softcap or 0.0,
        "alibi_slopes": None,
    }


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """See `seqloom.attention.kernels.call`; out is in the type of q."""
    width = common_width(q, v, ALIGNED)
    turned = (widen(x, width).transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = _interface()._flash_attn_forward(*turned, **_options(call), return_softmax=False)
    return cut(out.transpose(1, 2), v.shape[-1]), lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """See `seqloom.attention.kernels.call`; gradients are in the type of q."""
    width = common_width(q, v, ALIGNED)
    dout, wide_q, wide_k, wide_v, out = (
        widen(x, width).transpose(1, 2) for x in (dout.to(q.dtype), q, k, v, out.to(q.dtype))
    )
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (wide_q, wide_k, wide_v))
    _interface()._flash_attn_backward(
        dout,
        wide_q,
        wide_k,
        wide_v,
        out,
        lse.contiguous(),
        *grads,
        **_options(call),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        rng_state=None,
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return cut(dq, q.shape[-1]), cut(dk, k.shape[-1]), cut(dv, v.shape[-1])


FLASH_ATTN = Kernel("flash_attn", absent, lacks, forward, backward)
