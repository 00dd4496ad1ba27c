"""The linear of 1d cut in ring steps: a block of tokens is multiplied while the next one travels.

The same results and bytes as the linear with one gather (`tensor_overlap=ring`; Colossal-AI's mode "ring", the
decomposition of Wang et al., ASPLOS 2023, 10.1145/3567955.3567959), but unless the plan keeps it for backward no rank
holds the gathered input. Blocks go to the next rank at each step. Partial sums travel in the type of the input, so
lower types are rounded at each hop of y and dx, where the linear with one gather rounds once; dw is summed in float32.

| what                  | what goes around       | each step                                      |
|-----------------------|------------------------|------------------------------------------------|
| gather, then multiply | x, one rank's tokens   | y[block] = x_block w^T                         |
| multiply, then scatter| partial sums of a block| sum += x[block] w^T, for the block of the rank where it ends |

Where x or y is whole (no sequence parallelism), the sum over ranks is such a scatter and one gather.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqloom.fabric import start_collect, start_shift
from seqloom.geometry import even_sizes
from seqloom.tensor.group import TOKENS, Transfer
from seqloom.tensor.linear import Call, products, weight_gradient

Block = tuple[slice, Tensor]


def _circulate(mine: Tensor, move: Transfer) -> Iterator[Block]:
    """Every rank's block [..., tokens, width], this rank's first, with where its tokens lie; the next is on its way."""
    axis, stops = move.axis, [0, *accumulate(move.sizes)]
    block = mine.contiguous()
    for step in range(axis.size):
        owner = (axis.rank - step) % axis.size
        coming = None
        if step < axis.size - 1:
            shape = [*mine.shape]
            shape[TOKENS] = move.sizes[(owner - 1) % axis.size]
            into = mine.new_empty(shape)
            # Tags keep the steps apart: a rank may be one step ahead of its neighbour.
            coming = start_shift([block], axis, [into], tag=step % 2)
        yield slice(stops[owner], stops[owner + 1]), block
        if coming is not None:
            block = coming.wait()[0]


def _reduce(part: Callable[[slice], Tensor], move: Transfer) -> Tensor:
    """The sum over ranks of part(tokens), for the tokens of this rank."""
    axis, stops = move.axis, [0, *accumulate(move.sizes)]
    total = None
    for step in range(axis.size):
        owner = (axis.rank - 1 - step) % axis.size
        coming = None
        if total is not None:
            shape = [*total.shape]
            shape[TOKENS] = move.sizes[owner]
            coming = start_shift([total.contiguous()], axis, [total.new_empty(shape)], tag=step % 2)
        mine = part(slice(stops[owner], stops[owner + 1]))
        total = mine if coming is None else mine.add_(coming.wait()[0])
    assert total is not None
    return total


def _sum(part: Callable[[slice], Tensor], move: Transfer, num_tokens: int) -> Tensor:
    """`_reduce`, gathered to all ranks where the move is of the whole."""
    if move.dim is not None:
        return _reduce(part, move)
    cut = Transfer(move.axis, TOKENS, even_sizes(num_tokens, move.axis.size))
    return start_collect(_reduce(part, cut), cut.axis, TOKENS, cut.sizes).wait()


def _tokens(x: Tensor, part: slice) -> Tensor:
    return x[..., part, :]


class _RingLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.call, kept = call, x
        if call.x is not None and call.x.dim is not None:
            shape = [*x.shape[:TOKENS], sum(call.x.sizes)]
            outs = [x.new_empty([*shape, len(w)]) for w in weights]
            if not call.regather:
                kept = x.new_empty([*shape, x.shape[-1]])
            for part, block in _circulate(x, call.x):
                for out, w in zip(outs, weights, strict=True):
                    _tokens(out, part).copy_(block @ w.mT)
                if not call.regather:
                    _tokens(kept, part).copy_(block)
        elif call.ys[0] is not None:
            (w,), (move,) = weights, call.ys
            outs = [_sum(lambda part: _tokens(x, part) @ w.mT, move, x.shape[TOKENS])]
        else:
            outs = [x @ w.mT for w in weights]
        ctx.save_for_backward(kept, *weights)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        x, *weights = ctx.saved_tensors
        _, wants_x, *wants = ctx.needs_input_grad
        if call.ys[0] is not None and call.ys[0].dim is not None:
            dx, dw = _after_scatter(grads[0], x, weights[0], call.ys[0])
            return None, dx, dw
        dx = None
        if wants_x and call.x is not None:
            dx = _sum(
                lambda part: products([_tokens(grad, part) for grad in grads], weights), call.x, grads[0].shape[TOKENS]
            )
        elif wants_x:
            dx = products(grads, weights)
        blocks: Iterable[Block] = [(slice(None), x)]
        if call.x is not None and call.x.dim is not None and call.regather and any(wants):
            blocks = _circulate(x, call.x)
        return None, dx, *_weight_gradients(grads, blocks, wants)


def _after_scatter(grad: Tensor, x: Tensor, weight: Tensor, move: Transfer) -> tuple[Tensor, Tensor]:
    """dx and dw of a linear whose output was scattered: the blocks of dy go around once for both."""
    dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=_wide(weight))
    for part, block in _circulate(grad, move):
        _tokens(dx, part).copy_(block @ weight)
        dw += weight_gradient(block, _tokens(x, part))
    return dx, dw.to(weight.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _weight_gradients(grads: Sequence[Tensor], blocks: Iterable[Block], wants: Sequence[bool]) -> list[Tensor | None]:
    totals: list[Tensor | None] = [None] * len(grads)
    for part, block in blocks:
        for number, (grad, wanted) in enumerate(zip(grads, wants, strict=True)):
            if wanted:
                more, total = weight_gradient(_tokens(grad, part), block).to(_wide(block)), totals[number]
                totals[number] = more if total is None else total.add_(more)
    return [None if total is None else total.to(grads[0].dtype) for total in totals]


def ring_linear(x: Tensor, weights: Sequence[Tensor], call: Call) -> tuple[Tensor, ...]:
    """`parallel_linear` in ring steps, for moves of tokens over one axis.

    Forward and backward: as the table above says.
    """
    return _RingLinear.apply(call, x, *weights)
