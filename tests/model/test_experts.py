"""Experts dealt to ranks, against the untouched model on one device, and what they send."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from close import assert_close
from model.dense import TOKENS, batch_of, build, dense_loss, gradients
from pool import Pool
from seqloom.fabric import Fabric
from seqloom.geometry import even_bounds
from seqloom.model import Float64Islands, build_model, parallelize, sum_gradients, token_loss, whole_tensors
from seqloom.model.experts import expert_modules
from seqloom.plan import ModelShape, Plan, fit, read_config
from seqloom.planner import expert_bytes
from seqloom.sequence import shard_batch
from seqloom.verify import Case, verify_here

ROUTERS = ("MixtralTopKRouter", "Qwen3MoeTopKRouter", "DeepseekV3TopkRouter")


def verified(family: str, text: str, num_tokens: int = TOKENS, changes: dict[str, Any] | None = None) -> str | None:
    """What is wrong with a run of two steps of two micro-batches, or None."""
    plan = Plan.parse(text)
    config = {**fit(read_config(family), plan, num_tokens), **(changes or {})}
    documents = (7, 13, 28) if num_tokens == TOKENS else None
    verdict = verify_here(
        Case(config=config, plan=plan, num_tokens=num_tokens, documents=documents, accumulate=2, steps=2)
    )
    return None if verdict.equal else str(verdict)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("mixtral", "ring=2 expert=2"),
        ("gpt_oss", "ulysses=2 expert=2"),
        ("qwen3_moe", "ring=3 expert=3"),
        ("mixtral", "ring=3 expert=3"),
        ("deepseek_v3", "ring=2 ulysses=2 expert=4"),
        ("deepseek_v2", "data=2 ring=2 expert=2"),
        ("qwen3_moe", "tensor=2 ring=2 expert=4"),
        ("mixtral", "tensor=2"),
        ("mixtral", "tensor=2 ring=2 expert=2 expert_tensor=2"),
        ("deepseek_v3", "tensor=2 ring=2 expert=4"),
        ("deepseek_v2", "tensor=2 expert_tensor=2"),
        ("gpt_oss", "tensor=2 expert=2"),
        ("qwen3_moe", "pipeline=2 ulysses=2 expert=2"),
    ],
)
def test_a_plan_equals_one_device(pool: Pool, family: str, text: str) -> None:
    """Catches tokens of one rank missed or sent to another expert, weights lost, gradients summed over too many."""
    assert not any(pool.run(Plan.parse(text).world_size, verified, family, text))


def rounded(text: str, intermediate: int) -> str | None:
    """What is wrong with a step in float32, whose experts are multiplied in groups, or None."""
    plan = Plan.parse(text)
    config = {**fit(read_config("mixtral"), plan, TOKENS), "intermediate_size": intermediate}
    verdict = verify_here(Case(config=config, plan=plan, num_tokens=TOKENS, dtype="float32"))
    return None if verdict.equal else str(verdict)


def test_parts_of_experts_that_no_grouped_product_takes(pool: Pool) -> None:
    """Catches torch's refusal of rows that are no multiple of 16 bytes: 18 of 36 columns of four bytes each."""
    assert not any(pool.run(2, rounded, "tensor=2 expert_tensor=2", 36))


def test_starved_experts(pool: Pool) -> None:
    """Catches ranks that hang, or have no gradient, where no token comes to their experts: 4 tokens, 8 experts."""
    assert not any(pool.run(4, verified, "deepseek_v3", "ulysses=4 expert=4", 4, {"num_experts_per_tok": 1}))


@pytest.mark.sweep
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize(
    "text",
    [
        "tensor=2",
        "tensor=3 expert=3",
        "tensor=2 ulysses=2",
        "tensor=2 data=2 zero=3 recompute=selective",
        "tensor=2 pipeline=2",
        "tensor=2 data=2 ulysses=2 expert=8 layout=contiguous",
        "tensor=4 ring=2 expert=2 tensor_overlap=ring",
        "tensor=3 ring=2 expert=3 regather=false",
        "tensor=2 ring=3 exchange=gather",
        "tensor=3 ring=2 expert_tensor=3",
        "tensor=2 data=2 ulysses=2 expert=4 expert_tensor=2 layout=striped",
        "tensor=2 ring=2 ulysses=2 expert=4 recompute=full",
    ],
)
def test_every_way_beside_tensor_ranks(pool: Pool, family: str, text: str) -> None:
    """Catches gradients of routers and experts not summed over tensor ranks, or summed twice."""
    assert not any(pool.run(Plan.parse(text).world_size, verified, family, text))


@pytest.mark.sweep
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize(
    "text",
    [
        "data=2 ring=2 expert=4",
        "data=2 ulysses=2 expert=2 layout=striped",
        "ring=4 expert=2 inner_ring=2",
        "ring=2 ulysses=2 data=2 expert=4 exchange=needed",
        "ring=6 expert=3 layout=balanced",
        "ulysses=4 data=2 expert=8",
        "data=2 ring=2 expert=2 zero=3",
        "data=2 ring=2 expert=4 zero=1 recompute=selective",
        "pipeline=2 data=2 ring=2 expert=4",
    ],
)
def test_every_way_to_deal_them(pool: Pool, family: str, text: str) -> None:
    """Catches the same in larger worlds, with experts that do not divide and other layouts and exchanges."""
    assert not any(pool.run(Plan.parse(text).world_size, verified, family, text))


