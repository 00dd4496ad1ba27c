"""Stages of an unmodified model: the model itself with fewer layers, and a step of all its micro-batches.

A rank keeps the model with its configuration and the full list of layers, so that names and numbers stay; what
lies on other ranks is replaced by modules without parameters that give back what they are given. A stage after the
first is called with `inputs_embeds`, and one before the last gives its hidden states before the norm. So
every family's own forward runs as it is. Where a rank has several stages, each is a view of the model that
shares the modules.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from math import prod
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from seqloom.errors import ModelError
from seqloom.fabric import Fabric
from seqloom.fabric.pipeline import run_stages
from seqloom.model.balance import Tally, is_balanced, tallied_loss, tally, tally_elements
from seqloom.model.families import layers
from seqloom.model.loss import base_outputs, head_loss, token_loss
from seqloom.model.zero import inside
from seqloom.plan import Plan, chunks, stages_of
from seqloom.sequence import LocalBatch, SequenceShard

Computing = Callable[[], AbstractContextManager[object]]
"""Makes the context of forward passes, as autocast."""

_OWN = {
    "bloom": (("word_embeddings", "word_embeddings_layernorm"), ("ln_f",)),
    "gpt2": (("wte", "wpe", "drop"), ("ln_f",)),
}
"""What of the base model stands before its layers and after them, in families for which transformers has no plan."""

_ADDED = {"gpt2": ("wpe",)}
"""Of these, what is added to the hidden states instead of making them."""


class Elsewhere(nn.Module):
    """In place of a module that lies on another rank: gives back what it is given first."""

    def __init__(self, wrap: bool = False) -> None:
        """wrap: give it back in a tuple, as BLOOM's layers do."""
        super().__init__()
        self.wrap = wrap

    def forward(self, given: Tensor, *_: Any, **__: Any) -> Any:
        """`given`, the same tensor."""
        return (given,) if self.wrap else given


class Nothing(nn.Module):
    """In place of a module on another rank whose output is added: a zero."""

    def forward(self, given: Tensor, *_: Any) -> Tensor:
        """A zero, [], on the device of `given`."""
        return torch.zeros((), device=given.device)


def cut_model(model: PreTrainedModel, plan: Plan, rank: int, cut: Sequence[int]) -> None:
    """Keep of `model` the stages of pipeline rank `rank`, in place; cut: the layers of each stage, in order.

    Raises ModelError for a model with parameters of which no rule says where they lie.
    """
    model._cut = tuple(cut)
    if plan.pipeline == 1:
        return
    model._passed = model.get_input_embeddings().weight.dtype  # of hidden states, the same on every rank
    base, mine = model.base_model, stages_of(plan, rank)
    before, after = _sides(model)
    listed = next(name for name, module in base.named_children() if module is layers(model))
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    prefix = f"{model.base_model_prefix}."
    owned = (f"{head}.", *(f"{prefix}{name}." for name in (*before, *after, listed)))
    others = [name for name, _ in model.named_parameters() if not name.startswith(owned)]
    if others:
        raise ModelError(
            f"{type(model).__name__} has parameters in {others[0]}, of which no rule says on which stage of a pipeline "
            "they lie; use pipeline=1."
        )
    _keep(model, mine, plan.num_stages - 1)


def stage_layers(model: PreTrainedModel, stage: int) -> list[nn.Module]:
    """The layers of a stage, in order."""
    return list(layers(model))[sum(model._cut[:stage]) : sum(model._cut[: stage + 1])]


