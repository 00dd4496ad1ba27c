"""Which plans run: every reason at once, and a nearest plan that is legal and really nearest."""

import ast
import inspect
import re
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from math import log2
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloom.errors import PlanError
from seqloom.geometry import Layout, Mask
from seqloom.plan import FAMILIES, ModelShape, Plan, check, legal_plans, nearest, reasons, shortest
from seqloom.plan.pipeline import pipeline_reasons
from seqloom.planner import Tokens, places

FOUR = ModelShape(family="llama", vocab=96, hidden=96, layers=4, heads=12, kv_heads=6, head_dim=8, max_positions=4096)
TINY = ModelShape(family="llama", vocab=96, hidden=96, layers=2, heads=12, kv_heads=6, head_dim=8, max_positions=4096)

plans = st.builds(
    Plan,
    data=st.integers(1, 4),
    ring=st.integers(1, 6),
    ulysses=st.integers(1, 16),
    layout=st.sampled_from(["zigzag", "contiguous", "striped", "balanced"]),
    exchange=st.sampled_from(["ring", "gather", "needed", "rsa"]),
)

grids = st.sampled_from(
    [
        {},
        {"tensor": 2},
        {"tensor": 3, "sequence_parallel": False},
        {"tensor": 5},
        {"tensor": 4, "tensor_kind": "2d"},
        {"tensor": 6, "tensor_kind": "2d", "grid": "3x2", "tensor_tokens": "ulysses"},
        {"tensor": 5, "tensor_kind": "2d", "grid": "1x5", "regather": False},
        {"tensor": 8, "tensor_kind": "2.5d", "depth": 2},
        {"tensor": 8, "tensor_kind": "3d"},
        {"tensor": 12, "tensor_kind": "3d", "grid": "2x3x2"},
    ]
)
tensor_plans = st.builds(
    lambda fields, **degrees: Plan(**fields, **degrees),
    grids,
    data=st.integers(1, 2),
    ring=st.integers(1, 3),
    ulysses=st.integers(1, 4),
    layout=st.sampled_from(["zigzag", "contiguous", "striped", "balanced"]),
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
        (Plan(schedule="zbv"), 64, {}, "schedule, chunks and stages are for pipeline above 1; leave them out."),
        (
            Plan(tensor=5),
            64,
            {},
            "12 query heads cannot be split evenly over tensor=5; use a degree that divides them: 1, 2, 3, 4, 6, 12.",
        ),
        (
            Plan(tensor=64, tensor_kind="2d"),
            64,
            {},
            "12 query heads cannot be split evenly over the 8 columns of tensor=64 tensor_kind=2d; use a number of "
            "columns that divides them: 1, 2, 3, 4, 6, 12.",
        ),
        (
            Plan(tensor=10, tensor_kind="3d", grid="2x5x1"),
            64,
            {},
            "12 query heads cannot be split evenly over the 5 input ranks of tensor=10 tensor_kind=3d grid=2x5x1; use "
            "a number of input ranks that divides them: 1, 2, 3, 4, 6, 12.",
        ),
        (
            Plan(tensor=4, ulysses=4),
            64,
            {},
            "ulysses=4 is more than a tensor rank's 3 of 12 query heads, and each rank takes at least one; "
            "the largest degree is 3.",
        ),
        (
            Plan(tensor=16, tensor_kind="2d", tensor_tokens="ulysses"),
            64,
            {},
            "ulysses=1 with the 4 token ranks of the grid is more than a tensor rank's 3 of 12 query heads, and each "
            "rank takes at least one; the largest degree is 3, and tensor_tokens=ring needs none.",
        ),
        (
            Plan(tensor=4, ring=2),
            7,
            {},
            "A sequence of 7 tokens is too short for ring=2 ulysses=1 tensor=4 layout=zigzag to give each rank at "
            "least one; the shortest sequence has 8.",
        ),
        (
            Plan(tensor=6, tensor_kind="2d", grid="3x2", layout="contiguous"),
            2,
            {},
            "A sequence of 2 tokens is too short for ring=1 ulysses=1 tensor=6 tensor_kind=2d grid=3x2 "
            "layout=contiguous to give each rank at least one; the shortest sequence has 3.",
        ),
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
            "A sequence of 7 tokens is too short for ring=4 ulysses=1 layout=zigzag to give each rank at least one; "
            "the shortest sequence has 8.",
        ),
        (
            Plan(ring=4, ulysses=3, layout="striped"),
            10,
            {},
            "A sequence of 10 tokens is too short for ring=4 ulysses=3 layout=striped to give each rank at least one; "
            "the shortest sequence has 12.",
        ),
        (
            Plan(),
            5000,
            {},
            "A sequence of 5,000 tokens is longer than the model's 4,096 positions; "
            "use at most so many, or a model that has more.",
        ),
        (Plan(data=4), 64, {"batch": 6}, "A batch of 6 sequences cannot be split over data=4 (divisors: 1, 2, 3, 6)."),
    ],
)
def test_each_reason_in_words(plan: Plan, num_tokens: int, known: dict[str, int], message: str) -> None:
    """Catches a limit that is not checked, or whose sentence lacks the fact, the limit or the way out."""
    assert reasons(plan, TINY, num_tokens, **known) == [message]


