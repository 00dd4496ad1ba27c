"""Which plans run: every reason at once, and a nearest plan that is legal and really nearest."""

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from math import log2
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloom.errors import PlanError
from seqloom.geometry import Layout, Mask, total
from seqloom.plan import ModelShape, Plan, check, legal_plans, nearest, reasons, shortest

TINY = ModelShape(family="llama", vocab=96, hidden=96, layers=2, heads=12, kv_heads=6, head_dim=8, max_positions=4096)

plans = st.builds(
    Plan,
    data=st.integers(1, 4),
    ring=st.integers(1, 6),
    ulysses=st.integers(1, 16),
    layout=st.sampled_from(["zigzag", "contiguous", "striped", "balanced"]),
    exchange=st.sampled_from(["ring", "gather", "needed", "rsa"]),
)


def test_a_legal_plan_has_no_reasons() -> None:
    """Catches a check that refuses what runs."""
    for text in (
        "data=2 ring=4 ulysses=3",
        "ring=2 ulysses=12",
        "ring=4 inner_ring=2 ulysses=5",
        "ring=7 layout=balanced",
    ):
        plan = Plan.parse(text)
        for num_tokens in (997, 1024):
            assert reasons(plan, TINY, num_tokens, world=plan.world_size, batch=4) == []
            check(plan, TINY, num_tokens, world=plan.world_size, batch=4)