def _sides(model: PreTrainedModel) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The children of the base model before its layers and after them; raises ModelError where nothing says it."""
    family = model.config.model_type
    if family in _OWN:
        return _OWN[family]
    plan = list(getattr(model.config, "base_model_pp_plan", None) or ())
    listed = next(name for name, module in model.base_model.named_children() if module is layers(model))
    if listed not in plan:
        raise ModelError(
            f"transformers names no pipeline plan for {type(model).__name__}, so it cannot be cut into stages; "
            "use pipeline=1."
        )
    return tuple(plan[: plan.index(listed)]), tuple(plan[plan.index(listed) + 1 :])


def _keep(model: PreTrainedModel, stages: Iterable[int], last: int) -> None:
    """Replace in `model` and its base what does not belong to these stages; their other children stay shared."""
    base, cut, stages = model.base_model, model._cut, set(stages)
    before, after = _sides(model)
    kept = {layer for stage in stages for layer in range(sum(cut[:stage]), sum(cut[: stage + 1]))}
    bloom = model.config.model_type == "bloom"
    listed = layers(model)
    name = next(name for name, module in base.named_children() if module is listed)
    setattr(base, name, nn.ModuleList(layer if i in kept else Elsewhere(wrap=bloom) for i, layer in enumerate(listed)))
    if 0 not in stages:
        for name in before:
            setattr(base, name, Nothing() if name in _ADDED.get(model.config.model_type, ()) else Elsewhere())
    if last not in stages:
        for name in after:
            setattr(base, name, Elsewhere())
        head = model.get_output_embeddings()
        name = next(name for name, module in model.named_modules() if module is head)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Elsewhere())


def views(model: PreTrainedModel, plan: Plan, rank: int) -> dict[int, PreTrainedModel]:
    """This rank's stages by number: `model` itself where there is one, else models that share its modules."""
    mine = stages_of(plan, rank)
    if len(mine) == 1:
        return {mine[0]: model}
    if is_balanced(model):  # else each view, made anew for each step, would have transformers watch routers once more
        maybe_install_capturing_hooks(model.base_model)
    found = {}
    for stage in mine:
        view = _shallow(model)
        base = _shallow(model.base_model)
        view._modules[model.base_model_prefix] = base
        _keep(view, [stage], plan.num_stages - 1)
        found[stage] = view
    return found


