"""The loss on text that is not trained on, the same number under every plan."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from seqloom.errors import DataError
from seqloom.fabric import Fabric, all_reduce_
from seqloom.model import layer_windows, step_loss
from seqloom.sequence import NO_LABEL, Batch, shard_batch
from seqloom.train.packing import PackedText
from seqloom.train.step import computing


@dataclass
class HeldOut:
    """Text that is not trained on, and the lowest loss on it so far.

    sequences: how many of its sequences are taken, from the start. loss, step: the lowest loss, in nats, and after
    how many steps; None and 0 before the first.
    """

    text: PackedText
    sequences: int
    loss: float | None = None
    step: int = 0

    @property
    def measured(self) -> dict[str, float]:
        """What losses are measured on; those of other text, lengths or sequences are not compared."""
        return {
            "best_text": self.text.fingerprint,
            "best_sequence_length": self.text.sequence_length,
            "best_sequences": self.sequences,
        }

    def see(self, loss: float, step: int) -> None:
        """Note a loss that was measured after a step."""
        if self.loss is None or loss < self.loss:
            self.loss, self.step = loss, step

    def running(self) -> dict[str, float]:
        """What a checkpoint says of it."""
        return {} if self.loss is None else {"best_loss": self.loss, "best_step": self.step, **self.measured}

    def take_up(self, said: Mapping[str, float]) -> str | None:
        """Go on from what a checkpoint says; a note where its loss is not to be compared, and the best begins anew."""
        if "best_loss" not in said:
            return None
        if any(said.get(key) != value for key, value in self.measured.items()):
            return (
                f"The best evaluation was {said['best_loss']:.3f} after step {said['best_step']:.0f}, of other text or "
                "lengths than are evaluated now, so the best begins anew."
            )
        self.loss, self.step = said["best_loss"], int(said["best_step"])
        return None


def evaluate(
    model: PreTrainedModel,
    text: PackedText,
    fabric: Fabric,
    *,
    sequences: int | None,
    micro_batch: int,
    precision: str,
    chunk_tokens: int,
) -> float:
    """The mean loss over all label tokens of the first `sequences` of a text, in nats; every rank calls it together.

    sequences: None takes all. micro_batch: sequences that are computed at a time, over all ranks; the plan divides
    them as in training. Dropout is off meanwhile, and the balance of experts left out. Raises DataError for a text
    without labels.
    """
    count = min(text.num_sequences, sequences or text.num_sequences)
    total = sum(batch.label_count for batch in _batches(text, count, micro_batch))
    if total == 0:
        raise DataError("The text of eval.files has no token that follows another; name files that hold more text.")
    windows = layer_windows(model)
    share = torch.zeros((), dtype=torch.float64, device=fabric.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in _batches(text, count, micro_batch):
                share += step_loss(
                    model,
                    [shard_batch(batch, fabric, windows=windows)],
                    fabric,
                    total=total,
                    sequences=0,
                    chunk_tokens=chunk_tokens,
                    computing=partial(computing, precision, fabric.device),
                    backward=False,
                )
    finally:
        model.train(training)
    return all_reduce_(share, fabric.world).item()


def _batches(text: PackedText, count: int, size: int) -> Iterator[Batch]:
    """The first `count` sequences, `size` at a time; what the last batch lacks is filled with rows without labels."""
    for first in range(0, count, size):
        numbers = range(first, min(first + size, count))
        lacking = size - len(numbers)
        batch = text.batch([*numbers, *[0] * lacking])
        if lacking:
            labels = batch.labels.clone()
            labels[len(numbers) :] = NO_LABEL
            batch = replace(batch, labels=labels)
        yield batch
