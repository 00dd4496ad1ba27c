"""One linear for every kind of tensor parallelism: y = scatter_y(gather_x(x) gather_w(w)^T).

Each of the three moves is over one axis along one dim, or absent; `plan.Grid.linear` lists them. Several
weights that read the same x (q, k, v; gate, up) share its gathering and the sum of its gradient.

| moves | forward                 | backward                                              |
|-------|-------------------------|-------------------------------------------------------|
| x     | gather tokens or hidden | gather again (or keep), then reduce-scatter dx        |
| w     | gather                  | gather again (or keep), then reduce-scatter dw        |
| y     | reduce-scatter          | gather dy                                             |
| whole | x: nothing; y: all-reduce | x: all-reduce dx; y: nothing                        |

With dyf = gather_y(dy): dx = scatter_x(dyf wf), dw = scatter_w(dyf^T xf). While dx is on its way, dw is
computed. 1D is Megatron-LM with sequence parallelism (arXiv 2205.05198, section 4.2.2), 2D equals SUMMA
(Optimus, arXiv 2104.05343) with one gather in place of q broadcasts, 2.5D is 2D on more token ranks
(arXiv 2105.14500), 3D is arXiv 2105.14450 with all-gathers; `tensor.specification` has the papers' forms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqloom.fabric import Pending, start_collect, start_sum_, start_sum_parts
from seqloom.tensor.group import Transfer


@dataclass(frozen=True)
class Call:
    """How one call of the linear moves what.

    x: how the input is gathered. ws, ys: for each weight how it is gathered, and how its output is
    scattered. overlap: whether dw is computed while dx travels. regather: whether backward gathers x and
    w again.
    """

    x: Transfer | None
    ws: tuple[Transfer | None, ...]
    ys: tuple[Transfer | None, ...]
    overlap: bool = True
    regather: bool = True


class Here:
    """A tensor that need not travel, where one under way is expected."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def wait(self) -> Tensor:
        """The tensor."""
        return self.tensor


def start_gather(x: Tensor, move: Transfer | None) -> Pending | Here:
    """Begin gathering x as a move says; what is whole is there already."""
    return Here(x) if move is None or move.dim is None else start_collect(x, move.axis, move.dim, move.sizes)


def start_scatter(x: Tensor, move: Transfer | None) -> Pending | Here:
    """Begin summing x over the ranks of a move, to all of them where it is whole, else each to its part.

    x may be overwritten where it is whole.
    """
    if move is None:
        return Here(x)
    return start_sum_(x, move.axis) if move.dim is None else start_sum_parts(x, move.axis, move.dim, move.sizes)


def in_autocast(x: Tensor) -> bool:
    """Whether autocast chooses the type of a product of x; it leaves float64 alone."""
    return not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


def computed_in(x: Tensor) -> torch.dtype:
    """The type that autocast gives a product of x, so that it is that which travels; x's own without autocast."""
    return torch.get_autocast_dtype(x.device.type) if in_autocast(x) else x.dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        gathering = [start_gather(w, move) for w, move in zip(weights, call.ws, strict=True)]
        whole = start_gather(x, call.x).wait()
        wholes = [one.wait() for one in gathering]
        outs = [start_scatter(whole @ w.mT, move) for w, move in zip(wholes, call.ys, strict=True)]
        ctx.call = call
        if call.regather:
            ctx.save_for_backward(x, *weights)
        else:
            ctx.save_for_backward(whole, *wholes)
        return tuple(out.wait() for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        _, wants_x, *wants = ctx.needs_input_grad
        saved_x, *saved = ctx.saved_tensors
        outs = [start_gather(grad, move) for grad, move in zip(grads, call.ys, strict=True)]
        # What is gathered again, and only where somebody asks for it: a transfer that is begun must be waited for.
        again = call.regather
        x = start_gather(saved_x, call.x if again else None) if any(wants) else None
        weights = (
            [start_gather(w, m if again else None) for w, m in zip(saved, call.ws, strict=True)] if wants_x else []
        )
        grads = tuple(out.wait() for out in outs)
        dx: Pending | Here | None = None
        if wants_x:
            dx = start_scatter(products(grads, [w.wait() for w in weights]), call.x)
            if not call.overlap:
                dx = Here(dx.wait())
        whole = x.wait() if x is not None else None
        dws = [
            start_scatter(weight_gradient(grad, whole), move) if wanted and whole is not None else None
            for grad, move, wanted in zip(grads, call.ws, wants, strict=True)
        ]
        given_w = tuple(dw and dw.wait() for dw in dws)
        return None, dx and dx.wait(), *given_w


def products(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The sum of grad [..., out] @ weight [out, in] over both, in one buffer."""
    total = grads[0] @ weights[0]
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        total.flatten(0, -2).addmm_(grad.flatten(0, -2), weight)
    return total


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """[out, in]: grad [..., out]^T x [..., in], summed over tokens."""
    return grad.flatten(0, -2).mT @ x.flatten(0, -2)


def parallel_linear(x: Tensor, weights: Sequence[Tensor], call: Call) -> tuple[Tensor, ...]:
    """The outputs [..., tokens, out part] of this rank's x [..., tokens, in part] and parts of weights [out, in].

    Forward: gather x and w, multiply, reduce-scatter y. Backward: as the table above says.
    """
    return _Linear.apply(call, x, *weights)
