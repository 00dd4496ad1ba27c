"""Linears to a latent, as multi-head latent attention has them (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Queries, keys and values of all heads are made of latents, far narrower than the residual stream. A rank computes the
latents of its own tokens with whole weights, and what is gathered is these rather than the hidden states; the linears
that make heads of them are split by heads, and read all tokens. Megatron-LM does the same.

| sequence parallelism | forward                   | backward                               |
|----------------------|---------------------------|----------------------------------------|
| yes                  | all-gather of the latents | reduce-scatter (sum) of their gradient |
| no                   | nothing                   | all-reduce of their gradient           |

Each rank's heads give a part of the gradient, hence the sum.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqloom.tensor.group import TOKENS, TensorGroup
from seqloom.tensor.parameters import local, split
from seqloom.tensor.regions import copy_to_tensor_region, gather_from_sequence_parallel_region


class LatentLinear(nn.Module):
    """A linear of 1d to a latent: [..., tokens, in] of this rank to [..., tokens, out] of all ranks.

    The parameters are those of the linear it stands for, under their names, whole on all ranks.
    """

    def __init__(self, group: TensorGroup, weight: Tensor, bias: Tensor | None) -> None:
        """Take `weight` [out, in] and `bias` [out], which are the same on all ranks."""
        super().__init__()
        self.group = group
        self.siblings: Callable[[], Any] | None = None  # weak, as a ParallelLinear's
        self.out_features, self.in_features = weight.shape
        self.weight = split(weight, group, {}, group.grid.outer)
        self.bias = None if bias is None else split(bias, group, {}, group.grid.outer)

    def forward(self, x: Tensor) -> Tensor:
        """The latent of all ranks' tokens, of this rank's; among siblings, what was made at their entry."""
        siblings = self.siblings() if self.siblings is not None else None
        outs: list[Tensor] | None = siblings.take(self) if siblings is not None else None
        return (outs or compute_latents([self], x))[0]

    def extra_repr(self) -> str:
        """What nn.Linear says."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def compute_latents(linears: Sequence[LatentLinear], x: Tensor) -> list[Tensor]:
    """The outputs of linears that read the same x, gathered together."""
    group = linears[0].group
    own = [F.linear(x, local(each.weight), None if each.bias is None else local(each.bias)) for each in linears]
    latents = torch.cat(own, -1)
    move = group.collecting(group.grid.linear("colwise").x, latents, latents.shape[-1])
    if move is not None and move.dim is None:
        latents = copy_to_tensor_region(latents, move.axis)
    elif move is not None:
        latents = gather_from_sequence_parallel_region(latents, move.axis, TOKENS, move.sizes)
    return list(latents.split([each.out_features for each in linears], -1))
