"""Sizes of a configuration with which there is no model, of any plan."""

from collections.abc import Iterator, Mapping
from typing import Any

from seqloom.errors import counted


def misfits(
    values: Mapping[str, Any], family: str, kv_heads: int, head_dim: int, experts: int, *, rotary: bool
) -> Iterator[str]:
    """Why these numbers fail inside a forward pass, where transformers would say it in words about tensors.

    values: of the configuration, by the names most families have. rotary: whether positions turn pairs of channels.
    """
    heads, hidden, chosen = values["num_attention_heads"], values["hidden_size"], values.get("num_experts_per_tok", 0)
    if heads % kv_heads:
        yield (
            f"{counted(heads, 'query head')} cannot share {counted(kv_heads, 'key/value head')} evenly; use a divisor "
            f"of {heads}."
        )
    if not rotary and hidden % heads:
        yield (
            f"{hidden} hidden channels cannot be cut into {counted(heads, 'head')} of {family} evenly; use a multiple "
            "of them."
        )
    if rotary and head_dim % 2:
        yield (
            f"Heads of {counted(head_dim, 'channel')} cannot be turned in pairs by rotary positions; use an even "
            f"head_dim, or a hidden_size such as {heads * (head_dim + 1)}."
        )
    if experts and chosen > experts:
        yield (
            f"num_experts_per_tok={chosen} is more than the {counted(experts, 'expert')} of a layer; use at most so "
            "many."
        )
