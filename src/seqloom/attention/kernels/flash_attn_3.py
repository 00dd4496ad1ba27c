"""FlashAttention-3 for Hopper GPUs, the package flash_attn_3 (Dao-AILab/flash-attention, folder hopper).

Its operators `flash_attn_3::fwd` and `flash_attn_3::bwd`, as registered by hopper/flash_api.cpp since
2025: tensors [rows, tokens, heads, D], any strides but the last; heads of K may be fewer; the
log-sum-exp [rows, Hq, n] in float32. They are called by the names of their arguments, since releases
differ in order and defaults; what a release wants and we do not give is None.
"""

from typing import Any

import torch
from torch import Tensor

from seqloom.attention.kernels.call import Call, Kernel
from seqloom.attention.kernels.limits import first, installed, lacks_extras, lacks_gpu, lacks_type, lacks_width
from seqloom.attention.kernels.width import common_width, cut, widen

ALIGNED = 8
"""Head widths are multiples of this."""


def _operator(name: str) -> Any:
    import flash_attn_3._C  # noqa: F401  its import registers the operators

    return getattr(torch.ops.flash_attn_3, name).default


def _called(operator: Any, **given: Any) -> Any:
    """operator(**given), with None for what has neither a value nor a default."""
    wanted = {arg.name: None for arg in operator._schema.arguments if not arg.has_default_value()}
    return operator(**{**wanted, **given})


def absent(device: torch.device) -> str | None:
    """It needs its package and a Hopper GPU."""
    reason = lacks_gpu(device, range(9, 10))
    return reason or (None if installed("flash_attn_3._C") else "flash_attn_3 is not installed")


def lacks(call: Call, q: Tensor, v: Tensor) -> str | None:
    """float16 or bfloat16, heads of width 256 at most; a soft cap, no ALiBi, dropout or callable mask."""
    return first(lacks_type(q.dtype), lacks_extras(call, ("softcap",)), lacks_width(common_width(q, v, ALIGNED), 256))


def _options(call: Call) -> dict[str, Any]:
    return {"softmax_scale": call.scale, "is_causal": call.causal, "softcap": call.softcap or 0.0}


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """See `seqloom.attention.kernels.call`; out is in the type of q."""
    width = common_width(q, v, ALIGNED)
    turned = {name: widen(x, width).transpose(1, 2) for name, x in (("q", q), ("k", k), ("v", v))}
    out, lse, *_ = _called(_operator("fwd"), **turned, num_splits=1, **_options(call))
    return cut(out.transpose(1, 2), v.shape[-1]), lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """See `seqloom.attention.kernels.call`; gradients are in the type of q."""
    width = common_width(q, v, ALIGNED)
    named = (("dout", dout.to(q.dtype)), ("q", q), ("k", k), ("v", v), ("out", out.to(q.dtype)))
    turned = {name: widen(x, width).transpose(1, 2) for name, x in named}
    # Ours, because releases return them at different places.
    grads = {f"d{name}": torch.empty(turned[name].shape, dtype=q.dtype, device=q.device) for name in "qkv"}
    _called(
        _operator("bwd"),
        **turned,
        **grads,
        softmax_lse=lse.contiguous(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_options(call),
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads.values())
    return cut(dq, q.shape[-1]), cut(dk, k.shape[-1]), cut(dv, v.shape[-1])


FLASH_ATTN_3 = Kernel("flash_attn_3", absent, lacks, forward, backward)
