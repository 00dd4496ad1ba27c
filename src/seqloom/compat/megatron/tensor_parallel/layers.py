"""Megatron-LM's column- and row-parallel linears over `seqloom.tensor`'s one linear, on sequence-first tensors.

| linear | sequence parallel              | without                                        |
|--------|--------------------------------|------------------------------------------------|
| column | x: gather tokens               | x: the same on all ranks, its gradient summed  |
| row    | y: reduce-scatter tokens       | y: summed to all ranks                         |

Sizes need not divide. As in Megatron-LM, a row-parallel bias is the same on all ranks and is marked
`sequence_parallel` where each rank sees its own tokens only: the loop sums the gradients of parameters so marked over
the tensor group.
"""

from collections.abc import Callable
from contextlib import suppress
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from seqloom.compat.megatron.model_parallel_config import check
from seqloom.compat.megatron.parallel_state import (
    device,
    get_context_parallel_world_size,
    get_pipeline_model_parallel_world_size,
    tensor_axis,
)
from seqloom.compat.megatron.refusal import refuse
from seqloom.compat.megatron.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from seqloom.errors import ConfigError, DataError
from seqloom.fabric import Axis
from seqloom.geometry import even_sizes
from seqloom.tensor import (
    Call,
    Transfer,
    computed_in,
    gather_from_sequence_parallel_region,
    parallel_linear,
    scatter_to_sequence_parallel_region,
)

SEQUENCE = 0
"""The dim of tokens."""

_OLDER_NAMES = {"input_": "input", "inputs": "input", "sequence_parallel_enabled": "sequence_parallel"}
_MODULE_REFUSED = {
    "embedding_activation_buffer": "the weight's gradient is computed in its own backward; leave it out",
    "grad_output_buffer": "the weight's gradient is computed in its own backward; leave it out",
    "is_expert": "a plan deals experts to ranks; use Plan(expert=N)",
}


def linear_with_grad_accumulation_and_async_allreduce(*args: Any, **named: Any) -> Tensor:
    """x weight^T + bias for sequence-first x; while the gradient of x travels, that of the weight is computed.

    Called as Megatron-LM calls it: (input, weight, bias, gradient_accumulation_fusion, allreduce_dgrad,
    sequence_parallel, grad_output_buffer, wgrad_deferral_limit, async_grad_allreduce, tp_group), or as AscendSpeed
    does: (input_, weight, bias, sequence_parallel_enabled), by position, by name or both. Older names stand for
    newer ones: async_grad_allreduce alone for allreduce_dgrad.

    weight: this rank's part [out, in]. sequence_parallel: x holds this rank's tokens; they are gathered, and the
    gradient is reduce-scattered. Without, the gradient of x is summed if allreduce_dgrad says so. Forward gathers x;
    backward gathers it again. Raises ConfigError for arguments that are no such call or are not honoured, and for
    both sequence_parallel and allreduce_dgrad.
    """
    given = {_OLDER_NAMES.get(name, name): value for name, value in named.items()}
    older = {"allreduce_dgrad" if name == "async_grad_allreduce" else name: value for name, value in given.items()}
    for call, names in ((_as_ascendspeed, given), (_linear, given), (_linear, older)):
        with suppress(TypeError):
            bound = signature(call).bind(*args, **names)
            break
    else:
        megatron, ascendspeed = (", ".join(signature(call).parameters) for call in (_linear, _as_ascendspeed))
        raise ConfigError(
            f"linear_with_grad_accumulation_and_async_allreduce takes ({megatron}) or ({ascendspeed}), not "
            f"{', '.join([f'{len(args)} by position', *named])}; give it one or the other."
        )
    return call(*bound.args, **bound.kwargs)


def _as_ascendspeed(input: Tensor, weight: Tensor, bias: Tensor | None, sequence_parallel: bool) -> Tensor:
    return _linear(input, weight, bias, False, False, sequence_parallel)


