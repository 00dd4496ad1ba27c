"""An unmodified transformers model under a plan, and the gradients of its replicas."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqloom.errors import ModelError
from seqloom.fabric import Axis, Fabric, Pending, broadcast_, start_all_reduce_
from seqloom.memory import chunked_cross_entropy
from seqloom.model.probe import connect, probe
from seqloom.plan import ModelShape, check
from seqloom.sequence import LocalBatch, SequenceShard

BUCKET_BYTES = 32 * 2**20
"""Gradients are summed in flat buffers of about this size: few messages, and each on its way while the next fills."""

LOSS_CHUNK_TOKENS = 1024


def parallelize(model: PreTrainedModel, fabric: Fabric) -> PreTrainedModel:
    """Make `model` compute its part of every sequence, as the fabric's plan says; returns the same model.

    The weights become those of rank 0 everywhere and move to the fabric's device. From then on it
    is called with `sequence=`, as in `model(**local.inputs, sequence=shard)`, and without labels: see
    `token_loss`. Raises PlanError when the plan does not fit the model, ModelError when the model has
    what cannot be split exactly.
    """
    shape = ModelShape.from_config(model.config.to_dict())
    check(fabric.plan, shape)
    _refuse_dropout(model)
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ModelError(
            f"The head of {type(model).__name__} is {type(head).__name__}, not a plain nn.Linear, so its loss cannot "
            "be computed in chunks; merge adapters into it, and give a model with a language modelling head."
        )
    probe(model)
    connect(model)
    for part in (model, model.base_model):
        part.register_forward_pre_hook(_refuse_what_is_whole, with_kwargs=True)
    model.to(fabric.device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            broadcast_(tensor, fabric.replicas)
    return model


def _refuse_what_is_whole(model: nn.Module, _: tuple[Any, ...], given: dict[str, Any]) -> None:
    """Refuse what only makes sense with the whole sequence at hand.

    The model's own loss would shift labels inside this rank's part, and average over its tokens alone;
    a cache would hold this rank's keys alone; positions would count from this rank's first token.
    """
    if given.get("sequence") is not None and given.get("position_ids") is None:
        raise ModelError(
            f"{type(model).__name__} was called without position_ids, which it would count from this rank's first "
            "token; call it with model(**local.inputs, sequence=shard)."
        )
    if given.get("use_cache") or given.get("past_key_values") is not None:
        raise ModelError(
            f"{type(model).__name__} was asked for a cache of keys and values, which would hold this rank's alone; "
            "call it with use_cache=False, as local.inputs has it."
        )
    if given.get("labels") is not None:
        raise ModelError(
            f"{type(model).__name__} was given labels, of which it would make a loss of this rank's tokens alone; "
            "leave them out and use token_loss."
        )


def layer_windows(model: PreTrainedModel) -> tuple[int | None, ...]:
    """Each layer's attention window, for `shard_batch(..., windows=...)`, so that layout=balanced evens them out."""
    return ModelShape.from_config(model.config.to_dict()).windows


def _refuse_dropout(model: PreTrainedModel) -> None:
    """Raise ModelError where something other than attention drops out: torch draws it anew on every rank."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and not name.endswith("attention_dropout"):  # which attention takes over
            probability = module.p
        else:
            probability = getattr(module, "hidden_dropout", 0.0)  # BLOOM's, a number handed to a function
        if isinstance(probability, float | int) and probability > 0:
            raise ModelError(f"{name} drops out with p={probability}, which would depend on the plan; set it to 0.")


def token_loss(
    model: PreTrainedModel,
    local: LocalBatch,
    shard: SequenceShard,
    *,
    total: int | None = None,
    chunk_tokens: int = LOSS_CHUNK_TOKENS,
) -> Tensor:
    """This rank's share of the mean loss over all label tokens, in nats; the shares of all ranks sum to it.

    total: label tokens of the whole optimizer step, over all ranks and micro-batches; by default
    those of this micro-batch. chunk_tokens: tokens whose logits exist at once. A rank without
    labels contributes exactly 0. Gradients of the shares sum (never average) over ranks to the
    gradient of the mean: see `sum_gradients`.
    """
    hidden = model.base_model(**local.inputs, sequence=shard).last_hidden_state
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    summed = chunked_cross_entropy(hidden, head.weight, bias, local.labels, chunk_tokens=chunk_tokens, softcap=softcap)
    return summed / max(local.label_count if total is None else total, 1)


def sum_gradients(model: nn.Module, fabric: Fabric) -> None:
    """Sum every gradient over all ranks that hold the same weights; call it after backward.

    After it each rank holds the gradient of the global mean loss. Raises ModelError where a
    trainable parameter has no gradient: the ranks could not tell it from a missing message.
    """
    bucket: list[Tensor] = []
    pending: list[tuple[list[Tensor], Pending]] = []
    held = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            raise ModelError(
                f"{name} has no gradient: the loss does not depend on it; call requires_grad_(False) on it."
            )
        if bucket and (held > BUCKET_BYTES or bucket[0].dtype != parameter.grad.dtype):
            pending.append(_start(bucket, fabric.replicas))
            bucket, held = [], 0
            if len(pending) > 1:  # two on their way; a third would only hold memory
                _finish(*pending.pop(0))
        bucket.append(parameter.grad)
        held += parameter.grad.numel() * parameter.grad.element_size()
    if fabric.replicas.size == 1:
        return
    if bucket:
        pending.append(_start(bucket, fabric.replicas))
    for started in pending:
        _finish(*started)


def _start(gradients: list[Tensor], axis: Axis) -> tuple[list[Tensor], Pending]:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    return gradients, start_all_reduce_(flat, axis)


def _finish(gradients: list[Tensor], work: Pending) -> None:
    for gradient, part in zip(gradients, work.wait().split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
