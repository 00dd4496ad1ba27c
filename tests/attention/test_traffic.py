"""Bytes counted by the meter are the bytes of the formulas, to the last one."""

from typing import Any

import pytest
import torch

from pool import Pool
from seqloom.attention import attention, specification
from seqloom.fabric import Fabric
from seqloom.model import sum_gradients
from seqloom.plan import ModelShape, Plan, granularity
from seqloom.planner import all_reduce_bytes, attention_bytes
from seqloom.sequence import Batch, shard_batch

TEXTS = [
    *(f"ring={n}{extra}" for n in (2, 3, 4, 8) for extra in ("", " exchange=gather")),
    *(f"ulysses={n}" for n in (2, 3, 4, 8)),
    "ring=2 ulysses=2",
    "ring=2 ulysses=2 exchange=gather layout=striped",
    "ring=4 ulysses=2 layout=contiguous",
    "ring=2 ulysses=4 exchange=gather",
    "ring=3 ulysses=2",
    "data=2 ring=2 ulysses=2",
]


def shape_for(plan: Plan) -> ModelShape:
    """Three query heads to a key/value head, and a width that is none of the other numbers."""
    kv_heads = 2 * plan.ulysses
    return ModelShape(
        family="llama",
        vocab=8,
        hidden=8,
        layers=1,
        heads=3 * kv_heads,
        kv_heads=kv_heads,
        head_dim=16,
        max_positions=512,
    )


def case(text: str) -> tuple[Plan, ModelShape, int, int]:
    """Plan, shape, tokens and the rows of a rank."""
    plan = Plan.parse(text)
    return plan, shape_for(plan), granularity(plan) * 3, 2


def sent(text: str, dtype: torch.dtype, form: str) -> tuple[dict[str, int], dict[str, int], list[torch.dtype]]:
    """Bytes of forward and of backward, and the types of the gradients."""
    plan, shape, tokens, rows = case(text)
    fabric = Fabric.build(plan)
    _, shard = shard_batch(Batch.from_tokens(torch.zeros(rows * plan.data, tokens, dtype=torch.int64)), fabric)
    local = tokens // (plan.ring * plan.ulysses)
    q, k, v = (
        torch.randn(rows, heads, local, shape.head_dim).to(dtype).requires_grad_()
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    fabric.meter.reset()
    out = {"fast": attention, "specification": specification.attention}[form](q, k, v, shard)
    forward = fabric.meter.sent
    fabric.meter.reset()
    out.backward(torch.ones_like(out))
    return forward, fabric.meter.sent, [x.grad.dtype for x in (q, k, v)]


def formula(text: str, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """The same by `attention_bytes`."""
    plan, shape, tokens, rows = case(text)
    wide = max(4, dtype.itemsize)
    by_axis = attention_bytes(plan, shape, tokens, rows=rows, item_bytes=dtype.itemsize, accumulate_bytes=wide)
    forward, backward = ({axis: n[way] for axis, n in by_axis.items() if n[way]} for way in ("forward", "backward"))
    return forward, backward


@pytest.mark.parametrize("text", TEXTS)
def test_meter_equals_formula(pool: Pool, text: str) -> None:
    """Catches a hop too many, repeated key heads on the wire, dK and dV sent in bfloat16 or activations in float32."""
    plan = Plan.parse(text)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        forward, backward = formula(text, dtype)
        assert (set(forward) == {axis for axis in ("ring", "ulysses") if getattr(plan, axis) > 1}) and backward
        for counted in pool.run(plan.world_size, sent, text, dtype, "fast"):
            assert counted == (forward, backward, [dtype] * 3), dtype


@pytest.mark.parametrize("text", ["ulysses=3", "ring=3", "ring=3 exchange=gather", "ring=2 ulysses=2 exchange=gather"])
def test_the_specification_sends_as_much(pool: Pool, text: str) -> None:
    """Catches a fast form that is cheaper or dearer than the algorithm it stands for.

    But for the blocks that the fast form sends again in backward: the specification keeps them.
    """
    forward, backward = formula(text, torch.float64)
    if "ring" in forward:
        backward["ring"] -= forward["ring"]
    for counted in pool.run(Plan.parse(text).world_size, sent, text, torch.float64, "specification"):
        assert counted[:2] == (forward, backward)


def gradient_bytes(text: str) -> dict[str, int]:
    fabric = Fabric.build(Plan.parse(text))
    model = torch.nn.Sequential(torch.nn.Linear(24, 36), torch.nn.Linear(36, 12, bias=False))
    model[0].bias.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    fabric.meter.reset()
    sum_gradients(model, fabric)
    return fabric.meter.sent


@pytest.mark.parametrize("text", ["data=2", "ring=3", "data=2 ring=2", "data=2 ring=2 ulysses=2", "data=1"])
def test_gradient_sum(pool: Pool, text: str) -> None:
    """Catches gradients summed axis by axis, frozen parameters sent along, and gradients sent twice."""
    plan = Plan.parse(text)
    expected = all_reduce_bytes(4 * (24 * 36 + 36 * 12), plan.world_size)
    found: list[Any] = pool.run(plan.world_size, gradient_bytes, text)
    assert found == [{"replicas": expected} if expected else {}] * plan.world_size
