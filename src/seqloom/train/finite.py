"""Where numbers stopped being finite: the first parameter and the step, the same words on every rank."""

from collections.abc import Callable
from math import isfinite

import torch
from torch import Tensor
from transformers import PreTrainedModel

from seqloom.errors import NumericsError
from seqloom.fabric import Fabric, all_reduce_, broadcast_
from seqloom.model import gradient
from seqloom.tensor import local
from seqloom.train.step import StepReport

NAME_BYTES = 512
"""Of a parameter's name, which travels from the rank that holds it to all."""

_NOBODY = 2**62


def check_finite(model: PreTrainedModel, report: StepReport, fabric: Fabric, *, step: int) -> None:
    """Refuse to go on from a loss or gradient that is not finite; every rank calls it together before the optimizer.

    step: the step's number as metrics.jsonl has it. Where all is finite nothing travels: the report is the same on
    every rank. Raises NumericsError, which names the first parameter in the model's order with such a gradient.
    """
    if isfinite(report.loss) and isfinite(report.gradient_norm):
        return
    name = first_not_finite(model, fabric, gradient)
    what = f"the gradient of {name} is the first that is not finite"
    if name is None:
        name = first_not_finite(model, fabric, lambda parameter: parameter)
        what = f"{name} itself is not finite" if name else "every parameter and gradient is finite by itself"
    raise NumericsError(
        f"At step {step} the loss is {report.loss} and the gradient norm {report.gradient_norm}: {what}. No step was "
        "taken; resume from an earlier checkpoint with a lower learning rate, or begin anew in float32."
    )


def first_not_finite(model: PreTrainedModel, fabric: Fabric, of: Callable[[Tensor], Tensor | None]) -> str | None:
    """The name of the first parameter of which `of` gives something not finite on any rank; None where all is finite.

    Of pipeline stages the first is the one nearest the input. Every rank calls it together.
    """
    name, place = "", _NOBODY
    for number, (known, parameter) in enumerate(model.named_parameters()):
        found = of(parameter)
        if found is not None and not local(found).isfinite().all():
            name, place = known, fabric.pipeline.rank * 2**32 + number
            break
    first = all_reduce_(torch.tensor(place, device=fabric.device), fabric.world, "min")
    if first.item() == _NOBODY:
        return None
    mine = fabric.world.rank if first.item() == place else fabric.world.size
    owner = all_reduce_(torch.tensor(mine, device=fabric.device), fabric.world, "min")
    letters = torch.tensor(list(name.encode()[:NAME_BYTES].ljust(NAME_BYTES)), dtype=torch.uint8, device=fabric.device)
    broadcast_(letters, fabric.world, int(owner.item()))
    return bytes(letters.tolist()).decode().rstrip()
