"""AdamW for a model under a plan: of each parameter a rank steps what ZeRO gives it, and holds moments of no more.

Under zero=0 that is the parameter as it is. Under zero=1 it is this rank's rows of it; after a step the rows
travel to the ranks that hold the whole. Under zero=2 and zero=3 it is the share that FSDP2 keeps here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqloom.fabric import Axis, Fabric, buckets, start_collect
from seqloom.model import at_rest, shared_over
from seqloom.plan import chunks
from seqloom.tensor import local


@dataclass(frozen=True)
class Stepped:
    """What an optimizer steps of one parameter.

    name: of the parameter in the model. part: what is stepped, under whose name as a key the optimizer keeps its
    moments: the parameter itself, or a plain tensor of rows [first, first + len(part)) of this rank's part of it,
    sharing its memory. axis: that over which these rows are dealt, None where all are here.
    """

    name: str
    parameter: nn.Parameter
    part: nn.Parameter
    first: int = 0
    axis: Axis | None = None


class PlannedAdamW(torch.optim.AdamW):
    """AdamW whose `param_groups` hold what this rank steps; `stepped` says of which parameters.

    It reads the gradients of the model's parameters when it steps, and changes the parameters of all ranks: every
    rank calls `step` together.
    """

    def __init__(
        self, stepped: Sequence[Stepped], groups: Sequence[dict[str, Any]], stage: int, **settings: Any
    ) -> None:
        """groups, settings: as of torch.optim.AdamW. stage: the plan's `zero`."""
        super().__init__([group for group in groups if group["params"]], **settings)
        self.stepped, self.stage = tuple(stepped), stage

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the parameters."""
        super().zero_grad(set_to_none)
        for one in self.stepped:
            one.parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step what is here and, under zero=1, fetch the rest."""
        if self.stage == 0:
            return super().step(closure)
        for one in self.stepped:
            # Bound anew: FSDP2 and Module.to may have moved the parameter to other memory since.
            one.part.data = _rows(local(one.parameter), one)
            grad = one.parameter.grad
            one.part.grad = None if grad is None else _rows(local(grad), one)
        loss = super().step(closure)
        for one in self.stepped:
            one.part.grad = None
        if self.stage == 1:
            for bucket in buckets(_dealt(self.stepped)):
                _fetch(bucket)
        return loss


def adamw(
    model: nn.Module,
    fabric: Fabric | None,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    only_matrices: bool = False,
) -> PlannedAdamW:
    """AdamW for a model that `parallelize` has split, or, with fabric None, for a model on one device.

    only_matrices: whether vectors, which are norms and biases, are left out of the decay.
    """
    stage = 0 if fabric is None else fabric.plan.zero
    stepped = shares(model, fabric)
    decayed = [one.part for one in stepped if one.part.ndim >= 2 or not only_matrices]
    others = [one.part for one in stepped if one.part.ndim < 2 and only_matrices]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return PlannedAdamW(stepped, groups, stage, lr=learning_rate, betas=betas, eps=epsilon)


def shares(model: nn.Module, fabric: Fabric | None) -> list[Stepped]:
    """What an optimizer steps of each parameter that is trained, in the model's order; fabric as of `adamw`."""
    at_rest(model)
    return [
        Stepped(name, parameter, parameter)
        if fabric is None or fabric.plan.zero == 0
        else _share(name, parameter, fabric)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def _share(name: str, parameter: nn.Parameter, fabric: Fabric) -> Stepped:
    """What a rank steps of a parameter where moments are shared out."""
    held, (axis, _) = local(parameter.detach()), shared_over(parameter, fabric)
    if fabric.plan.zero > 1:
        first = getattr(parameter, "zero_rows", 0)  # absent where an expert has no other replica
        return Stepped(name, parameter, nn.Parameter(held), first, axis)
    if held.dim() == 0:  # too small to deal
        return Stepped(name, parameter, nn.Parameter(held))
    shares = chunks(len(held), axis.size)
    first = sum(shares[: axis.rank])
    return Stepped(name, parameter, nn.Parameter(held[first : first + shares[axis.rank]]), first, axis)


def _rows(held: Tensor, one: Stepped) -> Tensor:
    """Of what this rank holds of a parameter or gradient the rows that it steps."""
    if len(held) == len(one.part) if held.dim() else True:
        return held
    return held[one.first : one.first + len(one.part)]


def _dealt(stepped: Sequence[Stepped]) -> Iterator[tuple[tuple[str, torch.dtype], int, Stepped]]:
    """As `buckets` takes them what is dealt over an axis; counted in what is whole on all ranks that trade."""
    for one in stepped:
        if one.axis is not None and one.axis.size > 1:
            part = local(one.parameter)
            yield (one.axis.name, one.part.dtype), part.numel() * part.element_size(), one


def _fetch(bucket: Sequence[Stepped]) -> None:
    """Fill in the rows that other ranks have stepped. An all-gather of uneven parts."""
    axis = bucket[0].axis
    assert axis is not None
    parts = [local(one.parameter.detach()) for one in bucket]
    # [parts, ranks]: elements of each part that each rank steps.
    counts = [[rows * part[:1].numel() for rows in chunks(len(part), axis.size)] for part in parts]
    sizes = [sum(column) for column in zip(*counts, strict=True)]
    mine = torch.cat([one.part.detach().flatten() for one in bucket])
    by_rank = start_collect(mine, axis, 0, sizes).wait().split(sizes)
    for rank, flat in enumerate(by_rank):
        if rank == axis.rank:
            continue
        fetched = flat.split([count[rank] for count in counts])
        for part, rows in zip(parts, fetched, strict=True):
            shares = chunks(len(part), axis.size)
            first = sum(shares[:rank])
            part[first : first + shares[rank]] = rows.view(shares[rank], *part.shape[1:])
