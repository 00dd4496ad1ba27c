"""The tensor family: one linear for 1D, 2D, 2.5D and 3D, and what a model needs beside it."""

from seqloom.tensor.dropout import ParallelDropout
from seqloom.tensor.embedding import ParallelEmbedding, PositionEmbedding
from seqloom.tensor.group import TensorGroup, Transfer
from seqloom.tensor.head import split_head
from seqloom.tensor.latent import LatentLinear
from seqloom.tensor.linear import Call, computed_in, parallel_linear
from seqloom.tensor.modules import ParallelLinear, Placeholder, Siblings
from seqloom.tensor.norm import ParallelLayerNorm, ParallelRMSNorm
from seqloom.tensor.parameters import Slot, local, split, whole
from seqloom.tensor.regions import (
    copy_to_tensor_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)

__all__ = [
    "Call",
    "LatentLinear",
    "ParallelDropout",
    "ParallelEmbedding",
    "ParallelLayerNorm",
    "ParallelLinear",
    "ParallelRMSNorm",
    "Placeholder",
    "PositionEmbedding",
    "Siblings",
    "Slot",
    "TensorGroup",
    "Transfer",
    "computed_in",
    "copy_to_tensor_region",
    "gather_from_sequence_parallel_region",
    "local",
    "parallel_linear",
    "reduce_from_tensor_region",
    "reduce_scatter_to_sequence_parallel_region",
    "scatter_to_sequence_parallel_region",
    "split",
    "split_head",
    "whole",
]
