"""The ways into and out of a tensor group, on sequence-first tensors [sequence, batch, hidden].

| function                                   | forward                       | backward                  |
|--------------------------------------------|-------------------------------|---------------------------|
| scatter_to_sequence_parallel_region        | split of tokens               | all-gather                |
| gather_from_sequence_parallel_region       | all-gather of tokens          | reduce-scatter, or split  |
| reduce_scatter_to_sequence_parallel_region | reduce-scatter of tokens      | all-gather                |
| copy_to_tensor_model_parallel_region       | identity                      | all-reduce                |
| reduce_from_tensor_model_parallel_region   | all-reduce                    | identity                  |
| scatter_to_tensor_model_parallel_region    | split of the last dim         | all-gather                |
| gather_from_tensor_model_parallel_region   | all-gather of the last dim    | split                     |

Megatron-LM asks sizes to divide; here any will do. `group` is the tensor group unless one is given.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup

from seqloom import tensor
from seqloom.compat.megatron.parallel_state import tensor_axis
from seqloom.errors import ConfigError


def _own_memory(use_global_buffer: bool) -> None:
    if use_global_buffer:
        raise ConfigError(
            "use_global_buffer=True is not honoured here: each gathering has memory of its own; leave it out."
        )


def scatter_to_sequence_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """This rank's tokens of an input that all ranks hold alike. Forward: split. Backward: all-gather."""
    return tensor.scatter_to_sequence_parallel_region(input_, tensor_axis(group), 0)


def gather_from_sequence_parallel_region(
    input_: Tensor,
    tensor_parallel_output_grad: bool = True,
    group: ProcessGroup | None = None,
    output_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """Every rank's tokens. Forward: all-gather. Backward: reduce-scatter, or split.

    tensor_parallel_output_grad: whether ranks go on with parts of the same work, so that their gradients sum.
    output_split_sizes: the tokens of each rank, exchanged by default. Raises ConfigError for use_global_buffer.
    """
    _own_memory(use_global_buffer)
    return tensor.gather_from_sequence_parallel_region(
        input_, tensor_axis(group), 0, output_split_sizes, tensor_parallel_output_grad
    )


def reduce_scatter_to_sequence_parallel_region(
    input_: Tensor,
    group: ProcessGroup | None = None,
    input_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """This rank's tokens of the sum of all ranks' inputs. Forward: reduce-scatter. Backward: all-gather.

    input_split_sizes: the tokens of each rank, as even as can be by default. Raises ConfigError for
    use_global_buffer.
    """
    _own_memory(use_global_buffer)
    return tensor.reduce_scatter_to_sequence_parallel_region(input_, tensor_axis(group), 0, input_split_sizes)


def copy_to_tensor_model_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """An input that all ranks hold alike, each doing a part of the work. Forward: identity. Backward: all-reduce."""
    return tensor.copy_to_tensor_region(input_, tensor_axis(group))


def reduce_from_tensor_model_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The sum of all ranks' inputs, on all of them. Forward: all-reduce. Backward: identity."""
    return tensor.reduce_from_tensor_region(input_, tensor_axis(group))


def scatter_to_tensor_model_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """This rank's part of the last dim. Forward: split. Backward: all-gather."""
    return tensor.scatter_to_sequence_parallel_region(input_, tensor_axis(group), -1)


def gather_from_tensor_model_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Every rank's part of the last dim. Forward: all-gather. Backward: split, since all ranks go on alike."""
    return tensor.gather_from_sequence_parallel_region(
        input_, tensor_axis(group), -1, tensor_parallel_output_grad=False
    )
