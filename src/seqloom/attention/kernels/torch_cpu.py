"""PyTorch's fused attention for CPU: `aten::_scaled_dot_product_flash_attention_for_cpu` and its backward.

The backward takes the log-sum-exp from outside, so the final one of a row may be given. Tensors are
read where they lie, whatever their strides; backward copies dout where it is no block of memory.
float64, float32, float16 and bfloat16. Seen at torch 2.13.
"""

import torch
from torch import Tensor

from seqloom.attention.kernels.call import Call, Kernel
from seqloom.attention.kernels.limits import first, lacks_extras, lacks_type
from seqloom.attention.kernels.width import common_width, cut, widen

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def absent(device: torch.device) -> str | None:
    """It runs wherever the tensors are on the CPU."""
    return None if device.type == "cpu" else "for the CPU"


def lacks(call: Call, q: Tensor, v: Tensor) -> str | None:
    """A softmax of scaled scores, and nothing else."""
    return first(lacks_type(q.dtype, TYPES), lacks_extras(call))


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """See `seqloom.attention.kernels.call`; out is in the type of q."""
    width = common_width(q, v)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        widen(q, width), widen(k, width), widen(v, width), 0.0, call.causal, scale=call.scale
    )
    return cut(out, v.shape[-1]), lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """See `seqloom.attention.kernels.call`; gradients are in the type of q."""
    width = common_width(q, v)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(widen(x, width) for x in (dout, q, k, v, out)), lse, 0.0, call.causal, scale=call.scale
    )
    return cut(dq, q.shape[-1]), cut(dk, q.shape[-1]), cut(dv, v.shape[-1])


TORCH_CPU = Kernel("torch_cpu", absent, lacks, forward, backward)