@pytest.mark.parametrize(
    ("family", "plan", "message"),
    [
        (
            "bloom",
            Plan(tensor=4, tensor_kind="2d"),
            "tensor_kind=2d cannot split bloom yet; use tensor_kind=1d, or a model of gemma2, gemma3_text, llama, "
            "mistral, qwen2, qwen3.",
        ),
        (
            "gpt2",
            Plan(tensor=8, tensor_kind="2.5d", depth=2),
            "tensor_kind=2.5d cannot split gpt2 yet; use tensor_kind=1d, or a model of gemma2, gemma3_text, llama, "
            "mistral, qwen2, qwen3.",
        ),
        (
            "deepseek_v2",
            Plan(tensor=8, tensor_kind="3d"),
            "tensor_kind=3d cannot split deepseek_v2 yet; use tensor_kind=1d, or a model of gemma2, gemma3_text, "
            "llama, mistral, qwen2, qwen3.",
        ),
    ],
)
def test_a_family_that_a_grid_cannot_split(family: str, plan: Plan, message: str) -> None:
    """Catches a model whose weights no rule splits let through to the processes, and one refused for nothing."""
    shape = replace(TINY, family=family)
    assert reasons(plan, shape, 64) == [message]
    assert reasons(Plan(ring=2, ulysses=2), shape, 64) == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text",
    [
        "tensor=3 sequence_parallel=false",
        "tensor=4 tensor_overlap=ring ring=2 ulysses=3 data=2",
        "tensor=6 tensor_kind=2d grid=3x2 ring=2",
        "tensor=8 tensor_kind=2.5d depth=2 regather=false",
        "tensor=8 tensor_kind=3d ulysses=2",
        "tensor=12 tensor_kind=3d grid=2x3x2 tensor_tokens=ulysses",
    ],
)
def test_the_families_that_each_grid_splits(family: str, text: str) -> None:
    """Catches a family lost from one of the two lists; key/value heads fewer than the degree are no reason."""
    plan = Plan.parse(text)
    on_a_grid = family in ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
    allowed = plan.tensor_kind == "1d" or on_a_grid
    for kv_heads in (1, 4, 12):
        found = reasons(plan, replace(TINY, family=family, kv_heads=kv_heads), 997, world=plan.world_size, batch=4)
        assert (found == []) is allowed


def test_any_length_fits_a_model_without_positions_of_its_own() -> None:
    """Catches BLOOM, which computes its biases from positions, held to a length."""
    assert reasons(Plan(), replace(TINY, max_positions=None), 10**6) == []


def test_every_reason_is_given_at_once() -> None:
    """Catches a check that stops at the first reason, or at the first of one kind."""
    model = replace(TINY, max_positions=10, unsupported=("First fact.", "Second fact."))
    plan = Plan(data=4, pipeline=2, stages="1-0-1", tensor=5, ring=4, ulysses=13)
    found = reasons(plan, model, 51, world=8, batch=6)
    expected = [
        "First fact.",
        "Second fact.",
        "takes 2,080 processes, but there are 8",
        "stages=1-0-1 names 3 stages",
        "between the ends without layers",
        "12 query heads cannot be split evenly over tensor=5",
        "ulysses=13 is more than the model's 12 query heads",
        "longer than the model's 10 positions",
        "51 tokens is too short",
        "A batch of 6 sequences",
    ]
    assert [part for part in expected if not any(part in reason for reason in found)] == []
    assert len(found) == len(expected)
    with pytest.raises(PlanError) as caught:
        check(plan, model, 51, world=8, batch=6)
    assert caught.value.reasons == tuple(found)
    assert caught.value.nearest is None
    assert all(reason in str(caught.value) for reason in found)


