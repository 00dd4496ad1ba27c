"""Sequence-parallel and tensor-parallel regions: each way into or out of one, with its adjoint.

The meaning is Megatron-LM's (arXiv 2205.05198, section 4.2.2; g and g-bar there, f and f-bar in
arXiv 1909.08053), on batch-first tensors and on any dim, of which ranks may hold uneven or empty parts:

| function                                   | forward        | backward                |
|--------------------------------------------|----------------|-------------------------|
| scatter_to_sequence_parallel_region        | split          | all-gather              |
| gather_from_sequence_parallel_region       | all-gather     | reduce-scatter, or split|
| reduce_scatter_to_sequence_parallel_region | reduce-scatter | all-gather              |
| copy_to_tensor_region                      | identity       | all-reduce              |
| reduce_from_tensor_region                  | all-reduce     | identity                |

Over an axis of one rank each is the identity. Lower types are summed in float32 and rounded once. Every
rank of the axis calls them together; tensors on the meta device travel nowhere.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqloom.errors import DataError
from seqloom.fabric import Axis, start_collect, start_sum_, start_sum_parts
from seqloom.geometry import even_sizes


def _split(x: Tensor, axis: Axis, dim: int, sizes: Sequence[int]) -> Tensor:
    """This rank's part, in memory of its own: a view would keep the whole alive."""
    return x.split(list(sizes), dim)[axis.rank].clone(memory_format=torch.contiguous_format)


def _gather(x: Tensor, axis: Axis, dim: int, sizes: Sequence[int]) -> Tensor:
    return start_collect(x, axis, dim, sizes).wait()


def _reduce_scatter(x: Tensor, axis: Axis, dim: int, sizes: Sequence[int]) -> Tensor:
    return start_sum_parts(x, axis, dim, sizes).wait()


def _sum(x: Tensor, axis: Axis) -> Tensor:
    return start_sum_(x.clone(memory_format=torch.contiguous_format), axis).wait()


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, sizes: Sequence[int]) -> Tensor:
        ctx.place = (axis, dim, sizes)
        return _split(x, axis, dim, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grads[0], *ctx.place), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, sizes: Sequence[int], summed: bool) -> Tensor:
        ctx.place, ctx.summed = (axis, dim, sizes), summed
        return _gather(x, axis, dim, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = (_reduce_scatter if ctx.summed else _split)(grads[0], *ctx.place)
        return grad, None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int, sizes: Sequence[int]) -> Tensor:
        ctx.place = (axis, dim, sizes)
        return _reduce_scatter(x, axis, dim, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grads[0], *ctx.place), None, None, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return _sum(x, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _cut(x: Tensor, axis: Axis, dim: int, sizes: Sequence[int] | None) -> tuple[int, ...]:
    """The sizes of the parts that x falls into. Raises DataError for sizes that are not those of x."""
    if sizes is None:
        return even_sizes(x.shape[dim], axis.size)
    if len(sizes) != axis.size or sum(sizes) != x.shape[dim]:
        raise DataError(
            f"The sizes {tuple(sizes)} sum to {sum(sizes)}, but dim {dim} has {x.shape[dim]} to be cut among the "
            f"{axis.size} ranks of axis {axis.name}; give one size a rank."
        )
    return tuple(sizes)


def _held(x: Tensor, axis: Axis, dim: int, sizes: Sequence[int] | None) -> tuple[int, ...]:
    """The sizes of all ranks' parts, of which x is this rank's. Raises DataError for sizes that are not theirs."""
    mine = x.shape[dim]
    if sizes is None and x.is_meta:
        return (mine,) * axis.size
    if sizes is None:
        told = start_collect(torch.tensor([mine], device=x.device), axis, 0, (1,) * axis.size).wait()
        return tuple(told.tolist())
    if len(sizes) != axis.size or sizes[axis.rank] != mine:
        raise DataError(
            f"Rank {axis.rank} of {axis.size} of axis {axis.name} holds {mine} along dim {dim}, which the sizes "
            f"{tuple(sizes)} do not say; give what each rank holds, or leave them out to have them exchanged."
        )
    return tuple(sizes)


def scatter_to_sequence_parallel_region(
    x: Tensor, axis: Axis, dim: int = 1, sizes: Sequence[int] | None = None
) -> Tensor:
    """This rank's part along `dim` of an x that all ranks hold alike.

    Forward: split. Backward: all-gather. sizes: of each rank's part, as even as can be by default.
    Raises DataError for sizes that do not sum to that of x.
    """
    return x if axis.size == 1 else _Scatter.apply(x, axis, dim, _cut(x, axis, dim, sizes))


def gather_from_sequence_parallel_region(
    x: Tensor,
    axis: Axis,
    dim: int = 1,
    sizes: Sequence[int] | None = None,
    tensor_parallel_output_grad: bool = True,
) -> Tensor:
    """Every rank's x laid end to end along `dim`.

    Forward: all-gather. Backward: reduce-scatter (sum), for ranks that go on with parts of the same work,
    as column-parallel weights do; where all ranks do the same with the result, each has the whole
    gradient already, and with tensor_parallel_output_grad=False backward is a split. sizes: what each
    rank holds, exchanged by default. Raises DataError for sizes in which this rank's is wrong.
    """
    if axis.size == 1:
        return x
    return _Gather.apply(x, axis, dim, _held(x, axis, dim, sizes), tensor_parallel_output_grad)


def reduce_scatter_to_sequence_parallel_region(
    x: Tensor, axis: Axis, dim: int = 1, sizes: Sequence[int] | None = None
) -> Tensor:
    """This rank's part along `dim` of the sum of all ranks' x.

    Forward: reduce-scatter (sum). Backward: all-gather. sizes: of each rank's part, as even as can be by
    default. Raises DataError for sizes that do not sum to that of x.
    """
    return x if axis.size == 1 else _ReduceScatter.apply(x, axis, dim, _cut(x, axis, dim, sizes))


def copy_to_tensor_region(x: Tensor, axis: Axis) -> Tensor:
    """An x that all ranks hold alike, for each to do a part of the work on. Forward: identity. Backward: all-reduce."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def reduce_from_tensor_region(x: Tensor, axis: Axis) -> Tensor:
    """The sum of all ranks' x, on all of them. Forward: all-reduce. Backward: identity."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)
