"""What splitting a family over tensor ranks must know of it: which way each linear goes."""

import re
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from seqloom.errors import ModelError

COLWISE, ROWWISE = "colwise", "rowwise"
DOWN, UP = "down", "up"
"""To a latent that all heads read, whole on all ranks; and from it, split as a column-wise linear is."""


@dataclass(frozen=True)
class Directions:
    """The split linears of a family, by their names below the base model with `*` for a layer's number.

    linears: name to colwise, rowwise, down or up. packed: how many linears of equal size a name packs along its output.
    after: dropouts that follow a row-wise linear inside the module of its column-wise ones. by_head: parameters of
    an attention module itself, a number for each query head.
    """

    linears: dict[str, str]
    packed: dict[str, int] = field(default_factory=dict)
    after: frozenset[str] = frozenset()
    by_head: frozenset[str] = frozenset()


_ATTENTION = {
    "layers.*.self_attn.q_proj": COLWISE,
    "layers.*.self_attn.k_proj": COLWISE,
    "layers.*.self_attn.v_proj": COLWISE,
    "layers.*.self_attn.o_proj": ROWWISE,
}
_LATENT = Directions(
    {
        "layers.*.self_attn.q_proj": COLWISE,  # where queries have no latent
        "layers.*.self_attn.q_a_proj": DOWN,
        "layers.*.self_attn.q_b_proj": UP,
        "layers.*.self_attn.kv_a_proj_with_mqa": DOWN,
        "layers.*.self_attn.kv_b_proj": UP,
        "layers.*.self_attn.o_proj": ROWWISE,
        **{
            f"layers.*.mlp.{shared}{name}": direction
            for shared in ("", "shared_experts.")
            for name, direction in (("gate_proj", COLWISE), ("up_proj", COLWISE), ("down_proj", ROWWISE))
        },
    }
)
_OWN = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "gpt_oss": Directions(_ATTENTION, by_head=frozenset({"sinks"})),
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
"""Families for which transformers has no plan, or one that leaves latents whole."""


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
