"""The loss on text that is not trained on, the same number under every plan."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel

from seqloom.errors import DataError
from seqloom.fabric import Fabric, all_reduce_
from seqloom.model import layer_windows, pipeline_loss, token_loss
from seqloom.sequence import NO_LABEL, Batch, shard_batch
from seqloom.train.packing import PackedText
from seqloom.train.step import computing


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
                mine, shard = shard_batch(batch, fabric, windows=windows)
                if fabric.pipeline.size > 1:
                    context = partial(computing, precision, fabric.device)
                    share += pipeline_loss(
                        model,
                        [(mine, shard)],
                        fabric,
                        total=total,
                        sequences=0,
                        chunk_tokens=chunk_tokens,
                        computing=context,
                        backward=False,
                    )
                    continue
                with computing(precision, fabric.device):
                    share += token_loss(model, mine, shard, total=total, sequences=0, chunk_tokens=chunk_tokens)
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
