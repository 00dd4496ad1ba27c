"""Plans print, read back, and refuse what they do not understand."""

import ast
from dataclasses import fields
from itertools import permutations
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architecture.source import modules
from seqloom.errors import PlanError
from seqloom.plan import Plan

TYPES = get_type_hints(Plan)
NAMES = [field.name for field in fields(Plan)]
ALL = ", ".join(NAMES)


def values(name: str) -> st.SearchStrategy[Any]:
    """Every value a field takes."""
    if get_origin(TYPES[name]) is Literal:
        return st.sampled_from(get_args(TYPES[name]))
    words = {"stages": ["3", "3-5"], "recompute": ["selective", "full:uniform:2/none", "full:block:3"]}
    words["order"] = [f"tensor-{'-'.join(rest)}" for rest in permutations(["ulysses", "ring", "data", "pipeline"])]
    if name in words:
        return st.sampled_from(words[name])
    return st.booleans() if TYPES[name] is bool else st.integers(1, 5)


@st.composite
def any_plan(draw: st.DrawFn) -> Plan:
    """Every plan the constructor lets through."""
    drawn = {name: draw(values(name)) for name in NAMES if name not in ("grid", "inner_ring")}
    if drawn["tensor_kind"] != "2.5d":
        drawn["depth"] = 1
    if drawn["tensor_kind"] == "1d":
        drawn["tensor_tokens"] = "ring"
    else:
        sizes = draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))
        sizes += [draw(st.integers(1, 3))] if drawn["tensor_kind"] == "3d" else []
        even = len(set(sizes)) == 1 and draw(st.booleans())
        drawn |= {"sequence_parallel": True, "tensor": prod(sizes) * drawn["depth"]}
        drawn |= {"grid": None if even else "x".join(map(str, sizes))}
        if drawn["tensor_overlap"] == "ring":
            drawn["tensor_overlap"] = "none"
    around = Plan(**drawn).attention_ring
    choices = st.none() | st.sampled_from([degree for degree in range(1, around + 1) if around % degree == 0])
    return Plan(**{**drawn, "inner_ring": draw(choices) if drawn["exchange"] == "ring" else None})


plans = any_plan()


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
        ("=2", f"A plan has no field ''; it has {ALL}."),
        ("ulises=2", f"A plan has no field 'ulises' (did you mean 'ulysses'?); it has {ALL}."),
        ("zzz=2", f"A plan has no field 'zzz'; it has {ALL}."),
        ("ring=2 ring=2", "The plan names ring twice; name it once."),
        ("ring=0", "ring=0 is not a whole number from 1 to 65,536."),
        ("ring=-2", "ring=-2 is not a whole number from 1 to 65,536."),
        ("ring=1.5", "ring=1.5 is not a whole number from 1 to 65,536."),
        ("ring=two", "ring=two is not a whole number from 1 to 65,536."),
        ("ring==2", "ring==2 is not a whole number from 1 to 65,536."),
        ("layout=zig", "layout=zig is unknown; it is one of zigzag, contiguous, striped, balanced."),
        ("layout=2", "layout=2 is unknown; it is one of zigzag, contiguous, striped, balanced."),
        ("exchange=Ring", "exchange=Ring is unknown; it is one of ring, gather, needed, rsa."),
        ("tensor_kind=4d", "tensor_kind=4d is unknown; it is one of 1d, 2d, 2.5d, 3d."),
        ("tensor_kind=2", "tensor_kind=2 is unknown; it is one of 1d, 2d, 2.5d, 3d."),
        ("tensor_overlap=yes", "tensor_overlap=yes is unknown; it is one of backward, ring, none."),
        ("tensor_tokens=col", "tensor_tokens=col is unknown; it is one of ring, ulysses."),
        ("sequence_parallel=0", "sequence_parallel=0 is unknown; it is true or false."),
        ("regather=no", "regather=no is unknown; it is true or false."),
        ("grid=3", "grid=3 is no grid; write rows x columns as in grid=3x2."),
        ("grid=3x0", "grid=3x0 is no grid; write rows x columns as in grid=3x2."),
        ("grid=1x2x3x4", "grid=1x2x3x4 is no grid; write rows x columns as in grid=3x2."),
        ("depth=0", "depth=0 is not a whole number from 1 to 65,536."),
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
    "wrong",
    [
        {"ring": 0},
        {"ring": True},
        {"ring": 2.0},
        {"ring": "2"},
        {"ulysses": None},
        {"layout": "x"},
        {"inner_ring": 0},
        {"inner_ring": "2"},
        {"inner_ring": True},
        {"exchange": None},
        {"sequence_parallel": 1},
        {"regather": "false"},
        {"tensor_kind": 2},
        {"grid": (3, 2)},
        {"depth": None},
    ],
)
def test_the_constructor_refuses_the_same(wrong: dict[str, Any]) -> None:
    """Catches a plan made in Python that text could not say: True for 1, 2.0 for 2."""
    with pytest.raises(PlanError, match=r"whole number|unknown|no grid"):
        Plan(**wrong)


