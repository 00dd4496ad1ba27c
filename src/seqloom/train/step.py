"""One optimizer step over micro-batches, the same numbers under every plan."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from seqloom.errors import ConfigError, NumericsError
from seqloom.fabric import Fabric, all_reduce_
from seqloom.model import layer_windows, sum_gradients, token_loss
from seqloom.sequence import Batch, shard_batch


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
    """The context of forward passes: autocast to bfloat16 for "bf16", the parameters' own type otherwise."""
    if precision not in ("float32", "float64", "bf16"):
        raise ConfigError(f"precision '{precision}' is unknown; it is one of float32, float64, bf16.")
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def compute_gradients(
    model: PreTrainedModel, micro_batches: Sequence[Batch], fabric: Fabric, *, precision: str, chunk_tokens: int
) -> StepReport:
    """Leave in every parameter the gradient of the mean loss over all labels of all micro-batches.

    Every rank passes the same global micro-batches. Gradients that were there are replaced.
    """
    total = sum(batch.label_count for batch in micro_batches)
    share = torch.zeros((), dtype=torch.float64, device=fabric.device)
    model.zero_grad()
    windows = layer_windows(model)
    for batch in micro_batches:
        local, shard = shard_batch(batch, fabric, windows=windows)
        with computing(precision, fabric.device):
            loss = token_loss(model, local, shard, total=total, chunk_tokens=chunk_tokens)
        loss.backward()
        share += loss.detach()
    sum_gradients(model, fabric)
    all_reduce_(share, fabric.world)
    return StepReport(share.item(), get_total_norm(gradients(model)).item(), total)


def apply_gradients(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, report: StepReport, *, clip: float | None
) -> None:
    """Scale the gradients to a global norm of at most `clip` and take the optimizer's step.

    Raises NumericsError, before anything is changed, where the loss or the norm is not finite.
    """
    if not (isfinite(report.loss) and isfinite(report.gradient_norm)):
        raise NumericsError(
            f"The loss is {report.loss} and the gradient norm {report.gradient_norm}, so no step was taken; "
            "resume from the last checkpoint with a lower learning rate or in float32."
        )
    if clip is not None:
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = torch.tensor(report.gradient_norm, dtype=torch.float64, device=trained[0].device)
        clip_grads_with_norm_(trained, clip, norm)
    optimizer.step()


def gradients(model: PreTrainedModel) -> list[Tensor]:
    """The gradients that parameters hold."""
    return [p.grad for p in model.parameters() if p.grad is not None]
