"""The loss that keeps a router from favouring a few experts, by the families' own formula, whatever the plan.

Of one sequence, with E experts of which a token takes k, over the tokens of all its layers with experts together:

    balance = E sum_e f_e P_e      f_e: times that e is among a token's k, P_e: its probability, both a mean over tokens

(Switch Transformer, arXiv 2101.03961, equations 4 to 6; transformers' `load_balancing_loss_func`). It is no mean
of the losses of parts. But f has no gradient, so ranks that share a sequence sum their counts, and each adds
what its own tokens' probabilities give: these shares sum to the whole. The loss of a step has its mean over all
sequences, times the configuration's `router_aux_loss_coef`.

Stages of a pipeline hand on the sums so far, behind the hidden states: probabilities, whose gradient comes back the
same way, and counts. So the last stage has those of all layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from seqloom.errors import ModelError
from seqloom.fabric import all_reduce_
from seqloom.geometry import Mask
from seqloom.sequence import SequenceShard


def is_balanced(model: PreTrainedModel) -> bool:
    """Whether the model's configuration asks for the balance of its experts in the loss."""
    return bool(getattr(model.config, "output_router_logits", False))


class Tally(NamedTuple):
    """Sums over this rank's tokens in some layers: probabilities [rows, experts], counts [rows, experts + 1].

    Counts are of the times that each expert was chosen and, last, of tokens; they have no gradient.
    """

    probabilities: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, rows: int, experts: int, like: Tensor) -> "Tally":
        """Of no layers yet, in the type and on the device of `like`."""
        return cls(like.new_zeros(rows, experts), like.new_zeros(rows, experts + 1))

    @classmethod
    def unpack(cls, flat: Tensor, rows: int, experts: int) -> "Tally":
        """What `pack` has made one tensor of; whatever comes after it is left."""
        probabilities, counts, _ = flat.tensor_split([rows * experts, tally_elements(rows, experts)])
        return cls(probabilities.view(rows, experts), counts.detach().view(rows, experts + 1))

    def pack(self) -> Tensor:
        """All of it as one flat tensor."""
        return torch.cat([self.probabilities.flatten(), self.counts.flatten()])


def tally_elements(rows: int, experts: int) -> int:
    """The numbers in a tally."""
    return rows * (2 * experts + 1)


def tally(model: PreTrainedModel, router_logits: Sequence[Tensor], shard: SequenceShard, before: Tally) -> Tally:
    """`before` and the sums of more layers.

    router_logits: of each layer with experts [rows * tokens, experts], of the tokens that this rank holds on the
    outer side. Padding does not count.
    """
    (probabilities, counts), each = before, model.num_experts_per_tok
    rows, experts = probabilities.shape
    kept = _kept(shard, counts.device).to(counts.dtype)
    counts = counts.clone()
    counts[:, -1] += kept.sum(1) * len(router_logits)
    for logits in router_logits:
        shares = logits.view(rows, -1, experts).softmax(-1, dtype=counts.dtype)
        probabilities = probabilities + (shares * kept[..., None]).sum(1)
        chosen = shares.detach().topk(each, -1).indices
        counts.scatter_add_(1, chosen.flatten(1), kept.repeat_interleave(each, 1))
    return Tally(probabilities, counts)


def tallied_loss(model: PreTrainedModel, found: Tally, shard: SequenceShard, sequences: int) -> Tensor:
    """This rank's share of the mean balance of so many sequences, from the sums of all layers."""
    counts = found.counts
    for axis in shard.sharing:
        counts = all_reduce_(counts, axis)
    tokens = counts[:, -1:].clamp_min(1)
    balance = found.probabilities.shape[1] * (counts[:, :-1] / tokens * (found.probabilities / tokens)).sum()
    return balance * (model.router_aux_loss_coef / sequences)


def balance_loss(
    model: PreTrainedModel, router_logits: Sequence[Tensor], shard: SequenceShard, sequences: int
) -> Tensor:
    """This rank's share of the mean balance of so many sequences, times its coefficient; the shares sum to it.

    router_logits: as `tally` has them, of all layers.
    """
    if not router_logits:
        raise ModelError(
            f"{type(model).__name__} was asked for output_router_logits=true but has no layer with experts; set it to "
            "false."
        )
    first = router_logits[0]
    wide = first.new_empty((), dtype=torch.promote_types(first.dtype, torch.float32))
    found = tally(model, router_logits, shard, Tally.empty(len(shard.masks), first.shape[-1], wide))
    return tallied_loss(model, found, shard, sequences)


def _kept(shard: SequenceShard, device: torch.device) -> Tensor:
    """[rows, tokens] bool: which of the tokens that this rank holds on the outer side are no padding."""
    spans = shard.tokens.outer if shard.tokens else shard.spans
    held = torch.cat([torch.arange(*span) for span in spans])
    return torch.stack([_no_padding(mask, shard.layout.num_tokens)[held] for mask in shard.masks]).to(device)


def _no_padding(mask: Mask, num_tokens: int) -> Tensor:
    """[num_tokens] bool."""
    if not mask.padding or mask.documents is None:
        return torch.ones(num_tokens, dtype=torch.bool)
    kept = torch.ones(len(mask.documents), dtype=torch.bool)
    kept[list(mask.padding)] = False
    return kept.repeat_interleave(torch.tensor(mask.documents))
