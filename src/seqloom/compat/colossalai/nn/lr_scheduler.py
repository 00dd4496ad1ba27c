"""`colossalai.nn.lr_scheduler`: those of its schedulers that torch's make up, as its code has their rates.

Each is made of the optimizer before `Booster.boost`, which leaves it in force.
"""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
    StepLR,
)
from torch.optim.lr_scheduler import CosineAnnealingLR as _Cosine

__all__ = [
    "CosineAnnealingLR",
    "CosineAnnealingWarmupLR",
    "ExponentialLR",
    "LambdaLR",
    "LinearWarmupLR",
    "MultiStepLR",
    "StepLR",
]


class CosineAnnealingLR(_Cosine):
    """torch's, under their argument names."""

    def __init__(self, optimizer: Optimizer, total_steps: int, eta_min: float = 0.0, last_epoch: int = -1) -> None:
        super().__init__(optimizer, total_steps, eta_min, last_epoch)


class CosineAnnealingWarmupLR(SequentialLR):
    """Step t of warm-up has (t + 1) / warmup_steps of the rate; then a cosine falls to eta_min at total_steps."""

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, eta_min: float = 0.0) -> None:
        parts: list[LRScheduler] = [_Cosine(optimizer, total_steps - warmup_steps, eta_min)]
        if warmup_steps > 1:
            parts.insert(0, LinearLR(optimizer, 1 / warmup_steps, total_iters=warmup_steps - 1))
        elif warmup_steps:
            parts.insert(0, ConstantLR(optimizer, 1.0, total_iters=1))
        super().__init__(optimizer, parts, [warmup_steps] if warmup_steps else [])


class LinearWarmupLR(LambdaLR):
    """Step t of warm-up has (t + 1) / (warmup_steps + 1) of the rate; then it falls straight to 0 at total_steps."""

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, last_epoch: int = -1) -> None:
        def share(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            return (total_steps - step) / (total_steps - warmup_steps)

        super().__init__(optimizer, share, last_epoch)


def __getattr__(name: str) -> object:
    """Say which schedulers there are."""
    raise AttributeError(
        f"seqloom.compat.colossalai.nn.lr_scheduler has no '{name}'; it has {', '.join(__all__)}, and any scheduler of "
        "torch does."
    )