def metered(family: str, text: str) -> tuple[int, int]:
    """Bytes sent along the expert axis in a forward and backward pass; and by the formula, from what was routed."""
    plan = Plan.parse(text)
    fabric = Fabric.build(plan)
    shape = ModelShape.from_config(fit(read_config(family), Plan(), TOKENS))
    with Float64Islands():
        model = parallelize(build(family), fabric)
        routed: list[torch.Tensor] = []
        for module in model.modules():
            if type(module).__name__ in ROUTERS:
                module.register_forward_hook(lambda _, __, out: routed.append(out[2]))
        local, shard = shard_batch(batch_of(2), fabric)
        fabric.meter.reset()
        token_loss(model, local, shard).backward()
    sent = fabric.meter.sent["expert"]
    bounds = even_bounds(shape.experts, plan.expert)
    axis, expected = fabric.expert, 0
    for chosen in routed:
        to = torch.stack([((chosen >= a) & (chosen < b)).sum() for a, b in pairwise(bounds)])
        every = [torch.empty_like(to) for _ in range(axis.size)]
        torch.distributed.all_gather(every, to, group=axis.group)
        table = torch.stack(every)
        table.fill_diagonal_(0)
        there, here = table[axis.rank].sum().item(), table[:, axis.rank].sum().item()
        expected += sum(expert_bytes(plan, shape, int(there), int(here), rank=axis.rank, item_bytes=8).values())
    return sent, expected


@pytest.mark.parametrize(
    ("family", "text"), [("mixtral", "ring=3 expert=3"), ("deepseek_v3", "data=2 ulysses=2 expert=2")]
)
def test_bytes_are_those_of_what_was_routed(pool: Pool, family: str, text: str) -> None:
    """Catches copies padded, sent twice, or sent to ranks that have no expert of theirs."""
    for sent, expected in pool.run(Plan.parse(text).world_size, metered, family, text):
        assert sent == expected > 0


def held(text: str) -> list[tuple[int, ...]]:
    """The shapes of a rank's experts after backward, and their gradients'."""
    fabric = Fabric.build(Plan.parse(text))
    with Float64Islands():
        model = parallelize(build("mixtral"), fabric)
        local, shard = shard_batch(batch_of(2), fabric)
        token_loss(model, local, shard).backward()
        sum_gradients(model, fabric)
    found = [p for module in expert_modules(model) for p in module.parameters()]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in found)
    return [tuple(p.shape) for p in found]


def test_a_rank_holds_its_experts_alone(pool: Pool) -> None:
    """Catches all experts kept on every rank, which would be as equal and save nothing."""
    shapes = pool.run(3, held, "ring=3 expert=3")
    assert [each[0] for each in shapes] == [(1, 96, 32), (1, 96, 32), (2, 96, 32)]
    assert [len(each) for each in shapes] == [4, 4, 4]
    shapes = pool.run(4, held, "ring=2 tensor=2 expert=2 expert_tensor=2")
    assert {shape for each in shapes for shape in each} == {(2, 24, 32), (2, 32, 24)}


def saved(text: str, folder: str) -> None:
    """The experts of a split model, saved by all ranks together."""
    fabric = Fabric.build(Plan.parse(text))
    model = parallelize(build("qwen3_moe"), fabric)
    model.save_pretrained(folder)


@pytest.mark.parametrize("text", ["ring=2 expert=2", "tensor=2 expert_tensor=2"])
def test_saved_weights_are_whole(pool: Pool, tmp_path: Path, text: str) -> None:
    """Catches a folder that holds one rank's experts, or halves of a packed weight end to end in another order."""
    pool.run(2, saved, text, str(tmp_path))
    loaded, expected = type(build("qwen3_moe")).from_pretrained(tmp_path), build("qwen3_moe")
    for (name, ours), (_, theirs) in zip(loaded.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def biased(text: str) -> int:
    """How many gradients are those of one device, where DeepSeek's choice of experts is biased by rank 0's buffer."""
    fabric = Fabric.build(Plan.parse(text))
    batch = batch_of(2)
    with Float64Islands():
        dense, model = build("deepseek_v3"), build("deepseek_v3")
        bias = torch.linspace(-0.4, 0.4, 8, dtype=torch.float64)
        for each, held in ((dense, bias), (model, bias * (fabric.rank == 0))):
            each.model.layers[1].mlp.gate.e_score_correction_bias.copy_(held)
        loss = dense_loss(dense, batch)
        loss.backward()
        model = parallelize(model, fabric)
        local, shard = shard_batch(batch, fabric)
        token_loss(model, local, shard).backward()
        sum_gradients(model, fabric)
    found, expected = whole_tensors(model, fabric, "gradient"), gradients(dense)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, tolerance=1e-11, ranks=fabric.world.size)
    return len(expected)


def test_the_bias_of_the_choice(pool: Pool) -> None:
    """Catches a buffer left out where weights are made the same, or lost where experts are dealt out."""
    assert min(pool.run(2, biased, "ring=2 expert=2")) > 20


def test_buffers_that_stay_in_float32() -> None:
    """Catches DeepSeek's biases rounded to the type of the weights, which would send tokens elsewhere."""
    model = build_model(fit(read_config("deepseek_v3"), Plan(), TOKENS), dtype=torch.bfloat16)
    gate = model.model.layers[1].mlp.gate
    assert (gate.weight.dtype, gate.e_score_correction_bias.dtype) == (torch.bfloat16, torch.float32)
