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

        Raises ModelError where a needed number is missing.
        """
        missing = [key for key in _NEEDED if config.get(key) is None]
        if missing:
            raise ModelError(
                f"The model configuration lacks {', '.join(missing)}; "
                "give the config.json of a Hugging Face causal language model."
            )
        wrong = [key for key in _NEEDED[1:] if type(config[key]) is not int or config[key] < 1]
        if wrong:
            raise ModelError(
                f"The model configuration's {wrong[0]} is {config[wrong[0]]!r}, not a whole number above 0."
            )
        heads = config["num_attention_heads"]
        return cls(
            family=config["model_type"],
            vocab=config["vocab_size"],
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_positions=config["max_position_embeddings"],
            window=_window(config),
            unsupported=tuple(_unsupported(config)),
        )


_NEEDED = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def _window(config: Mapping[str, Any]) -> int | None:
    window = config.get("sliding_window")
    layer_types = config.get("layer_types")
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    # Qwen2 and Qwen3 carry a window in every configuration and use it only where they say so.
    return None if config.get("use_sliding_window") is False else window


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    family = config["model_type"]
    found = []
    if family not in TINY_SHAPES:
        found.append(f"Model family '{family}' is not supported yet; supported are {', '.join(FAMILIES)}.")
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
    grown["num_hidden_layers"] = layers or max(config["num_hidden_layers"], plan.pipeline)
    grown["max_position_embeddings"] = max(config["max_position_embeddings"], num_tokens)
    return grown
