"""Running the stages of a pipeline in the order of a schedule: `torch.distributed.pipelining`, metered.

| schedule    | order                                     | source                          |
|-------------|-------------------------------------------|---------------------------------|
| gpipe       | all forwards, then all backwards          | arXiv 1811.06965                |
| 1f1b        | a forward, a backward, after a warm-up    | PipeDream-Flush, arXiv 2006.09503 |
| interleaved | the same over several stages a rank       | arXiv 2104.04473, section 2.2   |
| zbv         | backward in two parts, stages there and back | arXiv 2401.10241, section 6  |
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from seqloom.errors import SeqloomError
from seqloom.fabric.failure import naming
from seqloom.fabric.mesh import Axis
from seqloom.plan.plan import Schedule

_SCHEDULES: dict[Schedule, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
}


class _MeteredStage(PipelineStage):
    """torch's stage, whose messages are counted."""

    def __init__(self, axis: Axis, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, group=axis.group)
        self.axis = axis

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[distributed.P2POp]:
        """The messages of activations to the next stage."""
        return self._counted(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[distributed.P2POp]:
        """The messages of gradients to the stage before."""
        return self._counted(super().get_bwd_send_ops(bwd_chunk_id))

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor | None, ...]:
        """The gradient for the stage before on the same rank; without backward none, which torch asks for too."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """Take it from the stage after on the same rank."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def _counted(self, messages: list[distributed.P2POp]) -> list[distributed.P2POp]:
        sent = sum(message.tensor.numel() * message.tensor.element_size() for message in messages)
        self.axis.meter.add(self.axis.name, sent)
        return messages


def run_stages(
    stages: Mapping[int, nn.Module],
    axis: Axis,
    device: torch.device,
    *,
    schedule: Schedule,
    num_stages: int,
    micro_batches: int,
    passed: Tensor,
    backward: bool = True,
) -> list[Tensor]:
    """Run micro-batches through all stages, forward and, where asked, backward; every rank calls it together.

    stages: this rank's by number. Each is called as module(received, micro=tensor([number])) with what the stage
    before it gave, the first without; it returns what goes on, the last a loss. passed: on the meta device, shaped
    as what goes between stages; one shape for all of them. Gradients are added up in `.grad`, of the losses
    as they are. Returns the losses of all micro-batches, in order, where the last stage is, else nothing. Raises
    CommunicationError where a peer is gone.
    """
    held: list[PipelineStage] = []
    for number, module in stages.items():
        first, last = number == 0, number == num_stages - 1
        given = passed.detach().requires_grad_()  # without which torch makes no gradient of it
        shapes = {"input_args": () if first else (given,), "output_args": (given.sum() if last else given,)}
        held.append(_MeteredStage(axis, module, number, num_stages, device, **shapes))
    one = schedule in ("gpipe", "1f1b")
    order = _SCHEDULES["gpipe" if one and not backward else schedule](
        held[0] if one else held, micro_batches, loss_fn=_passed_on, scale_grads=False
    )
    numbers, losses = torch.arange(micro_batches), list[Tensor]()
    run, place = order.step if backward else order.eval, axis.meter.place
    place.begin("pipeline", axis.name)
    with naming("pipeline", axis, place.counts[axis.name]), _unwrapped():
        run(micro=numbers, target=numbers, losses=losses, return_outputs=False)
    return losses


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise our own errors as themselves, which torch wraps in words about a stage."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, SeqloomError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


def _passed_on(loss: Tensor, _: Tensor) -> Tensor:
    return loss
