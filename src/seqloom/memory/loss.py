"""Cross entropy of a language model's head without the logits of the whole sequence.

The head and the loss run over chunks of tokens; each chunk's gradient is computed beside its loss,
so logits exist for one chunk at a time, forward and backward. What is kept for backward is the
gradient of the hidden states [tokens, hidden] and of the head [vocab, hidden].
Like the fused linear cross entropy of Liger Kernel (arXiv 2410.10989), in plain torch.

The vocabulary may be split over an axis (as in Megatron-LM, arXiv 1909.08053, section 3): every rank has its
logits of the same tokens, and per chunk one all-gather of two numbers per token tells it the log-sum-exp of
all and the logit of the label. The adjoint of that sum is the identity: each rank's part of the
gradient follows from what it knows. On a 3d grid the hidden dim is split over one more axis, whose ranks
take tokens apart: the logits of a chunk are then summed over it, of which each rank keeps those of its tokens.

| tensor           | shape                                                                          |
|------------------|--------------------------------------------------------------------------------|
| hidden           | [..., tokens, hidden], with `scatter` the tokens of all its ranks, end to end  |
| weight, bias     | [vocab, hidden], [vocab], this rank's part of the vocabulary                   |
| labels           | [..., tokens], this rank's                                                     |
| logits of a chunk| [chunk_tokens, vocab]; with `scatter` of all its ranks' pieces, and their sum   |
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqloom.fabric import Axis, start_collect, start_sum_parts

Scatter = tuple[Axis, Sequence[int]]
"""An axis over which logits are summed, and how many tokens each of its ranks keeps."""


@dataclass(frozen=True)
class _Head:
    """How logits are made of hidden states, and what of the vocabulary and the tokens is here."""

    chunk: int
    softcap: float | None
    vocabulary: Axis | None
    first: int
    scatter: Scatter | None

    def pieces(self, hidden: Tensor) -> list[Tensor]:
        """hidden [..., tokens, hidden] as [tokens, hidden] of each rank that keeps some of the logits."""
        if self.scatter is None:
            return [hidden.flatten(0, -2)]
        return [part.flatten(0, -2) for part in hidden.split(list(self.scatter[1]), -2)]

    def whole(self, pieces: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The reverse of `pieces`."""
        if self.scatter is None:
            return pieces[0].view(shape)
        return torch.cat([x.view(*shape[:-2], n, shape[-1]) for x, n in zip(pieces, self.scatter[1], strict=True)], -2)

    def chunks(self, pieces: Sequence[Tensor]) -> Iterator[tuple[slice, ...]]:
        """The tokens of each piece that are computed together; of short pieces there is nothing left in the end."""
        each = max(1, self.chunk // len(pieces))
        for first in range(0, max(map(len, pieces)), each):
            yield tuple(slice(min(first, len(piece)), min(first + each, len(piece))) for piece in pieces)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> Tensor:
        """[tokens kept here, vocab part]; sizes: the tokens that each rank keeps."""
        if self.scatter is None:
            return torch.nn.functional.linear(hidden, weight, bias)
        logits = start_sum_parts(torch.nn.functional.linear(hidden, weight), self.scatter[0], 0, sizes).wait()
        return logits if bias is None else logits + bias.to(logits.dtype)

    def errors(self, mine: Tensor, sizes: Sequence[int]) -> Tensor:
        """The gradients of the logits of all ranks' tokens, from those of this one's: the adjoint of their sum."""
        return mine if self.scatter is None else start_collect(mine, self.scatter[0], 0, sizes).wait()

    def targets(self, labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Of each label its column among scores [tokens, vocab part], and whether it has one here."""
        columns = labels - self.first
        here = (columns >= 0) & (columns < scores.shape[1])
        if self.vocabulary is None:  # a label beyond the vocabulary is left for torch to refuse
            return columns.clamp(min=0)[:, None], here
        return columns.clamp(0, max(0, scores.shape[1] - 1))[:, None], here

    def normalised(self, scores: Tensor, columns: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens] each: the log-sum-exp over the whole vocabulary, and the score of the label."""
        lse = scores.logsumexp(-1)
        if self.vocabulary is None:
            return lse, scores.gather(1, columns)[:, 0]
        target = torch.full_like(lse, float("-inf"))
        if scores.shape[1]:
            target = torch.where(here, scores.gather(1, columns)[:, 0], target)
        said = torch.stack([lse, target])[None]
        found = start_collect(said, self.vocabulary, 0, (1,) * self.vocabulary.size).wait()
        # No rank has a label beyond the vocabulary: its score stays -inf, and the loss is infinite, not wrong.
        return found[:, 0].logsumexp(0), found[:, 1].amax(0)


@dataclass
class _Gradients:
    """The gradients of the whole sum, as far as chunks have been seen; None where none is asked for."""

    hidden: list[Tensor] | None
    weight: Tensor | None
    bias: Tensor | None

    @property
    def asked(self) -> bool:
        return any(x is not None for x in (self.hidden, self.weight, self.bias))

    def add(self, head: _Head, error: Tensor, parts: Sequence[slice], hidden: Tensor, weight: Tensor) -> None:
        """Add a chunk's part; error: the gradient of its logits [tokens kept here, vocab part], rounded as they are."""
        sizes = [part.stop - part.start for part in parts]
        if self.hidden is None and self.weight is None:
            return
        errors = head.errors(error, sizes)
        if self.hidden is not None:
            for into, part, made in zip(self.hidden, parts, (errors @ weight).split(sizes), strict=True):
                into[part] = made
        if self.weight is not None:
            self.weight += errors.T @ hidden


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: _Head, keep: bool
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=dtype)
        pieces = head.pieces(hidden)
        wants = [keep and wanted for wanted in ctx.needs_input_grad[:3]]
        grads = _Gradients(
            [torch.empty_like(piece) for piece in pieces] if wants[0] else None,
            torch.zeros_like(weight, dtype=dtype) if wants[1] else None,
            torch.zeros_like(bias, dtype=dtype) if wants[2] and bias is not None else None,
        )
        mine = 0 if head.scatter is None else head.scatter[0].rank
        for parts in head.chunks(pieces):
            asked = labels[parts[mine]]
            states = [piece[part] for piece, part in zip(pieces, parts, strict=True)]
            states = states[0] if len(states) == 1 else torch.cat(states)
            logits = head.logits(states, weight, bias, [part.stop - part.start for part in parts])
            scores, valid = logits.to(dtype), asked >= 0
            if head.softcap:
                scores = (scores / head.softcap).tanh_().mul_(head.softcap)
            columns, here = head.targets(asked, scores)
            lse, target = head.normalised(scores, columns, here)
            total += torch.where(valid, lse - target, 0).sum()
            if grads.asked:
                error = torch.exp(scores - lse[:, None])
                if error.shape[1]:
                    error.scatter_add_(1, columns, -here[:, None].to(dtype))
                error *= valid[:, None]
                if head.softcap:  # d (cap tanh(z / cap)) / dz = 1 - tanh^2
                    error *= 1 - (scores / head.softcap).square_()
                grads.add(head, error.to(logits.dtype), parts, states, weight)
                if grads.bias is not None:
                    grads.bias += error.sum(0)
        made = None if grads.hidden is None else head.whole(grads.hidden, hidden.shape)
        ctx.save_for_backward(made, grads.weight, grads.bias)
        ctx.dtypes = [x.dtype if x is not None else None for x in (hidden, weight, bias)]
        return total if head.vocabulary is None else total / head.vocabulary.size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Of the whole sum, though forward returned a share of it: the shares of all ranks depend on what is here.
        scaled = [
            None if x is None else (x * grad).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    chunk_tokens: int,
    softcap: float | None = None,
    vocabulary: Axis | None = None,
    first: int = 0,
    scatter: Scatter | None = None,
) -> Tensor:
    """The sum of -log p(label) over labelled tokens, in nats, as a scalar of at least float32.

    hidden: [..., hidden], weight: [vocab, hidden], bias: [vocab] or None, labels: [...] int64 with
    negative numbers where there is none. chunk_tokens: tokens whose logits exist at once. softcap:
    logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118, section 2); None or 0
    leaves them.

    vocabulary: the axis over which the vocabulary is split; weight and bias hold its rows from `first` on,
    possibly none, and hidden and labels are the same on all its ranks. Each then returns its share, the sum
    over the ranks of the axis, and gives back its part of the gradient of hidden (their sum is the
    whole), and the gradient of its rows. scatter: an axis and the tokens that each of its ranks keeps; hidden
    [..., tokens of all, part of the hidden dim] and weight [vocab, the same part] give partial logits, which are
    summed over it. labels, and the returned sum, are of the tokens kept here, and so is the bias's gradient.

    Forward: per chunk an all-gather of [tokens, 2] over `vocabulary`, and over `scatter` a reduce-scatter of the
    logits and, for backward, an all-gather of their gradient. Backward: nothing travels.
    """
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if vocabulary is not None and vocabulary.size == 1:
        vocabulary = None
    if scatter is not None and scatter[0].size == 1:
        scatter = None
    head = _Head(chunk_tokens, softcap, vocabulary, first, scatter)
    return _ChunkedLoss.apply(hidden, weight, bias, labels.flatten(), head, keep)
