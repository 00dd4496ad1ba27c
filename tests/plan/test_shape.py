"""Models read from their configuration's JSON, and the built-in shapes that grow to a plan."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from seqloom.errors import ModelError
from seqloom.plan import (
    FAMILIES,
    TINY_SHAPES,
    ModelShape,
    Plan,
    fit,
    layer_costs,
    read_config,
    reasons,
    shortest,
    without_dropout,
)

LLAMA = TINY_SHAPES["llama"]
LATENT = ("deepseek_v2", "deepseek_v3")
OWN_KEYS = ("bloom", "gpt2", *LATENT)
"""Families with a key head for each query head."""
EXPERTS = {"gpt_oss": 4, "mixtral": 4, "qwen3_moe": 6, "deepseek_v2": 6, "deepseek_v3": 8}


@pytest.mark.parametrize("name", FAMILIES)
def test_built_in_shapes_are_what_transformers_would_read(name: str) -> None:
    """Catches a built-in shape that is no valid model of its family, or that is refused."""
    shape = ModelShape.from_config(read_config(name))
    bloom, own, latent = name == "bloom", name in OWN_KEYS, name in LATENT
    assert (shape.family, shape.heads, shape.kv_heads, shape.head_dim) == (
        name,
        4,
        4 if own else 2,
        10 if latent else 8,
    )
    assert (shape.value_dim, shape.experts) == (8, EXPERTS.get(name, 0))
    assert shape.experts_per_token == (2 if shape.experts else 0)
    assert (shape.vocab, shape.hidden, shape.layers, shape.max_positions) == (96, 32, 2, None if bloom else 256)
    assert shape.intermediate == (128 if bloom else 48)
    assert shape.tied == (name in ("qwen2", "gemma2", "gemma3_text", "bloom", "gpt2"))
    assert without_dropout(read_config(name)) == (read_config(name), ()), "built-in shapes drop nothing"
    assert (shape.windows, shape.unsupported) == (
        (24 if name in ("gemma2", "gemma3_text", "gpt_oss") else None, None),
        (),
    )


def test_a_file_and_its_folder_read_the_same(tmp_path: Path) -> None:
    """Catches a folder not searched for its config.json."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "vocab_size": 77}))
    assert read_config(str(tmp_path)) == read_config(str(tmp_path / "config.json"))
    assert read_config(str(tmp_path))["vocab_size"] == 77


def test_a_read_configuration_can_be_changed_without_changing_the_built_in_one() -> None:
    """Catches a table handed out that its reader then edits for everybody."""
    read_config("llama")["vocab_size"] = 1
    assert read_config("llama")["vocab_size"] == 96


