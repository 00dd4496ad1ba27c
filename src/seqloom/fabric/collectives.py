"""Every collective seqloom uses: metered, with its adjoint named, and with errors that name the axis.

The functions on the first half move plain tensors, in place or asynchronously, and know nothing of
autograd. The second half are differentiable; each says what it does forward and backward.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from seqloom.fabric.failure import naming
from seqloom.fabric.mesh import Axis
from seqloom.geometry import even_sizes

# torch 2.13 renamed these two; 2.11 has the older names only.
_all_gather_single = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter_single = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


def _beginning(what: str, axis: Axis) -> AbstractContextManager[None]:
    """Name the collective that begins here; all ranks of the axis count it, also those with nothing to send."""
    axis.meter.place.begin(what, axis.name)
    return naming(what, axis, axis.meter.place.counts[axis.name])


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass
class Pending:
    """A transfer under way. `wait` ends it and gives the tensor that arrived."""

    what: str
    axis: Axis
    works: list[Any]
    arriving: Any  # a tensor, or what else the transfer fills
    leaving: Any = None  # kept alive until the transfer ends
    finish: Callable[[], None] | None = None  # what is left to do with what arrived
    number: int = 0  # of the collective on its axis

    def __post_init__(self) -> None:
        self.number = self.axis.meter.place.counts[self.axis.name]

    def wait(self) -> Any:
        """Block until the transfer has ended on this rank."""
        with naming(self.what, self.axis, self.number):
            for work in self.works:
                work.wait()
        if self.finish is not None:
            self.finish()
        self.leaving = self.finish = None
        return self.arriving


def start_shift(
    block: Sequence[Tensor], axis: Axis, into: Sequence[Tensor] | None = None, *, by: int = 1, tag: int = 0
) -> Pending:
    """Begin sending the tensors of `block` to rank + by and receiving those of rank - by, around the axis.

    They must be contiguous and stay unchanged until the wait; `into` receives (like `block` by
    default, though the tensors that come may be of other shapes). Transfers under way together take
    tags that are further apart than a block has tensors.
    """
    arriving = [torch.empty_like(part) for part in block] if into is None else list(into)
    source, target = (axis.rank - by) % axis.size, (axis.rank + by) % axis.size
    axis.meter.add(axis.name, sum(map(_bytes, block)))
    with _beginning("shift", axis):
        works = _start_messages({target: block}, {source: arriving}, axis, tag)
    return Pending("shift", axis, works, arriving, block)


def _start_messages(
    leaving: Mapping[int, Sequence[Tensor]], arriving: Mapping[int, Sequence[Tensor]], axis: Axis, tag: int
) -> list[Any]:
    """Post every message; tensor number i of a pair of ranks has tag + i, and empty ones are not sent."""
    messages = [
        distributed.P2POp(op, tensor, group=axis.group, tag=tag + number, group_peer=peer)
        # The receives are posted first: gloo turns a two-way pair half-duplex in the other order.
        for op, posted in ((distributed.irecv, arriving), (distributed.isend, leaving))
        for peer, tensors in posted.items()
        for number, tensor in enumerate(tensors)
        if tensor.numel()
    ]
    return distributed.batch_isend_irecv(messages) if messages else []


def start_all_gather(block: Tensor, axis: Axis) -> Pending:
    """Begin collecting every rank's `block` [...] as [size, ...], in rank order."""
    gathered = block.new_empty((axis.size, *block.shape))
    if axis.size == 1:
        gathered[0] = block
        return Pending("all-gather", axis, [], gathered)
    axis.meter.add(axis.name, (axis.size - 1) * _bytes(block))
    with _beginning("all-gather", axis):
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
    with _beginning("reduce-scatter", axis):
        leaving = parts.contiguous().flatten(0, 1)
        work = _reduce_scatter_single(mine, leaving, group=axis.group, async_op=True)
    return Pending("reduce-scatter", axis, [work], mine, leaving)


def all_gather_into_(whole: Tensor, block: Tensor, axis: Axis, *, async_op: bool = False) -> Any:
    """Fill `whole` [size x n] with every rank's `block` [n], which may be a part of it; the work, if it goes on."""
    axis.meter.add(axis.name, (axis.size - 1) * _bytes(block))
    with _beginning("all-gather", axis):
        return _all_gather_single(whole, block, group=axis.group, async_op=async_op)


