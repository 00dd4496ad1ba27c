"""A tiny model and its loss and gradients on one device, with transformers' own attention."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from seqloom.model import build_model
from seqloom.plan import Plan, fit, read_config
from seqloom.sequence import Batch
from seqloom.verify.oracle import one_device_logits

TOKENS = 48


def build(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The built-in shape of a family in float64, its configuration changed."""
    return build_model({**fit(read_config(family), Plan(), TOKENS), **changes}, dtype=torch.float64, seed=seed)


def batch_of(
    rows: int, documents: list[list[int]] | None = None, num_tokens: int = TOKENS, vocab: int = 96, **others: Any
) -> Batch:
    """Random tokens, the same everywhere."""
    tokens = torch.randint(vocab, (rows, num_tokens), generator=torch.Generator().manual_seed(7))
    return Batch.from_tokens(tokens, documents, **{"first_row": 0, **others})


def dense_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The mean loss over all labels, by the untouched model, one whole row at a time."""
    model.set_attn_implementation("eager")
    logits = [one_device_logits(model, batch, row, precision="float64") for row in range(len(batch.tokens))]
    return cross_entropy(torch.cat(logits).flatten(0, 1), batch.labels.flatten())


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of every parameter that has one, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