def test_the_constructor_names_every_wrong_field() -> None:
    """Catches a constructor that stops at the first."""
    with pytest.raises(PlanError) as caught:
        Plan(data=0, tensor=-1)
    assert len(caught.value.reasons) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ring=8 inner_ring=3", "inner_ring=3 does not divide ring=8; nearest to it do 2 and 4."),
        ("ring=4 inner_ring=6", "inner_ring=6 does not divide ring=4; nearest to it do 4."),
        ("inner_ring=2", "inner_ring=2 does not divide ring=1; nearest to it do 1."),
        (
            "ring=4 inner_ring=2 exchange=needed",
            "inner_ring=2 cuts the ring of exchange=ring in two, and exchange=needed has none; "
            "leave inner_ring out or use exchange=ring.",
        ),
    ],
)
def test_an_inner_ring_that_cannot_be(text: str, message: str) -> None:
    """Catches an inner ring that leaves ranks over, and one accepted by an exchange that never looks at it."""
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert caught.value.reasons == (message,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("order=x1", "order=x1 is no order of axes; it names each of them once, as tensor-ulysses-ring-data-pipeline."),
        (
            "order=ring-data",
            "order=ring-data is no order of axes; it names each of them once, as tensor-ulysses-ring-data-pipeline.",
        ),
        (
            "tensor=4 tensor_kind=2d order=ulysses-tensor-ring-data-pipeline",
            "order=ulysses-tensor-ring-data-pipeline does not begin with tensor, as tensor_kind=2d needs, whose token "
            "axes join those of attention; put tensor first, or use tensor_kind=1d.",
        ),
    ],
)
def test_a_rank_order_that_cannot_be(text: str, message: str) -> None:
    """Catches an order that leaves an axis out, and one in which a grid's token axes are counted wrongly."""
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert caught.value.reasons == (message,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "tensor=6 tensor_kind=2d",
            "tensor=6 is no square, as tensor_kind=2d takes without a grid; use tensor=4 or tensor=9, or name rows x "
            "columns, such as grid=3x2.",
        ),
        (
            "tensor=12 tensor_kind=2.5d depth=2",
            "tensor=12 is no square times depth=2, as tensor_kind=2.5d takes without a grid; use tensor=8 or "
            "tensor=18, or name rows x columns, such as grid=3x2.",
        ),
        (
            "tensor=9 tensor_kind=2.5d depth=2",
            "tensor=9 is no square times depth=2, as tensor_kind=2.5d takes without a grid; use tensor=8 or tensor=18.",
        ),
        (
            "tensor=4 tensor_kind=3d",
            "tensor=4 is no cube, as tensor_kind=3d takes without a grid; use tensor=1 or tensor=8, or name output x "
            "input x weight, such as grid=2x2x1.",
        ),
        (
            "tensor=6 tensor_kind=2d grid=2x2",
            "grid=2x2 has 4 ranks, but tensor=6; use tensor=4 or another grid.",
        ),
        (
            "tensor=6 tensor_kind=2.5d depth=3 grid=2x2",
            "grid=2x2 depth=3 has 12 ranks, but tensor=6; use tensor=12 or another grid.",
        ),
        (
            "tensor=8 tensor_kind=3d grid=4x2",
            "grid=4x2 does not fit tensor_kind=3d, whose grid is output x input x weight, as 2x2x3.",
        ),
        (
            "tensor=4 tensor_kind=2d grid=2x2x1",
            "grid=2x2x1 does not fit tensor_kind=2d, whose grid is rows x columns, as 3x2.",
        ),
        (
            "tensor=8 depth=2",
            "depth=2 belongs to tensor_kind=2.5d, not 1d; leave it out or use tensor_kind=2.5d.",
        ),
        (
            "tensor=4 tensor_kind=2d depth=2",
            "depth=2 belongs to tensor_kind=2.5d, not 2d; leave it out or use tensor_kind=2.5d.",
        ),
        (
            "tensor=4 grid=2x2",
            "grid=2x2 belongs to tensor_kind 2d, 2.5d and 3d, not 1d; leave it out or name the kind.",
        ),
        (
            "tensor=4 tensor_tokens=ulysses",
            "tensor_tokens=ulysses is for the token axes of tensor_kind 2d, 2.5d and 3d, and 1d has none; leave it out "
            "or name the kind.",
        ),
        (
            "tensor=4 tensor_kind=2d sequence_parallel=false",
            "sequence_parallel=false is possible with tensor_kind=1d only; 2d splits tokens always.",
        ),
        (
            "tensor=8 tensor_kind=3d tensor_overlap=ring",
            "tensor_overlap=ring cuts the gathers of tensor_kind=1d, not of 3d; leave it out or use 1d.",
        ),
        (
            "ring=2 tensor=6 tensor_kind=2d grid=3x2 inner_ring=4",
            "inner_ring=4 does not divide ring=2 with the 3 token ranks of the grid; nearest to it do 3 and 6.",
        ),
    ],
)
def test_a_tensor_grid_that_cannot_be(text: str, message: str) -> None:
    """Catches tensor fields that do not go together, met by processes that wait for each other, or ignored."""
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert caught.value.reasons == (message,)


