"""An unmodified transformers model under a plan, and the gradients of its replicas."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from seqloom.errors import ModelError
from seqloom.fabric import Fabric, broadcast_
from seqloom.model.experts import split_experts
from seqloom.model.families import layers
from seqloom.model.pieces import count_copies, tied_names
from seqloom.model.pipeline import cut_model, join_ends, stage_layers
from seqloom.model.probe import connect, probe
from seqloom.model.recompute import recompute
from seqloom.model.tensor import split_model
from seqloom.model.whole import install_save
from seqloom.model.zero import shard as share_out
from seqloom.plan import ModelShape, check, cut, stages_of, units
from seqloom.sequence import SequenceShard
from seqloom.tensor import ParallelDropout, TensorGroup

ATTENTION_DROPOUTS = ("attention_dropout", "attn_dropout")
"""Names of dropout modules whose probability the attention function is given."""


def parallelize(model: PreTrainedModel, fabric: Fabric, *, num_tokens: int | None = None) -> PreTrainedModel:
    """Make `model` compute its part of every sequence, as the fabric's plan says; returns the same model.

    The weights become those of rank 0 everywhere and move to the fabric's device. Under tensor plans each
    rank keeps its part of them as new parameters: convert types before this call, and make optimizers and
    hooks after it. From then on it is called with `sequence=`, as in `model(**local.inputs, sequence=shard)`,
    and without labels: see `token_loss`. Of a pipeline each rank keeps its stages, cut for sequences of
    `num_tokens` (see `plan.cut`), and runs them by `step_loss`. Its `save_pretrained` is called by all ranks
    together, as `save_whole`. Raises PlanError when the plan does not fit the model, ModelError when the model has what
    cannot be split exactly, or a plan already.
    """
    if getattr(model, "_split_by", None) is not None:
        raise ModelError(f"The model was split already, under '{model._split_by}'; build it anew for another plan.")
    shape = ModelShape.from_config(model.config.to_dict())
    check(fabric.plan, shape)
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ModelError(
            f"The head of {type(model).__name__} is {type(head).__name__}, not a plain nn.Linear, so its loss cannot "
            "be computed in chunks; merge adapters into it, and give a model with a language modelling head."
        )
    probe(model, fabric.plan)
    connect(model)
    group = TensorGroup.of(fabric)
    model._tied_names = tied_names(model)
    numbers = {name: number for number, (name, _) in enumerate(model.named_modules())}
    tied = head.weight is model.get_input_embeddings().weight
    if fabric.plan.pipeline > 1:
        # Before the cut: stages of one model, whatever weights the ranks came with.
        _share_weights(model, fabric)
    cut_model(model, fabric.plan, fabric.pipeline.rank, cut(fabric.plan, shape, num_tokens))
    for part in (model, model.base_model):
        part.register_forward_pre_hook(_refuse_what_is_whole, with_kwargs=True)
    for part in (model.base_model, *layers(model)):
        part.register_forward_pre_hook(partial(_bind, group), with_kwargs=True)
    if fabric.plan.tensor == 1:
        model.to(fabric.device)
    if fabric.plan.pipeline == 1:
        _share_weights(model, fabric)
    split_experts(model, fabric)
    if fabric.plan.tensor > 1:
        split_model(model, group, tied=tied)
        for module in model.modules():  # Module.to would swap the parameters, and forget what is said of them
            module._buffers.update(
                {name: b if b is None else b.to(fabric.device) for name, b in module._buffers.items()}
            )
    if tied and fabric.ends.size > 1:
        join_ends(model)
    _draw_dropouts(model, group, numbers)
    _keep_less(model, fabric, group)
    count_copies(model, fabric)
    install_save(model, fabric)
    model._split_by = fabric.plan
    return model


def _keep_less(model: PreTrainedModel, fabric: Fabric, group: TensorGroup) -> None:
    """Have backward compute layers again, stage by stage, and share parameters out, as the plan says."""
    shared: list[nn.Module] = []
    together: list[range] = []
    for stage in stages_of(fabric.plan, fabric.pipeline.rank):
        held = stage_layers(model, stage)
        again = units(fabric.plan, stage, len(held))
        recompute(held, again, group, fabric.plan.activations)
        together += [range(len(shared) + unit.start, len(shared) + unit.stop) for unit in again]
        shared += held
    if fabric.plan.zero >= 2:
        share_out(model, shared, fabric, together)


def _share_weights(model: PreTrainedModel, fabric: Fabric) -> None:
    """Make the weights those of rank 0 everywhere."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            broadcast_(tensor, fabric.world)


def _bind(group: TensorGroup, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the split modules how the sequences are split that the model or one of its layers is called with."""
    group.shard = next((x for x in (*args, *kwargs.values()) if isinstance(x, SequenceShard)), None)
    if group.shard is None and max(group.grid.sizes) > 1:
        raise ModelError(
            f"{type(module).__name__} was called without a sequence; after parallelize call the model with "
            "model(**local.inputs, sequence=shard), as shard_batch gives them."
        )


def _draw_dropouts(model: PreTrainedModel, group: TensorGroup, numbers: Mapping[str, int]) -> None:
    """Replace dropouts of hidden states by ones that every plan draws alike; attention takes over its own.

    numbers: of the modules, by name, as the whole model has them.
    Raises ModelError for a dropout that is no module of its own, which torch would draw anew on every rank,
    and for one between split linears.
    """
    for name, module in list(model.named_modules()):
        probability = module.p if isinstance(module, nn.Dropout) else getattr(module, "hidden_dropout", 0.0)
        parent, _, child = name.rpartition(".")
        if not probability or child in ATTENTION_DROPOUTS:
            continue
        if not isinstance(module, nn.Dropout):  # BLOOM's, a number handed to a function
            raise ModelError(f"{name} drops out with p={probability}, which would depend on the plan; set it to 0.")
        if getattr(module, "tensor_side", "outer") == "inner":
            raise ModelError(
                f"{name} drops out with p={probability} between linears that a tensor grid splits, which is "
                "not supported; set it to 0."
            )
        width = model.config.hidden_size if group.grid.outer.hidden else None
        drawn = ParallelDropout(module.p, group, "outer", numbers[name], width)
        setattr(model.get_submodule(parent), child, drawn.train(module.training))


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
    if given.get("logits_to_keep"):
        raise ModelError(
            f"{type(model).__name__} was given logits_to_keep={given['logits_to_keep']}, which "
            "would keep this rank's last tokens; leave it out and take the positions of shard.spans."
        )
    if given.get("labels") is not None:
        raise ModelError(
            f"{type(model).__name__} was given labels, of which it would make a loss of this rank's tokens alone; "
            "leave them out and use token_loss."
        )


def layer_windows(model: PreTrainedModel) -> tuple[int | None, ...]:
    """Each layer's attention window, for `shard_batch(..., windows=...)`, so that layout=balanced evens them out."""
    return ModelShape.from_config(model.config.to_dict()).windows