def reduce_scatter_into_(mine: Tensor, parts: Tensor, axis: Axis, *, async_op: bool = False) -> Any:
    """Fill `mine` [n] with this rank's part of the sum of `parts` [size x n]; the work, if it goes on."""
    axis.meter.add(axis.name, (axis.size - 1) * _bytes(mine))
    with _beginning("reduce-scatter", axis):
        return _reduce_scatter_single(mine, parts, group=axis.group, async_op=async_op)


def start_trade(
    leaving: Sequence[Sequence[Tensor]],
    arriving: Sequence[Sequence[Tensor]],
    axis: Axis,
    *,
    what: str = "all-to-all",
) -> Pending:
    """Begin an all-to-all of uneven parts: the tensors leaving[p] go to rank p, arriving[p] are filled by rank p.

    All are contiguous; empty ones are not sent. A rank's part for itself is neither read nor filled:
    who calls knows a shorter way. It is made of messages between pairs, which gloo carries faster than
    its own all-to-all, all-gather and reduce-scatter. `wait` gives what has arrived. what: its name where it
    fails.
    """
    others = [(axis.rank + by) % axis.size for by in range(1, axis.size)]
    sent = {peer: leaving[peer] for peer in others if any(part.numel() for part in leaving[peer])}
    received = {peer: arriving[peer] for peer in reversed(others) if any(part.numel() for part in arriving[peer])}
    axis.meter.add(axis.name, sum(_bytes(part) for parts in sent.values() for part in parts))
    with _beginning(what, axis):
        works = _start_messages(sent, received, axis, tag=0)
    return Pending(what, axis, works, arriving, leaving)


def start_collect(part: Tensor, axis: Axis, dim: int, sizes: Sequence[int]) -> Pending:
    """Begin laying every rank's `part` end to end along `dim`: an all-gather of uneven parts.

    sizes: the size of each rank's part along `dim`. A part on the meta device travels nowhere.
    """
    shape = list(part.shape)
    shape[dim] = sum(sizes)
    whole = part.new_empty(shape)
    views = whole.split(list(sizes), dim)
    views[axis.rank].copy_(part)
    if axis.size == 1 or part.is_meta:
        return Pending("all-gather", axis, [], whole)
    leaving = part.contiguous()
    arriving = [view if view.is_contiguous() else view.new_empty(view.shape) for view in views]

    def finish() -> None:
        for rank, (view, arrived) in enumerate(zip(views, arriving, strict=True)):
            if rank != axis.rank and view is not arrived:
                view.copy_(arrived)

    trade = start_trade([[leaving]] * axis.size, [[part] for part in arriving], axis, what="all-gather")
    return Pending("all-gather", axis, trade.works, whole, leaving, finish)


def start_sum_parts(whole: Tensor, axis: Axis, dim: int, sizes: Sequence[int]) -> Pending:
    """Begin summing over ranks this rank's part of `whole` along `dim`: a reduce-scatter of uneven parts.

    sizes: the size of each rank's part along `dim`. Lower types are summed in float32, in the order of ranks,
    and rounded once.
    """
    parts = whole.split(list(sizes), dim)
    mine = parts[axis.rank]
    if axis.size == 1 or whole.is_meta:
        return Pending("reduce-scatter", axis, [], mine.clone())
    leaving = [part.contiguous() if rank != axis.rank else part for rank, part in enumerate(parts)]
    arriving = [mine.new_empty(mine.shape) if rank != axis.rank else mine for rank in range(axis.size)]
    total = torch.empty_like(mine, memory_format=torch.contiguous_format)

    def finish() -> None:
        wide = torch.promote_types(mine.dtype, torch.float32)
        summed = total if wide == mine.dtype else None
        summed = torch.add(arriving[0].to(wide), arriving[1], out=summed)
        for part in arriving[2:]:
            summed += part
        if summed is not total:
            total.copy_(summed)

    trade = start_trade([[part] for part in leaving], [[part] for part in arriving], axis, what="reduce-scatter")
    return Pending("reduce-scatter", axis, trade.works, total, leaving, finish)


def start_sum_(whole: Tensor, axis: Axis) -> Pending:
    """Begin summing `whole` over ranks, to all of them: an all-reduce, which may overwrite `whole`.

    Backends sum lower types in those types, hop by hop; here they are summed in float32 and rounded once, at
    the same bytes. Meta tensors travel nowhere.
    """
    if axis.size == 1 or whole.is_meta:
        return Pending("all-reduce", axis, [], whole)
    if torch.finfo(whole.dtype).bits >= torch.finfo(torch.float32).bits:
        return start_all_reduce_(whole.contiguous(), axis)
    sizes = even_sizes(whole.numel(), axis.size)
    pending = start_sum_parts(whole.flatten(), axis, 0, sizes)
    summed = pending.finish

    def finish() -> None:
        if summed is not None:
            summed()
        pending.arriving = whole.copy_(start_collect(pending.arriving, axis, 0, sizes).wait().view(whole.shape))

    pending.finish = finish
    return pending


