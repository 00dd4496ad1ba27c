"""The model that Megatron-style flags describe, as a Hugging Face configuration."""

from typing import Any

from seqloom.dialects.ledger import Ledger, as_whole
from seqloom.dialects.models import FIRST_QWEN, ROPE_OF_LLAMA31, by_name, by_sizes, family, full

_SIZES = {
    "--hidden-size": "hidden_size",
    "--num-layers": "num_hidden_layers",
    "--num-attention-heads": "num_attention_heads",
    "--ffn-hidden-size": "intermediate_size",
    "--kv-channels": "head_dim",
    "--num-experts": "num_local_experts",
    "--moe-router-topk": "num_experts_per_tok",
}
_NEEDED = ("--hidden-size", "--num-layers", "--num-attention-heads")


def model_of(ledger: Ledger, title: str, length: int | None) -> dict[str, Any] | None:
    """The configuration by sizes, filled up from a known model of the same sizes; else by a name in the title."""
    words = [title] + [
        value
        for name in ("--tokenizer-model", "--tokenizer-name-or-path")
        if isinstance(value := ledger.given.get(name), str)
    ]
    named = next((found for word in words if (found := by_name(word))), None)
    if not all(name in ledger for name in _NEEDED):
        if named:
            ledger.note("model", "mapped", f"Known by name as {named[0]}.{_qwen(named[0])}", value=named[0])
        elif any(name in ledger for name in _NEEDED):
            ledger.note("model", "no effect", "Not known: hidden size, layers and heads are not all given.")
        left = [name for name in _SIZES if not ledger.noted(name)]
        ledger.no_effect("The model's sizes are not all given, so they do not enter `model`.", *left)
        return named[1] if named else None
    sizes = {key: ledger.whole(name) for name, key in _SIZES.items() if name in ledger}
    sizes["num_hidden_layers"] -= _idle(ledger, sizes["num_hidden_layers"])
    if "--group-query-attention" in ledger and "--num-query-groups" in ledger:
        sizes["num_key_value_heads"] = ledger.whole("--num-query-groups")
    elif "--num-key-value-heads" in ledger:  # Megatron-DeepSpeed's name for them
        sizes["num_key_value_heads"] = ledger.whole("--num-key-value-heads")
    names = ("--num-query-groups", "--group-query-attention", "--num-key-value-heads")
    ledger.mapped("It enters `model`.", *_SIZES, *names)
    kind = _family(ledger, title)
    _unlike(ledger, kind, title)
    ledger.mapped(f"It names the family, {kind}.", *_FEATURES)
    like = {key: value for key, value in sizes.items() if key != "head_dim"}
    if named and named[1]["model_type"] in (kind, "qwen2", "qwen3") and _agrees(named[1], like):
        like_it: tuple[str, dict[str, Any]] | None = named
    else:
        like_it = by_sizes(kind, {"num_key_value_heads": sizes["num_attention_heads"], **like})
    config = full(like_it[1]) if like_it else {"model_type": kind}
    if like_it:
        ledger.note("model", "mapped", f"Its sizes are those of {like_it[0]}.{_qwen(like_it[0])}", value=like_it[0])
    return _filled(ledger, config, sizes, length)


def _idle(ledger: Ledger, layers: int) -> int:
    """How many of the layers do nothing."""
    listed = ledger.get("--noop-layers")
    found = {as_whole(each) for each in str(listed).split(",")} if listed is not None else set()
    idle = len([each for each in found if each is not None and 0 <= each < layers])
    if None in found or idle == layers:
        return 0
    ledger.changed(f"The model has {layers - idle} layers: those that do nothing there are left out.", "--noop-layers")
    return idle


def _agrees(config: dict[str, Any], sizes: dict[str, int]) -> bool:
    return all(full(config).get(key) == value for key, value in sizes.items() if key in full(config))


def _qwen(name: str) -> str:
    """Why first-generation Qwen is another family here."""
    if name not in FIRST_QWEN:
        return ""
    return " First-generation Qwen, which transformers lacks, runs as Qwen2 of that shape."


