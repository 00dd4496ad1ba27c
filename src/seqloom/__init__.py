"""seqloom: train transformers on very long sequences, split over devices and equal to one device.

The names below load on first use, so that what needs no torch (`seqloom.plan`) starts at once.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Batch": "sequence",
    "Fabric": "fabric",
    "Layout": "geometry",
    "Mask": "geometry",
    "Plan": "plan",
    "parallelize": "model",
    "shard_batch": "sequence",
    "sum_gradients": "model",
    "token_loss": "model",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"seqloom.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'seqloom' has no attribute '{name}'")