def _linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    grad_output_buffer: list[Tensor] | None = None,
    wgrad_deferral_limit: int | None = 0,
    async_grad_allreduce: bool | None = None,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    for name, value in {
        "gradient_accumulation_fusion": gradient_accumulation_fusion,
        "grad_output_buffer": grad_output_buffer is not None,
        "wgrad_deferral_limit": wgrad_deferral_limit,
    }.items():
        if value:
            raise ConfigError(
                f"{name} of linear_with_grad_accumulation_and_async_allreduce is not honoured here: backward computes "
                "each weight's gradient at once and adds it to weight.grad; leave it out."
            )
    if sequence_parallel and allreduce_dgrad:
        raise ConfigError(
            "allreduce_dgrad=True and sequence_parallel=True would sum the gradient of the input twice; pass one."
        )
    if async_grad_allreduce not in (None, allreduce_dgrad):
        raise ConfigError(
            f"async_grad_allreduce={async_grad_allreduce} is the older name of allreduce_dgrad={allreduce_dgrad}; pass "
            "the newer one alone."
        )
    axis = tensor_axis(tp_group)
    move = None
    if axis.size > 1 and (sequence_parallel or allreduce_dgrad):
        move = Transfer(axis, SEQUENCE, _lengths(input, axis)) if sequence_parallel else Transfer(axis, None)
    out = _product(input, weight, Call(move, (None,), (None,)))
    return out if bias is None else out + bias.to(out.dtype)


def _product(x: Tensor, weight: Tensor, call: Call) -> Tensor:
    dtype = computed_in(x)
    (out,) = parallel_linear(x.to(dtype), [weight.to(dtype)], call)
    return out


def _lengths(x: Tensor, axis: Axis) -> tuple[int, ...]:
    """The tokens of each rank."""
    mine = torch.tensor([x.shape[SEQUENCE]], device=x.device)
    return tuple(gather_from_sequence_parallel_region(mine, axis, 0, (1,) * axis.size).tolist())


def _marked(parameter: nn.Parameter, dim: int | None, stride: int) -> nn.Parameter:
    """With the marks by which Megatron-LM's own code knows a parameter that is split along `dim`, or is whole."""
    parameter.tensor_model_parallel = dim is not None
    parameter.partition_dim, parameter.partition_stride = -1 if dim is None else dim, stride
    return parameter


class _Parallel(nn.Module):
    """What both linears share: sizes, settings, and a weight that is drawn whole and cut along `dim`."""

    def __init__(self, input_size: int, output_size: int, config: Any, group: ProcessGroup | None, skip: bool) -> None:
        super().__init__()
        self.axis, self.skip_bias_add = tensor_axis(group), skip
        check(
            config,
            (self.axis.size, get_pipeline_model_parallel_world_size(), get_context_parallel_world_size()),
        )
        self.input_size, self.output_size, self.config, self.tp_group = input_size, output_size, config, group
        self.sequence_parallel = bool(config.sequence_parallel) and self.axis.size > 1
        self.device = torch.device("cpu") if config.use_cpu_initialization else device()

    def _weight(self, init_method: Callable[[Tensor], Any], dim: int, stride: int, keep: bool) -> nn.Parameter:
        """This rank's part of the whole weight [out, in]; with a stride, of each of so many blocks of it."""
        whole = torch.empty(self.output_size, self.input_size, dtype=self.config.params_dtype)
        if self.config.perform_initialization:
            init_method(whole)
        self.master_weight = whole if keep else None
        blocks = whole.detach().chunk(stride, dim)
        part = torch.cat([scatter_to_sequence_parallel_region(block, self.axis, dim) for block in blocks], dim)
        return _marked(nn.Parameter(part.to(self.device)), dim, stride)

    def _bias(self, size: int, dim: int | None, stride: int) -> nn.Parameter:
        made = torch.zeros if self.config.perform_initialization else torch.empty
        return _marked(nn.Parameter(made(size, dtype=self.config.params_dtype, device=self.device)), dim, stride)

    def extra_repr(self) -> str:
        """The whole sizes, and the ranks that share them."""
        return f"in_features={self.input_size}, out_features={self.output_size}, TP={self.axis.size}"


