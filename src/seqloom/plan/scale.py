"""Plans and models at reduced size: the axes and features of a large run on the processes of a small machine."""

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from seqloom.errors import ModelError
from seqloom.plan.pipeline import micro_batches_needed
from seqloom.plan.plan import Plan
from seqloom.plan.shape import ModelShape
from seqloom.plan.tiny import FAMILIES, TINY_SHAPES, fit

_GIVEN_UP = ("data", "pipeline", "ulysses", "ring", "tensor")
"""Axes in the order in which they go where not all can keep two ranks."""

_FEATURES = (
    *("architectures", "tie_word_embeddings", "sliding_window", "sliding_window_pattern", "norm_topk_prob"),
    *("activation_function", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
)
"""What built-in shapes say beside sizes: here the model's own counts."""


def reduced(plan: Plan, most: int) -> Plan:
    """The plan with lower degrees, on at most `most` processes; they stay where it takes no more.

    Every axis keeps two ranks (a tensor grid the fewest of its kind, a double ring four) as long as that fits; the
    largest degrees halve first. Where it does not, axes are given up: data first, then pipeline, ulysses, ring, tensor.
    What the degrees no longer allow follows them: see `_settled`. Stages named by hand are balanced, since a reduced
    model has other layers.

    >>> str(reduced(Plan(pipeline=2, ring=16, tensor=2), 8)), str(reduced(Plan(data=4, ring=4), 8))
    ('pipeline=2 ring=2 tensor=2', 'data=2 ring=4')
    """
    degrees = {axis: getattr(plan, axis) for axis in _GIVEN_UP}
    least = {axis: min(degrees[axis], _least(plan, axis)) for axis in _GIVEN_UP}
    while prod(degrees.values()) > most:
        axis = max(_GIVEN_UP, key=lambda axis: (degrees[axis] > least[axis], degrees[axis]))
        if degrees[axis] == least[axis]:
            axis = next(axis for axis in _GIVEN_UP if degrees[axis] > 1)
            least[axis] = 2 if axis == "ring" and degrees[axis] > 2 else 1
        grid = axis == "tensor" and plan.tensor_kind != "1d"
        degrees[axis] = least[axis] if grid else max(least[axis], degrees[axis] // 2)
    return _settled(plan, degrees)


def _least(plan: Plan, axis: str) -> int:
    """The fewest ranks that leave an axis what it is."""
    if axis == "ring" and plan.inner_ring and plan.tensor_grid.tokens == 1:
        return 4
    if axis != "tensor" or plan.tensor_kind == "1d":
        return 2
    return {"2d": 4, "2.5d": 4 * min(plan.depth, 2), "3d": 8}[plan.tensor_kind]


def _settled(plan: Plan, degrees: Mapping[str, int]) -> Plan:
    """The plan with these degrees, and everything else as near to what it was as they allow."""
    changes: dict[str, Any] = {**degrees, "inner_ring": None, "stages": None, "expert": 1, "expert_tensor": 1}
    if degrees["tensor"] == 1:
        line = Plan(tensor=1)
        names = ("tensor_kind", "depth", "grid", "sequence_parallel", "tensor_tokens", "tensor_overlap", "regather")
        changes |= {name: getattr(line, name) for name in names}
        changes |= {"activations": "whole"} if plan.activations == "partitioned" else {}
    elif degrees["tensor"] != plan.tensor and plan.tensor_kind != "1d":
        changes |= {"grid": None, "depth": min(plan.depth, 2)}
    if degrees["pipeline"] == 1:
        changes |= {"schedule": Plan.schedule, "chunks": None}
    elif plan.chunks:
        changes |= {"chunks": min(plan.chunks, 2)}
    found = replace(plan, recompute="none", zero=0, zero_replicas=1, offload=False, **changes)
    found = replace(
        found, recompute=_recompute(plan, found.num_stages), **_shares(plan, found), **_experts(plan, found)
    )
    around = found.attention_ring
    inner = next((size for size in (plan.inner_ring, 2) if size and around % size == 0 and size < around), None)
    return replace(found, inner_ring=inner) if plan.inner_ring else found


def _recompute(plan: Plan, stages: int) -> str:
    """What is computed again, for so many stages: those at the same place of the pipeline; one layer for several."""
    words = plan.recompute.split("/")
    if len(words) > 1:
        words = [words[place * len(words) // stages] for place in range(stages)]
    words = [re.sub(r"\d+", "1", word) for word in words]
    return "/".join(words) if len(set(words)) > 1 else words[0]


def _shares(plan: Plan, found: Plan) -> dict[str, Any]:
    """The fields of ZeRO that these degrees allow."""
    ranks = found.replicas
    if ranks == 1 or not plan.zero:
        return {}
    fitting = [groups for groups in range(1, plan.zero_replicas + 1) if ranks % groups == 0 and groups < ranks]
    return {"zero": plan.zero, "offload": plan.offload, "zero_replicas": max(fitting)}


def _experts(plan: Plan, found: Plan) -> dict[str, Any]:
    """The fields of experts that these degrees allow."""
    split = found.tensor if plan.expert_tensor > 1 else 1
    ranks = found.replicas * (found.tensor if split == 1 else 1)
    return {"expert": max(d for d in range(1, plan.expert + 1) if ranks % d == 0), "expert_tensor": split}


def shrunk(config: Mapping[str, Any], plan: Plan, num_tokens: int, *, vocab: int) -> dict[str, Any]:
    """A Hugging Face configuration with the sizes of its family's built-in shape, grown to fit the plan.

    Features stay: dropout, tied embeddings, rotary bases, windows, and whether query heads share key/value heads (all
    one, several, or none). vocab: of the tokenizer; special tokens beyond it are left out. Raises ModelError for a
    family without a built-in shape.
    """
    shape = ModelShape.from_config(config)
    if shape.family not in TINY_SHAPES:
        raise ModelError(f"There is no reduced size of {shape.family}; there is one of {', '.join(FAMILIES)}.")
    tiny = dict(TINY_SHAPES[shape.family])
    if "num_key_value_heads" in tiny and tiny["num_key_value_heads"] != tiny["num_attention_heads"]:
        shared = {shape.heads: tiny["num_attention_heads"], 1: 1}
        tiny["num_key_value_heads"] = shared.get(shape.kv_heads, tiny["num_key_value_heads"])
    sizes = {key: value for key, value in fit(tiny, plan, num_tokens).items() if key not in _FEATURES}
    found = {**config, **sizes, "vocab_size": vocab, **_rotary(config, sizes)}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(found.get(key), int) and found[key] >= vocab:
            found[key] = None
    return found


def _rotary(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary angles that are scaled beyond some length: the same share of the positions there are."""
    key, name = "max_position_embeddings", "original_max_position_embeddings"
    scaled = {at: config[at] for at in ("rope_scaling", "rope_parameters") if name in (config.get(at) or {})}
    if not config.get(key) or not sizes.get(key):
        return {}
    return {at: {**said, name: max(1, said[name] * sizes[key] // config[key])} for at, said in scaled.items()}


def few_micro_batches(plan: Plan, number: int) -> int:
    """At most two micro-batches of a step, or as many as the plan's schedule needs.

    >>> few_micro_batches(Plan(), 64), few_micro_batches(Plan(), 1), few_micro_batches(Plan(pipeline=4), 64)
    (2, 1, 4)
    """
    return micro_batches_needed(plan, min(number, 2))
