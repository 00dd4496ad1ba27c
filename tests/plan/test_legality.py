"""Which plans run: every reason at once, and a nearest plan that is legal and really nearest."""

from dataclasses import replace
from itertools import product
from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloom.errors import PlanError
from seqloom.geometry import Layout
from seqloom.plan import ModelShape, Plan, check, granularity, legal_plans, nearest, reasons

TINY = ModelShape(family="llama", vocab=96, hidden=96, layers=2, heads=12, kv_heads=6, head_dim=8, max_positions=4096)

plans = st.builds(
    Plan,
    data=st.integers(1, 4),
    ring=st.integers(1, 6),
    ulysses=st.integers(1, 8),
    layout=st.sampled_from(["zigzag", "contiguous", "striped"]),
    exchange=st.sampled_from(["ring", "gather"]),
)


def test_a_legal_plan_has_no_reasons() -> None:
    """Catches a check that refuses what runs."""
    plan = Plan(data=2, ring=4, ulysses=3)
    assert reasons(plan, TINY, 4 * 3 * 8, world=24, batch=4) == []
    check(plan, TINY, 4 * 3 * 8, world=24, batch=4)


@pytest.mark.parametrize(
    ("plan", "num_tokens", "known", "message"),
    [
        (Plan(ring=2), 64, {"world": 4}, "The plan 'ring=2' takes 2 processes, but there are 4."),
        (Plan(pipeline=2), 64, {}, "pipeline=2 is not supported yet; the only degree is 1."),
        (Plan(tensor=3), 64, {}, "tensor=3 is not supported yet; the only degree is 1."),
        (Plan(ulysses=4), 64, {}, "6 key/value heads cannot be split over ulysses=4 (divisors: 1, 2, 3, 6)."),
        (Plan(), 0, {}, "A sequence of 0 tokens is empty; the shortest has 1."),
        (
            Plan(ring=4),
            60,
            {},
            "60 tokens cannot be split over ring=4 ulysses=1 layout=zigzag, "
            "which needs a multiple of 8 (such as 56 or 64).",
        ),
        (
            Plan(ring=4, ulysses=3, layout="striped"),
            10,
            {},
            "10 tokens cannot be split over ring=4 ulysses=3 layout=striped, "
            "which needs a multiple of 12 (such as 12).",
        ),
        (
            Plan(),
            5000,
            {},
            "A sequence of 5000 tokens is longer than the model's 4096 positions; "
            "use at most so many, or a model that has more.",
        ),
        (Plan(data=4), 64, {"batch": 6}, "A batch of 6 sequences cannot be split over data=4 (divisors: 1, 2, 3, 6)."),
    ],
)
def test_each_reason_in_words(plan: Plan, num_tokens: int, known: dict[str, int], message: str) -> None:
    """Catches a limit that is not checked, or whose sentence lacks the fact, the limit or the way out."""
    assert reasons(plan, TINY, num_tokens, **known) == [message]


def test_query_heads_are_named_when_they_are_what_fails() -> None:
    """Catches the wrong kind of head blamed: 12 query heads on 12 key/value heads."""
    assert reasons(Plan(ulysses=8), replace(TINY, kv_heads=12), 64) == [
        "12 query heads cannot be split over ulysses=8 (divisors: 1, 2, 3, 4, 6, 12)."
    ]


def test_a_window_shorter_than_the_sequence_is_refused_and_a_longer_one_is_causal() -> None:
    """Catches a window silently dropped, and one refused although it hides nothing."""
    window = replace(TINY, window=64)
    assert reasons(Plan(), window, 64) == reasons(Plan(), window, 16) == []
    (reason,) = reasons(Plan(), window, 65)
    assert "window of 64 is shorter than the 65 tokens" in reason
    assert "up to 64 tokens" in reason


def test_every_reason_is_given_at_once() -> None:
    """Catches a check that stops at the first reason, or at the first of one kind."""
    model = replace(TINY, max_positions=50, window=40, unsupported=("First fact.", "Second fact."))
    plan = Plan(data=4, pipeline=2, tensor=2, ring=4, ulysses=5)
    found = reasons(plan, model, 61, world=8, batch=6)
    expected = [
        "First fact.",
        "Second fact.",
        "takes 320 processes, but there are 8",
        "pipeline=2",
        "tensor=2",
        "6 key/value heads",
        "12 query heads",
        "longer than the model's 50 positions",
        "window of 40",
        "61 tokens cannot be split",
        "A batch of 6 sequences",
    ]
    assert [part for part in expected if not any(part in reason for reason in found)] == []
    assert len(found) == len(expected)
    with pytest.raises(PlanError) as caught:
        check(plan, model, 61, world=8, batch=6)
    assert caught.value.reasons == tuple(found)
    assert caught.value.nearest is None
    assert all(reason in str(caught.value) for reason in found)


