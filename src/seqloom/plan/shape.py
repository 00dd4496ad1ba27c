"""What a plan must know of a model, read from its configuration's JSON without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seqloom.errors import ModelError, counted
from seqloom.plan.sizes import misfits
from seqloom.plan.tiny import EXPERTS, FAMILIES


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The numbers of a decoder that a plan's legality and cost depend on.

    windows: for each layer how many tokens a query sees, itself included, None where all; left out,
        no layer has a window. max_positions: the longest sequence, None where any length will do.
    intermediate: width of the MLP inside, by default four times hidden. tied: whether the embedding is
        the head's weight too. value_dim: width of a value head, by default head_dim, that of queries and keys.
    experts: of a layer that has them, 0 where none has; a token goes to experts_per_token of them, and `balanced`
        is whether the loss asks for their balance.
    inside: for each layer the width inside of its MLP or of the experts that all tokens share, 0 where it has neither;
        left out, intermediate, or 0 in a model with experts. routed: the same of the experts that one token goes to,
        together; left out, as many as it goes to in every layer, each of width intermediate.
    query_latent, key_latent: of multi-head latent attention the width of what queries are made of, 0 where that is the
        hidden state, and of what keys and values are. shared_key: of the rotated part of keys, which all heads share.
    unsupported: a sentence for each feature that no plan honours yet.
    """

    family: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int | None
    windows: tuple[int | None, ...] = ()
    intermediate: int = 0
    tied: bool = False
    value_dim: int = 0
    experts: int = 0
    experts_per_token: int = 0
    balanced: bool = False
    inside: tuple[int, ...] = ()
    routed: tuple[int, ...] = ()
    query_latent: int = 0
    key_latent: int = 0
    shared_key: int = 0
    unsupported: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.layers)
        if not self.intermediate:
            object.__setattr__(self, "intermediate", 4 * self.hidden)
        if not self.value_dim:
            object.__setattr__(self, "value_dim", self.head_dim)
        if not self.inside:
            object.__setattr__(self, "inside", (0 if self.experts else self.intermediate,) * self.layers)
        if not self.routed:
            width = self.experts_per_token * self.intermediate if self.experts else 0
            object.__setattr__(self, "routed", (width,) * self.layers)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Read a Hugging Face configuration, as `config.json` holds it.

        Keys that are absent take the family's defaults, as transformers gives them. Raises ModelError
        with everything that is missing or cannot be.
        """
        family = config.get("model_type")
        if not isinstance(family, str):
            raise ModelError(
                f"The model configuration's model_type is {family!r}; it must name a family such as 'llama'."
            )
        values = _values(family, config)
        needed = [key for key in _NEEDED if (family, key) != ("bloom", "max_position_embeddings")]
        missing = [key for key in needed if key not in values]
        if missing and family not in FAMILIES:  # other families name these numbers differently
            raise ModelError(_unknown_family(family))
        if missing:
            lacking = ", ".join(_NAMES["gpt2"].get(key, key) if family == "gpt2" else key for key in missing)
            raise ModelError(
                f"The model configuration lacks {lacking}; "
                "give the config.json of a Hugging Face causal language model."
            )
        for key in (*_NEEDED, *_OPTIONAL):
            if key in values and (type(values[key]) is not int or values[key] < 1):
                raise ModelError(f"The model configuration's {key} is {values[key]!r}, not a whole number above 0.")
        heads = values["num_attention_heads"]
        kv_heads = heads if family in _LATENT else values.get("num_key_value_heads", heads)
        head_dim, experts = _head_dim(family, values), _experts(family, values)
        for misfit in misfits(values, family, kv_heads, head_dim, experts, rotary=family not in _NAMES):
            raise ModelError(misfit)
        return cls(
            family=family,
            vocab=values["vocab_size"],
            hidden=values["hidden_size"],
            layers=values["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=values.get("max_position_embeddings"),
            windows=_windows(family, values),
            intermediate=values.get("intermediate_size", 0),
            tied=values.get("tie_word_embeddings", False) is True,
            value_dim=values["v_head_dim"] if family in _LATENT else 0,
            query_latent=values.get("q_lora_rank", 0) if family in _LATENT else 0,
            key_latent=values["kv_lora_rank"] if family in _LATENT else 0,
            shared_key=values["qk_rope_head_dim"] if family in _LATENT else 0,
            experts=experts,
            inside=_inside(family, values),
            routed=_routed(family, values),
            experts_per_token=values.get("num_experts_per_tok", 0),
            balanced=bool(values.get("output_router_logits")),
            unsupported=tuple(_unsupported(config)),
        )


_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_OPTIONAL = (
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "intermediate_size",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "num_experts_per_tok",
    "q_lora_rank",
    "kv_lora_rank",
    "moe_intermediate_size",
)
_QWEN: dict[str, Any] = {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "intermediate_size": 22_016,
}
_GEMMA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "head_dim": 256,
    "intermediate_size": 9216,
    "tie_word_embeddings": True,
}
_DEEPSEEK: dict[str, Any] = {
    "intermediate_size": 11_008,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1407,
    "first_k_dense_replace": 0,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 11_008},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "intermediate_size": 14_336},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "sliding_window_pattern": 6},
    "gpt_oss": {
        "num_key_value_heads": 8,
        "sliding_window": 128,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
    },
    "mixtral": {
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "intermediate_size": 6144,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
    },
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": {
        **_DEEPSEEK,
        "intermediate_size": 18_432,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2048,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
    },
    "bloom": {"tie_word_embeddings": True},
    "gpt2": {"tie_word_embeddings": True},
}
"""What transformers takes where a configuration does not say, as far as a plan depends on it."""

_BALANCED = ("gpt_oss", "mixtral", "qwen3_moe")
"""Families whose loss may hold the balance of their experts."""

_LATENT = ("deepseek_v2", "deepseek_v3")
"""Families of multi-head latent attention: a key and a value for each query head, of widths of their own."""

_NAMES = {
    "bloom": {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embed"},
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
    },
}
"""What some families call these numbers. A number under the general name comes first, where the family reads it."""

_IGNORED = {
    "bloom": ("num_key_value_heads", "head_dim", "max_position_embeddings", "intermediate_size"),
    "gpt2": ("num_key_value_heads", "head_dim", "intermediate_size"),
}
"""General names that a family does not read."""


def _values(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as its family reads it: defaults filled in, by the names of the other families."""
    # A null here means none, or as many as query heads; only an absent key takes the default.
    defaults = {
        key: value for key, value in _DEFAULTS.get(family, {}).items() if key not in _NULLS or key not in config
    }
    values = defaults | {key: value for key, value in config.items() if value is not None}
    for ignored in _IGNORED.get(family, ()):
        values.pop(ignored, None)
    for general, own in _NAMES.get(family, {}).items():
        if own in values and (general not in values or own == "n_embed"):  # BLOOM's older name for hidden_size wins
            values[general] = values[own]
    return values


