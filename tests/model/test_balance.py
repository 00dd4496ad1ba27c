"""The balance of experts in the loss, against the model's own, one sequence at a time."""

import pytest
import torch
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from close import assert_close
from model.dense import batch_of, build
from pool import Pool
from seqloom.errors import ModelError
from seqloom.fabric import Fabric, all_reduce_
from seqloom.model import Float64Islands, parallelize, sum_gradients, token_loss
from seqloom.model.pipeline import cut_model, views
from seqloom.plan import Plan, fit, read_config
from seqloom.sequence import Batch, shard_batch
from seqloom.train import compute_gradients
from seqloom.verify import Case, verify_here
from seqloom.verify.oracle import one_device_output

BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def verified(family: str, text: str) -> str | None:
    """What is wrong with a run of two steps of two micro-batches of two rows on each data rank, or None."""
    plan = Plan.parse(text)
    config = {**fit(read_config(family), plan, 48), **BALANCED}
    verdict = verify_here(Case(config=config, plan=plan, num_tokens=48, batch=2, accumulate=2, steps=2))
    return None if verdict.equal else str(verdict)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("mixtral", "ring=3 expert=3"),
        ("qwen3_moe", "data=2 ulysses=2 layout=striped"),
        ("gpt_oss", "data=2 expert=2"),
        ("mixtral", "tensor=2 ring=2 expert=2"),
        ("qwen3_moe", "pipeline=2 ring=2"),
        ("mixtral", "pipeline=2 schedule=zbv"),
    ],
)
def test_no_plan_changes_it(pool: Pool, family: str, text: str) -> None:
    """Catches a mean of each shard's balance, of each rank's rows, or of each micro-batch, all of which are others."""
    assert not any(pool.run(Plan.parse(text).world_size, verified, family, text))


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("gpt_oss", "pipeline=2 data=2 zero=1 schedule=gpipe"),
        ("mixtral", "pipeline=2 schedule=interleaved tensor=2 expert=2 recompute=full"),
        ("qwen3_moe", "pipeline=2 data=2 ring=2 expert=4 zero=2"),
        ("qwen3_moe", "pipeline=2 schedule=zbv ulysses=2 layout=striped"),
    ],
)
def test_no_pipeline_changes_it(pool: Pool, family: str, text: str) -> None:
    """Catches sums that stages lose, or add up in another order of micro-batches, beside other axes."""
    assert not any(pool.run(Plan.parse(text).world_size, verified, family, text))


def padded(text: str) -> None:
    """Rows with padding: only their balance is in the loss, whose gradient the router has."""
    plan = Plan.parse(text)
    fabric = Fabric.build(plan)
    whole = batch_of(2)
    mask = torch.ones_like(whole.tokens)
    mask[0, 30:] = mask[1, :5] = 0
    batch = Batch.from_tokens(whole.tokens, attention_mask=mask, first_row=0)
    with Float64Islands():
        dense, model = build("mixtral", **BALANCED), build("mixtral", **BALANCED)
        dense.set_attn_implementation("eager")
        found = [one_device_output(dense, batch, row, precision="float64").aux_loss for row in range(2)]
        expected = torch.stack(found).sum() * (0.5 / 2)
        expected.backward()
        model = parallelize(model, fabric)
        local, shard = shard_batch(batch, fabric)
        loss = token_loss(model, local, shard, total=10**15, sequences=2)  # so that the tokens' loss is nothing
        loss.backward()
        sum_gradients(model, fabric)
    loss = all_reduce_(loss.detach(), fabric.world)
    assert_close(loss, expected.detach(), tolerance=1e-9, ranks=fabric.world.size)
    name = "model.layers.1.mlp.gate.weight"
    ours, theirs = (each.get_parameter(name).grad for each in (model, dense))
    assert_close(ours, theirs, tolerance=1e-9, ranks=fabric.world.size)


def test_padding_does_not_count(pool: Pool) -> None:
    """Catches padding counted as tokens, which it is not in the family's formula, and shards that miss it."""
    pool.run(3, padded, "ring=3")


def refused(text: str) -> str:
    """What a pipeline says to hidden states in bfloat16."""
    fabric = Fabric.build(Plan.parse(text))
    model = parallelize(build("mixtral", **BALANCED).to(torch.bfloat16), fabric)
    with pytest.raises(ModelError) as caught:
        compute_gradients(model, [batch_of(1)] * 2, fabric, precision="float32", chunk_tokens=8)
    return str(caught.value)


def test_a_type_that_cannot_count(pool: Pool) -> None:
    """Catches counts above 256 rounded on their way to the next stage."""
    for said in pool.run(2, refused, "pipeline=2"):
        assert "torch.bfloat16 cannot count so far; keep the weights in float32" in said


def test_routers_are_watched_once() -> None:
    """Catches one more hook on every router at each step of a rank with several stages."""
    model = build("mixtral", num_hidden_layers=4, **BALANCED)
    plan = Plan(pipeline=2, schedule="zbv")
    cut_model(model, plan, 0, (1, 1, 1, 1))
    router = model.model.layers[0].mlp.gate
    found = []
    for _ in range(2):
        for part in views(model, plan, 0).values():
            maybe_install_capturing_hooks(part.base_model)  # as transformers does at its first call
        found.append(len(router._forward_hooks))
    assert found == [1, 1]


def test_the_sequences_of_a_step_are_asked_for() -> None:
    """Catches a mean over the sequences of one micro-batch where the tokens' is over those of all."""
    fabric = Fabric.build(Plan())
    model = parallelize(build("mixtral", **BALANCED), fabric)
    local, shard = shard_batch(batch_of(1), fabric)
    with pytest.raises(ModelError, match="total= without sequences="):
        token_loss(model, local, shard, total=7)
    whole, tokens = token_loss(model, local, shard), token_loss(model, local, shard, sequences=0)
    assert tokens + 0.4 < whole, "with a coefficient of 0.5 a balance is about 0.5 or more for each token's choice"