def join_ends(model: PreTrainedModel) -> None:
    """Note of a tied weight that the first and the last stage hold a copy each: their gradients belong together."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if (weight := getattr(module, "weight", None)) is not None:
            weight.at_ends = True


def _shallow(module: Any) -> Any:
    """Another module of the same children, parameters, hooks and attributes."""
    view = module.__class__.__new__(module.__class__)
    view.__dict__.update(vars(module), _modules=dict(module._modules))
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:  # a forward of the instance's own
            view.__dict__[name] = MethodType(value.__func__, view)
    return view


class _Stage(nn.Module):
    """A stage as a schedule calls it: what goes between stages is one flat tensor, the last gives a loss."""

    def __init__(
        self,
        part: PreTrainedModel,
        first: bool,
        last: bool,
        given: Sequence[tuple[LocalBatch, SequenceShard]],
        passed: Tensor,
        width: int,
        experts: int,
        computing: Computing,
        loss: Callable[[PreTrainedModel, Tensor, LocalBatch, SequenceShard, Tally | None], Tensor],
    ) -> None:
        super().__init__()
        self.part, self.first, self.last, self.given = part, first, last, given
        self.passed, self.width, self.experts = passed, width, experts
        self.computing, self.loss = computing, loss

    def forward(self, *received: Tensor, micro: Tensor) -> Tensor:
        """The hidden states of micro-batch number `micro`, flat, or its loss."""
        result: Tensor = inside(self.part, self._forward, *received, micro=micro)
        return result

    def _forward(self, *received: Tensor, micro: Tensor) -> Tensor:
        local, shard = self.given[int(micro)]
        shape = (*local.input_ids.shape, self.width)
        embedded = None if self.first else received[0][: prod(shape)].view(shape)
        with self.computing():
            found = base_outputs(self.part, local, shard, embedded)
            hidden, met = found.last_hidden_state, None
            if self.experts:
                before = Tally.empty(len(hidden), self.experts, hidden.new_empty((), dtype=self.passed.dtype))
                if not self.first:
                    before = Tally.unpack(received[0][prod(shape) :], len(hidden), self.experts)
                met = tally(self.part, found.router_logits, shard, before)
            if self.last:
                return self.loss(self.part, hidden, local, shard, met)
        if hidden.shape != shape or hidden.dtype != self.passed.dtype:
            raise ModelError(
                f"{type(self.part).__name__} gives hidden states {list(hidden.shape)} in {hidden.dtype} where a "
                f"pipeline passes {list(shape)} in {self.passed.dtype} on; use pipeline=1."
            )
        flat = hidden.flatten() if met is None else torch.cat([hidden.flatten(), met.pack()])
        return nn.functional.pad(flat, (0, self.passed.numel() - flat.numel()))


def _message(
    model: PreTrainedModel, given: Sequence[tuple[LocalBatch, SequenceShard]], width: int, experts: int
) -> Tensor:
    """On the meta device what goes between stages: the hidden states of the largest micro-batch, and its tally.

    experts: of a layer where their balance is in the loss, else 0. Raises ModelError for a type that cannot count.
    """
    if experts and torch.promote_types(model._passed, torch.float32) != model._passed:
        raise ModelError(
            f"output_router_logits=true sends counts of tokens along with a pipeline's hidden states, whose type "
            f"{model._passed} cannot count so far; keep the weights in float32, with precision bf16 or fp16."
        )
    sizes = [local.input_ids.shape for local, _ in given]
    counted = bool(experts)
    most = max(rows * tokens * width + counted * tally_elements(rows, experts) for rows, tokens in sizes)
    return torch.empty(most, dtype=model._passed, device="meta")


def step_loss(
    model: PreTrainedModel,
    given: Iterable[tuple[LocalBatch, SequenceShard]],
    fabric: Fabric,
    *,
    total: int,
    sequences: int,
    chunk_tokens: int,
    computing: Computing,
    scale: float = 1.0,
    backward: bool = True,
) -> Tensor:
    """Run micro-batches forward and, unless told otherwise, backward, through stages where the plan has them.

    given: this rank's part of each micro-batch; without a pipeline each is taken when it is its turn. total,
    sequences: label tokens and sequences of the step, as `token_loss` takes them. scale: what losses are multiplied by
    for backward. computing: makes the context of forward passes. Gradients are added up where backward leaves them.
    Every rank calls it together. Returns this rank's share of the mean loss, [], float64, in nats, without a graph;
    the shares of all ranks sum to it.
    """
    if fabric.pipeline.size > 1:
        return _staged_loss(
            model,
            list(given),
            fabric,
            total=total,
            sequences=sequences,
            chunk_tokens=chunk_tokens,
            computing=computing,
            scale=scale,
            backward=backward,
        )
    share = torch.zeros((), dtype=torch.float64, device=fabric.device)
    for local, shard in given:
        with computing():
            loss = token_loss(model, local, shard, total=total, sequences=sequences, chunk_tokens=chunk_tokens)
        if backward:
            (loss * scale if scale != 1 else loss).backward()
        share += loss.detach()
    return share


def _staged_loss(
    model: PreTrainedModel,
    given: Sequence[tuple[LocalBatch, SequenceShard]],
    fabric: Fabric,
    *,
    total: int,
    sequences: int,
    chunk_tokens: int,
    computing: Computing,
    scale: float,
    backward: bool,
) -> Tensor:
    """`step_loss` of a model that is cut into stages; the share of all but the last stage is 0."""
    plan, last = fabric.plan, fabric.plan.num_stages - 1
    hidden, width = plan.tensor_grid.outer.hidden, model.config.hidden_size
    if hidden:
        width = chunks(width, fabric.grid[hidden].size)[fabric.grid[hidden].rank]
    experts = model.num_experts if is_balanced(model) and sequences else 0
    passed = _message(model, given, width, experts)

    def loss(
        part: PreTrainedModel, hidden: Tensor, local: LocalBatch, shard: SequenceShard, met: Tally | None
    ) -> Tensor:
        found = head_loss(part, hidden, local, total, chunk_tokens)
        if met is not None:
            found = found + tallied_loss(part, met, shard, sequences)
        return found * scale if scale != 1 else found

    stages = {
        number: _Stage(part, number == 0, number == last, given, passed, width, experts, computing, loss)
        for number, part in views(model, plan, fabric.pipeline.rank).items()
    }
    losses = run_stages(
        stages,
        fabric.pipeline,
        fabric.device,
        schedule=plan.schedule,
        num_stages=plan.num_stages,
        micro_batches=len(given),
        passed=passed,
        backward=backward,
    )
    share = torch.zeros((), dtype=torch.float64, device=fabric.device)
    for found in losses:
        share += found.detach()
    return share / scale
