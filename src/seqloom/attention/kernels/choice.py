"""Which kernel computes a tile: the first of an explicit table that is here and honours the whole call."""

from torch import Tensor

from seqloom.attention.kernels.call import Call, Kernel
from seqloom.attention.kernels.flash_attn import FLASH_ATTN
from seqloom.attention.kernels.flash_attn_3 import FLASH_ATTN_3
from seqloom.attention.kernels.flash_attn_4 import FLASH_ATTN_4
from seqloom.attention.kernels.flex import FLEX
from seqloom.attention.kernels.plain import PLAIN
from seqloom.attention.kernels.torch_cpu import TORCH_CPU
from seqloom.attention.kernels.torch_cuda import CUDNN, TORCH_FLASH
from seqloom.errors import ModelError

KERNELS: tuple[tuple[str, tuple[Kernel, ...]], ...] = (
    ("cpu", (TORCH_CPU, PLAIN)),
    ("cuda", (FLASH_ATTN_3, FLASH_ATTN_4, CUDNN, FLASH_ATTN, TORCH_FLASH, FLEX, PLAIN)),
)
"""The kernels of each kind of device, the fastest first; every other device has the plain one."""


def kernels_for(device_type: str) -> tuple[Kernel, ...]:
    """The kernels of a kind of device ("cpu", "cuda", ...), the fastest first."""
    return dict(KERNELS).get(device_type, (PLAIN,))


def choose(q: Tensor, v: Tensor, call: Call) -> Kernel:
    """The first kernel that runs on q's device and lacks nothing of the call.

    q: [rows, Hq, n, Dk]; v: [rows, Hk, m, Dv]. Raises ModelError with each kernel's reason if none does.
    """
    kernels = kernels_for(q.device.type)
    for kernel in kernels:
        if kernel.absent(q.device) is None and kernel.lacks(call, q, v) is None:
            return kernel
    reasons = "; ".join(f"{each.name}: {each.absent(q.device) or each.lacks(call, q, v)}" for each in kernels)
    raise ModelError(
        f"No attention kernel honours this call on {q.device} in {q.dtype} ({reasons}); "
        f"use float32, which the plain kernel takes with every option."
    )
