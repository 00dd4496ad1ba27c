"""The multi-dimensional linears as their papers state them: what the one linear must equal.

Blocks are broadcast in turn and partial results reduced to their owners, on square and cubic grids whose axes
divide every dim. For tests: nothing is overlapped, and a reduction to one rank is an all-reduce.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqloom.fabric import Axis, all_reduce_, broadcast_


def _from(block: Tensor, axis: Axis, source: int) -> Tensor:
    """The block of rank `source`."""
    mine = block.clone(memory_format=torch.contiguous_format)
    return broadcast_(mine, axis, source)


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


class _Summa(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, row: Axis, col: Axis) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.row, ctx.col = row, col
        out = x.new_zeros(*x.shape[:-1], len(weight))
        for step in range(col.size):  # C = A B: blocks of A go along rows, blocks of B along columns
            out += _from(x, col, step) @ _from(weight, row, step).mT
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), row, col, grad = ctx.saved_tensors, ctx.row, ctx.col, grads[0]
        dx = dweight = None
        for step in range(col.size):  # A = C B^T: blocks of B go along columns, products are reduced along rows
            part = all_reduce_(grad @ _from(weight, row, step), col)
            dx = part if col.rank == step else dx
        for step in range(row.size):  # B = A^T C: blocks of A go along rows, products are reduced along columns
            part = all_reduce_(_flat(grad).mT @ _flat(_from(x, col, step)), row)
            dweight = part if row.rank == step else dweight
        return dx, dweight, None, None


def summa_linear(x: Tensor, weight: Tensor, row: Axis, col: Axis) -> Tensor:
    """x weight^T by SUMMA on a square grid: rank (i, j) holds block (i, j) of x and of the result.

    x: [..., tokens / q, in / q]. weight: [out / q, in / q], rows of its part j and columns of its part i: block (i, j)
    of weight^T. Returns [..., tokens / q, out / q]. Forward: q broadcasts of x over `col` and of weight over `row`.
    Backward: the two products of the same kind (Optimus, arXiv 2104.05343, algorithms 1 to 3).
    """
    return _Summa.apply(x, weight, row, col)


class _Linear3D(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, source: Axis, shared: Axis, target: Axis) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.axes = source, shared, target
        weights = [_from(weight, shared, rank) for rank in range(shared.size)]
        columns = torch.cat(weights).mT
        partial = torch.cat([_from(x, source, rank) @ columns for rank in range(source.size)], -2)
        return _kept(partial, target, -2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (source, shared, target) = ctx.saved_tensors, ctx.axes
        grad = torch.cat([_from(grads[0], target, rank) for rank in range(target.size)], -2)
        whole = torch.cat([_from(weight, shared, rank) for rank in range(shared.size)])
        tokens = torch.cat([_from(x, source, rank) for rank in range(source.size)], -2)
        dx = _kept(grad @ whole, source, -2)
        dweight = _kept(_flat(grad).mT @ _flat(tokens), shared, 0)
        return dx, dweight, None, None, None


def _kept(partial: Tensor, axis: Axis, dim: int) -> Tensor:
    """The sum over ranks, of which this rank keeps its part along `dim`."""
    return all_reduce_(partial, axis).chunk(axis.size, dim)[axis.rank].contiguous()


def linear_3d(x: Tensor, weight: Tensor, source: Axis, shared: Axis, target: Axis) -> Tensor:
    """x weight^T on a cube: each rank holds one q^3-th of x, of weight and of the result.

    x: [..., tokens / q^2, in / q], its tokens over `source` and `shared`, its hidden dim over `target`. weight:
    [out / q^2, in / q], its rows over `source` and, inside, over `shared`, its columns over `target`. Returns
    [..., tokens / q^2, out / q], its tokens over `target` and `shared`, its hidden dim over `source`.
    Forward: broadcasts of x over `source` and of weight over `shared`, a reduction over `target`. Backward: the
    same with the roles exchanged (arXiv 2105.14450, algorithms 1 and 2).
    """
    return _Linear3D.apply(x, weight, source, shared, target)
