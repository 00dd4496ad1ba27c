"""The optimizer that `Booster.boost` returns: it sums gradients over ranks, clips them and steps what is here."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seqloom.compat.colossalai.booster.model import BoostedModel
from seqloom.errors import ConfigError
from seqloom.model import at_rest, clear_gradients, pieces, sum_gradients
from seqloom.tensor import local
from seqloom.train import PlannedAdamW, StepReport, apply_gradients
from seqloom.train.optimizer import shares
from seqloom.train.scale import LossScale
from seqloom.train.step import gradient_norm, gradients

ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD")
"""Optimizers of torch that step each element by itself, so that parts of a weight are stepped as the whole would be."""

GROWTH_STEPS = 1000
"""Finite steps in a row after which fp16's loss scale doubles."""


class BoostedOptimizer:
    """A torch optimizer of a split model; `unwrap` gives the optimizer itself, which schedulers go on holding."""

    def __init__(self, optim: torch.optim.Optimizer, model: BoostedModel, schedule: Mapping[str, Any]) -> None:
        """schedule: clip, the largest global gradient norm, and initial_loss_scale of fp16, where they are said."""
        self.optim, self.model, self.clip = optim, model, schedule.get("clip")
        self.scale = LossScale(schedule.get("initial_loss_scale", 2.0**16) if model.precision == "fp16" else 1.0)
        self.loss, self.stepped = 0.0, False
        self.left: list[tuple[int, int]] | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer itself."""
        return self.optim.param_groups

    def unwrap(self) -> torch.optim.Optimizer:
        """The optimizer that was boosted."""
        return self.optim

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of a loss; `step` sums over ranks.

        Raises ConfigError after a step without zero_grad, whose gradients are sums already.
        """
        self.begin()
        (loss * self.scale.value if self.scale.value != 1 else loss).backward()
        self.end(loss)

    def begin(self) -> None:
        """Refuse a backward pass on top of gradients that were summed over ranks already."""
        if self.stepped and self._gradients():
            raise ConfigError("Gradients of the last step are still there; call optimizer.zero_grad() after each step.")
        self.stepped = False

    def end(self, loss: Tensor) -> None:
        """Remember the loss of a backward pass, and which gradients it left."""
        self.loss, self.left = float(loss.detach()), self._gradients()

    def _gradients(self) -> list[tuple[int, int]]:
        """Where each gradient lies, and how often it was changed."""
        at_rest(self.model.module)
        return [(part.data_ptr(), part._version) for part in map(local, gradients(self.model.module))]

    def step(self) -> None:
        """Sum gradients over ranks, clip, and step. Raises NumericsError where loss or gradients are not finite.

        In fp16 a step whose gradients overflowed is left out and the loss scale halved. Raises ConfigError without a
        `backward` before it, and where a program changed gradients since, which are shares until they are summed.
        """
        module, fabric, scale = self.model.module, self.model.fabric, self.scale
        if self.left is None:
            raise ConfigError("There was no booster.backward before this step; call it in place of loss.backward().")
        if (fabric.world.size > 1 or scale.value != 1) and self._gradients() != self.left:
            raise ConfigError(
                "Gradients were changed after backward, where each rank has its share of them; clip by the plugin's "
                "max_norm, and scale the loss."
            )
        sum_gradients(module, fabric)
        for found in gradients(module) if scale.value != 1 else ():
            local(found).mul_(1 / scale.value)
        self.stepped, self.left = True, None
        report = StepReport(self.loss, gradient_norm(module, fabric), 0)
        skipped = self.model.precision == "fp16" and scale.overflowed(report)
        if self.model.precision == "fp16":
            self.scale = scale.after(report, GROWTH_STEPS)
        if not skipped:
            apply_gradients(module, self.optim, report, clip=self.clip)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients; they are set to None, whatever is asked for."""
        clear_gradients(self.model.module)
        self.stepped, self.left = False, None

    def __getattr__(self, name: str) -> object:
        """Say what there is."""
        raise AttributeError(
            f"A boosted optimizer has no '{name}'; it has param_groups, backward, step, zero_grad and unwrap. Clip by "
            "the plugin's max_norm, save with booster.save_optimizer."
        )


def _elementwise() -> set[type]:
    return {getattr(torch.optim, name) for name in ELEMENTWISE}


def names(model: nn.Module) -> dict[int, str]:
    """The name of each parameter, by its identity."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def adopt(optim: torch.optim.Optimizer, model: BoostedModel, before: dict[int, str]) -> None:
    """Have an optimizer step what a split model holds here, each part in the group where the whole parameter was.

    before: `names` of the model before it was split. Raises ConfigError for an optimizer that has stepped or holds
    parameters of something else, for ZeRO with another one than HybridAdam, and, where ranks have parts of weights,
    for one that may step an element by others.
    """
    if optim.state:
        raise ConfigError("The optimizer has taken steps already; boost it before the first one.")
    zero, planned = model.fabric.plan.zero, isinstance(optim, PlannedAdamW)
    if zero and not planned:
        raise ConfigError(
            f"{type(optim).__name__} would step whole parameters, and zero={zero} shares them out; use HybridAdam."
        )
    plan = model.fabric.plan
    if (plan.tensor > 1 or plan.expert > 1) and not planned and type(optim) not in _elementwise():
        raise ConfigError(
            f"{type(optim).__name__} may step an element by others of its weight, of which each rank has a part under "
            f"'{plan}'; use HybridAdam, or one of torch's {', '.join(ELEMENTWISE)}."
        )
    stepped = shares(model.module, model.fabric)
    whole = {id(p): piece.name for p, piece in zip(model.module.parameters(), pieces(model.module), strict=True)}
    parts: dict[str, list[nn.Parameter]] = {}
    for one in stepped:
        parts.setdefault(whole[id(one.parameter)], []).append(one.part)
    for group in optim.param_groups:
        if any(id(parameter) not in before for parameter in group["params"]):
            raise ConfigError("The optimizer holds parameters that are not the model's; make it of model.parameters().")
        group["params"] = [part for old in group["params"] for part in parts.get(before[id(old)], ())]
    if isinstance(optim, PlannedAdamW):
        held = {id(part) for group in optim.param_groups for part in group["params"]}
        optim.stepped, optim.stage = tuple(one for one in stepped if id(one.part) in held), zero
