"""The reference: the untouched transformers model on one device, with its own attention and a dense mask.

Nothing of seqloom's attention, sharding, dropout or loss is in it; masks and the coins of dropout are written
out from their definition.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from seqloom.errors import ModelError
from seqloom.sequence import NO_LABEL, Batch
from seqloom.train import computing
from seqloom.verify.coins import coins


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


def visible(batch: Batch, row: int, window: int | None = None) -> Tensor:
    """[S, S] bool: whether a query (dim 0) may see a key (dim 1) in a layer of this window: the definition.

    Same document, and that no padding; among these the document's prefix, or what is neither later
    (where the rule is causal) nor `window` or more away; and all of it only where the rule allows.
    """
    lengths = batch.documents[row] if batch.documents else (batch.num_tokens,)
    sizes = torch.tensor(lengths)
    document = torch.arange(len(lengths)).repeat_interleave(sizes)
    position = torch.arange(batch.num_tokens)
    inside = position - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    q, k = position[:, None], position[None, :]
    near = torch.ones(batch.num_tokens, batch.num_tokens, dtype=torch.bool)
    for width in (batch.rule.window, window):
        if width is not None:
            near &= (q - k).abs() < width
    if batch.rule.causal:
        near &= k <= q
    seen = (document[:, None] == document) & (near | (inside[None, :] < batch.rule.prefix))
    if batch.rule.allowed is not None:
        seen &= batch.rule.allowed(q, k)
    for number in batch.padding[row] if batch.padding else ():
        seen &= (document != number)[:, None]
    return seen


def dense_mask(batch: Batch, row: int, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """[1, 1, S, S]: 0 where a query (dim 2) may see a key (dim 3), the least number of the type elsewhere."""
    seen = visible(batch, row, window)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def layer_masks(model: PreTrainedModel, batch: Batch, row: int) -> Tensor | dict[str, Tensor]:
    """The dense mask of every layer, in the form the family takes: one for all, or one for each type of layer."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = {module.layer_type for module in model.modules() if isinstance(getattr(module, "layer_type", None), str)}
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ModelError(f"Layers of type {', '.join(sorted(unknown))} have no reference yet; use another model.")
    if not kinds:
        return dense_mask(batch, row, model.dtype, window).to(model.device)
    windows = {"full_attention": None, "sliding_attention": window}
    return {kind: dense_mask(batch, row, model.dtype, windows[kind]).to(model.device) for kind in kinds}


def one_device_logits(model: PreTrainedModel, batch: Batch, row: int, *, precision: str) -> Tensor:
    """[1, S, vocab]: the whole row through the model's own code."""
    logits: Tensor = one_device_output(model, batch, row, precision=precision).logits
    return logits


def one_device_output(model: PreTrainedModel, batch: Batch, row: int, *, precision: str) -> Any:
    """What the model's own code makes of the whole row, its balance of experts among it."""
    part = slice(row, row + 1)
    mask = layer_masks(model, batch, row)
    given = {} if model.config.model_type == "bloom" else {"attention_mask": mask}
    # Rows without a number are of a model that does not drop out.
    drawn = nullcontext() if batch.first_row is None else coins(model, batch.seed, batch.first_row + row)
    with drawn, _bloom_mask(model, mask), _padding_alone(model, batch, row), computing(precision, model.device):
        return model(
            input_ids=batch.tokens[part].to(model.device),
            position_ids=batch.positions()[part].to(model.device),
            use_cache=False,
            **given,
        )


def _bloom_mask(model: PreTrainedModel, mask: object) -> AbstractContextManager[object]:
    """BLOOM takes no dense mask: while this is entered, the mask that it makes for itself is the one given."""
    if model.config.model_type != "bloom":
        return nullcontext()
    return patch.object(sys.modules[type(model).__module__], "create_causal_mask", lambda **_: mask)


def _padding_alone(model: PreTrainedModel, batch: Batch, row: int) -> AbstractContextManager[object]:
    """The balance of experts takes the mask for one of padding: while this is entered it is given that of the row."""
    module = sys.modules[type(model).__module__]
    own = getattr(module, "load_balancing_loss_func", None)
    if own is None:
        return nullcontext()
    mask = None
    if batch.documents and batch.padding and batch.padding[row]:
        kept = [number not in batch.padding[row] for number in range(len(batch.documents[row]))]
        mask = torch.tensor(kept).repeat_interleave(torch.tensor(batch.documents[row])).to(model.device)[None]
    given = lambda logits, experts, each, _: own(logits, experts, each, mask)  # noqa: E731
    return patch.object(module, "load_balancing_loss_func", given)


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
        rows = sum(len(batch.tokens) for batch in micro_batches)
        model.zero_grad()
        loss = 0.0
        for batch, row in _rows(micro_batches):
            found = one_device_output(model, batch, row, precision=precision)
            logits = found.logits
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
            labels = batch.labels[row].to(model.device)
            share = cross_entropy(wide, labels, ignore_index=NO_LABEL, reduction="sum") / total
            if getattr(found, "aux_loss", None) is not None:
                share = share + found.aux_loss * (model.router_aux_loss_coef / rows)
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
