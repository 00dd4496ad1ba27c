"""How far two runs are apart, and what that proves."""

from dataclasses import dataclass

import torch
from torch import Tensor

from seqloom.fabric import Fabric, all_reduce_
from seqloom.verify.oracle import Trajectory
from seqloom.verify.parting import Parting


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How errors are measured in one type.

    tolerance: the largest error that counts as equal. floor: a tensor smaller than this share of the
    norm of all is measured against that share, since a tensor that is zero but for rounding has no
    relative error worth the name. adam_epsilon: of the optimizer that takes the steps; it keeps
    AdamW, which divides each gradient by its own size, from blowing rounding up to a full step.
    """

    tolerance: float
    floor: float = 1e-6
    adam_epsilon: float = 1e-6


MEASURES = {
    "float64": Measure(tolerance=1e-9),
    # About 1,000 roundings of 2^-23, as they pile up over the layers of a small model.
    "float32": Measure(tolerance=2.0**-13, adam_epsilon=1e-4),
    # 16 roundings of 2^-8. Zero gradients are noise of 1e-3 here, so the floors lie above it.
    "bf16": Measure(tolerance=2.0**-4, floor=1e-3, adam_epsilon=1e-2),
}
"""By type. Losing a shard, a label, a document bound or a factor of two is a gradient error of 0.1 to 1.
Parameters move by about 1e-3 a step here, so that in bf16 their figure shows gross faults only."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A plan's run held against one device's.

    loss_error, gradient_norm_error: relative, the worst over the steps. worst_gradient_error: over
    all parameters and ranks, |g - ref| / max(|ref|, floor x |all g|), in norms, at the first step;
    worst_parameter has it. parameter_error: likewise of the parameters after all steps. parameters:
    the five worst gradients, as {"name": ..., "gradient_error": ...}. parting: where the runs part
    first, when they do. dropouts: what dropped out, on both sides. dropouts_off: the configuration's dropouts that
    were set to 0.
    """

    plan: str
    world_size: int
    dtype: str
    steps: int
    tolerance: float
    loss_error: float
    gradient_norm_error: float
    worst_gradient_error: float
    worst_parameter: str
    parameter_error: float
    parameters: tuple[dict[str, str | float], ...] = ()
    parting: Parting | None = None
    dropouts: tuple[str, ...] = ()
    dropouts_off: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether every error is within the tolerance; a NaN never is."""
        errors = (self.loss_error, self.gradient_norm_error, self.worst_gradient_error, self.parameter_error)
        return all(error <= self.tolerance for error in errors)


def compare(run: Trajectory, reference: Trajectory, fabric: Fabric, dtype: str) -> Verdict:
    """Hold this rank's run against the reference; the verdict covers all ranks.

    Every rank passes its own run and the same reference.
    """
    measure = MEASURES[dtype]
    names = list(reference.gradients)
    gradient_errors = tensor_errors(run.gradients, reference.gradients, measure.floor, fabric)
    parameter_errors = tensor_errors(run.parameters, reference.parameters, measure.floor, fabric)
    worst = int(gradient_errors.argmax())
    return Verdict(
        plan=str(fabric.plan),
        world_size=fabric.world.size,
        dtype=dtype,
        steps=len(reference.losses),
        tolerance=measure.tolerance,
        loss_error=number_error(run.losses, reference.losses, fabric),
        gradient_norm_error=number_error(run.norms, reference.norms, fabric),
        worst_gradient_error=gradient_errors[worst].item(),
        worst_parameter=names[worst],
        parameter_error=parameter_errors.max().item(),
        parameters=tuple(
            {"name": names[i], "gradient_error": gradient_errors[i].item()}
            for i in gradient_errors.argsort(descending=True)[:5].tolist()
        ),
    )


def tensor_errors(actual: dict[str, Tensor], expected: dict[str, Tensor], floor: float, fabric: Fabric) -> Tensor:
    """[tensors] float64: the error of each tensor, the worst over all ranks; infinite where one is not finite."""
    whole = torch.stack([tensor.double().norm() for tensor in expected.values()]).norm()
    errors = [
        (actual[name].double() - tensor.double()).norm() / torch.maximum(tensor.double().norm(), floor * whole)
        for name, tensor in expected.items()
    ]
    stacked = torch.stack(errors).nan_to_num(nan=float("inf"))
    return all_reduce_(stacked, fabric.world, "max")


def number_error(actual: list[float], expected: list[float], fabric: Fabric) -> float:
    """The relative error of numbers, the worst over all of them and all ranks; infinite where one is not finite."""
    run, reference = (
        torch.tensor(numbers, dtype=torch.float64, device=fabric.device) for numbers in (actual, expected)
    )
    errors = ((run - reference) / reference).abs().nan_to_num(nan=float("inf"))
    return all_reduce_(errors.max(), fabric.world, "max").item()