def test_no_such_model(tmp_path: Path) -> None:
    """Catches a path that does not exist, or a folder without config.json, met with a traceback."""
    for source in ("lama", str(tmp_path), str(tmp_path / "none.json"), "x" * 300):
        with pytest.raises(
            ModelError,
            match=r"There is no model .*bloom, deepseek_v2, .*, llama, .*, qwen2, qwen3, qwen3_moe, a con",
        ):
            read_config(source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{not json", "is not readable as JSON"),
        (b"", "is not readable as JSON"),
        (b"\xff\xfe\x00", "is not readable as JSON"),
        (b"[1, 2]", "holds a JSON list, not an object"),
        (b"3", "holds a JSON int, not an object"),
        (b"[" * 100_000, "is not readable as JSON"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    """Catches unreadable files met with a traceback, or with a message that does not name the file."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_config(str(path))
    assert str(path) in str(caught.value)


def test_missing_keys_are_named_together() -> None:
    """Catches a KeyError, and missing keys named one at a time."""
    config = {key: value for key, value in LLAMA.items() if key not in ("hidden_size", "num_hidden_layers")}
    with pytest.raises(ModelError, match="lacks hidden_size, num_hidden_layers; give"):
        ModelShape.from_config(config)


@pytest.mark.parametrize("value", [0, -1, "32", 32.0, True, [32]])
def test_numbers_must_be_numbers(value: Any) -> None:
    """Catches a size of zero, or one written as text, that fails much later."""
    with pytest.raises(ModelError, match=r"hidden_size is .* not a whole number above 0"):
        ModelShape.from_config({**LLAMA, "hidden_size": value})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"hidden_size": 28, "head_dim": None},
            "Heads of 7 channels cannot be turned in pairs .* hidden_size such as 32",
        ),
        ({"head_dim": 9}, "Heads of 9 channels cannot be turned in pairs"),
        ({**TINY_SHAPES["mixtral"], "num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than the 4 experts"),
    ],
)
def test_numbers_that_are_no_model(changes: dict[str, Any], named: str) -> None:
    """Catches sizes with which transformers fails inside a forward pass, in words about tensors."""
    with pytest.raises(ModelError, match=named):
        ModelShape.from_config({**LLAMA, **changes})


def test_grouped_heads_and_head_width_have_defaults() -> None:
    """Catches the defaults of a Llama configuration read wrongly: as many key/value heads, hidden / heads wide."""
    config = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "head_dim")}
    shape = ModelShape.from_config(config)
    assert (shape.kv_heads, shape.head_dim) == (4, 8)
    assert ModelShape.from_config({**LLAMA, "head_dim": 24}).head_dim == 24


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"model_type": "phi3"},
            "Model family 'phi3' is not supported yet; "
            "supported are bloom, deepseek_v2, deepseek_v3, gemma2, gemma3_text, gpt2, gpt_oss, llama, mistral, "
            "mixtral, qwen2, qwen3, qwen3_moe.",
        ),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 asks for soft-capped attention scores"),
        (
            {"final_logit_softcapping": 30.0},
            "final_logit_softcapping=30.0 asks for soft-capped logits, which only gemma2 and gemma3_text can have",
        ),
        (
            {**TINY_SHAPES["gemma3_text"], "attn_logit_softcapping": 50.0},  # in its configuration, but never read
            "attn_logit_softcapping=50.0 asks for soft-capped attention scores, which only gemma2 can have",
        ),
        (
            {**TINY_SHAPES["gemma3_text"], "use_bidirectional_attention": True},
            "use_bidirectional_attention=True asks for attention to both sides",
        ),
        (
            {**TINY_SHAPES["deepseek_v3"], "output_router_logits": True},
            "output_router_logits=True asks for a loss that balances experts, which transformers' deepseek_v3 does not",
        ),
        (
            {**TINY_SHAPES["mixtral"], "router_jitter_noise": 0.1},
            "router_jitter_noise=0.1 would draw other noise under each plan",
        ),
        (
            {**TINY_SHAPES["deepseek_v3"], "num_key_value_heads": 2},
            "num_key_value_heads=2 does not fit deepseek_v3, whose latent attention has a key for each query head",
        ),
        (
            {**TINY_SHAPES["gpt2"], "add_cross_attention": True},
            "add_cross_attention=True asks for attention to another model's states",
        ),
        (
            {
                **TINY_SHAPES["gemma3_text"],
                "rope_parameters": {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {}},
            },
            "rope type 'dynamic'",
        ),
        (
            {**TINY_SHAPES["bloom"], "hidden_dropout": 0.1},
            "hidden_dropout=0.1 would depend on how the sequence is split",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope'"),
    ],
)
def test_what_no_plan_honours_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    """Catches a feature silently dropped under a split."""
    shape = ModelShape.from_config({**LLAMA, **changes})
    (sentence,) = shape.unsupported
    assert named in sentence
    assert reasons(Plan(), shape, 64) == [sentence]


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_logit_softcapping": None, "attention_dropout": 0.1},  # which attention draws from positions
        {**TINY_SHAPES["bloom"], "attention_dropout": 0.1, "hidden_dropout": 0.0},
        {**TINY_SHAPES["gpt2"], "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
        {**TINY_SHAPES["gpt2"], "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": None},
    ],
)
def test_what_is_off_is_not_refused(changes: dict[str, Any]) -> None:
    """Catches a refusal of a key that is merely present."""
    assert ModelShape.from_config({**LLAMA, **changes}).unsupported == ()


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("llama", {"sliding_window": 128}, [None] * 4),
        ("mistral", {}, [4096] * 4),
        ("mistral", {"sliding_window": 128}, [128] * 4),
        ("mistral", {"sliding_window": 128, "use_sliding_window": False}, [128] * 4),
        ("mistral", {"sliding_window": 128, "layer_types": [FULL] * 4}, [128] * 4),
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("qwen2", {"sliding_window": 128}, [None] * 4),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": False}, [None] * 4),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True}, [None] * 4),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 1}, [None, 128, 128, 128]),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, [4096] * 4),
        ("qwen3", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 3}, [None] * 3 + [128]),
        ("qwen3", {"sliding_window": 128, "layer_types": [SLIDING] * 4}, [None] * 4),
        (
            "qwen3",
            {"sliding_window": 128, "use_sliding_window": True, "layer_types": [FULL, SLIDING, FULL, SLIDING]},
            [None, 128, None, 128],
        ),
        (
            "qwen3",
            {"sliding_window": None, "use_sliding_window": True, "layer_types": [FULL, SLIDING, FULL, SLIDING]},
            [None] * 4,
        ),
        ("gemma3_text", {"sliding_window_pattern": 3}, [4096, 4096, None, 4096]),
        ("gemma3_text", {"sliding_window": 128}, [128] * 4),
        ("gpt_oss", {}, [128, None, 128, None]),
        ("gpt_oss", {"sliding_window": 16, "layer_types": [FULL, FULL, FULL, SLIDING]}, [None, None, None, 16]),
        ("gemma2", {}, [4096, None, 4096, None]),
        ("gemma2", {"sliding_window": 128}, [128, None, 128, None]),
        ("gemma2", {"sliding_window": 128, "layer_types": [FULL, FULL, FULL, SLIDING]}, [None, None, None, 128]),
        ("bloom", {"sliding_window": 128}, [None] * 4),
    ],
)
def test_windows_are_those_that_transformers_gives_each_layer(
    family: str, changes: dict[str, Any], windows: list[int | None]
) -> None:
    """Catches a window dropped, put on the wrong layers, or taken from a key that the family does not use."""
    config = {**TINY_SHAPES[family], "num_hidden_layers": 4, "n_layer": 4}
    for key in ("sliding_window", "sliding_window_pattern"):
        config.pop(key, None)
    config |= changes
    assert ModelShape.from_config(config).windows == tuple(windows)
    theirs = AutoConfig.for_model(**json.loads(json.dumps(config)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    layers = [module for name, module in model.named_modules() if name.endswith(("self_attn", "self_attention"))]
    # Mistral's layers read the configuration when they are called.
    read = [
        getattr(layer, "sliding_window", theirs.sliding_window if family == "mistral" else None) for layer in layers
    ]
    assert read == windows


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("deepseek_v2", {}, (2 * 1407,) * 4),
        ("deepseek_v3", {}, (18_432,) * 3 + (2048,)),
        ("deepseek_v3", {"first_k_dense_replace": 9}, (18_432,) * 4),
        ("qwen3_moe", {"mlp_only_layers": [1], "decoder_sparse_step": 2}, (6144, 6144, 6144, 0)),
        ("mixtral", {}, (0,) * 4),
        ("llama", {}, (11_008,) * 4),
    ],
)
def test_what_all_tokens_go_through(family: str, changes: dict[str, Any], expected: tuple[int, ...]) -> None:
    """Catches shared experts forgotten, and dense layers among sparse ones."""
    config = {"model_type": family, "num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 64, **changes}
    assert ModelShape.from_config({"vocab_size": 9, "max_position_embeddings": 9, **config}).inside == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_costs_what_its_weights_multiply(family: str) -> None:
    """Catches dense widths where experts are, experts that a token does not go to, and latents taken as full."""
    config = {**read_config(family), **({"n_layer": 3} if family in ("bloom", "gpt2") else {"num_hidden_layers": 3})}
    config |= {"mlp_only_layers": [1]} if family == "qwen3_moe" else {}
    shape = ModelShape.from_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    found = [0] * 3
    for name, parameter in model.named_parameters():
        layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        chooses = ".router." in name or ".mlp.gate." in name
        if layer is not None and parameter.dim() > 1 and not chooses and not name.endswith("_bias"):
            share = shape.experts_per_token / shape.experts if ".experts." in name else 1
            found[layer] += round(parameter.numel() * share)
    assert layer_costs(shape) == found


def test_latents_have_transformers_widths() -> None:
    """Catches a null for no query latent taken for the default, and defaults that transformers does not have."""
    sizes = {"vocab_size": 9, "max_position_embeddings": 9, "num_hidden_layers": 1, "num_attention_heads": 1}
    for family in ("deepseek_v2", "deepseek_v3"):
        config = {"model_type": family, "hidden_size": 64, **sizes}
        shape, theirs = ModelShape.from_config(config), AutoConfig.for_model(family)
        found = shape.query_latent, shape.key_latent, shape.shared_key
        assert found == (theirs.q_lora_rank, theirs.kv_lora_rank, theirs.qk_rope_head_dim)
        assert ModelShape.from_config({**config, "q_lora_rank": None}).query_latent == 0


def test_the_sizes_are_those_that_transformers_reads() -> None:
    """Catches BLOOM's own names for its sizes misread, and defaults that are not the family's."""
    for family, sizes in itertools.product(FAMILIES, ({}, {"num_attention_heads": 2, "num_hidden_layers": 3})):
        config = {**TINY_SHAPES[family], **sizes}
        for key in ("num_key_value_heads", "head_dim") if sizes else ():
            config.pop(key, None)
        config |= {"num_key_value_heads": 2} if family not in ("llama", "bloom", "gpt2") and sizes else {}
        for key in ("intermediate_size", "n_inner", "tie_word_embeddings") if sizes else ():
            config.pop(key, None)
        theirs, ours = AutoConfig.for_model(**config), ModelShape.from_config(config)
        assert (ours.layers, ours.heads) == (theirs.num_hidden_layers, theirs.num_attention_heads)
        assert (ours.hidden, ours.vocab) == (theirs.hidden_size, theirs.vocab_size)
        assert ours.kv_heads == getattr(theirs, "num_key_value_heads", ours.heads)
        assert ours.head_dim == getattr(theirs, "head_dim", None) or ours.hidden // ours.heads
        assert ours.max_positions == getattr(theirs, "max_position_embeddings", None)
        assert ours.tied == theirs.tie_word_embeddings
        inside = getattr(theirs, "intermediate_size", None) or getattr(theirs, "n_inner", None)
        assert ours.intermediate == inside or 4 * theirs.hidden_size


@pytest.mark.parametrize(
    ("family", "changes", "experts"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, 0),
        ("qwen3_moe", {"decoder_sparse_step": 3}, 0),
        ("qwen3_moe", {"mlp_only_layers": [0]}, 6),
        ("deepseek_v3", {"first_k_dense_replace": 2}, 0),
        ("llama", {}, 0),
    ],
)
def test_layers_without_experts(family: str, changes: dict[str, Any], experts: int) -> None:
    """Catches experts dealt out in a model whose layers are all dense."""
    assert ModelShape.from_config({**TINY_SHAPES[family], **changes}).experts == experts


def test_an_alias_is_the_shape_it_stands_for() -> None:
    """Catches the issue's own name for DeepSeek's models not understood."""
    assert read_config("deepseek") == read_config("deepseek_v3")


def test_bloom_by_its_older_name_for_hidden() -> None:
    """Catches n_embed ignored, as configurations of the first BLOOMs spell it, and sizes it lacks asked for."""
    config = {key: value for key, value in TINY_SHAPES["bloom"].items() if key != "hidden_size"} | {"n_embed": 64}
    shape = ModelShape.from_config(config | {"num_key_value_heads": 2, "seq_length": 2048})
    assert (shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.max_positions) == (64, 4, 4, 16, None)
    with pytest.raises(ModelError, match="lacks hidden_size; give"):
        ModelShape.from_config({key: value for key, value in config.items() if key != "n_embed"})


def test_gpt2_by_its_own_names() -> None:
    """Catches GPT-2's sizes misread: from general names it does not read, or its own under an alias that it does."""
    config = {**TINY_SHAPES["gpt2"], "num_key_value_heads": 2, "head_dim": 5, "intermediate_size": 7}
    shape = ModelShape.from_config(config)
    assert (shape.kv_heads, shape.head_dim, shape.intermediate, shape.max_positions) == (4, 8, 48, 256)
    aliased = config | {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3, "n_inner": None}
    shape = ModelShape.from_config(aliased | {"max_position_embeddings": 512})
    assert (shape.hidden, shape.heads, shape.layers, shape.intermediate) == (64, 2, 3, 256)
    assert shape.max_positions == 512
    with pytest.raises(ModelError, match=r"lacks n_embd, n_positions; give"):
        ModelShape.from_config({key: value for key, value in config.items() if key not in ("n_embd", "n_positions")})
    with pytest.raises(ModelError, match="32 hidden channels cannot be cut into 5 heads of gpt2 evenly; use a multi"):
        ModelShape.from_config(config | {"n_head": 5})


def test_dropouts_that_a_configuration_does_not_name() -> None:
    """Catches GPT-2's three dropouts of 0.1, which hold where nothing is said, left on beside one device without."""
    config = {key: value for key, value in TINY_SHAPES["gpt2"].items() if not key.endswith("pdrop")}
    off, said = without_dropout({**config, "resid_pdrop": 0.25, "summary_first_dropout": 0.1})
    assert said == ("resid_pdrop=0.25", "attn_pdrop=0.1", "embd_pdrop=0.1")
    theirs = AutoConfig.for_model(**off)
    assert (theirs.attn_pdrop, theirs.embd_pdrop, theirs.resid_pdrop) == (0.0, 0.0, 0.0)
    assert off["summary_first_dropout"] == 0.1, "of a head that a language model does not have"
    for family in FAMILIES:
        named = {"model_type": family, "architectures": None}
        silent = AutoConfig.for_model(**without_dropout(named)[0]).to_dict()
        assert [key for key in silent if "drop" in key and silent[key] and "summary" not in key] == []


@pytest.mark.parametrize("types", [[FULL], [FULL, "chunked_attention"], SLIDING, {}, [FULL, 2], []])
def test_layer_types_that_cannot_be(types: Any) -> None:
    """Catches kinds of layers for other layers than there are, and kinds that nothing honours."""
    with pytest.raises(ModelError, match=r"layer_types is .*; it must name one of 'full_attention' and 'sliding_att"):
        ModelShape.from_config({**TINY_SHAPES["gemma2"], "layer_types": types})
    with pytest.raises(ModelError, match="max_window_layers is '1', not a whole number"):
        ModelShape.from_config({**TINY_SHAPES["qwen2"], "max_window_layers": "1"})
    with pytest.raises(ModelError, match="sliding_window_pattern is 0, not a whole number"):
        ModelShape.from_config({**TINY_SHAPES["gemma3_text"], "sliding_window_pattern": 0})


def test_a_window_is_no_reason_against_any_length() -> None:
    """Catches the refusal of sequences longer than the window, from when windows were not honoured."""
    shape = ModelShape.from_config({**TINY_SHAPES["mistral"], "sliding_window": 16})
    assert reasons(Plan(ring=2), shape, 256) == []


@given(st.sampled_from(FAMILIES), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2000))
def test_a_grown_shape_fits_its_plan(name: str, ulysses: int, ring: int, more: int) -> None:
    """Catches a built-in shape that does not grow far enough, one that grows without need, and parts that disagree."""
    plan = Plan(ring=ring, ulysses=ulysses)
    num_tokens = shortest(plan) + more
    shape = ModelShape.from_config(fit(read_config(name), plan, num_tokens))
    assert reasons(plan, shape, num_tokens) == []
    group = 1 if name in OWN_KEYS else 2
    assert (shape.heads, shape.value_dim) == (group * shape.kv_heads, 8)
    assert shape.hidden == shape.heads * shape.value_dim
    assert shape.max_positions == (None if name == "bloom" else max(256, num_tokens))
    assert shape.heads == max(4, -(-ulysses // group) * group)


@pytest.mark.parametrize(
    ("text", "heads", "kv_heads"),
    [
        ("tensor=3", 6, 3),
        ("tensor=4", 4, 2),
        ("tensor=5 ulysses=2", 10, 5),
        ("tensor=4 ulysses=3", 12, 6),
        ("tensor=6 tensor_kind=2d grid=2x3", 6, 3),
        ("tensor=6 tensor_kind=2d grid=3x2 ulysses=2 tensor_tokens=ulysses", 12, 6),
        ("tensor=8 tensor_kind=3d ulysses=4", 8, 4),
    ],
)
def test_heads_grow_to_the_tensor_grid(text: str, heads: int, kv_heads: int) -> None:
    """Catches heads that a tensor degree does not divide, or too few on each of its ranks for Ulysses."""
    plan = Plan.parse(text)
    for family in FAMILIES:
        shape = ModelShape.from_config(fit(read_config(family), plan, shortest(plan)))
        own = family in OWN_KEYS
        least = next(n for n in range(4, 99) if n % plan.tensor_grid.heads == 0 and n >= heads) if own else heads
        assert shape.heads == min(heads, least) or own
        assert shape.hidden == 8 * shape.heads and shape.heads % plan.tensor_grid.heads == 0
        assert shape.heads // plan.tensor_grid.heads >= plan.attention_ulysses
        if not own:
            assert shape.kv_heads == kv_heads
        if family == "llama":
            assert reasons(plan, shape, shortest(plan)) == []


def test_a_shape_that_fits_stays_as_it_is() -> None:
    """Catches growth without need, which would make small checks slow."""
    assert fit(LLAMA, Plan(ring=4, ulysses=2), 64) == LLAMA


def test_gpt2_shaped_by_hand() -> None:
    """Catches GPT-2's sizes grown under names that it does not read, or positions that stay behind the length."""
    gpt2 = TINY_SHAPES["gpt2"]
    assert fit(gpt2, Plan(pipeline=3), 300, heads=6) == gpt2 | {
        "n_head": 6,
        "n_embd": 48,
        "n_layer": 3,
        "n_positions": 300,
    }
    with pytest.raises(ModelError, match="gpt2 has a key/value head for each query head, so it cannot have 2"):
        fit(gpt2, Plan(), 64, kv_heads=2)


def test_bloom_shaped_by_hand() -> None:
    """Catches key/value heads accepted by a family that has none of its own, and ignored."""
    bloom = TINY_SHAPES["bloom"]
    assert fit(bloom, Plan(ring=4), 64, heads=6, kv_heads=6, layers=3) == bloom | {
        "n_head": 6,
        "hidden_size": 48,
        "n_layer": 3,
    }
    for counts in ({"heads": 6, "kv_heads": 2}, {"kv_heads": 2}):
        with pytest.raises(ModelError, match="bloom has a key/value head for each query head, so it cannot have 2"):
            fit(bloom, Plan(), 64, **counts)


def test_layers_grow_to_the_stages() -> None:
    """Catches a pipeline stage without a layer."""
    assert fit(LLAMA, Plan(pipeline=5), 64)["num_hidden_layers"] == 5
    assert fit(LLAMA, Plan(pipeline=5), 64, layers=3)["num_hidden_layers"] == 3
    assert fit(TINY_SHAPES["bloom"], Plan(pipeline=5), 64)["n_layer"] == 5


@pytest.mark.parametrize(
    ("given", "heads", "kv_heads"),
    [
        ({"heads": 6}, 6, 6),
        ({"kv_heads": 3}, 6, 3),
        ({"heads": 12, "kv_heads": 3}, 12, 3),
        ({"heads": 5, "kv_heads": 5}, 5, 5),
    ],
)
def test_numbers_given_by_hand_are_kept(given: dict[str, int], heads: int, kv_heads: int) -> None:
    """Catches a head count silently changed to one that the plan likes better."""
    grown = fit(LLAMA, Plan(ulysses=4), 64, **given)
    assert (grown["num_attention_heads"], grown["num_key_value_heads"]) == (heads, kv_heads)
    assert grown["hidden_size"] == heads * 8


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping=0.0 is no cap"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping=-1.0 is no cap"),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "set slow_but_exact to false"),
    ],
)
def test_settings_that_would_be_ignored(family: str, changes: dict[str, Any], said: str) -> None:
    """Catches a cap of 0 taken for none, and a product of BLOOM's that leaves out biases."""
    assert said in ModelShape.from_config({**read_config(family), **changes}).unsupported[0]
    assert not ModelShape.from_config(read_config(family)).unsupported
