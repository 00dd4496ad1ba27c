"""What a plan must know of a model, read from its configuration's JSON without torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

from seqloom.errors import ModelError
from seqloom.plan.plan import Plan

_TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}

TINY_SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_TINY},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], **_TINY, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **_TINY, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **_TINY},
}
"""Small models by name, for checks and demonstrations; `fit` grows them to a plan."""

FAMILIES = tuple(sorted(TINY_SHAPES))
"""The model types that run exactly today."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The numbers of a decoder that a plan's legality and cost depend on.

    `window` is the shortest attention window of any layer, None where all layers see everything.
    `unsupported` holds a sentence for each feature that no plan honours yet.
    """

    family: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    window: int | None = None
    unsupported: tuple[str, ...] = ()

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
        values = {**_DEFAULTS.get(family, {}), **{key: value for key, value in config.items() if value is not None}}
        missing = [key for key in _NEEDED if key not in values]
        if missing and family not in TINY_SHAPES:  # other families name these numbers differently
            raise ModelError(_unknown_family(family))
        if missing:
            raise ModelError(
                f"The model configuration lacks {', '.join(missing)}; "
                "give the config.json of a Hugging Face causal language model."
            )
        for key in (*_NEEDED, *_OPTIONAL):
            if key in values and (type(values[key]) is not int or values[key] < 1):
                raise ModelError(f"The model configuration's {key} is {values[key]!r}, not a whole number above 0.")
        heads = values["num_attention_heads"]
        # A null here means as many as query heads, to transformers too; only an absent key takes the default.
        stated = "num_key_value_heads" in config and config["num_key_value_heads"] is None
        kv_heads = heads if stated else values.get("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ModelError(
                f"{heads} query heads cannot share {kv_heads} key/value heads evenly; use a divisor of {heads}."
            )
        return cls(
            family=family,
            vocab=values["vocab_size"],
            hidden=values["hidden_size"],
            layers=values["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=values.get("head_dim", values["hidden_size"] // heads),
            max_positions=values["max_position_embeddings"],
            window=_window(family, config, values),
            unsupported=tuple(_unsupported(config)),
        )


_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_OPTIONAL = ("num_key_value_heads", "head_dim", "sliding_window")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128, "use_sliding_window": False},
}
"""What transformers takes where a configuration does not say, as far as a plan depends on it."""


def _window(family: str, config: Mapping[str, Any], values: Mapping[str, Any]) -> int | None:
    """The window that attention uses: Llama has none, Qwen only where it says so, and null means none."""
    layer_types = values.get("layer_types")
    unused = isinstance(layer_types, list) and "sliding_attention" not in layer_types
    switched_off = values.get("use_sliding_window") is False
    if family == "llama" or unused or switched_off or config.get("sliding_window", 0) is None:
        return None
    return values.get("sliding_window")


def _unknown_family(family: str) -> str:
    return f"Model family '{family}' is not supported yet; supported are {', '.join(FAMILIES)}."


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    family = config["model_type"]
    found = []
    if family not in TINY_SHAPES:
        found.append(_unknown_family(family))
    for key, what in (
        ("attn_logit_softcapping", "soft-capped attention scores"),
        ("final_logit_softcapping", "soft-capped logits"),
    ):
        if config.get(key):
            found.append(f"{key}={config[key]} asks for {what}, which is not supported yet; set it to null.")
    if config.get("attention_dropout"):
        found.append(
            f"attention_dropout={config['attention_dropout']} would depend on how the sequence is split; set it to 0.0."
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        return [*found, f"The rope settings are {rope!r}; they must be a section such as {{'rope_type': 'default'}}."]
    kind = rope.get("rope_type") or rope.get("type")
    if kind in ("dynamic", "longrope"):
        # transformers recomputes these frequencies from the longest position it sees, which differs by rank.
        found.append(
            f"rope type '{kind}' changes with the longest position a rank holds; "
            "use 'default', 'linear', 'yarn' or 'llama3'."
        )
    return found


def read_config(source: str) -> dict[str, Any]:
    """The configuration of a built-in tiny shape, a JSON file, or a folder that holds config.json.

    Raises ModelError when there is none.
    """
    if source in TINY_SHAPES:
        return dict(TINY_SHAPES[source])
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ModelError(
            f"There is no model '{source}': give one of {', '.join(FAMILIES)}, "
            "a config.json, or a folder that holds one."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not readable as JSON ({error}); give a Hugging Face config.json.") from error
    if not isinstance(config, dict):
        raise ModelError(
            f"{path} holds a JSON {type(config).__name__}, not an object; give a Hugging Face config.json."
        )
    return config


def fit(
    config: Mapping[str, Any],
    plan: Plan,
    num_tokens: int,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    layers: int | None = None,
) -> dict[str, Any]:
    """A built-in shape grown to fit a plan; a number given by hand is kept as given.

    Heads grow in whole groups until the Ulysses degree divides the key and value heads, layers to
    at least the pipeline's stages, positions to the sequence length, hidden to heads x head_dim.
    """
    grown = dict(config)
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    if heads is None and kv_heads is None:
        kv_heads = lcm(config["num_key_value_heads"], plan.ulysses * plan.tensor)
    elif kv_heads is None:
        kv_heads = heads
    grown["num_key_value_heads"] = kv_heads
    grown["num_attention_heads"] = heads if heads is not None else kv_heads * group
    grown["hidden_size"] = grown["num_attention_heads"] * config["head_dim"]
    grown["num_hidden_layers"] = max(config["num_hidden_layers"], plan.pipeline) if layers is None else layers
    grown["max_position_embeddings"] = max(config["max_position_embeddings"], num_tokens)
    return grown
