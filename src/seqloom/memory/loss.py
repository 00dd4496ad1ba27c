"""Cross entropy of a language model's head without the logits of the whole sequence.

The head and the loss run over chunks of tokens; each chunk's gradient is computed beside its loss,
so logits exist for one chunk at a time, forward and backward. What is kept for backward is the
gradient of the hidden states [tokens, hidden] and of the head [vocab, hidden].
Like the fused linear cross entropy of Liger Kernel (arXiv 2410.10989), in plain torch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk: int,
        softcap: float | None,
        keep: bool,
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=dtype)
        grads = [torch.zeros_like(x, dtype=dtype) if keep and x is not None else None for x in (weight, bias)]
        grad_hidden = torch.empty_like(hidden) if keep else None
        for first in range(0, len(hidden), chunk):
            part = slice(first, first + chunk)
            logits = torch.nn.functional.linear(hidden[part], weight, bias)
            scores, valid = logits.to(dtype), (labels[part] >= 0)
            if softcap:
                scores = (scores / softcap).tanh_().mul_(softcap)
            targets = labels[part].clamp(min=0)[:, None]
            lse = scores.logsumexp(-1)
            total += ((lse - scores.gather(1, targets)[:, 0]) * valid).sum()
            if grad_hidden is not None and grads[0] is not None:
                error = torch.exp(scores - lse[:, None])
                error.scatter_add_(1, targets, -torch.ones_like(error[:, :1]))
                error *= valid[:, None]
                if softcap:  # d (cap tanh(z / cap)) / dz = 1 - tanh^2
                    error *= 1 - (scores / softcap).square_()
                rounded = error.to(logits.dtype)
                grad_hidden[part] = rounded @ weight
                grads[0] += rounded.T @ hidden[part]
                if grads[1] is not None:
                    grads[1] += error.sum(0)
        ctx.save_for_backward(grad_hidden, *grads)
        ctx.dtypes = [x.dtype if x is not None else None for x in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if x is None else (x * grad).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    chunk_tokens: int,
    softcap: float | None = None,
) -> Tensor:
    """The sum of -log p(label) over labelled tokens, in nats, as a scalar of at least float32.

    hidden: [..., hidden], weight: [vocab, hidden], bias: [vocab] or None, labels: [...] int64 with
    negative numbers where there is none. chunk_tokens: tokens whose logits exist at once. softcap:
    logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118, section 2); None or 0
    leaves them.
    """
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    return _ChunkedLoss.apply(hidden.flatten(0, -2), weight, bias, labels.flatten(), chunk_tokens, softcap, keep)
