"""`colossalai.accelerator`: the kind of device there is."""

import torch

from seqloom.compat.colossalai.utils import get_current_device

__all__ = ["get_accelerator"]


class _Accelerator:
    """CUDA where it is available, else the CPU."""

    @property
    def name(self) -> str:
        """cuda or cpu."""
        return get_current_device().type

    def get_current_device(self) -> torch.device:
        """The device that this process computes on."""
        return get_current_device()

    def synchronize(self) -> None:
        """Wait for the device."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def empty_cache(self) -> None:
        """Give unused memory of the device back."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def max_memory_allocated(self) -> int:
        """The most bytes that tensors took on the device, 0 on the CPU."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def get_accelerator() -> _Accelerator:
    """The accelerator of this process."""
    return _Accelerator()
