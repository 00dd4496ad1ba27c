"""What whole models over tensor grids send, as the meter counts it, against the formulas: every byte."""

from fractions import Fraction
from typing import Any

import pytest

from model.dense import batch_of, build
from pool import Pool
from seqloom.fabric import Fabric
from seqloom.geometry import Layout
from seqloom.model import parallelize, token_loss
from seqloom.plan import ModelShape, Plan, fit, read_config
from seqloom.planner import Place, Tokens, all_reduce_bytes, attention_bytes, model_elements, places, tensor_bytes
from seqloom.sequence import shard_batch

TOKENS, ROWS, ITEM = 37, 2, 8


def sent_by(layers: int, family: str, text: str, changes: dict[str, Any]) -> dict[str, int]:
    """Bytes this rank sends in a forward and backward pass, before gradients are summed."""
    plan = Plan.parse(text)
    fabric = Fabric.build(plan)
    settings = {**fit(read_config(family), plan, TOKENS, layers=layers), **changes}
    model = parallelize(build(family, **settings), fabric)
    local, shard = shard_batch(batch_of(ROWS * plan.data, None, TOKENS, settings["vocab_size"]), fabric)
    fabric.meter.reset()
    token_loss(model, local, shard).backward()
    sent = fabric.meter.sent
    fabric.close()
    return sent


def one_layer(family: str, text: str, changes: dict[str, Any]) -> dict[str, int]:
    """Bytes this rank sends in one layer: those of three less those of two."""
    two, three = (sent_by(layers, family, text, changes) for layers in (2, 3))
    return {axis: three[axis] - two.get(axis, 0) for axis in three}


def predicted(family: str, text: str, changes: dict[str, Any], place: Place) -> dict[str, int]:
    """The same by the formulas: linears, attention, and the two norms where their width is split."""
    plan = Plan.parse(text)
    model = ModelShape.from_config({**fit(read_config(family), plan, TOKENS), **changes})
    layout = Layout(plan.layout, TOKENS, plan.attention_ring, plan.attention_ulysses)
    linears = tensor_bytes(plan, model, TOKENS, place=place, sequences=ROWS, layout=layout, item_bytes=ITEM)
    attention = attention_bytes(
        plan,
        model,
        TOKENS,
        ring_rank=place.ring,
        ulysses_rank=place.ulysses,
        heads_rank=place.heads,
        masks=(batch_of(1, None, TOKENS, 9).mask(0),) * ROWS,
        layout=layout,
        item_bytes=ITEM,
        accumulate_bytes=ITEM,
    )
    found = {axis: sum(ways.values()) for axis, ways in (attention | linears).items()}
    split = plan.tensor_grid.outer.hidden
    if split is not None:
        numbers = 2 * 2 * ROWS * Tokens.of(plan, layout, place).outer  # two norms, forward and backward
        found[split] += all_reduce_bytes(numbers * ITEM, plan.tensor_grid.axes[split])
    return {axis: count for axis, count in found.items() if count}


@pytest.mark.parametrize(
    ("family", "text", "changes"),
    [
        ("llama", "tensor=2 ring=2 ulysses=2", {}),
        ("llama", "tensor=4 regather=false", {"num_key_value_heads": 1}),
        ("llama", "tensor=3 tensor_overlap=ring", {"intermediate_size": 47}),
        ("llama", "tensor=3 tensor_overlap=ring regather=false", {}),
        ("llama", "tensor=3 sequence_parallel=false ring=2", {}),
        ("llama", "tensor=3 sequence_parallel=false tensor_overlap=ring", {}),
        ("gpt2", "tensor=3", {}),
        ("bloom", "tensor=4 regather=false", {}),
        ("llama", "tensor=4 tensor_kind=2d ring=2", {}),
        ("llama", "tensor=4 tensor_kind=2d", {"intermediate_size": 13}),
        (
            "llama",
            "tensor=6 tensor_kind=2d grid=3x2 regather=false",
            {"intermediate_size": 47, "num_key_value_heads": 1},
        ),
        ("qwen3", "tensor=6 tensor_kind=2d grid=2x3 tensor_tokens=ulysses", {"num_key_value_heads": 2}),
        ("llama", "tensor=8 tensor_kind=2.5d depth=2", {}),
        ("llama", "tensor=8 tensor_kind=3d", {"intermediate_size": 45}),
        ("llama", "tensor=6 tensor_kind=3d grid=3x2x1", {}),
        ("llama", "tensor=8 tensor_kind=3d regather=false", {"num_key_value_heads": 1}),
        ("deepseek_v3", "tensor=2 ring=2", {}),
        ("deepseek_v2", "tensor=3 tensor_overlap=ring regather=false", {"q_lora_rank": None}),
        ("deepseek_v3", "tensor=3 sequence_parallel=false", {"first_k_dense_replace": 9}),
    ],
)
def test_a_layer_sends_what_the_formulas_say(pool: Pool, family: str, text: str, changes: dict[str, Any]) -> None:
    """Catches a formula that no run follows, or a layer that sends more: lengths and widths that nothing divides."""
    plan = Plan.parse(text)
    found = pool.run(plan.world_size, one_layer, family, text, changes)
    for place in places(plan):
        expected, sent = predicted(family, text, changes, place), found[place.rank(plan)]
        assert expected.keys() == sent.keys()
        for axis, count in expected.items():
            assert abs(sent[axis] - count) <= 2, (axis, place)  # sums of thirds, rounded down one by one


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "text",
    ["tensor=3", "tensor=4 sequence_parallel=false", "tensor=6 tensor_kind=2d grid=3x2", "tensor=8 tensor_kind=3d"],
)
def test_a_model_sends_what_the_formulas_say(pool: Pool, text: str, tied: bool) -> None:
    """Catches an embedding or head that sends more than a linear would: beside ids, norms and two numbers a token."""
    plan, changes = Plan.parse(text), {"tie_word_embeddings": tied}
    grid = plan.tensor_grid
    model = ModelShape.from_config({**fit(read_config("llama"), plan, TOKENS), **changes})
    layout = Layout(plan.layout, TOKENS, plan.attention_ring, plan.attention_ulysses)
    found = pool.run(plan.world_size, sent_by, model.layers, "llama", text, changes)
    for place in places(plan):
        tokens = Tokens.of(plan, layout, place)
        elements = model_elements(plan, model, layout, place, sequences=ROWS)
        expected = {axis: sum(ways.values()) for axis, ways in elements.items()}
        expected[grid.inner.hidden or ""] += (grid.heads - 1) * 2 * ROWS * tokens.inner
        ids = grid.embedding(tied=tied).x
        if ids is not None:
            expected[ids.axis] += (grid.axes[ids.axis] - 1) * ROWS * tokens.outer
        if grid.outer.hidden:
            norms, parts = 2 * model.layers + 1, grid.axes[grid.outer.hidden]
            expected[grid.outer.hidden] += Fraction(2 * (parts - 1) * norms * 2 * ROWS * tokens.outer, parts)
        sent = found[place.rank(plan)]
        assert {axis: int(ITEM * count) for axis, count in expected.items() if count} == {
            axis: count for axis, count in sent.items() if axis in grid.axes
        }
