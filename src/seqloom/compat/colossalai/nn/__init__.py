"""`colossalai.nn`: layers that the tensor mode of the CONFIG splits."""

from seqloom.compat.colossalai.nn.layer import (
    Classifier,
    CrossEntropyLoss,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    partition_batch,
)

__all__ = ["Classifier", "CrossEntropyLoss", "Dropout", "Embedding", "LayerNorm", "Linear", "partition_batch"]


def __getattr__(name: str) -> object:
    """Say which layers there are."""
    raise AttributeError(
        f"seqloom.compat.colossalai.nn has no '{name}'; it has {', '.join(__all__)} and the modules lr_scheduler and "
        "optimizer."
    )
