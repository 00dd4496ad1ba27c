"""`colossalai.nn.optimizer`."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from seqloom.errors import ConfigError
from seqloom.train import PlannedAdamW

__all__ = ["HybridAdam"]


class HybridAdam(PlannedAdamW):
    """AdamW; `Booster.boost` tells it what of the parameters it steps on this rank."""

    def __init__(
        self,
        model_params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        adamw_mode: bool = True,
        nvme_offload_fraction: float = 0.0,
        nvme_offload_dir: str | None = None,
    ) -> None:
        """As there. Raises ConfigError for what AdamW in memory does not do."""
        if not bias_correction or nvme_offload_fraction or (weight_decay and not adamw_mode):
            raise ConfigError(
                "HybridAdam is AdamW here, with bias correction, decoupled weight decay and its state in memory; leave "
                "bias_correction, adamw_mode and nvme_offload_fraction as they are, or use another torch optimizer."
            )
        given: list[Any] = list(model_params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        super().__init__((), groups, 0, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