def test_one_is_said_in_the_singular() -> None:
    """Catches sentences of 1 tokens, 1 query heads and 1 layers."""
    model = replace(TINY, heads=1, kv_heads=1)
    plan = Plan(tensor=2, pipeline=2, ring=2, stages="1", zero=1, zero_replicas=2)
    said = " ".join(reasons(plan, model, 1, world=3, batch=1) + reasons(Plan(), TINY, world=2))
    for part in ("1 token is", "1 query head cannot", "1 layer,", "1 stage,", "takes 1 process,"):
        assert part in said, part


def tokens_of_each_rank(plan: Plan, num_tokens: int, mask: Mask) -> list[int]:
    layout = Layout(plan.layout, num_tokens, plan.attention_ring, plan.attention_ulysses, (mask,))
    held = [Tokens.of(plan, layout, place) for place in places(plan)]
    return [min(tokens.outer, tokens.inner) for tokens in held]


@given(tensor_plans, st.integers(0, 100), st.lists(st.integers(1, 40), min_size=1))
def test_every_rank_has_a_token_from_the_shortest_length_on(plan: Plan, more: int, documents: list[int]) -> None:
    """Catches a length let through that leaves a rank without a token, where collectives would meet empty tensors."""
    num_tokens = shortest(plan) + more
    mask = Mask(documents=(*documents, num_tokens - sum(documents)) if sum(documents) < num_tokens else None)
    held = tokens_of_each_rank(plan, num_tokens, mask)
    assert min(held) >= 1
    assert plan.tensor > 1 or sum(held) == num_tokens


@pytest.mark.parametrize(
    "text",
    [
        "ulysses=3",
        "ring=4",
        "ring=5 ulysses=3",
        "ring=3 ulysses=4 layout=striped",
        "tensor=4",
        "ring=2 ulysses=2 tensor=3",
        "tensor=6 tensor_kind=2d grid=3x2 layout=contiguous",
        "tensor=6 tensor_kind=3d grid=2x3x1 layout=contiguous",
    ],
)
def test_shorter_lengths_leave_a_rank_empty(text: str) -> None:
    """Catches lengths refused for nothing: at each of these plans the next shorter one, or one below it, starves."""
    plan = Plan.parse(text)
    below = [min(tokens_of_each_rank(plan, num_tokens, Mask())) for num_tokens in range(1, shortest(plan))]
    assert min(below[-plan.attention_ring :]) == 0


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


@given(tensor_plans, st.integers(1, 96), st.none() | st.integers(1, 24), st.none() | st.integers(1, 6))
def test_the_nearest_plan_of_a_tensor_plan(plan: Plan, num_tokens: int, world: int | None, batch: int | None) -> None:
    """Catches advice that does not run, or drops a tensor axis that was legal."""
    found = nearest(plan, TINY, num_tokens, world=world, batch=batch)
    assert found is not None
    assert reasons(found, TINY, num_tokens, world=found.world_size, batch=batch) == []
    assert (world or plan.world_size) % found.world_size == 0
    if not reasons(plan, TINY, num_tokens, world=world, batch=batch):
        assert found == plan
    if found.tensor == plan.tensor and found.tensor_kind == plan.tensor_kind and found.grid == plan.grid:
        asked = "sequence_parallel", "depth", "tensor_tokens", "tensor_overlap", "regather"
        assert [getattr(found, name) for name in asked] == [getattr(plan, name) for name in asked]


@pytest.mark.parametrize(
    ("asked", "known", "found"),
    [
        ("tensor=8", {}, "ulysses=2 tensor=4"),
        ("tensor=8 sequence_parallel=false tensor_overlap=none", {}, None),
        ("tensor=4", {"world": 8}, "ulysses=2 tensor=4"),
        ("tensor=25 tensor_kind=2d", {}, "tensor=25 tensor_kind=2d grid=25x1"),
        ("tensor=10 tensor_kind=2d grid=2x5", {}, "tensor=10 tensor_kind=2d grid=5x2"),
        ("tensor=4 tensor_kind=2d", {"family": "bloom"}, "tensor=4"),
        ("tensor=25 tensor_kind=2d", {"family": "bloom"}, "ring=5 ulysses=5"),
        (
            "tensor=4 tensor_kind=2d regather=false tensor_tokens=ulysses",
            {"family": "bloom"},
            "tensor=4 regather=false",
        ),
        ("ulysses=4 tensor=4", {}, "ring=2 ulysses=2 tensor=4"),
    ],
)
def test_the_nearest_grid(asked: str, known: dict[str, Any], found: str | None) -> None:
    """Catches a tensor axis given up where another grid, another kind or fewer ranks would do, or kept by halves."""
    shape = replace(TINY, family=known.get("family", "llama"))
    near = nearest(Plan.parse(asked), shape, 96, world=known.get("world"))
    assert near is not None
    if found is None:
        assert (near.sequence_parallel, near.tensor_overlap) == (False, "none")
    else:
        assert str(near) == found


