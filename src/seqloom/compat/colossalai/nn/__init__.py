"""`colossalai.nn`: layers that the tensor mode of the CONFIG splits."""

from seqloom.compat.colossalai.nn.layer import Dropout, Embedding, LayerNorm, Linear

__all__ = ["Dropout", "Embedding", "LayerNorm", "Linear"]
