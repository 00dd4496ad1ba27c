"""The head as the loss takes it: hidden states gathered, this rank's part of the vocabulary, no logits."""

from typing import Any

from torch import Tensor

from seqloom.plan import chunks
from seqloom.tensor.group import TOKENS, Transfer
from seqloom.tensor.linear import computed_in
from seqloom.tensor.modules import ParallelLinear
from seqloom.tensor.regions import copy_to_tensor_region, gather_from_sequence_parallel_region


def split_head(head: ParallelLinear, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """What `memory.chunked_cross_entropy` takes: hidden, weight, bias, and how the vocabulary is split.

    hidden: [..., tokens, hidden part] of the outer side. Returned are [..., tokens, hidden], gathered as the head's
    input is, [vocabulary part, hidden], and `vocabulary`, `first` and, where the logits are summed over an
    axis, `scatter`.
    """
    group, (weight,), (bias,) = head.group, head.weights(), head.biases()
    dtype = computed_in(hidden)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    collect = group.collecting(head.moves.x, hidden, head.in_features)
    tokens = sum(collect.sizes) if collect is not None and collect.dim == TOKENS else hidden.shape[TOKENS]
    scatter = group.scattering(head.moves.y, tokens, head.out_features)
    vocabulary = group.axes[group.grid.inner.hidden or ""]
    split: dict[str, Any] = {
        "vocabulary": vocabulary,
        "first": sum(chunks(head.out_features, vocabulary.size)[: vocabulary.rank]),
    }
    if scatter is not None:
        split["scatter"] = (scatter.axis, scatter.sizes)
    move = group.weight(head.moves, (head.out_features, head.in_features))
    return _gathered(hidden, collect), _gathered(weight, move), bias, split


def _gathered(x: Tensor, move: Transfer | None) -> Tensor:
    if move is None:
        return x
    if move.dim is None:
        return copy_to_tensor_region(x, move.axis)
    return gather_from_sequence_parallel_region(x, move.axis, move.dim, move.sizes)
