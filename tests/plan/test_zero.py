"""Which ZeRO stages go with which replicas."""

from dataclasses import replace

import pytest

from seqloom.plan import ModelShape, Plan, fit, read_config, reasons

TINY = ModelShape.from_config(fit(read_config("llama"), Plan(), 64))

REFUSALS = {
    "zero=1": ("zero=1 shares out", "one rank here", "raise data, ring or ulysses."),
    "tensor=2 zero=3": ("zero=3 shares out", "one rank here", "leave zero out"),
    "data=4 zero_replicas=2": ("zero_replicas=2", "zero=0 has none", "use zero=1, 2 or 3."),
    "data=2 ring=2 zero=3 zero_replicas=3": ("zero_replicas=3", "the 4 ranks", "use 2, or leave it out."),
    "data=4 zero=2 zero_replicas=4": ("zero_replicas=4", "the 4 ranks", "use 2, or leave it out."),
    "ring=3 zero=1 zero_replicas=3": ("zero_replicas=3", "the 3 ranks", "; leave it out."),
    "data=2 offload=true": ("offload=true", "zero=0 does not share out all three", "use zero=2 or zero=3"),
    "data=2 zero=1 offload=true": ("offload=true", "zero=1 does not", "use zero=2 or zero=3"),
}


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_names_fact_limit_and_way_out(text: str) -> None:
    """Catches a stage that shares nothing out, or an option that is ignored without a word."""
    (reason,) = reasons(Plan.parse(text), TINY)
    assert all(words in reason for words in REFUSALS[text]), reason


def test_stages_of_one_rank_are_not_shared_out() -> None:
    """Catches several stages of a rank under FSDP2, which would find each other's parameters freed."""
    deep = replace(TINY, layers=4)
    (reason,) = reasons(Plan.parse("data=2 pipeline=2 schedule=interleaved zero=3"), deep)
    assert "zero=3" in reason and "schedule=interleaved" in reason and "use zero=1" in reason


@pytest.mark.parametrize(
    "text",
    [
        "data=2 zero=1",
        "ring=3 zero=2",
        "ulysses=2 zero=3 offload=true",
        "data=2 ring=2 zero=1 zero_replicas=2",
        "tensor=4 tensor_kind=2d data=2 zero=3",
        "pipeline=2 data=2 zero=3",
        "data=6 zero=2 zero_replicas=3 offload=true",
    ],
)
def test_what_runs_is_not_refused(text: str) -> None:
    """Catches a refusal of what runs."""
    assert reasons(Plan.parse(text), TINY) == []
