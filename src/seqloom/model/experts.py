"""Experts dealt to ranks: each token goes to the ranks of its experts and comes back.

transformers looks the function that computes a layer's experts up by name, as it does attention's. Ours sorts
the token's copies by expert, one for each expert that it was routed to, tells every rank how many it gets for each
of its experts, trades the copies, has the family's own code compute this rank's experts on them, trades the
results back and adds them up by the router's weights at home. Experts are held fused, as parameters [experts, ...],
of which a rank keeps a run along dim 0.

| move     | forward                                | backward                                  |
|----------|----------------------------------------|-------------------------------------------|
| dispatch | all-to-all of copies [routed, hidden]  | all-to-all of their gradients back        |
| return   | all-to-all of results [routed, hidden] | all-to-all of their gradients             |

What is routed differs by rank, step and layer. A rank whose experts get no token takes part with empty blocks,
and its gradients are zero (GShard, arXiv 2006.16668; uneven blocks in place of a capacity, so that no token is
dropped).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from seqloom.fabric import Axis, Fabric, all_to_all_rows, start_trade
from seqloom.geometry import even_bounds
from seqloom.tensor import Slot
from seqloom.tensor.linear import computed_in

NAME = "seqloom"


@dataclass(frozen=True)
class Dealt:
    """How the experts of a layer are dealt: rank r of `axis` has those from bounds[r] to bounds[r + 1].

    inner: the name under which transformers computes experts that are all here.
    """

    axis: Axis
    bounds: tuple[int, ...]
    inner: str

    @property
    def held(self) -> tuple[int, ...]:
        """The number of experts of each rank."""
        return tuple(stop - start for start, stop in pairwise(self.bounds))


def split_experts(model: PreTrainedModel, fabric: Fabric) -> None:
    """Keep of every layer's experts those of this rank, and have them compute what all ranks route to them.

    Their parameters become new ones, with `slot`, their place in the whole, and `replica_axis`, the axis of the fabric
    over which their gradients are summed: the ranks that hold the same experts.
    """
    axis = fabric.expert
    if axis.size == 1:
        return
    inner = model.config._experts_implementation
    for module in expert_modules(model):
        bounds = tuple(even_bounds(module.num_experts, axis.size))
        start, stop = bounds[axis.rank], bounds[axis.rank + 1]
        for name, whole in list(module.named_parameters(recurse=False)):
            part = whole.detach()[start:stop].to(fabric.device, copy=True, memory_format=torch.contiguous_format)
            parameter = nn.Parameter(part, requires_grad=whole.requires_grad)
            parameter.slot = Slot(tuple(whole.shape), (start, *[0] * (whole.ndim - 1)))
            parameter.replica_axis = "expert_replicas"
            setattr(module, name, parameter)
        module.dealt = Dealt(axis, bounds, inner)
        module.num_experts = stop - start
    ALL_EXPERTS_FUNCTIONS.register(NAME, compute_experts)
    model.set_experts_implementation(NAME)


def expert_modules(model: nn.Module) -> Iterator[Any]:
    """The modules that hold all experts of a layer in fused parameters."""
    return filter(is_experts, model.modules())


def is_experts(module: object) -> bool:
    """Whether a module holds all experts of a layer in fused parameters, as transformers' decorator marks them."""
    return hasattr(module, "_apply_gate") and isinstance(getattr(module, "num_experts", None), int)


def compute_experts(module: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """In place of the family's forward of all experts; every rank of the expert axis calls it together.

    x: [tokens, hidden], this rank's. top_k_index, top_k_weights: [tokens, k], the experts of each token by their
    numbers in the whole layer, and their weights. Returns [tokens, hidden].
    """
    dealt: Dealt = module.dealt
    tokens, each = top_k_index.shape
    experts = top_k_index.flatten()
    order = experts.argsort(stable=True)
    counts = torch.bincount(experts, minlength=dealt.bounds[-1])
    leaving, arriving, numbers = _told(counts, dealt)
    # What the first linear would lower, it lowers before it travels.
    copies = x.to(computed_in(x)).index_select(0, order // each)
    received = all_to_all_rows(copies, leaving, arriving, dealt.axis)
    results = _computed(module, received, numbers)
    returned = all_to_all_rows(results, arriving, leaving, dealt.axis)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    by_token = returned.index_select(0, back).view(tokens, each, -1)
    return (by_token * top_k_weights[..., None]).sum(1).to(x.dtype)


def _told(counts: Tensor, dealt: Dealt) -> tuple[list[int], list[int], Tensor]:
    """How many copies go to each rank and come from it, and [arriving] the number of each one's expert here.

    counts: [experts], this rank's copies for each expert of the layer.
    """
    axis, held = dealt.axis, dealt.held
    arriving = counts.new_empty(axis.size, held[axis.rank])
    leaving = counts.split(held)
    arriving[axis.rank] = leaving[axis.rank]
    start_trade([[part] for part in leaving], [[part] for part in arriving], axis).wait()
    numbers = torch.arange(held[axis.rank], device=counts.device).repeat(axis.size)
    sums = torch.stack([torch.stack([part.sum() for part in leaving]), arriving.sum(1)]).tolist()
    return sums[0], sums[1], numbers.repeat_interleave(arriving.flatten())


def _computed(module: Any, received: Tensor, numbers: Tensor) -> Tensor:
    """The results of this rank's experts for what it received, not weighted, by the family's own code."""
    if not len(received):
        return _Starved.apply(received, *module.parameters(recurse=False))
    own = type(module).forward.__wrapped__
    forward = ALL_EXPERTS_FUNCTIONS.get_interface(module.dealt.inner, own)
    return forward(module, received, numbers[:, None], received.new_ones(len(received), 1))


class _Starved(torch.autograd.Function):
    """No tokens through experts: a graph that still leads to both trades and to gradients, which are zero."""

    @staticmethod
    def forward(ctx: Any, received: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return received.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted: Sequence[bool] = ctx.needs_input_grad[1:]
        zeros = [torch.zeros_like(p) if w else None for p, w in zip(ctx.saved_tensors, wanted, strict=True)]
        return grads[0], *zeros
