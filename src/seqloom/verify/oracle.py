"""The reference: the untouched transformers model on one device, with its own attention and a dense mask.

Nothing of seqloom's attention, sharding or loss is in it; masks are written out from their definition.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from seqloom.sequence import NO_LABEL, Batch
from seqloom.train import computing


@dataclass
class Trajectory:
    """What a run of some steps leaves behind.

    losses, norms: per step; the norm is that of all gradients before clipping. gradients: of the
    first step, before clipping. parameters: after the last step.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)


def dense_mask(batch: Batch, row: int, dtype: torch.dtype) -> Tensor:
    """[1, 1, S, S]: 0 where a query (dim 2) may see a key (dim 3), the least number of the type elsewhere."""
    lengths = batch.documents[row] if batch.documents else (batch.num_tokens,)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    position = torch.arange(batch.num_tokens)
    visible = (document[:, None] == document) & (position <= position[:, None])
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[None, None]


def one_device_steps(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[Sequence[Batch]],
    *,
    clip: float,
    precision: str,
) -> Trajectory:
    """Train `model` on global micro-batches, one sequence a forward pass, and record what happened."""
    model.set_attn_implementation("eager")
    run = Trajectory()
    for micro_batches in steps:
        total = sum(batch.label_count for batch in micro_batches)
        model.zero_grad()
        loss = 0.0
        for batch, row in _rows(micro_batches):
            part = slice(row, row + 1)
            with computing(precision, model.device):
                logits = model(
                    input_ids=batch.tokens[part],
                    position_ids=batch.positions()[part],
                    attention_mask=dense_mask(batch, row, model.dtype),
                    use_cache=False,
                ).logits
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
            share = cross_entropy(wide, batch.labels[row], ignore_index=NO_LABEL, reduction="sum") / total
            share.backward()
            loss += share.item()
        run.losses.append(loss)
        if not run.gradients:
            run.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        run.norms.append(clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
    run.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return run


def _rows(micro_batches: Sequence[Batch]) -> Iterator[tuple[Batch, int]]:
    for batch in micro_batches:
        for row in range(len(batch.tokens)):
            yield batch, row
