"""RMSNorm and LayerNorm of activations whose hidden dim may be split over an axis.

Each token's statistics need all of its channels: one collective of a number or two per token forward, and one
all-reduce backward, the adjoint of that sum. With x^ = (x - mean) r and g the gradient of x^, over a
hidden dim of `width`:

    RMSNorm    dx = r (g - x^ sum(g x^) / width)
    LayerNorm  dx = r (g - sum(g) / width - x^ sum(g x^) / width)

Statistics, and everything that is summed, are in float32 at least. Kept for backward: x itself, and the
statistics [..., tokens, 1]. Where the hidden dim is whole this is the plain formula, and nothing travels.

| tensor       | shape                               |
|--------------|-------------------------------------|
| x, output    | [..., tokens, this rank's channels] |
| weight, bias | [this rank's channels]              |
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from seqloom.errors import ModelError
from seqloom.fabric import Axis, all_reduce_, start_collect
from seqloom.plan import chunks
from seqloom.tensor.parameters import local


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _summed(x: Tensor, axis: Axis | None) -> Tensor:
    return x if axis is None or x.is_meta else all_reduce_(x, axis)


def _over_tokens(x: Tensor, parameter: Tensor | None) -> Tensor | None:
    """The gradient of a parameter [channels] from that of its use [..., channels]."""
    return None if parameter is None else x.flatten(0, -2).sum(0).to(parameter.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, width: int, axis: Axis | None, zero_centered: bool
    ) -> Tensor:
        wide = x.to(_wide(x))
        squares = _summed(wide.square().sum(-1, keepdim=True), axis)
        r = torch.rsqrt(squares / width + eps)
        ctx.save_for_backward(x, r, weight)
        ctx.width, ctx.axis, ctx.zero_centered = width, axis, zero_centered
        if zero_centered:
            return (wide * r * (1 + weight.to(wide.dtype))).to(x.dtype)
        return weight * (wide * r).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, r, weight = ctx.saved_tensors
        normed = x.to(r.dtype) * r
        grad = grads[0].to(r.dtype)
        scale = weight.to(r.dtype) + (1 if ctx.zero_centered else 0)
        # Llama's weight meets the normed x rounded to x's own type.
        met = normed if ctx.zero_centered else normed.to(x.dtype).to(r.dtype)
        dweight = _over_tokens(grad * met, weight) if ctx.needs_input_grad[1] else None
        dx = None
        if ctx.needs_input_grad[0]:
            grad = grad * scale
            along = _summed((grad * normed).sum(-1, keepdim=True), ctx.axis)
            dx = (r * (grad - normed * (along / ctx.width))).to(x.dtype)
        return dx, dweight, None, None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, width: int, axis: Axis | None
    ) -> Tensor:
        wide = x.to(_wide(x))
        mean, squares = _moments(wide, width, axis)
        r = torch.rsqrt(squares / width + eps)
        ctx.save_for_backward(x, mean, r, weight, bias)
        ctx.width, ctx.axis = width, axis
        out = (wide - mean) * r
        if weight is not None:
            out = out * weight.to(wide.dtype)
        if bias is not None:
            out = out + bias.to(wide.dtype)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, r, weight, bias = ctx.saved_tensors
        normed = (x.to(r.dtype) - mean) * r
        grad = grads[0].to(r.dtype)
        dweight = _over_tokens(grad * normed, weight) if ctx.needs_input_grad[1] else None
        dbias = _over_tokens(grad, bias) if ctx.needs_input_grad[2] else None
        dx = None
        if ctx.needs_input_grad[0]:
            if weight is not None:
                grad = grad * weight.to(r.dtype)
            sums = torch.stack([grad.sum(-1, keepdim=True), (grad * normed).sum(-1, keepdim=True)])
            whole, along = _summed(sums, ctx.axis) / ctx.width
            dx = (r * (grad - whole - normed * along)).to(x.dtype)
        return dx, dweight, dbias, None, None, None


def _moments(x: Tensor, width: int, axis: Axis | None) -> tuple[Tensor, Tensor]:
    """[..., 1] each: the mean over all channels, and the sum of squared distances from it.

    Every rank's own mean and distances are gathered, and joined as Chan, Golub and LeVeque do (The American
    Statistician 37, 1983): a sum of plain squares would cancel where the mean is large.
    """
    mean = x.sum(-1, keepdim=True) / max(x.shape[-1], 1)
    squares = (x - mean).square().sum(-1, keepdim=True)
    if axis is None:
        return mean, squares
    found = start_collect(torch.stack([mean, squares])[None], axis, 0, (1,) * axis.size).wait()
    means, squares = found[:, 0], found[:, 1]
    held = torch.tensor(chunks(width, axis.size), dtype=x.dtype, device=x.device).view(-1, *[1] * x.dim())
    mean = (means * held).sum(0) / width
    return mean, (squares + (means - mean).square() * held).sum(0)


class _Norm(nn.Module):
    """What the norms share: the weight, its axis, and a look at what comes in."""

    def __init__(self, weight: nn.Parameter | None, width: int, eps: float, axis: Axis | None) -> None:
        super().__init__()
        self.weight, self.width, self.eps = weight, width, eps
        self.axis = None if axis is None or axis.size == 1 else axis
        self.held = width if self.axis is None else chunks(width, self.axis.size)[self.axis.rank]

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.held:
            raise ModelError(
                f"{type(self).__name__} holds {self.held} of {self.width} channels but was given {x.shape[-1]}; the "
                "model reshapes what it norms in a way that this tensor grid does not follow."
            )

    def extra_repr(self) -> str:
        """The channels of the whole, and of this rank."""
        return f"{self.width}, held={self.held}, eps={self.eps}"


class ParallelRMSNorm(_Norm):
    """RMSNorm (arXiv 1910.07467) over a hidden dim that may be split over an axis."""

    def __init__(
        self,
        weight: nn.Parameter,
        width: int,
        eps: float,
        axis: Axis | None = None,
        *,
        zero_centered: bool = False,
    ) -> None:
        """weight: [width], split over `axis` as x is. eps: added to the mean square.

        zero_centered: whether the weight counts from 1 and is applied before rounding, as Gemma's,
        x^ (1 + weight); otherwise after it, as Llama's, weight * round(x^).
        """
        super().__init__(weight, width, eps, axis)
        self.zero_centered = zero_centered

    def forward(self, x: Tensor) -> Tensor:
        """x [..., this rank's channels], normed over all channels.

        Forward: all-reduce of the sums of squares. Backward: all-reduce of sum(g x^). Raises ModelError for an
        x of another number of channels.
        """
        self._check(x)
        return _RMSNorm.apply(x, local(self.weight), self.eps, self.width, self.axis, self.zero_centered)


class ParallelLayerNorm(_Norm):
    """LayerNorm (arXiv 1607.06450) over a hidden dim that may be split over an axis."""

    def __init__(
        self,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        width: int,
        eps: float,
        axis: Axis | None = None,
    ) -> None:
        """weight, bias: [width] or None, split over `axis` as x is. eps: added to the variance."""
        super().__init__(weight, width, eps, axis)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., this rank's channels], normed over all channels.

        Forward: all-gather of every rank's mean and squared distances. Backward: all-reduce of sum(g) and
        sum(g x^). Raises ModelError for an x of another number of channels.
        """
        self._check(x)
        weight, bias = (None if one is None else local(one) for one in (self.weight, self.bias))
        return _LayerNorm.apply(x, weight, bias, self.eps, self.width, self.axis)