_FEATURES = (
    "--position-embedding-type",
    "--use-rotary-position-embeddings",
    "--swiglu",
    "--normalization",
    "--add-qkv-bias",
    "--qkv-bias",
    "--qk-layernorm",
    "--multi-latent-attention",
    "--multi-head-latent-attention",
)


def _family(ledger: Ledger, title: str) -> str:
    """The family whose layers the flags describe, or else the program's name."""
    position = ledger.get("--position-embedding-type", "learned_absolute")
    rotary = position == "rope" or ledger.flag("--use-rotary-position-embeddings")
    if ledger.whole("--num-experts", 0, least=0) > 1:
        latent = ledger.flag("--multi-latent-attention") or ledger.flag("--multi-head-latent-attention")
        newer = "--mtp-num-layers" in ledger or ledger.get("--moe-router-score-function") == "sigmoid"
        return ("deepseek_v3" if newer else "deepseek_v2") if latent else "mixtral"
    if position == "alibi":
        return "bloom"
    if rotary or ledger.flag("--swiglu") or _normalization(ledger) == "rmsnorm":
        if ledger.flag("--add-qkv-bias") or ledger.flag("--qkv-bias"):
            return "qwen2"
        return "qwen3" if ledger.flag("--qk-layernorm") else "llama"
    named = {"bloom": "bloom", "llama": "llama", "qwen": "qwen2"}
    return next((family for word, family in named.items() if word in title.lower()), "gpt2")


def _normalization(ledger: Ledger) -> str:
    return str(ledger.get("--normalization", "LayerNorm")).lower()


def _unlike(ledger: Ledger, kind: str, title: str) -> None:
    """Tell of layers that are not those of the family, where the program builds them by its flags."""
    program = title.rpartition(" ")[2]
    if program and "gpt" not in program:
        return  # a program of one family, such as pretrain_llama.py
    biased = not ledger.flag("--disable-bias-linear")
    if kind in ("gpt2", "bloom"):
        if not biased:
            ledger.changed(f"{kind} has biases in its linears.", "--disable-bias-linear")
        return
    if _normalization(ledger) != "rmsnorm":
        said = "" if "--normalization" in ledger else "Not said: "
        ledger.note("--normalization", "changed", f"{said}LayerNorm there; {kind} has RMSNorm.")
    if not ledger.flag("--swiglu"):
        ledger.note("--swiglu", "changed", f"Not on: no gate in the MLP there; {kind} has one.")
    if biased:
        ledger.note("--disable-bias-linear", "changed", f"Not on: biases in all linears there, not in {kind}.")


def _filled(ledger: Ledger, known: dict[str, Any], sizes: dict[str, int], length: int | None) -> dict[str, Any]:
    """A configuration of the sizes given, with what they leave open from the known model or the family."""
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    defaults: dict[str, Any] = {
        "intermediate_size": 4 * hidden,
        "num_key_value_heads": heads,
        "max_position_embeddings": length or 4096,
    }
    config = {**defaults, **known, **sizes}
    for name, key in (
        ("--vocab-size", "vocab_size"),
        ("--padded-vocab-size", "vocab_size"),
        ("--max-position-embeddings", "max_position_embeddings"),
    ):
        if name in ledger:
            config[key] = ledger.whole(name)
            ledger.mapped("It enters `model`.", name)
    older = known["model_type"] in ("bloom", "gpt2")
    for name, key in (
        ("--rotary-base", "" if older else "rope_theta"),
        ("--norm-epsilon", "layer_norm_epsilon" if older else "rms_norm_eps"),
        ("--layernorm-epsilon", "layer_norm_epsilon" if older else "rms_norm_eps"),
        ("--init-method-std", "initializer_range"),
    ):
        if name in ledger and key:
            config[key] = ledger.number(name)
            ledger.mapped("It enters `model`.", name)
    _scaled_rotary(ledger, config)
    if known["model_type"].startswith("deepseek"):
        for name in (name for name in _LATENT if name in ledger):
            config[_LATENT[name]] = ledger.whole(name, least=0)
            ledger.mapped("It enters `model`.", name)
        for name in ("--routed-scaling-factor", "--moe-router-topk-scaling-factor"):
            if name in ledger:
                config["routed_scaling_factor"] = ledger.number(name)
                ledger.mapped("It enters `model`.", name)
        if "--norm-topk-prob" in ledger:
            config["norm_topk_prob"] = ledger.flag("--norm-topk-prob")
            ledger.mapped("It enters `model`.", "--norm-topk-prob")
    if "vocab_size" not in config:
        config["vocab_size"] = {"llama": 32_000, "qwen2": 151_936, "bloom": 250_880, "gpt2": 50_257}.get(
            known["model_type"], 32_000
        )
        ledger.note(
            "--vocab-size",
            "changed",
            f"Not said, since a tokenizer gives it there; taken as {config['vocab_size']:,}, usual for "
            f"{known['model_type']}.",
        )
    if config["model_type"] not in ("gpt2", "bloom"):
        config["tie_word_embeddings"] = not ledger.flag("--untie-embeddings-and-output-weights")
        ledger.mapped("It enters `model`.", "--untie-embeddings-and-output-weights")
    _dropout(ledger, config)
    return family(config["model_type"], config)