_NULLS = ("num_key_value_heads", "sliding_window", "q_lora_rank")


def _head_dim(family: str, values: Mapping[str, Any]) -> int:
    """The width of a query and key head."""
    if family in _LATENT:  # where head_dim is the rotated part of it
        width: int = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    else:
        width = values.get("head_dim", values["hidden_size"] // values["num_attention_heads"])
    return width


def _experts(family: str, values: Mapping[str, Any]) -> int:
    """The experts of a layer that has them; 0 where no layer has. Raises ModelError for what is no number."""
    key = next((key for key in EXPERTS if key in values), None)
    if key is None:
        return 0
    if type(values[key]) is not int or values[key] < 0:
        raise ModelError(f"The model configuration's {key} is {values[key]!r}, not a whole number.")
    return int(values[key]) if any(_sparse(family, values)) else 0


def _sparse(family: str, values: Mapping[str, Any]) -> list[bool]:
    """Whether each layer has experts, of a family that has them."""
    layers = range(values["num_hidden_layers"])
    if family in _LATENT:
        return [layer >= values["first_k_dense_replace"] for layer in layers]
    dense, step = values.get("mlp_only_layers") or (), values.get("decoder_sparse_step", 1)
    return [family != "qwen3_moe" or (layer not in dense and (layer + 1) % step == 0) for layer in layers]


def _inside(family: str, values: Mapping[str, Any]) -> tuple[int, ...]:
    """For each layer the width inside of what all tokens go through beside attention; () for the same everywhere."""
    if not _experts(family, values):
        return ()
    shared = values["n_shared_experts"] * values["moe_intermediate_size"] if family in _LATENT else 0
    return tuple(shared if sparse else values["intermediate_size"] for sparse in _sparse(family, values))


def _routed(family: str, values: Mapping[str, Any]) -> tuple[int, ...]:
    """For each layer the width inside of the experts that a token goes to, together; () for the same everywhere."""
    if not _experts(family, values):
        return ()
    name = "intermediate_size" if family in ("mixtral", "gpt_oss") else "moe_intermediate_size"
    width = values.get("num_experts_per_tok", 0) * values[name]
    return tuple(width if sparse else 0 for sparse in _sparse(family, values))


def _windows(family: str, values: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Each layer's attention window, as transformers gives it to the layer."""
    layers: int = values["num_hidden_layers"]
    window: int | None = values.get("sliding_window")
    if family == "qwen3_moe" and not values.get("use_sliding_window"):
        window = None
    if family in ("mistral", "mixtral", "qwen3_moe"):
        return (window,) * layers
    if family not in ("qwen2", "qwen3", *_ALTERNATING):  # Llama and BLOOM have none
        return (None,) * layers
    if family not in _ALTERNATING and not values.get("use_sliding_window"):
        window = None
    types = values["layer_types"] if "layer_types" in values else _layer_types(family, values)
    if not isinstance(types, list) or len(types) != layers or not {_SLIDING, _FULL}.issuperset(map(str, types)):
        raise ModelError(
            f"The model configuration's layer_types is {types!r}; "
            f"it must name one of '{_FULL}' and '{_SLIDING}' for each of {counted(layers, 'layer')}."
        )
    return tuple(window if kind == _SLIDING else None for kind in types)


_SLIDING, _FULL = "sliding_attention", "full_attention"
_ALTERNATING = ("gemma2", "gemma3_text", "gpt_oss")


def _layer_types(family: str, values: Mapping[str, Any]) -> list[str]:
    """The kind of each layer, where the configuration does not list them."""
    layers = range(values["num_hidden_layers"])
    key = "sliding_window_pattern" if family == "gemma3_text" else "max_window_layers"
    number = 2 if family in ("gemma2", "gpt_oss") else values[key]
    if type(number) is not int or number < (family == "gemma3_text"):
        raise ModelError(f"The model configuration's {key} is {number!r}, not a whole number.")
    if family in _ALTERNATING:  # every so many-th layer sees all
        return [_SLIDING if (layer + 1) % number else _FULL for layer in layers]
    return [_SLIDING if layer >= number else _FULL for layer in layers]


def _unknown_family(family: str) -> str:
    return f"Model family '{family}' is not supported yet; supported are {', '.join(FAMILIES)}."


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    family = config["model_type"]
    found = []
    if family not in FAMILIES:
        found.append(_unknown_family(family))
    for key, what, families in (
        ("attn_logit_softcapping", "soft-capped attention scores", ("gemma2",)),
        ("final_logit_softcapping", "soft-capped logits", ("gemma2", "gemma3_text")),
    ):
        if config.get(key) is not None and not config[key] > 0:
            found.append(f"{key}={config[key]} is no cap, by which transformers would divide; give null for none.")
        elif config.get(key) and family not in families:
            had = " and ".join(families)
            found.append(f"{key}={config[key]} asks for {what}, which only {had} can have; set it to null.")
    for key, what in (
        ("use_bidirectional_attention", "attention to both sides"),
        ("add_cross_attention", "attention to another model's states"),
    ):
        if config.get(key):
            found.append(f"{key}={config[key]} asks for {what}, which is not supported yet; set it to false.")
    if config.get("output_router_logits") and family in FAMILIES and family not in _BALANCED:
        found.append(
            f"output_router_logits={config['output_router_logits']} asks for a loss that balances experts, which "
            f"transformers' {family} does not compute; set it to false."
        )
    if config.get("router_jitter_noise"):
        found.append(
            f"router_jitter_noise={config['router_jitter_noise']} would draw other noise under each plan; set it to 0."
        )
    keys, heads = config.get("num_key_value_heads"), config.get("num_attention_heads")
    if family in _LATENT and keys not in (None, heads):
        found.append(
            f"num_key_value_heads={keys} does not fit {family}, whose latent attention has a key for each query head; "
            f"set it to {heads}."
        )
    if family == "bloom" and config.get("slow_but_exact") and config.get("pretraining_tp", 1) > 1:
        found.append(
            "slow_but_exact=true with pretraining_tp above 1 leaves out biases, which is not supported; "
            "set slow_but_exact to false."
        )
    if family == "bloom" and config.get("hidden_dropout"):
        found.append(
            f"hidden_dropout={config['hidden_dropout']} would depend on how the sequence is split; set it to 0.0 "
            "(attention_dropout does not depend on it)."
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        return [*found, f"The rope settings are {rope!r}; they must be a section such as {{'rope_type': 'default'}}."]
    # One section, or one for each kind of layer.
    sections = [section for section in rope.values() if isinstance(section, Mapping)] or [rope]
    for kind in dict.fromkeys(section.get("rope_type") or section.get("type") for section in sections):
        if kind in ("dynamic", "longrope"):
            # transformers recomputes these frequencies from the longest position it sees, which differs by rank.
            found.append(
                f"rope type '{kind}' changes with the longest position a rank holds; "
                "use 'default', 'linear', 'yarn' or 'llama3'."
            )
    return found
