"""Megatron-LM's names for the groups, regions and linears of tensor and sequence parallelism.

In a program that uses them, `megatron.core` becomes `seqloom.compat.megatron`. Tensors are sequence first,
[sequence, batch, hidden]; the groups are those of the process, set by `initialize_model_parallel`. What moves and what
is multiplied is `seqloom.tensor`'s. An argument of Megatron-LM that has no meaning here is refused by name, unless it
has its default.
"""

from seqloom.compat.megatron import parallel_state, tensor_parallel
from seqloom.compat.megatron.model_parallel_config import ModelParallelConfig
from seqloom.compat.megatron.parallel_state import destroy_model_parallel, initialize_model_parallel
from seqloom.compat.megatron.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    linear_with_grad_accumulation_and_async_allreduce,
)
from seqloom.compat.megatron.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "RowParallelLinear",
    "destroy_model_parallel",
    "gather_from_sequence_parallel_region",
    "initialize_model_parallel",
    "linear_with_grad_accumulation_and_async_allreduce",
    "parallel_state",
    "reduce_scatter_to_sequence_parallel_region",
    "scatter_to_sequence_parallel_region",
    "tensor_parallel",
]