@pytest.mark.parametrize(
    ("plan", "num_tokens", "known", "message"),
    [
        (Plan(ring=2), 64, {"world": 4}, "The plan 'ring=2' takes 2 processes, but there are 4."),
        (Plan(pipeline=2), 64, {}, "pipeline=2 is not supported yet; the only degree is 1."),
        (Plan(tensor=3), 64, {}, "tensor=3 is not supported yet; the only degree is 1."),
        (
            Plan(ulysses=13),
            64,
            {},
            "ulysses=13 is more than the model's 12 query heads, and each rank takes at least one; "
            "the largest degree is 12.",
        ),
        (Plan(), 0, {}, "A sequence of 0 tokens is empty; the shortest has 1."),
        (
            Plan(ring=4),
            7,
            {},
            "7 tokens are too few for ring=4 ulysses=1 layout=zigzag to give each rank at least one; "
            "the shortest sequence has 8.",
        ),
        (
            Plan(ring=4, ulysses=3, layout="striped"),
            10,
            {},
            "10 tokens are too few for ring=4 ulysses=3 layout=striped to give each rank at least one; "
            "the shortest sequence has 12.",
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


def test_any_length_fits_a_model_without_positions_of_its_own() -> None:
    """Catches BLOOM, which computes its biases from positions, held to a length."""
    assert reasons(Plan(), replace(TINY, max_positions=None), 10**6) == []


def test_every_reason_is_given_at_once() -> None:
    """Catches a check that stops at the first reason, or at the first of one kind."""
    model = replace(TINY, max_positions=10, unsupported=("First fact.", "Second fact."))
    plan = Plan(data=4, pipeline=2, tensor=2, ring=4, ulysses=13)
    found = reasons(plan, model, 51, world=8, batch=6)
    expected = [
        "First fact.",
        "Second fact.",
        "takes 832 processes, but there are 8",
        "pipeline=2",
        "tensor=2",
        "12 query heads",
        "longer than the model's 10 positions",
        "51 tokens are too few",
        "A batch of 6 sequences",
    ]
    assert [part for part in expected if not any(part in reason for reason in found)] == []
    assert len(found) == len(expected)
    with pytest.raises(PlanError) as caught:
        check(plan, model, 51, world=8, batch=6)
    assert caught.value.reasons == tuple(found)
    assert caught.value.nearest is None
    assert all(reason in str(caught.value) for reason in found)


def tokens_of_each_rank(plan: Plan, num_tokens: int, mask: Mask) -> list[int]:
    layout = Layout(plan.layout, num_tokens, plan.ring, plan.ulysses, (mask,))
    return [total(layout.shard(ring, ulysses)) for ring, ulysses in product(range(plan.ring), range(plan.ulysses))]


@given(plans, st.integers(0, 100), st.lists(st.integers(1, 40), min_size=1))
def test_every_rank_has_a_token_from_the_shortest_length_on(plan: Plan, more: int, documents: list[int]) -> None:
    """Catches a length let through that leaves a rank without a token, where collectives would meet empty tensors."""
    num_tokens = shortest(plan) + more
    mask = Mask(documents=(*documents, num_tokens - sum(documents)) if sum(documents) < num_tokens else None)
    held = tokens_of_each_rank(plan, num_tokens, mask)
    assert sum(held) == num_tokens and min(held) >= 1


@pytest.mark.parametrize("text", ["ulysses=3", "ring=4", "ring=5 ulysses=3", "ring=3 ulysses=4 layout=striped"])
def test_shorter_lengths_leave_a_rank_empty(text: str) -> None:
    """Catches lengths refused for nothing: at each of these plans the next shorter one, or one below it, starves."""
    plan = Plan.parse(text)
    below = [min(tokens_of_each_rank(plan, num_tokens, Mask())) for num_tokens in range(1, shortest(plan))]
    assert min(below[-plan.ring :]) == 0


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
    """Catches advice that changes the rows a batch needs where it could leave them: ulysses=16 of 12 heads, twice."""
    assert nearest(Plan(data=2, ulysses=16), TINY, 48) == Plan(data=2, ring=2, ulysses=8)


def test_the_error_names_the_nearest_plan() -> None:
    """Catches the way out left unsaid."""
    with pytest.raises(PlanError, match=r"Try ring=2 ulysses=8\.$") as caught:
        check(Plan(ulysses=16), TINY, 64)
    assert caught.value.nearest == "ring=2 ulysses=8"


def test_another_layout_is_advised_where_the_asked_one_cannot_be() -> None:
    """Catches giving up on a ring of 3 for 5 tokens: zigzag needs 6, contiguous 3."""
    assert nearest(Plan(ring=3), replace(TINY, heads=1, kv_heads=1), 5, batch=1) == Plan(ring=3, layout="contiguous")


def test_an_inner_ring_stays_where_it_divides() -> None:
    """Catches a search that trips over rings that the inner ring does not divide, or that always forgets it."""
    plan = Plan(ring=8, inner_ring=4, ulysses=3)
    assert nearest(plan, TINY, 96) == plan
    assert nearest(plan, TINY, 96, world=48) == Plan(ring=8, inner_ring=4, ulysses=6)
    assert nearest(plan, TINY, 96, world=12) == Plan(ring=4, ulysses=3)
    assert nearest(plan, TINY, 96, world=6) == Plan(ring=2, ulysses=3)


Refused = tuple[Callable[[], object], str, str]

REFUSALS: dict[str, Refused] = {
    "world too large": (lambda: check(Plan(), TINY, world=70_000), "70000", "it has 1 to 65,536."),
    "processes": (lambda: check(Plan(ring=2), TINY, world=3), "takes 2 processes", "there are 3. Try ring=3."),
    "heads": (lambda: check(Plan(ulysses=16), TINY), "ulysses=16", "largest degree is 12. Try ring=2 ulysses=8."),
    "too short": (lambda: check(Plan(ring=4), TINY, 3), "3 tokens", "the shortest sequence has 8."),
    "empty sequence": (lambda: check(Plan(), TINY, 0), "0 tokens", "the shortest has 1."),
    "too long": (lambda: check(Plan(), TINY, 5000), "5000 tokens", "4096 positions; use at most so many"),
    "pipeline": (lambda: check(Plan(pipeline=2), TINY), "pipeline=2", "the only degree is 1."),
    "tensor": (lambda: check(Plan(tensor=2), TINY), "tensor=2", "the only degree is 1."),
    "empty batch": (lambda: check(Plan(), TINY, batch=0), "0 sequences", "the smallest has 1."),
    "batch": (lambda: check(Plan(data=4), TINY, batch=6), "6 sequences", "data=4 (divisors: 1, 2, 3, 6)."),
    "number": (lambda: Plan(ring=0), "ring=0", "from 1 to 65,536."),
    "word": (lambda: Plan.parse("layout=zig"), "layout=zig", "one of zigzag, contiguous, striped, balanced."),
    "plan too large": (lambda: Plan(ring=65_536, data=2), "131,072 processes", "the most is 65,536."),
    "inner ring": (lambda: Plan(ring=8, inner_ring=3), "inner_ring=3", "ring=8; nearest to it do 2 and 4."),
    "inner ring of another exchange": (
        lambda: Plan(ring=8, inner_ring=2, exchange="gather"),
        "exchange=gather",
        "leave inner_ring out or use exchange=ring.",
    ),
    "field": (lambda: Plan.parse("rong=2"), "'rong' (did you mean 'ring'?)", "it has data, pipeline, ring"),
    "field twice": (lambda: Plan.parse("ring=2 ring=2"), "ring twice", "name it once."),
    "no value": (lambda: Plan.parse("ring"), "'ring'", "of the form name=value."),
}
"""For each refusal a plan can meet: a case, the fact its sentence must hold, and the limit or way out."""


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refusal_names_fact_limit_and_way_out(what: str) -> None:
    """Catches a refusal that leaves its reader to guess what was wrong or what would do."""
    call, fact, limit = REFUSALS[what]
    with pytest.raises(PlanError) as caught:
        call()
    assert fact in str(caught.value) and limit in str(caught.value)


def templates() -> list[str]:
    """Each sentence that the rooms of a plan's legality can write, as a pattern with holes where values stand."""
    files = [Path(inspect.getfile(Plan)), Path(inspect.getfile(check))]
    strings = [
        node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.JoinedStr)
    ]
    patterns = [
        "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in string.values)
        for string in strings
    ]
    return [pattern for pattern in patterns if pattern.endswith(re.escape("."))]


def test_every_refusal_is_in_the_list() -> None:
    """Catches a new sentence that nobody looked at for fact, limit and way out."""
    said: list[str] = []
    for call, _, _ in REFUSALS.values():
        with pytest.raises(PlanError) as caught:
            call()
        said += caught.value.reasons
    assert len(templates()) >= len(REFUSALS) - 2  # pipeline and tensor share one; so do two spellings
    assert [pattern for pattern in templates() if not any(re.fullmatch(pattern, reason) for reason in said)] == []
