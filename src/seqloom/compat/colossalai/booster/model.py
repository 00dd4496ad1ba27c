"""A transformers model under a plugin's plan, called as it was before: whole batches in, the loss of all out."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from seqloom.compat.colossalai.booster.plugin import _Plugin
from seqloom.compat.colossalai.state import PROCESS
from seqloom.errors import ConfigError, DataError, counted
from seqloom.fabric import Fabric, all_reduce_, start_collect
from seqloom.model import layer_windows, parallelize, step_loss, token_loss
from seqloom.plan import micro_batches_needed
from seqloom.sequence import Batch, SequenceShard, shard_batch
from seqloom.sequence.batch import NO_LABEL
from seqloom.tensor import reduce_from_tensor_region
from seqloom.train import computing

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once where the loss is computed."""

_IDLE = {"use_cache": False, "return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""Arguments of a forward pass that say what is so anyway."""


class BoostedModel(nn.Module):
    """What `Booster.boost` returns for a model; `unwrap` gives the model itself, in parts."""

    def __init__(self, model: PreTrainedModel, plugin: _Plugin) -> None:
        """Splits the model in place. Raises PlanError and ModelError as `parallelize`."""
        super().__init__()
        plan = plugin.plan
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            model.gradient_checkpointing_disable()
            plan = replace(plan, recompute="full")
        self.precision: str = plugin.settings["precision"]
        if self.precision != "float32":
            model.float()  # what is stepped; forward passes compute in the lower type
        self.fabric = replace(plugin.fabric, plan=plan)
        self.module = parallelize(model, self.fabric)
        self.windows = layer_windows(model)
        self.rows = 0

    def unwrap(self) -> PreTrainedModel:
        """The model that was boosted."""
        return self.module

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """The loss, where labels are given, otherwise the logits.

        input_ids, attention_mask, labels: [rows, tokens] of this data rank, whole, as transformers takes them; ranks
        that share a sequence are given the same. loss: the mean over all label tokens of all data ranks' rows, the
        same on every rank, for `Booster.backward`. logits: [rows, tokens, vocabulary] of this data rank's rows, and
        only without gradients. Raises ConfigError for other arguments, and under a pipeline, which
        `Booster.execute_pipeline` runs; DataError for rows that cannot be taken.
        """
        for name, value in others.items():
            if value is not None and (name not in _IDLE or value != _IDLE[name]):
                raise ConfigError(
                    f"A boosted model takes input_ids, attention_mask and labels, not {name}; leave it out."
                )
        if self.fabric.plan.pipeline > 1:
            raise ConfigError("A model in stages cannot be called; use booster.execute_pipeline.")
        if labels is None and torch.is_grad_enabled():
            raise ConfigError("Logits have no gradients here; give labels, or call the model under torch.no_grad().")
        batch = self._batch(input_ids, attention_mask, labels)
        local, shard = shard_batch(batch, self.fabric, windows=self.windows)
        with computing(self.precision, self.fabric.device):
            if labels is None:
                found = self.module(**local.inputs, sequence=shard).logits
                return CausalLMOutputWithPast(logits=whole_tokens(found, shard))
            share = token_loss(self.module, local, shard, chunk_tokens=CHUNK_TOKENS)
        return CausalLMOutputWithPast(loss=reduce_from_tensor_region(share, self.fabric.world))

    def run_stages(self, given: dict[str, Tensor], micro_batches: int, *, backward: bool, scale: float) -> Tensor:
        """The loss of this data rank's rows in so many micro-batches, run through the pipeline, on every rank.

        scale: what the loss is multiplied by for backward. Raises DataError for rows that cannot be cut,
        ConfigError for too few micro-batches.
        """
        if strange := set(given) - {"input_ids", "attention_mask", "labels"}:
            raise ConfigError(f"A boosted model takes no {', '.join(sorted(strange))}; leave it out.")
        rows = len(given["input_ids"])
        if rows % micro_batches or "labels" not in given:
            raise DataError(
                f"A pipeline is given labels, and rows that {micro_batches} micro-batches share evenly, not {rows}."
            )
        if (needed := micro_batches_needed(self.fabric.plan, micro_batches)) > micro_batches:
            raise ConfigError(
                f"{counted(micro_batches, 'micro-batch')} cannot be ordered over the stages of '{self.fabric.plan}'; "
                f"give the plugin num_microbatches={needed}."
            )
        parts = [
            self._batch(*(chunk.get(name) for name in ("input_ids", "attention_mask", "labels")))
            for chunk in (
                {name: tensor.chunk(micro_batches)[i] for name, tensor in given.items()} for i in range(micro_batches)
            )
        ]
        share = step_loss(
            self.module,
            (shard_batch(batch, self.fabric, windows=self.windows) for batch in parts),
            self.fabric,
            total=sum(batch.label_count for batch in parts),
            sequences=sum(len(batch.tokens) for batch in parts),
            chunk_tokens=CHUNK_TOKENS,
            computing=partial(computing, self.precision, self.fabric.device),
            scale=scale,
            backward=backward,
        )
        return all_reduce_(share, self.fabric.world)

    def _batch(self, tokens: Tensor | None, mask: Tensor | None, labels: Tensor | None) -> Batch:
        """The rows of all data ranks as one batch, labels shifted."""
        assert tokens is not None
        mask = torch.ones_like(tokens) if mask is None else mask
        labels = torch.full_like(tokens, NO_LABEL) if labels is None else labels
        if not tokens.shape == mask.shape == labels.shape or tokens.dim() != 2:
            shapes = ", ".join(str(list(one.shape)) for one in (tokens, mask, labels))
            raise DataError(f"input_ids, attention_mask and labels are {shapes}; give all as [rows, tokens].")
        tokens, mask, labels = _of_all(torch.stack([tokens, mask.to(tokens.dtype), labels], 1), self.fabric).unbind(1)
        shifted = torch.full_like(labels, NO_LABEL)
        shifted[:, :-1] = labels[:, 1:]
        padded = bool((mask == 0).any())
        if padded and bool(((shifted != NO_LABEL) & (mask == 0)).any()):
            raise DataError(f"A position that the attention_mask leaves out has a label; give it {NO_LABEL}.")
        if padded and self.module.config.model_type == "gpt2" and bool((mask[:, 0] == 0).any()):
            raise DataError("Padding stands before the tokens, which a table of positions counts; pad after them.")
        batch = Batch.from_tokens(
            tokens, attention_mask=mask if padded else None, first_row=self.rows, seed=PROCESS.seed
        )
        self.rows += len(tokens) if self.training else 0
        return replace(batch, labels=shifted)


def _of_all(rows: Tensor, fabric: Fabric) -> Tensor:
    """The rows [rows, 3, tokens] (tokens, mask, labels) of all data ranks, padded after the tokens to one length."""
    axis = fabric.data
    rows = rows.to(fabric.device)
    if axis.size == 1:
        return rows
    said = torch.tensor([[rows.shape[0], rows.shape[2]]], device=fabric.device)
    counts, lengths = start_collect(said, axis, 0, (1,) * axis.size).wait().T.tolist()
    blank = torch.tensor([0, 0, NO_LABEL], device=fabric.device)[:, None].expand(len(rows), 3, max(lengths))
    padded = blank.clone()
    padded[:, :, : rows.shape[2]] = rows
    return start_collect(padded, axis, 0, tuple(counts)).wait()


def whole_tokens(x: Tensor, shard: SequenceShard) -> Tensor:
    """[rows, all tokens, ...] in order from this rank's [rows, tokens, ...]; every rank calls it together."""
    x = start_collect(x, shard.ulysses, 1, shard.group_tokens).wait()
    x = start_collect(x, shard.ring, 1, shard.ring_tokens).wait()
    order = torch.cat([shard.positions(owner, x.device) for owner in range(shard.ring.size)])
    return torch.empty_like(x).index_copy_(1, order, x)
