"""A synthetic run folder, with files as training and verification write them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from math import cos, exp, pi
from pathlib import Path
from typing import Any

import pytest

from seqloom.geometry import Mask
from seqloom.plan import ModelShape, Plan
from seqloom.planner import all_reduce_bytes, attention_bytes, tensor_bytes

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 257,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}

Make = Callable[..., Path]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What ran. extra_bytes: sent along the ring in step 3 beyond what the formula says."""

    plan: str = "ring=2 ulysses=2"
    num_tokens: int = 4096
    batch: int = 1
    accumulate: int = 1
    dtype: str = "float32"
    steps: int = 120
    verified: bool = True
    model: dict[str, Any] = field(default_factory=dict)
    extra_bytes: int = 0


def write_run(folder: Path, **changes: Any) -> Path:
    """Write a run folder; the keyword arguments are those of Scenario."""
    ran = Scenario(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    config, split, parameters = {**MODEL, **ran.model}, Plan.parse(ran.plan), 1_013_248
    item = {"bfloat16": 2, "float32": 4, "float64": 8}[ran.dtype]
    layer = attention_bytes(
        split,
        ModelShape.from_config(config),
        ran.num_tokens,
        masks=(Mask(),) * (ran.batch // split.data),
        item_bytes=item,
        accumulate_bytes=max(item, 4),
    )
    sent = {axis: sum(each.values()) * config["num_hidden_layers"] * ran.accumulate for axis, each in layer.items()}
    if split.tensor > 1:
        rows = ran.batch // split.data
        linears = tensor_bytes(split, ModelShape.from_config(config), ran.num_tokens, sequences=rows, item_bytes=item)
        sent |= {
            axis: sum(each.values()) * config["num_hidden_layers"] * ran.accumulate for axis, each in linears.items()
        }
    sent["replicas"] = all_reduce_bytes(parameters * max(item, 4), split.data * split.ring * split.ulysses)
    run = {
        "plan": ran.plan,
        "world_size": split.world_size,
        "model": config,
        "num_tokens": ran.num_tokens,
        "batch": ran.batch,
        "accumulate": ran.accumulate,
        "dtype": ran.dtype,
        "parameters": parameters,
        "unigram_entropy": 3.307,
        "steps": ran.steps,
        "data": {"files": 300, "documents": 300, "tokens": 4_001_792, "sequences": 977},
        "versions": {"seqloom": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    }
    (folder / "run.json").write_text(json.dumps(run))
    lines = []
    for step in range(1, ran.steps + 1):
        wobble = ((step * 7919) % 101) / 101 - 0.5
        seconds = (2.1 if step == 1 else 1.28) + 0.09 * wobble
        line = {
            "step": step,
            "loss": 2.31 + 3.3 * exp(-step / 22) + 0.16 * wobble,
            "gradient_norm": 0.6 + 2.4 * exp(-step / 15) + 0.2 * abs(wobble),
            "learning_rate": 0.003 * min(step / 10, 0.55 + 0.45 * cos(pi * step / ran.steps)),
            "label_tokens": ran.num_tokens * ran.batch * ran.accumulate - 14,
            "seconds": seconds,
            "tokens_per_second": ran.num_tokens * ran.batch * ran.accumulate / seconds,
            # An axis that sent nothing is absent, as the meter has it.
            "sent_bytes": {
                axis: count + (ran.extra_bytes if axis == "ring" and step == 3 else 0)
                for axis, count in sent.items()
                if count
            },
        }
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if ran.verified:
        verdict = {
            "plan": ran.plan,
            "world_size": split.world_size,
            "dtype": "float64",
            "num_tokens": 512,
            "loss_error": 1.3e-16,
            "gradient_norm_error": 2.2e-16,
            "worst_gradient_error": 3.4e-15,
            "worst_parameter": "model.layers.0.self_attn.k_proj.weight",
            "parameter_error": 8.1e-16,
            "steps": 2,
            "tolerance": 1e-9,
            "equal": True,
            "parameters": [
                {"name": "model.layers.0.self_attn.k_proj.weight", "gradient_error": 3.4e-15},
                {"name": "model.layers.3.mlp.down_proj.weight", "gradient_error": 1.1e-15},
                {"name": "lm_head.weight", "gradient_error": 4.0e-16},
            ],
        }
        (folder / "verify.json").write_text(json.dumps(verdict))
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    """`write_run` into a fresh folder; keyword arguments change what ran."""

    def make(**changes: Any) -> Path:
        return write_run(tmp_path / "run", **changes)

    return make
