"""ZeRO against one device: every stage, alone and with the other axes."""

from typing import Any

import pytest

from pool import Pool
from seqloom.plan import Plan, fit, read_config
from seqloom.verify import Case, Verdict, verify_here

TOKENS = 37


def case(family: str, text: str, changes: dict[str, Any], **more: Any) -> Case:
    """Three clipped steps of two packed micro-batches each, so that ranks have unequal numbers of labels."""
    plan = Plan.parse(text)
    config = {**fit(read_config(family), plan, TOKENS), **changes}
    settings = {"steps": 3, "accumulate": 2, "documents": (1, 17, 2, 17), **more}
    return Case(config=config, plan=plan, num_tokens=TOKENS, **settings)


def equal(pool: Pool, family: str, text: str, changes: dict[str, Any], **more: Any) -> list[Verdict]:
    """The verdicts of all ranks, held to 1e-12; parameters that AdamW moves by noise part further under any plan."""
    one = case(family, text, changes, **more)
    verdicts = pool.run(one.plan.world_size, verify_here, one)
    for found in verdicts:
        errors = (found.loss_error, found.gradient_norm_error, found.worst_gradient_error, found.parameter_error / 10)
        assert found.equal and all(0 <= error <= 1e-12 for error in errors), found
    return verdicts


@pytest.mark.parametrize(
    ("family", "text", "changes"),
    [
        ("llama", "data=2 zero=1", {}),
        ("llama", "ring=3 zero=1", {"vocab_size": 97, "intermediate_size": 49}),
        ("llama", "ulysses=2 zero=2", {"tie_word_embeddings": True}),
        ("llama", "ring=3 zero=3", {"vocab_size": 97, "intermediate_size": 49, "tie_word_embeddings": True}),
        ("gemma2", "data=2 ulysses=2 zero=3 zero_replicas=2", {}),
        ("qwen3", "data=2 ring=2 zero=1 zero_replicas=2", {}),
        ("gpt2", "data=2 zero=3 tensor=2", {}),
        ("bloom", "ring=2 zero=2 offload=true", {}),
        ("llama", "ring=2 zero=3 offload=true", {}),
        ("llama", "ring=2 tensor=4 tensor_kind=2d zero=3", {"tie_word_embeddings": True}),
        ("llama", "data=2 tensor=4 tensor_kind=2d zero=1", {}),
    ],
)
def test_three_steps_equal_one_device(pool: Pool, family: str, text: str, changes: dict[str, Any]) -> None:
    """A mean for a sum, a norm that counts shares twice, rows stepped by nobody or fetched to the wrong place."""
    equal(pool, family, text, changes)


@pytest.mark.parametrize(
    "text",
    [
        "data=2 zero=3 recompute=full",
        "ring=2 zero=2 recompute=selective",
        "data=2 zero=3 recompute=full:uniform:2",
        "ring=2 zero=2 recompute=full:uniform:2",
        "data=2 zero=3 tensor=2 sequence_parallel=false recompute=full activations=partitioned",
    ],
)
def test_layers_that_run_again_find_their_parameters(pool: Pool, text: str) -> None:
    """Catches layers that run in backward, or together, after their parameters were freed."""
    equal(pool, "llama", text, {})


@pytest.mark.parametrize("text", ["data=2 zero=1", "ring=2 zero=3", "data=2 tensor=2 zero=2 offload=true"])
def test_bf16(pool: Pool, text: str) -> None:
    """Catches gradients summed in a lower type, or weights gathered in it."""
    one = case("llama", text, {}, dtype="bf16")
    assert all(verdict.equal for verdict in pool.run(one.plan.world_size, verify_here, one))


@pytest.mark.parametrize(
    "text",
    [
        "ring=2 zero=3",
        "data=2 ring=2 expert=2 zero=1",
        "data=2 ring=2 expert=2 zero=2",
        "data=2 ring=2 expert=2 zero=3 recompute=full",
        "data=4 expert=2 zero=3 zero_replicas=2",
        "data=2 expert=2 zero=3",
        "data=2 tensor=2 expert=2 zero=3",
        "data=2 tensor=2 expert_tensor=2 zero=2",
    ],
)
def test_experts(pool: Pool, text: str) -> None:
    """Catches experts shared out over ranks that hold others, or summed over those that share them."""
    equal(pool, "mixtral", text, {})


@pytest.mark.parametrize(
    "text",
    ["pipeline=2 data=2 zero=3", "pipeline=2 ring=2 zero=2 schedule=gpipe recompute=full", "pipeline=2 data=2 zero=1"],
)
def test_stages(pool: Pool, text: str) -> None:
    """Catches shares freed while other micro-batches wait for backward, and ends of a tied weight that part."""
    equal(pool, "llama", text, {"tie_word_embeddings": True})
