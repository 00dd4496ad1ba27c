"""`colossalai.utils`: printing once, and the device of this process."""

import torch
from torch import distributed

__all__ = ["get_current_device", "print_rank_0"]


def get_current_device() -> torch.device:
    """The device that this process computes on: its CUDA device, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def print_rank_0(msg: str, logger: object = None) -> None:
    """Print on rank 0, or, with a logger, log there at level info."""
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        print(msg, flush=True) if logger is None else logger.info(msg)  # type: ignore[attr-defined]