def test_tensor_fields_are_wrong_all_at_once() -> None:
    """Catches reasons that come one by one."""
    with pytest.raises(PlanError) as caught:
        Plan.parse("tensor=6 tensor_kind=2d depth=2 sequence_parallel=false")
    assert len(caught.value.reasons) == 2
    with pytest.raises(PlanError) as caught:
        Plan.parse("tensor=6 tensor_kind=3d grid=2x2 sequence_parallel=false")
    assert len(caught.value.reasons) == 2


def test_truth_is_said_in_small_letters() -> None:
    """Catches True, which the parser of other systems' flags would not read, and other spellings refused."""
    assert str(Plan(tensor=2, sequence_parallel=False, regather=False)) == (
        "tensor=2 sequence_parallel=false regather=false"
    )
    assert Plan.parse("tensor=2 sequence_parallel=False") == Plan(tensor=2, sequence_parallel=False)


def test_the_rings_of_a_plan() -> None:
    """Catches outer and inner exchanged, and a plan without inner_ring taken for rings of one."""
    rings = {None: (1, 6), 1: (6, 1), 2: (3, 2), 3: (2, 3), 6: (1, 6)}
    assert {inner: Plan(ring=6, inner_ring=inner).rings for inner in rings} == rings


def test_a_plan_of_impossible_size_is_refused_at_once() -> None:
    """Catches degrees whose product no search for a nearest plan would ever end on."""
    with pytest.raises(PlanError, match="the most is 65,536"):
        Plan(ring=65_536, ulysses=4_096)


def test_the_page_of_plans_has_every_field() -> None:
    """Catches a field that the page leaves out or still has, and a default that it tells wrongly."""
    page = (Path(__file__).parents[2] / "docs" / "plans.md").read_text(encoding="utf-8")
    table = page.partition("| field | default |")[2].partition("\n\n")[0].splitlines()[2:]
    told = [[cell.strip(" `") for cell in line.split("|")[1:3]] for line in table]
    defaults = [(field.name, "none" if field.default is None else str(field.default)) for field in fields(Plan)]
    assert [(name, default) for name, default in told] == [(name, default.lower()) for name, default in defaults]
