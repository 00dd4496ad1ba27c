"""What splitting a family over tensor ranks must know of it: which way each linear goes."""

import re
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from seqloom.errors import ModelError

COLWISE, ROWWISE = "colwise", "rowwise"


@dataclass(frozen=True)
class Directions:
    """The split linears of a family, by their names below the base model with `*` for a layer's number.

    linears: name to colwise or rowwise. packed: how many linears of equal size a name packs along its output.
    after: dropouts that follow a row-wise linear inside the module of its column-wise ones.
    """

    linears: dict[str, str]
    packed: dict[str, int] = field(default_factory=dict)
    after: frozenset[str] = frozenset()


_OWN = {
    "bloom": Directions(
        {
            "h.*.self_attention.query_key_value": COLWISE,  # each head's q, k and v lie together
            "h.*.self_attention.dense": ROWWISE,
            "h.*.mlp.dense_h_to_4h": COLWISE,
            "h.*.mlp.dense_4h_to_h": ROWWISE,
        }
    ),
    "gpt2": Directions(
        {
            "h.*.attn.c_attn": COLWISE,
            "h.*.attn.c_proj": ROWWISE,
            "h.*.mlp.c_fc": COLWISE,
            "h.*.mlp.c_proj": ROWWISE,
        },
        {"h.*.attn.c_attn": 3},
        frozenset({"h.*.attn.resid_dropout", "h.*.mlp.dropout"}),
    ),
}
"""Families for which transformers has no plan."""


def directions(model: PreTrainedModel) -> Directions:
    """Which way the linears of a model go: transformers' own `base_model_tp_plan`, or ours where it has none.

    Raises ModelError for a family that has neither.
    """
    family = model.config.model_type
    if family in _OWN:
        return _OWN[family]
    plan = getattr(model.config, "base_model_tp_plan", None) or {}
    linears = {name: style for name, style in plan.items() if style in (COLWISE, ROWWISE)}
    if not linears:
        raise ModelError(
            f"transformers names no tensor plan for {type(model).__name__}, so its linears have no known direction; "
            "use ring, ulysses or data instead of tensor."
        )
    return Directions(linears)


def pattern(name: str) -> str:
    """A module's name with `*` for a layer's number.

    >>> pattern("layers.12.mlp.up_proj")
    'layers.*.mlp.up_proj'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, in order."""
    number = model.config.num_hidden_layers
    found = [m for m in model.base_model.children() if isinstance(m, nn.ModuleList) and len(m) == number]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(found)} lists of {number} layers, not one; it cannot be split."
        )
    return found[0]
