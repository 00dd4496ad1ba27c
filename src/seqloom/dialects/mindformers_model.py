"""The model of a MindFormers YAML file, as a Hugging Face configuration."""

from typing import Any

from seqloom.dialects.ledger import Ledger, as_whole
from seqloom.dialects.models import FIRST_QWEN, by_name, by_sizes, family, full

PLACES = ("model.model_config.", "model_config.", "model.", "pretrained_model_config.")
"""Where the numbers of a model may stand."""

_SIZES = {
    "hidden_size": ("hidden_size",),
    "num_hidden_layers": ("num_layers", "num_hidden_layers"),
    "num_attention_heads": ("num_heads", "num_attention_heads"),
    "num_key_value_heads": ("n_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_query_groups"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size"),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embedding", "max_position_embeddings"),
    "num_local_experts": ("num_local_experts", "n_routed_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "num_experts_chosen"),
}
_NUMBERS = {
    "rms_norm_eps": ("rms_norm_eps",),
    "initializer_range": ("initializer_range",),
    "rope_theta": ("theta", "rope_theta", "rotary_base"),
}
_FAMILIES = (
    ("mixtral", "mixtral"),
    ("deepseekv3", "deepseek_v3"),
    ("deepseek3", "deepseek_v3"),
    ("deepseek", "deepseek_v2"),
    ("qwen3", "qwen3"),
    ("qwen", "qwen2"),
    ("bloom", "bloom"),
    ("gpt2", "gpt2"),
    ("pangualpha", "gpt2"),
    ("mistral", "mistral"),
    ("llama", "llama"),
)


def find(ledger: Ledger, *keys: str) -> str | None:
    """The option among `keys` that is given and not null, at whatever place a model's numbers stand."""
    return next((place + key for place in PLACES for key in keys if ledger.given.get(place + key) is not None), None)


def model_of(ledger: Ledger, title: str) -> dict[str, Any] | None:
    """The configuration by sizes, filled up from a known model of the same sizes; else by name."""
    found = {key: name for key, names in _SIZES.items() if (name := find(ledger, *names))}
    sizes = {key: ledger.whole(name) for key, name in found.items()}
    names = [
        ledger.given.get(key)
        for key in ("trainer.model_name", "model.arch.type", "model.model_config.checkpoint_name_or_path")
    ]
    text = " ".join(str(name) for name in [*names, title] if isinstance(name, str))
    named = by_name(str(names[0] or "")) or by_name(text)
    ledger.mapped("It names the trainer.", "trainer.type")
    if not {"hidden_size", "num_hidden_layers", "num_attention_heads"} <= set(sizes):
        return _by_name(ledger, named, found, sizes)
    ledger.mapped("It names the model.", "trainer.model_name")
    kind = _kind(ledger, text, sizes)
    expert = as_whole(ledger.given.get("moe_config.expert_num"))
    if expert and expert > 1 and kind in ("llama", "mistral"):
        kind, sizes["num_local_experts"] = "mixtral", expert
        ledger.mapped("It enters `model`.", "moe_config.expert_num")
    like = {"num_key_value_heads": sizes["num_attention_heads"], **sizes}
    known = named if named and _agrees(named[1], sizes) else by_sizes(kind, like)
    if known:
        ledger.note("model", "mapped", f"Its sizes are those of {known[0]}.{_qwen(known[0])}", value=known[0])
    config = {**_derived(ledger, sizes), **(full(known[1]) if known else {"model_type": kind}), **sizes}
    for key, keys in _NUMBERS.items():
        if (name := find(ledger, *keys)) and config["model_type"] not in ("bloom", "gpt2"):
            config[key] = ledger.number(name)
            ledger.mapped("It enters `model`.", name)
    config |= _kept(ledger, config["model_type"])
    ledger.mapped("It enters `model`.", *found.values())
    return family(config["model_type"], config)


_LATENT = (
    *("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "moe_intermediate_size"),
    *("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"),
)
"""Sizes of DeepSeek's latent attention and experts, under Hugging Face's names there too."""


def _kept(ledger: Ledger, kind: str) -> dict[str, Any]:
    """Tied embeddings, the width of a head where the family has one, and what only DeepSeek's families have."""
    found: dict[str, Any] = {}
    if kind.startswith("deepseek"):
        given = {key: name for key in _LATENT if (name := find(ledger, key))}
        found |= {key: ledger.whole(name, least=0) for key, name in given.items()}
        ledger.mapped("It enters `model`.", *given.values())
        if name := find(ledger, "routed_scaling_factor"):
            found["routed_scaling_factor"] = ledger.number(name)
            ledger.mapped("It enters `model`.", name)
        if name := find(ledger, "norm_topk_prob"):
            found["norm_topk_prob"] = ledger.flag(name)
            ledger.mapped("It enters `model`.", name)
    if name := find(ledger, "tie_word_embeddings"):
        found["tie_word_embeddings"] = ledger.flag(name)
        ledger.mapped("It enters `model`.", name)
    if kind in ("llama", "mistral", "mixtral", "qwen3") and (name := find(ledger, "head_dim")):
        found["head_dim"] = ledger.whole(name)
        ledger.mapped("It enters `model`.", name)
    return found


def _by_name(
    ledger: Ledger, named: tuple[str, dict[str, Any]] | None, found: dict[str, str], sizes: dict[str, int]
) -> dict[str, Any] | None:
    """The model of a name, where the file's own numbers win over those that the name stands for."""
    if named is None:
        why = "Not a model that is known here, and its sizes are not all said; give its configuration."
        ledger.changed(why, "trainer.model_name", *found.values())
        return None
    ledger.mapped("It names the model.", "trainer.model_name")
    ledger.note("model", "mapped", f"Known by name as {named[0]}.{_qwen(named[0])}", value=named[0])
    general = full(named[1])
    other = {key: value for key, value in sizes.items() if key in general and general[key] != value}
    for key, name in found.items():
        if key in other:
            ledger.mapped(f"It enters `model`, where {named[0]} has {general[key]:,}.", name)
        elif key in general:
            ledger.mapped(f"As {named[0]} has it.", name)
        else:
            ledger.changed(f"{named[0]} has no {key}; it does not enter `model`.", name)
    numbers = _kept(ledger, named[1]["model_type"])
    for key, names in _NUMBERS.items():
        said = find(ledger, *names)
        if said and named[1]["model_type"] not in ("bloom", "gpt2"):
            numbers[key] = ledger.number(said)
            ledger.mapped("It enters `model`.", said)
    if not other and not numbers:
        return named[1]
    kind = named[1]["model_type"]
    return family(kind, {**{key: value for key, value in general.items() if key not in _own(kind)}, **other, **numbers})


def _own(kind: str) -> set[str]:
    """The names under which a family has its sizes where they are its own."""
    return set(family(kind, dict.fromkeys(_SIZES, 0))) - set(_SIZES) - {"model_type"}


def _agrees(config: dict[str, Any], sizes: dict[str, int]) -> bool:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    return all(full(config).get(key) == sizes[key] for key in keys)


def _qwen(name: str) -> str:
    """Why first-generation Qwen is another family here."""
    if name not in FIRST_QWEN:
        return ""
    return " First-generation Qwen, which transformers lacks, runs as Qwen2 of that shape."


def _kind(ledger: Ledger, text: str, sizes: dict[str, int]) -> str:
    """The family: said by a type or a name, else Llama's layers."""
    said = [ledger.given.get(name) for place in PLACES for name in (f"{place}model_type", f"{place}type")]
    words = " ".join(str(word) for word in said if isinstance(word, str))
    squeezed = "".join(char for char in f"{text} {words}".lower() if char.isalnum())
    ledger.mapped(
        "It names the family.",
        *(f"{place}{key}" for place in PLACES for key in ("model_type", "type", "architectures")),
    )
    bias = find(ledger, "qkv_has_bias")
    default = "qwen2" if bias and ledger.flag(bias) else "llama"
    if bias:
        ledger.mapped("It names the family.", bias)
    found = next((kind for word, kind in _FAMILIES if word in squeezed), default)
    return default if found == "llama" else found


def _derived(ledger: Ledger, sizes: dict[str, int]) -> dict[str, Any]:
    """What a file leaves to its model's own rules."""
    hidden = sizes["hidden_size"]
    if name := find(ledger, "ffn_dim_multiplier"):
        wide = int(((ledger.number(name) or 1.0) + 0.01) * 4 * hidden)
        ledger.mapped("It enters the intermediate size.", name)
    else:
        wide = 4 * hidden
    step = 256
    if name := find(ledger, "multiple_of"):
        step = ledger.whole(name)
        ledger.mapped("It enters the intermediate size.", name)
    inside = -(-int(2 * wide / 3) // step) * step
    length = find(ledger, "seq_length")
    return {
        "intermediate_size": inside,
        "num_key_value_heads": sizes["num_attention_heads"],
        "max_position_embeddings": ledger.whole(length) if length else 4096,
        "vocab_size": 32_000,
    }
