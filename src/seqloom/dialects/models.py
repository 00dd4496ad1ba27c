"""Models by name or by their sizes, as Hugging Face configurations."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")

ROPE_OF_LLAMA31: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Rotary angles scaled for long sequences, as Llama 3.1 does and Megatron's `--use-rope-scaling`."""

_LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 32_000, "max_position_embeddings": 4096}
_LLAMA3 = _LLAMA | {"vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 500_000.0}
_LLAMA31 = _LLAMA3 | {"max_position_embeddings": 131_072, "rope_scaling": ROPE_OF_LLAMA31}
_QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 152_064,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
}
_QWEN_SMALL = _QWEN | {"vocab_size": 151_936}
_QWEN2 = _QWEN | {"rope_theta": 1_000_000.0}
_QWEN2_SMALL = _QWEN2 | {"vocab_size": 151_936, "tie_word_embeddings": True}
_QWEN3 = _QWEN_SMALL | {"model_type": "qwen3", "rope_theta": 1_000_000.0, "head_dim": 128}
_MIXTRAL = _LLAMA | {
    "model_type": "mixtral",
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_DEEPSEEK = _LLAMA | {"vocab_size": 102_400}
_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_DEEPSEEK_V2 = _DEEPSEEK | _MLA | {"model_type": "deepseek_v2", "num_experts_per_tok": 6, "n_shared_experts": 2}
_DEEPSEEK_V3 = {
    **_MLA,
    "model_type": "deepseek_v3",
    "vocab_size": 129_280,
    "max_position_embeddings": 4096,
    "q_lora_rank": 1536,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
}

_TABLE: tuple[tuple[str, dict[str, Any], tuple[int, ...]], ...] = (
    ("llama2-7b", _LLAMA, (4096, 11_008, 32, 32, 32)),
    ("llama2-13b", _LLAMA, (5120, 13_824, 40, 40, 40)),
    ("llama2-34b", _LLAMA, (8192, 22_016, 48, 64, 8)),
    ("llama2-70b", _LLAMA, (8192, 28_672, 80, 64, 8)),
    ("llama1-33b", _LLAMA, (6656, 17_920, 60, 52, 52)),
    ("llama1-65b", _LLAMA, (8192, 22_016, 80, 64, 64)),
    ("llama3-8b", _LLAMA3, (4096, 14_336, 32, 32, 8)),
    ("llama3-70b", _LLAMA3, (8192, 28_672, 80, 64, 8)),
    ("llama3.1-8b", _LLAMA31, (4096, 14_336, 32, 32, 8)),
    ("llama3.1-70b", _LLAMA31, (8192, 28_672, 80, 64, 8)),
    ("llama3.1-405b", _LLAMA31, (16_384, 53_248, 126, 128, 8)),
    ("qwen-1.8b", _QWEN_SMALL, (2048, 5504, 24, 16, 16)),
    ("qwen-7b", _QWEN_SMALL, (4096, 11_008, 32, 32, 32)),
    ("qwen-14b", _QWEN, (5120, 13_696, 40, 40, 40)),
    ("qwen-72b", _QWEN, (8192, 24_576, 80, 64, 64)),
    ("qwen1.5-0.5b", _QWEN2_SMALL, (1024, 2816, 24, 16, 16)),
    ("qwen1.5-1.8b", _QWEN2 | {"vocab_size": 151_936}, (2048, 5504, 24, 16, 16)),
    ("qwen1.5-4b", _QWEN2 | {"vocab_size": 151_936}, (2560, 6912, 40, 20, 20)),
    ("qwen1.5-7b", _QWEN2 | {"vocab_size": 151_936}, (4096, 11_008, 32, 32, 32)),
    ("qwen1.5-14b", _QWEN2, (5120, 13_696, 40, 40, 40)),
    ("qwen1.5-32b", _QWEN2, (5120, 27_392, 64, 40, 8)),
    ("qwen1.5-72b", _QWEN2, (8192, 24_576, 80, 64, 64)),
    ("qwen2-0.5b", _QWEN2_SMALL, (896, 4864, 24, 14, 2)),
    ("qwen2-1.5b", _QWEN2_SMALL, (1536, 8960, 28, 12, 2)),
    ("qwen2-7b", _QWEN2, (3584, 18_944, 28, 28, 4)),
    ("qwen2-72b", _QWEN2, (8192, 29_568, 80, 64, 8)),
    ("qwen2.5-0.5b", _QWEN2_SMALL, (896, 4864, 24, 14, 2)),
    ("qwen2.5-1.5b", _QWEN2_SMALL, (1536, 8960, 28, 12, 2)),
    ("qwen2.5-3b", _QWEN2_SMALL, (2048, 11_008, 36, 16, 2)),
    ("qwen2.5-7b", _QWEN2, (3584, 18_944, 28, 28, 4)),
    ("qwen2.5-14b", _QWEN2, (5120, 13_824, 48, 40, 8)),
    ("qwen2.5-32b", _QWEN2, (5120, 27_648, 64, 40, 8)),
    ("qwen2.5-72b", _QWEN2, (8192, 29_568, 80, 64, 8)),
    ("qwen3-0.6b", _QWEN3 | {"tie_word_embeddings": True}, (1024, 3072, 28, 16, 8)),
    ("qwen3-1.7b", _QWEN3 | {"tie_word_embeddings": True}, (2048, 6144, 28, 16, 8)),
    ("qwen3-4b", _QWEN3 | {"tie_word_embeddings": True}, (2560, 9728, 36, 32, 8)),
    ("qwen3-8b", _QWEN3, (4096, 12_288, 36, 32, 8)),
    ("qwen3-14b", _QWEN3, (5120, 17_408, 40, 40, 8)),
    ("qwen3-32b", _QWEN3, (5120, 25_600, 64, 64, 8)),
    ("mistral-7b", _LLAMA | {"model_type": "mistral", "sliding_window": None}, (4096, 14_336, 32, 32, 8)),
    ("mixtral-8x7b", _MIXTRAL, (4096, 14_336, 32, 32, 8)),
    ("mixtral-8x22b", _MIXTRAL | {"max_position_embeddings": 65_536}, (6144, 16_384, 56, 48, 8)),
    ("deepseek-7b", _DEEPSEEK, (4096, 11_008, 30, 32, 32)),
    ("deepseek-67b", _DEEPSEEK, (8192, 22_016, 95, 64, 8)),
    (
        "deepseek-v2-lite",
        _DEEPSEEK_V2 | {"q_lora_rank": None, "moe_intermediate_size": 1408, "n_routed_experts": 64},
        (2048, 10_944, 27, 16, 16),
    ),
    (
        "deepseek-v2",
        _DEEPSEEK_V2
        | {"q_lora_rank": 1536, "moe_intermediate_size": 1536, "n_routed_experts": 160, "n_group": 8, "topk_group": 3},
        (5120, 12_288, 60, 128, 128),
    ),
    ("deepseek-v3", _DEEPSEEK_V3, (7168, 18_432, 61, 128, 128)),
    *(
        (name, {"model_type": "bloom", "vocab_size": 250_880}, (hidden, 4 * hidden, layers, heads, heads))
        for name, hidden, layers, heads in (
            ("bloom-560m", 1024, 24, 16),
            ("bloom-1b1", 1536, 24, 16),
            ("bloom-1b7", 2048, 24, 16),
            ("bloom-3b", 2560, 30, 32),
            ("bloom-7b1", 4096, 30, 32),
            ("bloom-176b", 14_336, 70, 112),
        )
    ),
    *(
        (name, {"model_type": "gpt2", "vocab_size": 50_257, "max_position_embeddings": length}, (h, 4 * h, n, a, a))
        for name, h, n, a, length in (
            ("gpt2-medium", 1024, 24, 16, 1024),
            ("gpt2-large", 1280, 36, 20, 1024),
            ("gpt2-xl", 1600, 48, 25, 1024),
            ("gpt2", 768, 12, 12, 1024),
            ("gpt3-6.7b", 4096, 32, 32, 2048),
            ("gpt3-13b", 5120, 40, 40, 2048),
            ("gpt3-175b", 12_288, 96, 96, 2048),
        )
    ),
)
"""(name, what its family has alike, the numbers of `_KEYS`), from the models' published configurations."""

_ALIASES = {
    **{f"llama-{size}": f"llama2-{size}" for size in ("7b", "13b", "34b", "70b")},
    "llama-8b": "llama3-8b",
    "llama-33b": "llama1-33b",
    "llama-65b": "llama1-65b",
    "llama3-405b": "llama3.1-405b",
    "llama3.3-70b": "llama3.1-70b",
    "bloom-7b": "bloom-7b1",
    "bloom-7.1b": "bloom-7b1",
    "bloomz-7b": "bloom-7b1",
    "bloomz-176b": "bloom-176b",
    "gpt-175b": "gpt3-175b",
    "gpt-13b": "gpt3-13b",
    "mixtral": "mixtral-8x7b",
    "deepseek3": "deepseek-v3",
    "deepseek3-671b": "deepseek-v3",
    "deepseek-v3-671b": "deepseek-v3",
    "deepseek-v2-236b": "deepseek-v2",
    "deepseek2": "deepseek-v2",
    "deepseek-llm-7b": "deepseek-7b",
    "deepseek-llm-67b": "deepseek-67b",
}

FIRST_QWEN = ("qwen-1.8b", "qwen-7b", "qwen-14b", "qwen-72b")
"""First-generation Qwen, which transformers does not hold; here as Qwen2 of the same shape."""


def by_name(text: str) -> tuple[str, dict[str, Any]] | None:
    """The known model that a name, path or title speaks of, the most particular one.

    >>> by_name("meta-llama/Llama-2-7b-hf")[0], by_name("pretrain_qwen1.5_14b_ptd.sh")[0]
    ('llama2-7b', 'qwen1.5-14b')
    """
    squeezed = _squeezed(_dotted(text[:4096].lower()))
    found: list[tuple[int, str]] = []
    for name in (*(row[0] for row in _TABLE), *_ALIASES):
        key = _squeezed(name)
        if re.search(rf"{re.escape(key)}(?![0-9.]*[0-9])(?!b\d)", squeezed):
            found.append((len(key), name))
    if not found:
        return None
    name = max(found)[1]
    name = _ALIASES.get(name, name)
    return name, next(_config(base, sizes) for known, base, sizes in _TABLE if known == name)


def by_sizes(model_type: str | None, sizes: Mapping[str, int]) -> tuple[str, dict[str, Any]] | None:
    """The first known model of a type (any where None) with these of its sizes; keys as in a configuration."""
    if "hidden_size" not in sizes or "num_hidden_layers" not in sizes:
        return None
    for name, config in known():
        if model_type in (None, config["model_type"]) and all(
            full(config).get(key) == value for key, value in sizes.items() if key in _KEYS
        ):
            return name, config
    return None


def known() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every known model by name."""
    for name, base, sizes in _TABLE:
        yield name, _config(base, sizes)


def full(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with its sizes under the general names, whatever its family calls them."""
    own = {_OWN.get(config["model_type"], {}).get(key, key): key for key in _KEYS}
    sizes = {general: config[name] for name, general in own.items() if name in config}
    hidden, heads = sizes.get("hidden_size"), sizes.get("num_attention_heads")
    if config["model_type"] in ("bloom", "gpt2") and isinstance(hidden, int):
        sizes = {"intermediate_size": 4 * hidden, "num_key_value_heads": heads} | sizes
    return {**config, **sizes}


def family(model_type: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of a family from sizes under the general names, as that family names them.

    >>> family("bloom", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 9})
    {'model_type': 'bloom', 'hidden_size': 64, 'n_layer': 2, 'n_head': 4, 'vocab_size': 9}
    """
    names, dropped = _OWN.get(model_type, {}), _DROPPED.get(model_type, ())
    return {
        "model_type": model_type,
        **{names.get(key, key): value for key, value in sizes.items() if key not in (*dropped, "model_type")},
    }


_OWN = {
    "bloom": {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
    },
}
_OWN |= {kind: {"num_local_experts": "n_routed_experts"} for kind in ("deepseek_v2", "deepseek_v3")}
_DROPPED = {
    "deepseek_v2": ("head_dim",),
    "deepseek_v3": ("head_dim",),
    "bloom": ("num_key_value_heads", "intermediate_size", "max_position_embeddings", "rope_theta", "rms_norm_eps"),
    "gpt2": ("num_key_value_heads", "rope_theta", "rms_norm_eps"),
}


def _config(base: Mapping[str, Any], sizes: tuple[int, ...]) -> dict[str, Any]:
    return family(base["model_type"], {**base, **dict(zip(_KEYS, sizes, strict=True))})


def _dotted(text: str) -> str:
    """A name whose version and size are written without dots, with them: qwen2_5_0_5b is qwen2.5_0.5b."""
    text = re.sub(r"(?<=[a-z]\d)[_-](?=[1-9][_-])", ".", text)
    return re.sub(r"(?<=[_-]0)[_-](?=\d+b)", ".", text)


def _squeezed(text: str) -> str:
    """A name without what writers put between its parts: Llama-2-7B, llama2_7b."""
    return re.sub(r"[^a-z0-9.]", "", text.lower())
