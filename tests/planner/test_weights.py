"""The matrices of a rank are those of transformers' models, and what stages send is their block."""

from math import prod
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pool import Pool
from seqloom.fabric import Fabric
from seqloom.geometry import Layout
from seqloom.model import build_model, parallelize
from seqloom.plan import FAMILIES, ModelShape, Plan, fit, read_config
from seqloom.planner import Matrices, Place, matrices, pipeline_bytes, stepped_bytes
from seqloom.tensor import local


def rows(shapes: Any) -> list[tuple[int, int]]:
    """Rows and elements of each matrix, in any order; columns may lie in other orders."""
    return sorted((shape[0], prod(shape)) for shape in shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_matrices_are_those_of_transformers(family: str) -> None:
    """Catches a matrix left out, counted twice or with other rows, and a dense layer taken for a sparse one."""
    config = fit(read_config(family), Plan(), 64, layers=3)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    layers: list[list[tuple[int, ...]]] = [[], [], [], []]
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("_bias"):
            layer = next((int(part) for part in name.split(".") if part.isdecimal()), 3)
            layers[layer].append(tuple(parameter.shape))
    found = matrices(Plan(), ModelShape.from_config(config))
    assert [rows(layer) for layer in found.layers] == [rows(layer) for layer in layers[:3]]
    assert rows(found.outside) == rows(layers[3]) and found.experts == ()


def elements(found: Matrices) -> int:
    """All of it."""
    return sum(prod(shape) for unit in (*found.layers, *found.experts, found.outside) for shape in unit)


def test_stages_and_experts_are_dealt_out() -> None:
    """Catches layers in two stages or none, a head on every stage, and experts that stay whole."""
    shape = ModelShape.from_config(fit(read_config("mixtral"), Plan(), 64, layers=5))
    whole = elements(matrices(Plan(), shape))
    assert sum(elements(matrices(Plan(pipeline=3), shape, rank)) for rank in range(3)) == whole
    dealt = matrices(Plan(ring=2, tensor=2, expert=4), shape)
    assert dealt.experts[0] == ((1, 96, 32), (1, 32, 48)) and dealt.outside == ((48, 32), (48, 32))
    split = matrices(Plan(ring=2, tensor=2, expert=2, expert_tensor=2), shape)
    assert split.experts[0] == ((2, 24, 32), (2, 24, 32), (2, 32, 24))
    assert matrices(Plan(tensor=4, tensor_kind="2d"), ModelShape.from_config(read_config("llama"))).layers[0] == (
        ((16, 16), (8, 16), (8, 16), (16, 16), (24, 16), (24, 16), (16, 24))
    )


def held(cases: list[tuple[str, str]]) -> list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    """Rows and elements of the matrices that this rank holds under some plans, and those of the formula."""
    found = []
    for family, text in cases:
        fabric = Fabric.build(Plan.parse(text))
        config = fit(read_config(family), fabric.plan, 64)
        model = parallelize(build_model(config), fabric)
        named = [(name, local(parameter)) for name, parameter in model.named_parameters()]
        formula = matrices(fabric.plan, ModelShape.from_config(config))
        mine = rows(part.shape for name, part in named if part.dim() > 1 and not name.endswith("_bias"))
        fabric.close()
        found.append(
            (mine, rows(shape for unit in (*formula.layers, *formula.experts, formula.outside) for shape in unit))
        )
    return found


def test_the_matrices_of_a_tensor_grid(pool: Pool) -> None:
    """Catches a matrix split along the other dim, over the other axis, or counted split where it is whole."""
    cases = [
        ("llama", "tensor=4"),
        ("qwen2", "tensor=4 tensor_kind=2d"),
        ("llama", "tensor=4 tensor_kind=3d grid=2x2x1"),
        ("deepseek_v3", "tensor=4"),
        ("mixtral", "tensor=2 ring=2 expert=2 expert_tensor=2"),
        ("bloom", "tensor=4"),
    ]
    for case, (mine, formula) in zip(cases, pool.run(4, held, cases)[0], strict=True):
        assert mine == formula, case


def test_rows_that_others_stepped() -> None:
    """Catches padded rows, and those of a rank that has none."""
    sent = [stepped_bytes(Plan(data=3, zero=1), [(4, 10), (1, 5)], zero_rank=rank) for rank in range(3)]
    assert sent == [2 * 25 * 4, 2 * 20 * 4, 0]


@pytest.mark.parametrize(
    ("text", "each"),
    [
        ("ring=2 pipeline=2", [1, 1]),
        ("tensor=2 pipeline=3", [1, 2, 1]),
        ("tensor=4 tensor_kind=2d pipeline=2 schedule=interleaved", [3, 3]),
        ("ring=2 pipeline=2 schedule=zbv", [2, 2]),
    ],
)
def test_a_stage_sends_its_block(text: str, each: list[int]) -> None:
    """Catches blocks sent whole, after the last stage, or to a stage of the same rank."""
    plan = Plan.parse(text)
    shape = ModelShape.from_config(fit(read_config("llama"), plan, 64))
    layout = Layout(plan.layout, 64, plan.attention_ring, plan.attention_ulysses)
    for rank, blocks in enumerate(each):
        sent = pipeline_bytes(plan, shape, layout, Place(), rank=rank, item_bytes=8)
        assert sum(sent.values()) == blocks * 64 * shape.hidden // (plan.ring * plan.tensor) * 8
