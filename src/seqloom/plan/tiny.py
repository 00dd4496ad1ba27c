"""Small models by name, and how they grow to a plan; configurations as JSON."""

import json
from collections.abc import Mapping
from math import lcm
from os.path import isdir, isfile
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

_MLA: dict[str, Any] = {
    **{key: value for key, value in _TINY.items() if key not in ("num_key_value_heads", "head_dim")},
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
}
"""Multi-head latent attention: keys 10 wide, values 8."""

TINY_SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_TINY},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], **_TINY, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **_TINY, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **_TINY},
    "gemma2": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        **_TINY,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 5.0,
        "sliding_window": 24,  # in every other layer, the first included
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        **_TINY,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 12,
        "sliding_window": 24,
        "sliding_window_pattern": 2,  # every other layer sees all, the second first
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        **_TINY,
        "sliding_window": 24,  # in every other layer, the first included
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    "bloom": {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "vocab_size": 96,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.2,
    },
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 96,
        "n_embd": 32,
        "n_inner": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": None,  # transformers' default, 50256, is none of these 96 tokens
        "eos_token_id": None,
        "initializer_range": 0.2,
    },
    "mixtral": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        **_TINY,
        "sliding_window": None,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        **_TINY,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        **_MLA,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        **_MLA,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,  # the first layer has no experts
    },
}
"""Small models by name, for checks and demonstrations; `fit` grows them to a plan."""

FAMILIES = tuple(sorted(TINY_SHAPES))
"""The model types that run exactly today."""

ALIASES = {"deepseek": "deepseek_v3"}
"""Other names of built-in shapes."""


MOST_SHOWN = 80
"""Characters of a model's name that an error repeats."""


def read_config(source: str) -> dict[str, Any]:
    """The configuration of a built-in tiny shape, a JSON file, or a folder that holds config.json.

    Raises ModelError when there is none.
    """
    source = ALIASES.get(source, source)
    if source in TINY_SHAPES:
        return dict(TINY_SHAPES[source])
    path = Path(source)
    path = path / "config.json" if isdir(path) else path
    if not isfile(path):
        said = source if len(source) <= MOST_SHOWN else f"{source[:MOST_SHOWN]}..."
        raise ModelError(
            f"There is no model '{said}': give one of {', '.join(FAMILIES)}, a config.json, or a folder that holds one."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); make it readable.") from error
    except (ValueError, RecursionError) as error:
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

    Heads grow in whole groups, and to a multiple of the ranks that a tensor grid splits them over, until
    every rank that trades tokens for heads has a query head; there may be fewer key/value heads. Layers
    grow to at least the pipeline's stages, positions to the sequence length, hidden with the heads, experts
    to one for each rank they are dealt to. Raises ModelError for key/value heads of their own where the family
    has none.
    """
    family = config["model_type"]
    if family in _OWN_NAMES:
        own = _OWN_NAMES[family]
        if kv_heads not in (None, heads):
            raise ModelError(
                f"{family} has a key/value head for each query head, so it cannot have {kv_heads}; "
                "leave --kv-heads out, or take another model."
            )
        heads = heads or _heads(plan, config[own["heads"]], 1)
        grown = {own["heads"]: heads, own["hidden"]: heads * (config[own["hidden"]] // config[own["heads"]])}
        if "positions" in own:
            grown[own["positions"]] = max(config[own["positions"]], num_tokens)
        return {**config, **grown, own["layers"]: _layers(config[own["layers"]], plan, layers)}
    each = config["hidden_size"] // config["num_attention_heads"]
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    if heads is None:
        heads = _heads(plan, config["num_attention_heads"], group) if kv_heads is None else kv_heads * group
        kv_heads = heads // group
    return {
        **config,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "num_attention_heads": heads,
        "hidden_size": heads * each,
        "num_hidden_layers": _layers(config["num_hidden_layers"], plan, layers),
        "max_position_embeddings": max(config["max_position_embeddings"], num_tokens),
        **_experts(config, plan),
    }


def fit_world(
    config: Mapping[str, Any],
    world: int,
    num_tokens: int,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    layers: int | None = None,
) -> dict[str, Any]:
    """A built-in shape grown for every plan of so many processes: a query head and two layers for each of them.

    Numbers given by hand are kept, and errors raised, as in `fit`; PlanError for a world that cannot be.
    """
    most = Plan(ulysses=world)
    layers = 2 * world if layers is None else layers
    return fit(config, most, num_tokens, heads=heads, kv_heads=kv_heads, layers=layers)


def _experts(config: Mapping[str, Any], plan: Plan) -> dict[str, int]:
    """The number of experts, under the name that the family has for it; groups of experts stay of equal size."""
    key = next((key for key in EXPERTS if key in config), None)
    if key is None:
        return {}
    groups = config.get("n_group") or 1
    return {key: max(config[key], -(-plan.expert // groups) * groups)}


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What families call the number of experts of a layer."""

_OWN_NAMES = {
    "bloom": {"heads": "n_head", "hidden": "hidden_size", "layers": "n_layer"},
    "gpt2": {"heads": "n_head", "hidden": "n_embd", "layers": "n_layer", "positions": "n_positions"},
}
"""What the families without key/value heads of their own call the numbers that grow."""


def _heads(plan: Plan, least: int, group: int) -> int:
    """The fewest query heads, at least so many, of whole groups, that the plan deals out."""
    ranks = plan.tensor_grid.heads
    step = lcm(group, ranks)
    return -(-max(least, ranks * plan.attention_ulysses) // step) * step


def _layers(least: int, plan: Plan, given: int | None) -> int:
    return max(least, plan.num_stages) if given is None else given
