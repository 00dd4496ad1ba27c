"""Bytes counted by the meter are the bytes of the formulas, to the last one."""

from typing import Any

import pytest
import torch

from pool import Pool
from seqloom.attention import attention, specification
from seqloom.fabric import Fabric
from seqloom.geometry import Mask
from seqloom.model import sum_gradients
from seqloom.plan import ModelShape, Plan
from seqloom.planner import all_reduce_bytes, attention_bytes
from seqloom.sequence import Batch, shard_batch

TEXTS = [
    *(f"ring={n}{extra}" for n in (2, 3, 8) for extra in ("", " exchange=gather", " exchange=needed", " exchange=rsa")),
    *(f"ulysses={n}" for n in (2, 3, 4, 8)),
    "ring=2 ulysses=2",
    "ring=2 ulysses=2 exchange=gather layout=striped",
    "ring=4 ulysses=2 layout=contiguous",
    "ring=2 ulysses=4 exchange=gather",
    "ring=3 ulysses=2 exchange=needed layout=balanced",
    "ring=2 ulysses=3 exchange=rsa layout=striped",
    "data=2 ring=2 ulysses=2",
    "ring=4 inner_ring=2",
    "ring=6 inner_ring=3 layout=contiguous",
    "ring=6 inner_ring=2",
    "ring=3 inner_ring=1 ulysses=2 layout=balanced",
]
VALUE_WIDTH = 24


def case(text: str, even: bool) -> tuple[Plan, ModelShape, int, tuple[tuple[int, ...], ...]]:
    """Plan, shape, tokens and the documents of each local row: numbers that the plan divides, or that it does not.

    Three query heads to a key/value head, and widths that are none of the other numbers.
    """
    plan = Plan.parse(text)
    kv_heads = 2 * plan.ulysses if even else 3
    shape = ModelShape(
        family="llama",
        vocab=8,
        hidden=8,
        layers=1,
        heads=3 * kv_heads,
        kv_heads=kv_heads,
        head_dim=16,
        max_positions=512,
    )
    tokens = 12 * plan.ring * plan.ulysses + (0 if even else 7)
    return plan, shape, tokens, ((tokens,), (5, tokens // 2, tokens - tokens // 2 - 5))


def sent(
    text: str, dtype: torch.dtype, form: str, even: bool
) -> tuple[dict[str, int], dict[str, int], list[torch.dtype]]:
    """Bytes of forward and of backward, and the types of the gradients."""
    plan, shape, tokens, documents = case(text, even)
    fabric = Fabric.build(plan)
    rows = torch.zeros(len(documents) * plan.data, tokens, dtype=torch.int64)
    local, shard = shard_batch(Batch.from_tokens(rows, documents * plan.data), fabric)
    held = local.input_ids.shape[1]
    widths = ((shape.heads, 16), (shape.kv_heads, 16), (shape.kv_heads, VALUE_WIDTH))
    q, k, v = (torch.randn(len(documents), heads, held, width).to(dtype).requires_grad_() for heads, width in widths)
    fabric.meter.reset()
    out = {"fast": attention, "specification": specification.attention}[form](q, k, v, shard)
    forward = fabric.meter.sent
    fabric.meter.reset()
    out.backward(torch.ones_like(out))
    return forward, fabric.meter.sent, [x.grad.dtype for x in (q, k, v)]


def formula(text: str, dtype: torch.dtype, even: bool, rank: int) -> tuple[dict[str, int], dict[str, int]]:
    """The same by `attention_bytes`, for a process of the fabric."""
    plan, shape, tokens, documents = case(text, even)
    by_axis = attention_bytes(
        plan,
        shape,
        tokens,
        ring_rank=rank // plan.ulysses % plan.ring,
        ulysses_rank=rank % plan.ulysses,
        masks=tuple(Mask(documents=lengths) for lengths in documents),
        item_bytes=dtype.itemsize,
        accumulate_bytes=max(4, dtype.itemsize),
        value_dim=VALUE_WIDTH,
    )
    forward, backward = ({axis: n[way] for axis, n in by_axis.items() if n[way]} for way in ("forward", "backward"))
    return forward, backward


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_meter_equals_formula(pool: Pool, text: str, even: bool) -> None:
    """Catches a hop too many, repeated key heads on the wire, blocks padded, tokens sent that nobody sees, dK and dV
    sent in bfloat16 or activations in float32."""
    plan = Plan.parse(text)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for rank, counted in enumerate(pool.run(plan.world_size, sent, text, dtype, "fast", even)):
            forward, backward = formula(text, dtype, even, rank)
            assert (forward and backward) or plan.exchange == "needed"
            seen = tuple({axis: n for axis, n in passes.items() if n} for passes in counted[:2])
            assert (*seen, counted[2]) == (forward, backward, [dtype] * 3), (dtype, rank)


@pytest.mark.parametrize("text", ["ulysses=3", "ring=3", "ring=3 exchange=gather", "ring=2 ulysses=2 exchange=gather"])
def test_the_specification_sends_as_much(pool: Pool, text: str) -> None:
    """Catches a fast form that is cheaper or dearer than the algorithm it stands for.

    But for the blocks that the fast form sends again in backward: the specification keeps them.
    """
    for rank, counted in enumerate(
        pool.run(Plan.parse(text).world_size, sent, text, torch.float64, "specification", True)
    ):
        forward, backward = formula(text, torch.float64, True, rank)
        if "ring" in forward:
            backward["ring"] -= forward["ring"]
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