class ColumnParallelLinear(_Parallel):
    """A linear of whose outputs each rank of the tensor group holds a part, `output_size_per_partition` of them.

    The whole weight is drawn by init_method on every rank, from a generator that is to stand alike on all of them,
    and cut: it depends on no degree. forward gives (output, bias), the bias only with skip_bias_add.
    """

    def __init__(  # noqa: PLR0913 -- Megatron-LM's
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Callable[[Tensor], Any],
        bias: bool = True,
        gather_output: bool = False,
        stride: int = 1,
        keep_master_weight_for_test: bool = False,
        skip_bias_add: bool = False,
        skip_weight_param_allocation: bool = False,
        embedding_activation_buffer: list[Tensor] | None = None,
        grad_output_buffer: list[Tensor] | None = None,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        disable_grad_reduce: bool = False,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        """Make this rank's part. Arguments as in Megatron-LM, where tp_comm_buffer_name has no effect either.

        config: a ModelParallelConfig, Megatron-LM's or this package's. Raises ConfigError for an argument that is not
        honoured.
        """
        refuse(ColumnParallelLinear.__init__, locals(), _MODULE_REFUSED, "ColumnParallelLinear")
        super().__init__(input_size, output_size, config, tp_group, skip_bias_add)
        self.gather_output, self.disable_grad_reduce = gather_output, disable_grad_reduce
        self.output_size_per_partition = even_sizes(output_size // stride, self.axis.size)[self.axis.rank] * stride
        held = (
            None if skip_weight_param_allocation else self._weight(init_method, 0, stride, keep_master_weight_for_test)
        )
        self.register_parameter("weight", held)
        self.register_parameter("bias", self._bias(self.output_size_per_partition, 0, stride) if bias else None)

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[sequence, batch, out part], or out where outputs are gathered, and the bias if it is not added.

        input_: [sequence, batch, in]; with sequence parallelism this rank's tokens. weight: this rank's part, in
        place of the module's own. Raises DataError for a weight of another shape, or for none.
        """
        weight = self.weight if weight is None else weight
        shape = (self.output_size_per_partition, self.input_size)
        if weight is None or tuple(weight.shape) != shape:
            raise DataError(
                f"The weight is {None if weight is None else tuple(weight.shape)}, but this rank's part is {shape}; "
                "hand it to forward as `weight`."
            )
        out = _linear(
            input_,
            weight,
            None if self.skip_bias_add else self.bias,
            False,
            not self.sequence_parallel and not self.disable_grad_reduce,
            self.sequence_parallel,
            tp_group=self.tp_group,
        )
        if self.gather_output if runtime_gather_output is None else runtime_gather_output:
            out = gather_from_tensor_model_parallel_region(out, self.tp_group)
        return out, self.bias if self.skip_bias_add else None


class RowParallelLinear(_Parallel):
    """A linear of whose inputs each rank of the tensor group holds a part, `input_size_per_partition` of them.

    The whole weight is drawn and cut as for ColumnParallelLinear; the bias is whole on every rank. forward gives
    (output, bias), the bias only with skip_bias_add.
    """

    def __init__(  # noqa: PLR0913 -- Megatron-LM's
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        input_is_parallel: bool,
        skip_bias_add: bool,
        stride: int = 1,
        keep_master_weight_for_test: bool = False,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        """Make this rank's part. Arguments as in Megatron-LM, where tp_comm_buffer_name has no effect either.

        Raises ConfigError for an argument that is not honoured, and for sequence parallelism with an input that
        is not split.
        """
        refuse(RowParallelLinear.__init__, locals(), _MODULE_REFUSED, "RowParallelLinear")
        super().__init__(input_size, output_size, config, tp_group, skip_bias_add)
        if config.sequence_parallel and not input_is_parallel:
            raise ConfigError(
                "sequence_parallel=True with input_is_parallel=False of RowParallelLinear would split an input that "
                "holds all tokens; pass input_is_parallel=True."
            )
        self.input_is_parallel = input_is_parallel
        self.input_size_per_partition = even_sizes(input_size // stride, self.axis.size)[self.axis.rank] * stride
        self.weight = self._weight(init_method, 1, stride, keep_master_weight_for_test)
        self.register_parameter("bias", self._bias(output_size, None, stride) if bias else None)
        if self.bias is not None:
            self.bias.sequence_parallel = self.sequence_parallel

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[sequence, batch, out], with sequence parallelism this rank's tokens, and the bias if it is not added.

        input_: [sequence, batch, in part], or in where it is not split.
        """
        x = input_ if self.input_is_parallel else scatter_to_tensor_model_parallel_region(input_, self.tp_group)
        move = None
        if self.axis.size > 1:
            sizes = even_sizes(x.shape[SEQUENCE], self.axis.size)
            move = Transfer(self.axis, SEQUENCE, sizes) if self.sequence_parallel else Transfer(self.axis, None)
        out = _product(x, self.weight, Call(None, (None,), (move,)))
        if self.skip_bias_add or self.bias is None:
            return out, self.bias
        return out + self.bias.to(out.dtype), None
