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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from seqloom.fabric import Axis, Fabric, all_to_all_rows, start_collect, start_trade
from seqloom.geometry import even_bounds
from seqloom.tensor import (
    Slot,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from seqloom.tensor.linear import computed_in, in_autocast

NAME = "seqloom"


@dataclass(frozen=True)
class Dealt:
    """How the experts of a layer are dealt: rank r of `axis` has those from bounds[r] to bounds[r + 1].

    tensor: the axis over which each expert's intermediate dim is split. inner: the name under which transformers
    computes experts that are all here.
    """

    axis: Axis
    tensor: Axis
    bounds: tuple[int, ...]
    inner: str

    @property
    def held(self) -> tuple[int, ...]:
        """The number of experts of each rank."""
        return tuple(stop - start for start, stop in pairwise(self.bounds))


def split_experts(model: PreTrainedModel, fabric: Fabric) -> None:
    """Keep of every layer's experts those of this rank, and have them compute what all ranks route to them.

    Where a plan deals them out, their parameters become new ones, with `slot`, their place in the whole, and
    `replica_axis`, the axis of the fabric over which their gradients are summed: the ranks that hold the same. Where
    it splits each one too, a parameter that packs two linears along its output becomes two.
    """
    experts = list(expert_modules(model))
    if not experts:
        return
    plan, inner = fabric.plan, model.config._experts_implementation
    tensor = fabric.tensor if plan.expert_tensor > 1 else replace(fabric.tensor, rank=0, size=1, group=None)
    for module in experts:
        module.dealt = Dealt(fabric.expert, tensor, tuple(even_bounds(module.num_experts, fabric.expert.size)), inner)
        if plan.expert > 1 or plan.expert_tensor > 1:
            _keep_own(module, module.dealt, fabric)
    ALL_EXPERTS_FUNCTIONS.register(NAME, compute_experts)
    model.set_experts_implementation(NAME)


def _keep_own(module: Any, dealt: Dealt, fabric: Fabric) -> None:
    """Replace the parameters of a layer's experts by this rank's part of them."""
    start, stop = (dealt.bounds[dealt.axis.rank + more] for more in (0, 1))
    packed = {}
    for name, whole in list(module.named_parameters(recurse=False)):
        parts = [("", whole)]
        if dealt.tensor.size > 1 and name in PACKED:
            delattr(module, name)
            parts = [(f"_{number}", half) for number, half in enumerate(whole.chunk(2, 1))]
            packed[name] = tuple(name + suffix for suffix, _ in parts), 1
        for suffix, part in parts:
            offset = [start, *[0] * (whole.ndim - 1)]
            mine = part.detach()[start:stop]
            if dealt.tensor.size > 1:
                dim = 1 if name in PACKED else 2
                bounds = even_bounds(part.shape[dim], dealt.tensor.size)
                offset[dim] = bounds[dealt.tensor.rank]
                mine = mine.narrow(dim, offset[dim], bounds[dealt.tensor.rank + 1] - offset[dim])
            mine = mine.to(fabric.device, copy=True, memory_format=torch.contiguous_format)
            parameter = nn.Parameter(mine, requires_grad=whole.requires_grad)
            parameter.slot = Slot(tuple(part.shape), tuple(offset))
            parameter.replica_axis = "expert_replicas"
            setattr(module, name + suffix, parameter)
    module.packed, module.num_experts = packed, stop - start


PACKED = ("gate_up_proj",)
"""Parameters [experts, 2 x intermediate, hidden] of two linears; the others are [experts, hidden, intermediate]."""


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
    if dealt.tensor.size == 1:
        return _dispatched(module, x, top_k_index, top_k_weights)
    # Each tensor rank has a part of every expert, and so computes a part of the result for the tokens of all.
    axis, mine = dealt.tensor, torch.tensor([len(x)], device=x.device)
    sizes = tuple(start_collect(mine, axis, 0, (1,) * axis.size).wait().tolist())
    index = start_collect(top_k_index, axis, 0, sizes).wait()
    given = (x.to(computed_in(x)), top_k_weights)
    gathered, weights = (gather_from_sequence_parallel_region(y, axis, 0, sizes) for y in given)
    part = _dispatched(module, gathered, index, weights)
    return reduce_scatter_to_sequence_parallel_region(part, axis, 0, sizes).to(x.dtype)


def _dispatched(module: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`compute_experts` of the tokens that this rank sends to their experts."""
    dealt: Dealt = module.dealt
    if dealt.axis.size == 1:
        return _computed(module, x, top_k_index, top_k_weights)
    each = top_k_index.shape[1]
    experts = top_k_index.flatten()
    order = experts.argsort(stable=True)
    counts = torch.bincount(experts, minlength=dealt.bounds[-1])
    leaving, arriving, numbers = _told(counts, dealt)
    # What the first linear would lower, it lowers before it travels.
    copies = x.to(computed_in(x)).index_select(0, order // each)
    received = all_to_all_rows(copies, leaving, arriving, dealt.axis)
    results = _computed(module, received, numbers[:, None], received.new_ones(len(received), 1))
    returned = all_to_all_rows(results, arriving, leaving, dealt.axis)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    by_token = returned.index_select(0, back).view(len(x), each, -1)
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


def _computed(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """This rank's experts, by their numbers here, computed by the family's own code."""
    held = {name: p for name, p in module._parameters.items() if p is not None}
    if not len(x):
        return _Starved.apply(x, *held.values())
    stands = {name: torch.cat([held[part] for part in parts], dim) for name, (parts, dim) in _packed(module).items()}
    # transformers' grouped product is in the weights' type, also under autocast.
    stands = {name: p.to(computed_in(x)) if in_autocast(x) else p for name, p in {**held, **stands}.items()}
    own = type(module).forward.__wrapped__
    inner = module.dealt.inner if _aligned(stands.values()) else "eager"
    forward = ALL_EXPERTS_FUNCTIONS.get_interface(inner, own)
    before = dict(module._parameters)
    module._parameters.update(stands)
    try:
        return forward(module, x, index, weights)
    finally:
        module._parameters.clear()
        module._parameters.update(before)


def _aligned(weights: Iterable[Tensor]) -> bool:
    """Whether rows of all matrices are whole multiples of 16 bytes, without which torch's grouped product refuses."""
    return all(size * each.element_size() % 16 == 0 for each in weights if each.ndim == 3 for size in each.shape[1:])


def _packed(module: Any) -> dict[str, tuple[tuple[str, ...], int]]:
    packed: dict[str, tuple[tuple[str, ...], int]] = getattr(module, "packed", {})
    return packed


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
