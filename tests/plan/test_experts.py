"""Which ways to deal out experts are legal."""

from dataclasses import replace

import pytest

from seqloom.plan import ModelShape, Plan, fit, read_config, reasons

MIXTRAL = ModelShape.from_config({**fit(read_config("mixtral"), Plan(ulysses=4), 64), "num_local_experts": 6})


@pytest.mark.parametrize("text", ["ring=2 expert=2", "data=2 ring=3 expert=6", "ring=2 ulysses=4 expert=4"])
def test_degrees_that_divide(text: str) -> None:
    """Catches experts that do not divide by the degree refused: some ranks then hold one more."""
    assert reasons(Plan.parse(text), MIXTRAL, 64) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ring=8 expert=8", "expert=8 is more than the 6 experts of a layer, and each rank takes at least one; the "
         "largest degree is 6."),
        ("ring=4 expert=3", "expert=3 does not divide the 4 ranks of data x ring x ulysses x tensor; use a degree that "
         "does: 1, 2, 4."),
        ("ring=8 expert=5", "expert=5 does not divide the 8 ranks of data x ring x ulysses x tensor; use a degree that "
         "does: 1, 2, 4."),
        ("ring=2 expert_tensor=2", "expert_tensor=2 is neither 1, each expert whole on a rank, nor all of tensor=1; "
         "use one of them."),
    ],
)  # fmt: skip
def test_degrees_that_do_not(text: str, message: str) -> None:
    """Catches a degree accepted that no group of ranks can have, or one that leaves ranks without experts."""
    assert reasons(Plan.parse(text), MIXTRAL, 64) == [message]


def test_experts_between_tensor_ranks() -> None:
    """Catches tensor ranks that hold the same tokens and would each send them, and grids of which no rule is known."""
    assert reasons(Plan(tensor=2, ring=2, expert=4), MIXTRAL, 64) == []
    (said,) = reasons(Plan(tensor=2, sequence_parallel=False), MIXTRAL, 64)
    assert said.startswith("sequence_parallel=false gives every rank of tensor=2 all tokens")
    (said,) = reasons(Plan(tensor=4, tensor_kind="2d"), MIXTRAL, 64)
    assert said.startswith("tensor_kind=2d cannot split mixtral yet; use tensor_kind=1d")


def test_experts_of_alternating_channels() -> None:
    """Catches halves of gpt-oss's first linears cut as if one lay behind the other."""
    model = ModelShape.from_config(fit(read_config("gpt_oss"), Plan(tensor=2), 64))
    assert reasons(Plan(tensor=2, expert=2), model, 64) == []
    (said,) = reasons(Plan(tensor=2, expert_tensor=2), model, 64)
    assert said.startswith("expert_tensor=2 cannot split the experts of gpt_oss") and "use expert_tensor=1" in said


def test_a_model_without_experts() -> None:
    """Catches the fields ignored where there is nothing to deal out."""
    dense = ModelShape.from_config(fit(read_config("llama"), Plan(), 64))
    assert reasons(Plan(ring=2, expert=2), dense, 64) == [
        "expert=2 deals out experts, and this llama has none; leave it out."
    ]


def test_the_balance_of_experts() -> None:
    """Catches a balance of nothing, and one refused for nothing."""
    balanced = replace(MIXTRAL, balanced=True)
    assert reasons(Plan(ring=2), balanced, 64) == reasons(Plan(pipeline=2), balanced, 64) == []
    assert any("no layer of the model has any" in said for said in reasons(Plan(), replace(balanced, experts=0), 64))
