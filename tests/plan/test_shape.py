"""Models read from their configuration's JSON, and the built-in shapes that grow to a plan."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloom.errors import ModelError
from seqloom.plan import FAMILIES, TINY_SHAPES, ModelShape, Plan, fit, read_config, reasons

LLAMA = TINY_SHAPES["llama"]


@pytest.mark.parametrize("name", FAMILIES)
def test_built_in_shapes_are_what_transformers_would_read(name: str) -> None:
    """Catches a built-in shape that is no valid model of its family, or that is refused."""
    shape = ModelShape.from_config(read_config(name))
    assert (shape.family, shape.heads, shape.kv_heads, shape.head_dim) == (name, 4, 2, 8)
    assert (shape.vocab, shape.hidden, shape.layers, shape.max_positions) == (96, 32, 2, 256)
    assert (shape.window, shape.unsupported) == (None, ())


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
    for source in ("lama", str(tmp_path), str(tmp_path / "none.json")):
        with pytest.raises(ModelError, match=r"There is no model .*llama, mistral, qwen2, qwen3, a config.json"):
            read_config(source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{not json", "is not readable as JSON"),
        (b"", "is not readable as JSON"),
        (b"\xff\xfe\x00", "is not readable as JSON"),
        (b"[1, 2]", "holds a JSON list, not an object"),
        (b"3", "holds a JSON int, not an object"),
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
            {"model_type": "gpt2"},
            "Model family 'gpt2' is not supported yet; supported are llama, mistral, qwen2, qwen3",
        ),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
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
        {"attn_logit_softcapping": None, "attention_dropout": 0.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": None},
    ],
)
def test_what_is_off_is_not_refused(changes: dict[str, Any]) -> None:
    """Catches a refusal of a key that is merely present."""
    assert ModelShape.from_config({**LLAMA, **changes}).unsupported == ()


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 128}, 128),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": True}, 128),
        ({"model_type": "qwen3", "sliding_window": 128, "layer_types": ["full_attention"] * 2}, None),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 128,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            128,
        ),
    ],
)
def test_the_window_is_read_as_the_family_means_it(changes: dict[str, Any], window: int | None) -> None:
    """Catches a window dropped, and one taken from a key that the family does not use."""
    shape = ModelShape.from_config({**LLAMA, **changes})
    assert shape.window == window
    assert bool(reasons(Plan(), shape, 256)) == (window is not None)
    assert reasons(Plan(), shape, 128) == []


@given(st.sampled_from(FAMILIES), st.integers(1, 9), st.integers(1, 4), st.integers(1, 2000))
def test_a_grown_shape_fits_its_plan(name: str, ulysses: int, ring: int, times: int) -> None:
    """Catches a built-in shape that does not grow far enough, or whose parts disagree."""
    plan = Plan(ring=ring, ulysses=ulysses)
    num_tokens = 2 * ring * ulysses * times
    config = fit(read_config(name), plan, num_tokens)
    shape = ModelShape.from_config(config)
    assert reasons(plan, shape, num_tokens) == []
    assert (shape.heads, shape.head_dim) == (2 * shape.kv_heads, 8)
    assert shape.hidden == shape.heads * shape.head_dim
    assert shape.max_positions == max(256, num_tokens)
    assert shape.kv_heads in (ulysses, 2 * ulysses)  # no further than needed


def test_a_shape_that_fits_stays_as_it_is() -> None:
    """Catches growth without need, which would make small checks slow."""
    assert fit(LLAMA, Plan(ring=4, ulysses=2), 64) == LLAMA


def test_layers_grow_to_the_stages() -> None:
    """Catches a pipeline stage without a layer."""
    assert fit(LLAMA, Plan(pipeline=5), 64)["num_hidden_layers"] == 5
    assert fit(LLAMA, Plan(pipeline=5), 64, layers=3)["num_hidden_layers"] == 3


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