@given(plans, st.integers(1, 4))
def test_granularity_is_what_the_layout_needs(plan: Plan, times: int) -> None:
    """Catches a length let through whose shards or chunks would differ in size, and one refused for nothing."""

    def even(num_tokens: int) -> bool:
        layout = Layout(plan.layout, num_tokens, plan.ring, plan.ulysses)
        shards = product(range(plan.ring), range(plan.ulysses))
        sizes = {sum(span.size for span in layout.shard(*place)) for place in shards}
        chunks = {span.size for spans in layout.ring_spans for span in spans}
        return len(sizes) == len(chunks) == 1

    unit = granularity(plan)
    if plan.ring == 1 and plan.layout == "zigzag":
        assert unit == plan.ulysses  # one ring rank holds everything, however it is chunked
        return
    assert even(unit * times)
    assert not any(even(num_tokens) for num_tokens in range(1, unit))


@given(plans, st.integers(1, 96), st.none() | st.integers(1, 24), st.none() | st.integers(1, 6))
def test_the_nearest_plan_is_legal_and_really_nearest(
    plan: Plan, num_tokens: int, world: int | None, batch: int | None
) -> None:
    """Catches advice that does not run, and advice further off, or for fewer processes, than another plan that runs."""
    found = nearest(plan, TINY, num_tokens, world=world, batch=batch)
    assert found is not None  # one process is always legal here
    assert reasons(found, TINY, num_tokens, world=found.world_size, batch=batch) == []
    assert (found.exchange, found.pipeline, found.tensor) == (plan.exchange, 1, 1)
    available = world or plan.world_size
    assert available % found.world_size == 0

    def distance(other: Plan) -> float:
        return sum(abs(log2(getattr(other, axis) / getattr(plan, axis))) for axis in ("data", "ring", "ulysses"))

    degrees = [d for d in range(1, available + 1) if available % d == 0]
    for data, ring, ulysses in product(degrees, repeat=3):
        if data * ring * ulysses > available:
            continue
        other = replace(plan, data=data, ring=ring, ulysses=ulysses, layout=found.layout)
        if available % other.world_size == 0 and not reasons(other, TINY, num_tokens, batch=batch):
            assert other.world_size <= found.world_size
            if other.world_size == found.world_size:
                assert distance(found) <= distance(other) + 1e-9


@given(plans, st.integers(1, 96))
def test_a_legal_plan_is_its_own_nearest(plan: Plan, num_tokens: int) -> None:
    """Catches a distance that prefers another plan to the one asked for."""
    if not reasons(plan, TINY, num_tokens):
        assert nearest(plan, TINY, num_tokens) == plan


@given(plans, st.integers(1, 96), st.integers(1, 16))
def test_legal_plans_are_all_of_them(plan: Plan, num_tokens: int, world: int) -> None:
    """Catches a spread that is never tried, or tried twice."""
    found = list(legal_plans(plan, TINY, num_tokens, world=world))
    spreads = product(range(1, world + 1), repeat=3)
    candidates = [replace(plan, data=data, ring=ring, ulysses=ulysses) for data, ring, ulysses in spreads]
    expected = [other for other in candidates if not reasons(other, TINY, num_tokens, world=world)]
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_ties_keep_the_data_degree() -> None:
    """Catches advice that changes the rows a batch needs where it could leave them: ulysses=4 of 6 heads, twice."""
    assert nearest(Plan(data=2, ulysses=4), TINY, 48) == Plan(data=2, ring=2, ulysses=2)


def test_the_error_names_the_nearest_plan() -> None:
    """Catches the way out left unsaid."""
    with pytest.raises(PlanError, match=r"Try ring=2 ulysses=4\.$") as caught:
        check(Plan(ulysses=8), replace(TINY, kv_heads=12), 64)
    assert caught.value.nearest == "ring=2 ulysses=4"


def test_another_layout_is_advised_where_the_asked_one_cannot_be() -> None:
    """Catches giving up on a ring of 3 for 15 tokens: zigzag needs a multiple of 6, contiguous of 3."""
    assert nearest(Plan(ring=3), replace(TINY, heads=4, kv_heads=4), 15, batch=1) == Plan(ring=3, layout="contiguous")