_REDUCTIONS = {"sum": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX, "min": distributed.ReduceOp.MIN}


def start_all_reduce_(tensor: Tensor, axis: Axis, op: Literal["sum", "max", "min"] = "sum") -> Pending:
    """Begin combining `tensor` over the axis, in place, the same result on every rank."""
    if axis.size == 1:
        return Pending("all-reduce", axis, [], tensor)
    axis.meter.add(axis.name, Fraction(2 * (axis.size - 1) * _bytes(tensor), axis.size))
    with _beginning("all-reduce", axis):
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
        with _beginning("broadcast", axis):
            distributed.broadcast(tensor, group=axis.group, group_src=source)
    return tensor


def send(tensor: Tensor, axis: Axis, source: int, target: int = 0) -> Tensor:
    """Overwrite `tensor` on rank `target` of the axis with that of rank `source`; the others do nothing.

    It must be contiguous on these two.
    """
    if source == target or axis.rank not in (source, target):
        return tensor
    leaving, arriving = ({target: [tensor]}, {}) if axis.rank == source else ({}, {source: [tensor]})
    if leaving:
        axis.meter.add(axis.name, _bytes(tensor))
    with naming("send", axis, 0):
        for work in _start_messages(leaving, arriving, axis, tag=0):
            work.wait()
    return tensor


def gather_values(value: Any, axis: Axis) -> list[Any]:
    """Every rank's small value, in rank order, on all of them; it travels by pickle and is not metered."""
    found: list[Any] = [value] * axis.size
    if axis.size > 1:
        with _beginning("gather", axis):
            distributed.all_gather_object(found, value, group=axis.group)
    return found


def barrier(axis: Axis) -> None:
    """Wait until every rank of the axis is here."""
    if axis.size > 1:
        with _beginning("barrier", axis):
            distributed.barrier(group=axis.group)


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, by: int) -> Tensor:
        ctx.axis, ctx.by = axis, by
        return start_shift([x.contiguous()], axis, by=by).wait()[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return start_shift([grads[0].contiguous()], ctx.axis, by=-ctx.by).wait()[0], None, None


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
    def forward(ctx: Any, axis: Axis, shapes: Sequence[Sequence[int]], *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.axis, ctx.shapes = axis, [part.shape for part in parts]
        return _traded(parts, shapes, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_traded(grads, ctx.shapes, ctx.axis)


def _traded(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], axis: Axis) -> tuple[Tensor, ...]:
    arriving = [parts[0].new_empty(shape) for shape in shapes]
    arriving[axis.rank] = parts[axis.rank].clone()
    start_trade([[part.contiguous()] for part in parts], [[part] for part in arriving], axis).wait()
    return tuple(arriving)


def all_to_all(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], axis: Axis) -> tuple[Tensor, ...]:
    """Part p to rank p, and one of shapes[p] from it. Forward: all-to-all. Backward: the all-to-all back."""
    return _AllToAll.apply(axis, shapes, *parts)


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, leaving: Sequence[int], arriving: Sequence[int], axis: Axis) -> Tensor:
        ctx.way = arriving, leaving, axis
        return _traded_rows(x, leaving, arriving, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _traded_rows(grads[0], *ctx.way), None, None, None


def _traded_rows(x: Tensor, leaving: Sequence[int], arriving: Sequence[int], axis: Axis) -> Tensor:
    arrived = x.new_empty(sum(arriving), *x.shape[1:])
    sent, received = x.contiguous().split(list(leaving)), arrived.split(list(arriving))
    trade = start_trade([[part] for part in sent], [[part] for part in received], axis)
    received[axis.rank].copy_(sent[axis.rank])
    trade.wait()
    return arrived


def all_to_all_rows(x: Tensor, leaving: Sequence[int], arriving: Sequence[int], axis: Axis) -> Tensor:
    """Of x [rows, ...] the next leaving[p] rows to rank p; what comes, arriving[p] rows from it, in rank order.

    Forward: all-to-all. Backward: the all-to-all back.
    """
    return _AllToAllRows.apply(x, leaving, arriving, axis)