def test_a_search_over_many_processes_ends_at_once() -> None:
    """Catches a search whose candidates multiply: 55,440 processes have 120 divisors."""
    shape = replace(TINY, heads=96, kv_heads=8, max_positions=None)
    started = time.process_time()
    for text in ("tensor=7", "tensor=16 tensor_kind=2d", "tensor=27 tensor_kind=3d", "ulysses=100"):
        assert nearest(Plan.parse(text), shape, 2**20, world=55_440) is not None
    assert nearest(Plan(tensor=5), replace(shape, family="bloom"), 1, world=55_440) == Plan(data=55_440)
    assert time.process_time() - started < 10


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
    "world too large": (lambda: check(Plan(), TINY, world=70_000), "70,000", "it has 1 to 65,536."),
    "processes": (lambda: check(Plan(ring=2), TINY, world=3), "takes 2 processes", "there are 3. Try ring=3."),
    "heads": (lambda: check(Plan(ulysses=16), TINY), "ulysses=16", "largest degree is 12. Try ring=2 ulysses=8."),
    "too short": (lambda: check(Plan(ring=4), TINY, 3), "3 tokens", "the shortest sequence has 8."),
    "empty sequence": (lambda: check(Plan(), TINY, 0), "0 tokens", "the shortest has 1."),
    "too long": (lambda: check(Plan(), TINY, 5000), "5,000 tokens", "4,096 positions; use at most so many"),
    "no pipeline": (lambda: check(Plan(chunks=2), FOUR), "pipeline above 1", "leave them out. Try data=1."),
    "too few layers": (
        lambda: check(Plan(pipeline=8), FOUR),
        "4 layers cannot be cut into 8 stages",
        "at least 6 layers, or fewer stages. Try pipeline=4 ulysses=2.",
    ),
    "stages of another number": (
        lambda: check(Plan(pipeline=2, stages="1-2-1"), FOUR),
        "stages=1-2-1 names 3 stages, but the plan has 2",
        "name as many, or leave stages out. Try pipeline=2.",
    ),
    "stages of other layers": (
        lambda: check(Plan(pipeline=2, stages="1-2"), FOUR),
        "names 3 layers, but the model has 4",
        "make them add up. Try pipeline=2.",
    ),
    "a stage of nothing": (
        lambda: check(Plan(pipeline=3, stages="2-0-2"), FOUR),
        "stages=2-0-2 leaves a stage between the ends without layers",
        "only the ends may have none. Try pipeline=3.",
    ),
    "micro-batches": (
        lambda: check(Plan(pipeline=4), FOUR, micro_batches=2),
        "A step of 2 micro-batches cannot be ordered by schedule=1f1b over pipeline=4",
        "accumulate 4, or use schedule=gpipe. Try pipeline=4 schedule=gpipe.",
    ),
    "chunks of a plain schedule": (
        lambda: check(Plan(pipeline=2, chunks=2), FOUR),
        "one stage, not chunks=2",
        "use schedule=interleaved, or leave chunks out. Try pipeline=2.",
    ),
    "one chunk interleaved": (
        lambda: check(Plan(pipeline=2, schedule="interleaved", chunks=1), FOUR),
        "chunks=1 interleaves nothing",
        "use schedule=1f1b, or chunks=2. Try pipeline=2 schedule=interleaved.",
    ),
    "chunks there and back": (
        lambda: check(Plan(pipeline=2, schedule="zbv", chunks=3), FOUR),
        "2 stages each, not chunks=3",
        "leave it out. Try pipeline=2 schedule=zbv.",
    ),
    "shares of several stages": (
        lambda: check(Plan(data=2, zero=3, pipeline=2, schedule="zbv"), FOUR),
        "zero=3 with several stages on a pipeline rank (schedule=zbv)",
        "use zero=1, or schedule=1f1b or gpipe. Try",
    ),
    "heads over a line": (
        lambda: check(Plan(tensor=5), TINY),
        "12 query heads",
        "divides them: 1, 2, 3, 4, 6, 12. Try",
    ),
    "heads over a grid": (
        lambda: check(Plan(tensor=25, tensor_kind="2d"), TINY),
        "the 5 columns of tensor=25 tensor_kind=2d",
        "number of columns that divides them: 1, 2, 3, 4, 6, 12. Try",
    ),
    "family on a grid": (
        lambda: check(Plan(tensor=4, tensor_kind="2d"), replace(TINY, family="bloom")),
        "tensor_kind=2d cannot split bloom",
        "use tensor_kind=1d, or a model of gemma2, gemma3_text, llama, mistral, qwen2, qwen3. Try tensor=4.",
    ),
    "experts with all tokens": (
        lambda: check(Plan(tensor=2, sequence_parallel=False), replace(TINY, family="mixtral", experts=4)),
        "sequence_parallel=false gives every rank of tensor=2 all tokens",
        "leave it out. Try",
    ),
    "depth": (lambda: Plan(tensor=4, depth=2), "depth=2", "leave it out or use tensor_kind=2.5d."),
    "grid in a line": (lambda: Plan(tensor=4, grid="2x2"), "grid=2x2", "leave it out or name the kind."),
    "token axes in a line": (
        lambda: Plan(tensor=4, tensor_tokens="ulysses"),
        "tensor_tokens=ulysses is for the token axes",
        "1d has none; leave it out or name the kind.",
    ),
    "whole tokens on a grid": (
        lambda: Plan(tensor=4, tensor_kind="2d", sequence_parallel=False),
        "sequence_parallel=false",
        "tensor_kind=1d only",
    ),
    "ring steps on a grid": (
        lambda: Plan(tensor=4, tensor_kind="2d", tensor_overlap="ring"),
        "tensor_overlap=ring",
        "leave it out or use 1d.",
    ),
    "no grid": (lambda: Plan(tensor=4, tensor_kind="2d", grid="2by2"), "grid=2by2", "rows x columns as in grid=3x2."),
    "grid of another kind": (
        lambda: Plan(tensor=4, tensor_kind="2d", grid="2x2x1"),
        "grid=2x2x1 does not fit tensor_kind=2d",
        "rows x columns, as 3x2.",
    ),
    "grid of other ranks": (
        lambda: Plan(tensor=6, tensor_kind="2d", grid="2x2"),
        "grid=2x2 has 4 ranks, but tensor=6",
        "use tensor=4 or another grid.",
    ),
    "no square": (
        lambda: Plan(tensor=6, tensor_kind="2d"),
        "tensor=6 is no square",
        "use tensor=4 or tensor=9, or name rows x columns, such as grid=3x2.",
    ),
    "no cube": (
        lambda: Plan(tensor=12, tensor_kind="3d"),
        "tensor=12 is no cube",
        "use tensor=8 or tensor=27, or name output x input x weight, such as grid=3x2x2.",
    ),
    "truth": (lambda: Plan.parse("regather=maybe"), "regather=maybe", "it is true or false."),
    "empty batch": (lambda: check(Plan(), TINY, batch=0), "0 sequences", "the smallest has 1."),
    "batch": (lambda: check(Plan(data=4), TINY, batch=6), "6 sequences", "data=4 (divisors: 1, 2, 3, 6)."),
    "number": (lambda: Plan(ring=0), "ring=0", "from 1 to 65,536."),
    "word": (lambda: Plan.parse("layout=zig"), "layout=zig", "one of zigzag, contiguous, striped, balanced."),
    "plan too large": (lambda: Plan(ring=65_536, data=2), "131,072 processes", "the most is 65,536."),
    "order": (lambda: Plan(order="ring-data"), "order=ring-data", "as tensor-ulysses-ring-data-pipeline."),
    "order of a grid": (
        lambda: Plan(tensor=4, tensor_kind="2d", order="data-tensor-ulysses-ring-pipeline"),
        "does not begin with tensor",
        "put tensor first, or use tensor_kind=1d.",
    ),
    "inner ring": (lambda: Plan(ring=8, inner_ring=3), "inner_ring=3", "ring=8; nearest to it do 2 and 4."),
    "inner ring of another exchange": (
        lambda: Plan(ring=8, inner_ring=2, exchange="gather"),
        "exchange=gather",
        "leave inner_ring out or use exchange=ring.",
    ),
    "field": (lambda: Plan.parse("rong=2"), "'rong' (did you mean 'ring'?)", "it has data, zero, zero_replicas"),
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
    files = [Path(inspect.getfile(Plan)), Path(inspect.getfile(reasons)), Path(inspect.getfile(pipeline_reasons))]
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
    assert len(templates()) >= len(REFUSALS) - 3  # some share a sentence
    assert [pattern for pattern in templates() if not any(re.fullmatch(pattern, reason) for reason in said)] == []
