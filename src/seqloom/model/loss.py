"""This rank's share of the loss: the base model's hidden states, and the head in chunks."""

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from seqloom.errors import ModelError
from seqloom.memory import chunked_cross_entropy
from seqloom.model.balance import balance_loss, is_balanced
from seqloom.model.zero import inside
from seqloom.sequence import LocalBatch, SequenceShard
from seqloom.tensor import ParallelLinear, split_head

LOSS_CHUNK_TOKENS = 1024


def token_loss(
    model: PreTrainedModel,
    local: LocalBatch,
    shard: SequenceShard,
    *,
    total: int | None = None,
    sequences: int | None = None,
    chunk_tokens: int = LOSS_CHUNK_TOKENS,
) -> Tensor:
    """This rank's share of the mean loss over all label tokens, in nats; the shares of all ranks sum to it.

    total, sequences: label tokens and sequences of the whole optimizer step, over all ranks and micro-batches; by
    default those of this micro-batch. Sequences count where the configuration's output_router_logits adds the
    balance of experts to the loss, as `seqloom.model.balance` has it; 0 leaves that out. chunk_tokens: tokens whose
    logits exist at once. A rank without labels contributes exactly 0. Gradients of the shares sum (never average) over
    ranks to the gradient of the mean: see `sum_gradients`. Raises ModelError for a total without sequences where both
    count, and for a model cut into stages, whose loss is that of `step_loss`.
    """
    if len(getattr(model, "_cut", ())) > 1:
        raise ModelError("A model cut into stages has no token_loss of one rank; use compute_gradients.")
    balanced = is_balanced(model) and sequences != 0
    if balanced and total is not None and sequences is None:
        raise ModelError(
            "token_loss was given total= without sequences=, of which the loss of balanced experts is a mean; give the "
            "sequences of the whole step, too."
        )
    balance = (sequences or local.sequences) if balanced else None
    labels = local.label_count if total is None else total
    return inside(model, _loss, model, local, shard, labels, balance, chunk_tokens)


def _loss(
    model: PreTrainedModel,
    local: LocalBatch,
    shard: SequenceShard,
    total: int,
    sequences: int | None,
    chunk_tokens: int,
) -> Tensor:
    """What `token_loss` gives; sequences: those over which experts are balanced, None where they are not."""
    found = base_outputs(model, local, shard)
    loss = head_loss(model, found.last_hidden_state, local, total, chunk_tokens)
    if sequences is not None:
        loss = loss + balance_loss(model, found.router_logits, shard, sequences)
    return loss


def base_outputs(
    model: PreTrainedModel, local: LocalBatch, shard: SequenceShard, embedded: Tensor | None = None
) -> BaseModelOutput:
    """What the base model gives for the tokens, or for `embedded` [rows, local tokens, hidden] in their place."""
    inputs = local.inputs
    if embedded is not None:
        del inputs["input_ids"]
        inputs["inputs_embeds"] = embedded
    found: BaseModelOutput = model.base_model(**inputs, sequence=shard)
    return found


def head_loss(model: PreTrainedModel, hidden: Tensor, local: LocalBatch, total: int, chunk_tokens: int) -> Tensor:
    """This rank's share of the mean loss from the hidden states [rows, local tokens, hidden] that the head reads."""
    head = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if isinstance(head, ParallelLinear):
        hidden, weight, bias, split = split_head(head, hidden)
    else:
        weight, bias, split = head.weight, head.bias, {}
    summed = chunked_cross_entropy(
        hidden, weight, bias, local.labels, chunk_tokens=chunk_tokens, softcap=softcap, **split
    )
    return summed / max(total, 1)
