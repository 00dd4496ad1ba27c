"""Plans print, read back, and refuse what they do not understand."""

import ast
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architecture.source import modules
from seqloom.errors import PlanError
from seqloom.plan import Plan

TYPES = get_type_hints(Plan)
NAMES = [field.name for field in fields(Plan)]


def values(name: str) -> st.SearchStrategy[Any]:
    """Every value a field takes."""
    choices = get_args(TYPES[name])
    return st.sampled_from(choices) if choices else st.integers(1, 9)


plans = st.builds(Plan, **{name: values(name) for name in NAMES})


@given(plans)
def test_a_plan_reads_back_what_it_prints(plan: Plan) -> None:
    """Catches a field left out of the text, or read into another field."""
    assert Plan.parse(str(plan)) == plan


@given(plans, st.randoms())
def test_order_and_separators_do_not_matter(plan: Plan, random: Any) -> None:
    """Catches a parser that depends on the order of fields, or on spaces rather than commas."""
    parts = str(plan).split()
    random.shuffle(parts)
    assert Plan.parse(",".join(parts)) == Plan.parse("  " + ", ".join(parts) + "\n") == plan


@given(plans)
def test_defaults_are_unsaid(plan: Plan) -> None:
    """Catches text that grows with every field there is; a plan of defaults alone says data=1."""
    said = {part.partition("=")[0] for part in str(plan).split()}
    changed = {field.name for field in fields(Plan) if getattr(plan, field.name) != field.default}
    assert said == (changed or {"data"})
    assert str(Plan()) == "data=1"
    assert Plan.parse("") == Plan()


def test_world_size_is_the_product_of_the_degrees() -> None:
    """Catches a degree forgotten or counted twice: distinct primes."""
    assert Plan(data=2, pipeline=3, ring=5, ulysses=7, tensor=11).world_size == 2 * 3 * 5 * 7 * 11


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_read_somewhere(name: str) -> None:
    """Catches an option that is accepted and ignored: no code outside plan.py reads it."""
    readers = [
        module.name
        for module in modules()
        if module.name != "seqloom.plan.plan"
        for node in ast.walk(module.tree)
        if (isinstance(node, ast.Attribute) and node.attr == name)
        or (isinstance(node, ast.Constant) and node.value == name)  # getattr(plan, axis)
    ]
    assert readers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ring", "'ring' in the plan is not of the form name=value."),
        ("ring=", "'ring=' in the plan is not of the form name=value."),
        ("=2", "A plan has no field ''; it has data, pipeline, ring, ulysses, tensor, exchange, layout."),
        (
            "ulises=2",
            "A plan has no field 'ulises' (did you mean 'ulysses'?); "
            "it has data, pipeline, ring, ulysses, tensor, exchange, layout.",
        ),
        ("zzz=2", "A plan has no field 'zzz'; it has data, pipeline, ring, ulysses, tensor, exchange, layout."),
        ("ring=2 ring=2", "The plan names ring twice."),
        ("ring=0", "ring=0 is not a whole number from 1 to 65,536."),
        ("ring=-2", "ring=-2 is not a whole number from 1 to 65,536."),
        ("ring=1.5", "ring=1.5 is not a whole number from 1 to 65,536."),
        ("ring=two", "ring=two is not a whole number from 1 to 65,536."),
        ("ring==2", "ring==2 is not a whole number from 1 to 65,536."),
        ("layout=zig", "layout=zig is unknown; it is one of zigzag, contiguous, striped."),
        ("layout=2", "layout=2 is unknown; it is one of zigzag, contiguous, striped."),
        ("exchange=Ring", "exchange=Ring is unknown; it is one of ring, gather."),
    ],
)
def test_bad_text_is_refused_by_name(text: str, message: str) -> None:
    """Catches a typo read as a default, and a message that does not say what would work."""
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert caught.value.reasons == (message,)
    assert str(caught.value) == message


def test_every_bad_part_is_named_at_once() -> None:
    """Catches errors handed out one at a time."""
    with pytest.raises(PlanError) as caught:
        Plan.parse("ring=0 what=2 layout=x data ulysses=2")
    assert [reason.split(" ")[0] for reason in caught.value.reasons] == ["ring=0", "A", "layout=x", "'data'"]
    assert " Also: " in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"ring": 0}, {"ring": True}, {"ring": 2.0}, {"ring": "2"}, {"ulysses": None}, {"layout": "x"}]
)
def test_the_constructor_refuses_the_same(wrong: dict[str, Any]) -> None:
    """Catches a plan made in Python that text could not say: True for 1, 2.0 for 2."""
    with pytest.raises(PlanError, match=r"whole number|unknown"):
        Plan(**wrong)


def test_the_constructor_names_every_wrong_field() -> None:
    """Catches a constructor that stops at the first."""
    with pytest.raises(PlanError) as caught:
        Plan(data=0, tensor=-1)
    assert len(caught.value.reasons) == 2


def test_a_plan_of_impossible_size_is_refused_at_once() -> None:
    """Catches degrees whose product no search for a nearest plan would ever end on."""
    with pytest.raises(PlanError, match="the most is 65,536"):
        Plan(ring=65_536, ulysses=4_096)