def _scaled_rotary(ledger: Ledger, config: dict[str, Any]) -> None:
    """Rotary angles scaled as Llama 3.1's, which count only where they are asked for."""
    if config["model_type"] not in ("llama", "qwen2", "qwen3", "mixtral"):
        return
    config.pop("rope_scaling", None)
    if ledger.flag("--use-rope-scaling"):
        factor = ledger.number("--rope-scaling-factor", 8.0) or 0.0
        if factor < 1:
            ledger.refuse("--rope-scaling-factor", f"--rope-scaling-factor is {factor:g}; give 1 or more.")
        config["rope_scaling"] = ROPE_OF_LLAMA31 | {"factor": factor}
        ledger.mapped("It enters `model`, as Llama 3.1's.", "--use-rope-scaling", "--rope-scaling-factor")


_LATENT = {
    "--q-lora-rank": "q_lora_rank",
    "--kv-lora-rank": "kv_lora_rank",
    "--qk-head-dim": "qk_nope_head_dim",
    "--qk-nope-head-dim": "qk_nope_head_dim",
    "--qk-pos-emb-head-dim": "qk_rope_head_dim",
    "--qk-rope-head-dim": "qk_rope_head_dim",
    "--v-head-dim": "v_head_dim",
    "--moe-ffn-hidden-size": "moe_intermediate_size",
    "--moe-intermediate-size": "moe_intermediate_size",
    "--n-shared-experts": "n_shared_experts",
    "--first-k-dense-replace": "first_k_dense_replace",
    "--n-group": "n_group",
    "--topk-group": "topk_group",
}
"""Sizes of DeepSeek's latent attention and experts."""

_DROPOUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {"--attention-dropout": ("attn_pdrop",), "--hidden-dropout": ("resid_pdrop", "embd_pdrop")},
    "bloom": {"--attention-dropout": ("attention_dropout",), "--hidden-dropout": ("hidden_dropout",)},
}


def _dropout(ledger: Ledger, config: dict[str, Any]) -> None:
    """Dropouts, which are 0.1 in Megatron-LM where nothing is said."""
    names: dict[str, tuple[str, ...]] = _DROPOUTS.get(
        config["model_type"], {"--attention-dropout": ("attention_dropout",)}
    )
    for name in ("--attention-dropout", "--hidden-dropout"):
        value = ledger.number(name, 0.1)
        keys = names.get(name, ())
        for key in keys:
            config[key] = value
        unsaid = "" if name in ledger else "Not said: 0.1, Megatron-LM's default. "
        if keys:
            ledger.note(name, "mapped", f"{unsaid}It enters `model`.")
        elif value:
            ledger.note(name, "changed", f"{unsaid}{config['model_type']} has no such dropout, so there is none here.")
        else:
            ledger.note(name, "mapped", "There is none.")
