"""Sizes of a configuration with which there is no model, of any plan."""

from collections.abc import Iterator, Mapping
from typing import Any


def misfits(
    values: Mapping[str, Any], family: str, kv_heads: int, head_dim: int, experts: int, *, rotary: bool
) -> Iterator[str]:
    """Why these numbers fail inside a forward pass, where transformers would say it in words about tensors.

    values: of the configuration, by the names most families have. rotary: whether positions turn pairs of channels.
    """
    heads, hidden, chosen = values["num_attention_heads"], values["hidden_size"], values.get("num_experts_per_tok", 0)
    if heads % kv_heads:
        yield f"{heads} query heads cannot share {kv_heads} key/value heads evenly; use a divisor of {heads}."
    if not rotary and hidden % heads:
        yield (f"{hidden} hidden channels cannot be cut into {heads} heads of {family} evenly; use a multiple of them.")
    if rotary and head_dim % 2:
        yield (
            f"Heads of {head_dim} channels cannot be turned in pairs by rotary positions; use an even head_dim, or a "
            f"hidden_size such as {heads * (head_dim + 1)}."
        )
    if experts and chosen > experts:
        yield f"num_experts_per_tok={chosen} is more than the {experts} experts of a layer; use at most so many."
