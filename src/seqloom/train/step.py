"""One optimizer step over micro-batches, the same numbers under every plan."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import isfinite

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqloom.errors import ConfigError, NumericsError
from seqloom.fabric import Fabric, all_reduce_
from seqloom.model import (
    clear_gradients,
    copies,
    gradient,
    hand_over,
    layer_windows,
    step_loss,
    sum_gradients,
)
from seqloom.sequence import Batch, shard_batch
from seqloom.tensor import local

PIECE = 2**24
"""Elements whose squares are summed at once: their copies in float64 are all the memory that a norm takes."""

LOWER = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions under which models compute in a lower type than that of their weights."""


@dataclass(frozen=True)
class StepReport:
    """What a step did, the same on every rank.

    loss: mean over all label tokens of the step, in nats. gradient_norm: of all gradients, before
    clipping. label_count: label tokens of the step.
    """

    loss: float
    gradient_norm: float
    label_count: int


def computing(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context of forward passes: autocast to bfloat16 or float16 for "bf16" and "fp16", else none."""
    if precision not in ("float32", "float64", *LOWER):
        raise ConfigError(f"precision '{precision}' is unknown; it is one of float32, float64, bf16, fp16.")
    return torch.autocast(device.type, LOWER[precision]) if precision in LOWER else nullcontext()


def compute_gradients(
    model: PreTrainedModel,
    micro_batches: Sequence[Batch],
    fabric: Fabric,
    *,
    precision: str,
    chunk_tokens: int,
    loss_scale: float = 1.0,
) -> StepReport:
    """Leave in every parameter the gradient of the mean loss over all labels of all micro-batches.

    Every rank passes the same global micro-batches. Gradients that were there are replaced. Where they are
    afterwards `seqloom.model.gradient` tells. loss_scale: what losses are multiplied by for backward; gradients are
    divided by it once they are summed.
    """
    total = sum(batch.label_count for batch in micro_batches)
    sequences = sum(len(batch.tokens) for batch in micro_batches)
    clear_gradients(model)
    windows = layer_windows(model)
    share = step_loss(
        model,
        (shard_batch(batch, fabric, windows=windows) for batch in micro_batches),
        fabric,
        total=total,
        sequences=sequences,
        chunk_tokens=chunk_tokens,
        computing=partial(computing, precision, fabric.device),
        scale=loss_scale,
    )
    sum_gradients(model, fabric)
    for found in gradients(model) if loss_scale != 1 else ():
        local(found).mul_(1 / loss_scale)
    all_reduce_(share, fabric.world)
    return StepReport(share.item(), gradient_norm(model, fabric), total)


def gradient_norm(model: nn.Module, fabric: Fabric) -> float:
    """The norm of all gradients as one vector, each element counted once, whoever holds it; summed in float64.

    Every rank calls it together, after `sum_gradients`.
    """
    total = torch.zeros((), dtype=torch.float64, device=fabric.device)
    for parameter in model.parameters():
        if (found := gradient(parameter)) is not None:
            # All ranks that hold the same elements count them.
            total += _square(local(found)).to(total.device) / copies(parameter, fabric)
    return all_reduce_(total, fabric.world).sqrt().item()


def _square(part: Tensor) -> Tensor:
    """The sum of the squares of all elements, in float64."""
    pieces = part.flatten().split(PIECE)
    return torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]).square().sum()


def apply_gradients(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, report: StepReport, *, clip: float | None
) -> None:
    """Scale the gradients to a global norm of at most `clip` and take the optimizer's step.

    Raises NumericsError, before anything is changed, where the loss or the norm is not finite.
    """
    if not (isfinite(report.loss) and isfinite(report.gradient_norm)):
        raise NumericsError(
            f"The loss is {report.loss} and the gradient norm {report.gradient_norm}, so no step was taken; "
            "resume from an earlier checkpoint with a lower learning rate, or begin anew in float32."
        )
    if clip is not None:
        factor = clip / (report.gradient_norm + 1e-6)  # as torch's clip_grad_norm_ has it
        for found in gradients(model) if factor < 1 else ():
            local(found).mul_(factor)
    hand_over(model)
    optimizer.step()


def gradients(model: nn.Module) -> list[Tensor]:
    """The gradients that parameters hold."""
    return [found for parameter in model.parameters() if (found := gradient(parameter)) is not None]
