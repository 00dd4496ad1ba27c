"""Every collective seqloom uses: metered, with its adjoint named, and with errors that name the axis.

The functions on the first half move plain tensors, in place or asynchronously, and know nothing of
autograd. The second half are differentiable; each says what it does forward and backward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from seqloom.errors import CommunicationError
from seqloom.fabric.mesh import Axis

# torch 2.13 renamed these two; 2.11 has the older names only.
_all_gather_single = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter_single = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor

_LINK_WORDS = ("connection", "transport", "timed out", "timeout", "socket", "broken pipe", "nccl")
"""How a backend's message reads when a peer is gone, as opposed to wrong use of a collective."""


@contextmanager
def _naming(what: str, axis: Axis) -> Iterator[None]:
    """Turn a backend's failure into a sentence that names the collective and the axis."""
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL raise RuntimeError and its subclasses for everything
        if not any(word in str(error).lower() for word in _LINK_WORDS):
            raise
        cause = str(error).strip().splitlines()[0]
        raise CommunicationError(
            f"{what} on axis {axis.name} failed at rank {axis.rank} of {axis.size}: a peer died or stalled; "
            f"if another rank reports an error of its own, that is the reason ({cause})."
        ) from error


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass
class Pending:
    """A transfer under way. `wait` ends it and gives the tensor that arrived."""

    what: str
    axis: Axis
    works: list[Any]
    arriving: Tensor
    leaving: Tensor | None = None  # kept alive until the transfer ends

    def wait(self) -> Tensor:
        """Block until the transfer has ended on this rank."""
        with _naming(self.what, self.axis):
            for work in self.works:
                work.wait()
        self.leaving = None
        return self.arriving


def start_shift(block: Tensor, axis: Axis, into: Tensor | None = None, *, by: int = 1, tag: int = 0) -> Pending:
    """Begin sending `block` to rank + by and receiving the one of rank - by, around the axis.

    `block` must be contiguous and stay unchanged until the wait; `into` receives (new by default).
    Transfers under way together take different tags.
    """
    arriving = torch.empty_like(block) if into is None else into
    peers = ((distributed.irecv, arriving, axis.rank - by), (distributed.isend, block, axis.rank + by))
    axis.meter.add(axis.name, _bytes(block))
    with _naming("shift", axis):
        # The receive is posted first: gloo turns a two-way pair half-duplex in the other order.
        works = distributed.batch_isend_irecv(
            [
                distributed.P2POp(op, tensor, group=axis.group, tag=tag, group_peer=peer % axis.size)
                for op, tensor, peer in peers
            ]
        )
    return Pending("shift", axis, works, arriving, block)


def start_all_gather(block: Tensor, axis: Axis) -> Pending:
    """Begin collecting every rank's `block` [...] as [size, ...], in rank order."""
    gathered = block.new_empty((axis.size, *block.shape))
    if axis.size == 1:
        gathered[0] = block
        return Pending("all-gather", axis, [], gathered)
    axis.meter.add(axis.name, (axis.size - 1) * _bytes(block))
    with _naming("all-gather", axis):
        leaving = block.contiguous()
        work = _all_gather_single(gathered.flatten(0, 1), leaving, group=axis.group, async_op=True)
    return Pending("all-gather", axis, [work], gathered, leaving)


def start_reduce_scatter(parts: Tensor, axis: Axis) -> Pending:
    """Begin summing `parts` [size, ...] over ranks; rank r receives the sum of every parts[r]."""
    mine = parts.new_empty(parts.shape[1:])
    if axis.size == 1:
        mine.copy_(parts[0])
        return Pending("reduce-scatter", axis, [], mine)
    axis.meter.add(axis.name, (axis.size - 1) * _bytes(mine))
    with _naming("reduce-scatter", axis):
        leaving = parts.contiguous().flatten(0, 1)
        work = _reduce_scatter_single(mine, leaving, group=axis.group, async_op=True)
    return Pending("reduce-scatter", axis, [work], mine, leaving)


def trade(parts: Tensor, axis: Axis) -> Tensor:
    """All-to-all: part p of `parts` [size, ...] goes to rank p; part p of the result came from rank p."""
    if axis.size == 1:
        return parts
    arriving = torch.empty_like(parts)
    axis.meter.add(axis.name, _bytes(parts) * (axis.size - 1) // axis.size)
    with _naming("all-to-all", axis):
        distributed.all_to_all_single(arriving, parts, group=axis.group)
    return arriving


_REDUCTIONS = {"sum": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX, "min": distributed.ReduceOp.MIN}


def start_all_reduce_(tensor: Tensor, axis: Axis, op: Literal["sum", "max", "min"] = "sum") -> Pending:
    """Begin combining `tensor` over the axis, in place, the same result on every rank."""
    if axis.size == 1:
        return Pending("all-reduce", axis, [], tensor)
    axis.meter.add(axis.name, Fraction(2 * (axis.size - 1) * _bytes(tensor), axis.size))
    with _naming("all-reduce", axis):
        work = distributed.all_reduce(tensor, _REDUCTIONS[op], group=axis.group, async_op=True)
    return Pending("all-reduce", axis, [work], tensor)


def all_reduce_(tensor: Tensor, axis: Axis, op: Literal["sum", "max", "min"] = "sum") -> Tensor:
    """Combine `tensor` over the axis, in place, the same result on every rank."""
    return start_all_reduce_(tensor, axis, op).wait()


def broadcast_(tensor: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """Overwrite `tensor` with that of rank `source` of the axis."""
    if axis.size > 1:
        if axis.rank == source:
            axis.meter.add(axis.name, _bytes(tensor))
        with _naming("broadcast", axis):
            distributed.broadcast(tensor, group=axis.group, group_src=source)
    return tensor


def barrier(axis: Axis) -> None:
    """Wait until every rank of the axis is here."""
    if axis.size > 1:
        with _naming("barrier", axis):
            distributed.barrier(group=axis.group)


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, by: int) -> Tensor:
        ctx.axis, ctx.by = axis, by
        return start_shift(x.contiguous(), axis, by=by).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return start_shift(grads[0].contiguous(), ctx.axis, by=-ctx.by).wait(), None, None


def shift(x: Tensor, axis: Axis, by: int = 1) -> Tensor:
    """Pass `x` around the axis. Forward: from rank - by. Backward: the gradient from rank + by."""
    return x if axis.size == 1 else _Shift.apply(x, axis, by)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return start_all_gather(x, axis).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_reduce_scatter(grads[0], ctx.axis).wait(), None


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Collect every rank's `x` [...] as [size, ...]. Forward: all-gather. Backward: reduce-scatter (sum)."""
    return _AllGather.apply(x, axis)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return trade(parts.contiguous(), axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return trade(grads[0].contiguous(), ctx.axis), None


def all_to_all(parts: Tensor, axis: Axis) -> Tensor:
    """Part p of `parts` [size, ...] to rank p. Forward: all-to-all. Backward: the same all-to-all."""
    return _AllToAll.apply(parts, axis)
