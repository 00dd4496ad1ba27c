"""Split attention against dense attention on one device, outputs and gradients: every mask under every exchange."""

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.oracle import compare
from pool import Pool
from seqloom.attention import attention
from seqloom.fabric import Fabric
from seqloom.geometry import Mask
from seqloom.plan import Plan
from seqloom.sequence import Batch, shard_batch

EVEN, UNEVEN = 48, 61  # 61 is prime


def every_third(q: Any, k: Any) -> Any:
    """A rule of the user's own: elementwise, on ints and on tensors."""
    return (q - k) % 3 != 1


RULES = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window": Mask(window=7),
    "full window": Mask(causal=False, window=5),
    "prefix": Mask(prefix=4),
    "window and prefix": Mask(window=6, prefix=3),
    "callable": Mask(allowed=every_third),
}


def packings(tokens: int) -> list[dict[str, Any]]:
    """Two rows each: one document, different documents, and left and right padding."""
    kept = torch.ones(2, tokens, dtype=torch.int64)
    kept[0, : tokens // 3] = 0
    kept[1, -5:] = 0
    return [
        {},
        {"documents": [[tokens], [1, 16, 5, tokens - 22]]},
        {"documents": [[7, 1, 1, tokens - 9], [tokens - 8, 8]]},
        {"attention_mask": kept},
        {"documents": [[tokens // 2, tokens - tokens // 2], [9, tokens - 9]], "attention_mask": kept},
    ]


def several(text: str, cases: list[tuple[Any, ...]]) -> int:
    """Each of (tokens, packing, rule, heads, form, options) under one fabric; raises where a case parts."""
    fabric = Fabric.build(Plan.parse(text))
    for tokens, packing, rule, heads, form, options in cases:
        ids = torch.zeros(2, tokens, dtype=torch.int64)
        batch = Batch.from_tokens(ids, rule=rule, first_row=3, seed=11, **packing)
        try:
            compare(fabric, batch, heads, form=form, **options)
        except Exception as error:
            error.add_note(f"{tokens} tokens, {packing}, {rule}, heads {heads}, {form}, {options}")
            raise
    return len(cases)


SPREADS = ["ring=2", "ulysses=2", "ring=3", "ring=2 ulysses=2", "ring=4", "ring=4 ulysses=2"]
EXCHANGES = ["ring", "gather", "needed", "rsa"]
LAYOUTS = ["zigzag", "contiguous", "striped", "balanced"]


def mask_cases(layout: str) -> list[tuple[Any, ...]]:
    """Every rule on every packing, of an even and an uneven length."""
    return [
        (tokens, packing, rule, (6, 2), "fast", {})
        for tokens, rule in product((EVEN, UNEVEN), RULES.values())
        for packing in packings(tokens)[:: 2 if layout == "striped" else 1]
    ]


@pytest.mark.sweep
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("spread", SPREADS)
def test_every_mask_and_layout(pool: Pool, spread: str, exchange: str, layout: str) -> None:
    """Catches a block met twice or never, a diagonal off by one, a document or padding seen from outside, a window or
    prefix dropped by one exchange, and a gradient sent to the wrong owner."""
    plan, cases = Plan.parse(f"{spread} exchange={exchange} layout={layout}"), mask_cases(layout)
    assert pool.run(plan.world_size, several, str(plan), cases, timeout_seconds=240) == [len(cases)] * plan.world_size


SOME = list(enumerate(product(["ring=3", "ring=2 ulysses=2", "ring=4"], EXCHANGES, LAYOUTS)))


@pytest.mark.parametrize(("number", "choice"), SOME)
def test_masks_and_layouts(pool: Pool, number: int, choice: tuple[str, str, str]) -> None:
    """Catches what the whole table catches, on every ninth case of it: another ninth for each plan."""
    spread, exchange, layout = choice
    plan, cases = Plan.parse(f"{spread} exchange={exchange} layout={layout}"), mask_cases(layout)[number % 9 :: 9]
    assert pool.run(plan.world_size, several, str(plan), cases) == [len(cases)] * plan.world_size


@pytest.mark.parametrize("text", ["data=1", "ring=3", "ulysses=3", "ring=2 ulysses=2", "ring=2 exchange=gather"])
def test_the_specification_equals_dense(pool: Pool, text: str) -> None:
    """Catches a specification that says something else than the definition."""
    options = {"softcap": 2.0, "slopes": True, "sinks": True, "dropout": 0.3, "layer": 3, "window": 9}
    cases = [
        (tokens, packing, rule, (6, 2), "specification", given)
        for tokens, rule, given in [(EVEN, RULES["full"], {}), (UNEVEN, RULES["prefix"], {}), (UNEVEN, Mask(), options)]
        for packing in packings(tokens)
    ]
    world = Plan.parse(text).world_size
    assert pool.run(world, several, text, cases) == [len(cases)] * world


HEADS = {
    "as many": (8, 8),
    "grouped": (8, 2),
    "one": (8, 1),
    "uneven": (10, 5),
    "uneven groups": (9, 3),
    "seven to one": (14, 2),
}


@pytest.mark.parametrize(
    "text", ["ulysses=2", "ulysses=3", "ring=2 ulysses=2", "ulysses=4", "ulysses=8", "ring=2 ulysses=4"]
)
def test_every_head_count(pool: Pool, text: str) -> None:
    """Catches a query head beside the wrong key head, a key head that several ranks read whose gradients are not
    summed, and heads that must divide."""
    cases = [
        (tokens, packings(tokens)[1], rule, heads, "fast", {"widths": widths})
        for heads, (tokens, rule, widths) in product(
            HEADS.values(), [(EVEN, Mask(), (8, 8)), (UNEVEN, Mask(window=7), (8, 4)), (UNEVEN, Mask(), (4, 12))]
        )
    ]
    world = Plan.parse(text).world_size
    assert pool.run(world, several, text, cases) == [len(cases)] * world


OPTIONS: list[dict[str, Any]] = [
    {"softcap": 1.5},
    {"slopes": True},
    {"sinks": True},
    {"dropout": 0.4, "layer": 2},
    {"window": 5},
    {"softcap": 1.5, "slopes": True, "sinks": True, "dropout": 0.4, "layer": 1, "window": 9, "scale": 0.5},
]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    "spread", ["data=1", "ring=2", "ulysses=3", "ring=2 ulysses=2", "data=2 ring=2", "ring=3 ulysses=2"]
)
def test_every_option(pool: Pool, spread: str, exchange: str) -> None:
    """Catches slopes or sinks of the wrong heads, a soft cap without its gradient, a layer's window lost, and dropout
    whose coins depend on the plan: the oracle draws them for the whole batch."""
    plan = Plan.parse(f"{spread} exchange={exchange}")
    cases = [
        (tokens, packings(tokens)[packing], rule, heads, "fast", options)
        for options in OPTIONS
        for tokens, packing, rule, heads in [
            (EVEN, 0, Mask(), (6, 2)),
            (UNEVEN, 4, Mask(prefix=2), (9, 3)),
            (UNEVEN, 1, Mask(causal=False), (7, 7)),
        ]
    ]
    assert pool.run(plan.world_size, several, str(plan), cases) == [len(cases)] * plan.world_size


def as_a_number(q: Any, k: Any) -> Any:
    """A rule that says 0 or 1."""
    return ((q - k) % 3 != 1) * 1


def everything(q: Any, k: Any) -> bool:
    """A rule that is one answer for all pairs."""
    return True


@pytest.mark.parametrize("text", ["data=1", "ring=2", "ring=2 exchange=rsa"])
def test_rules_need_not_be_tensors_of_bools(pool: Pool, text: str) -> None:
    """Catches a rule of numbers, or of one answer, that is misread or fails in a kernel."""
    cases = [(UNEVEN, {}, Mask(allowed=rule), (6, 2), "fast", {}) for rule in (as_a_number, everything)]
    world = Plan.parse(text).world_size
    assert pool.run(world, several, text, cases) == [2] * world


def sinks_of_nothing(value: float) -> tuple[float, bool]:
    """The largest gradient of the sinks under left padding, and whether all outputs are finite."""
    kept = torch.arange(12)[None] > 4
    batch = Batch.from_tokens(torch.zeros(1, 12, dtype=torch.int64), attention_mask=kept)
    _, shard = shard_batch(batch, Fabric.build(Plan()))
    q, k, v = (torch.randn(1, 2, 12, 4, dtype=torch.float64) for _ in range(3))
    sinks = torch.full((2,), value, dtype=torch.float64).requires_grad_()
    out = attention(q, k, v, shard, sinks=sinks)
    out.sum().backward()
    return sinks.grad.abs().max().item(), bool(out.isfinite().all())


def test_a_sink_of_minus_infinity_is_none(pool: Pool) -> None:
    """Catches NaN from infinity less infinity where a query sees nothing, and a NaN hidden as 0."""
    assert pool.run(1, sinks_of_nothing, float("-inf")) == [(0.0, True)]
    assert pool.run(1, sinks_of_nothing, float("nan"))[0][1] is False


@pytest.mark.parametrize("inner", [1, 2, 3, 6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_double_ring_of_every_divisor(pool: Pool, inner: int, layout: str) -> None:
    """Catches groups that are right only where the inner ring squared is the ring: here 6 is 1x6, 2x3, 3x2 and 6x1."""
    plan = Plan(ring=6, inner_ring=inner, layout=layout)
    cases = [
        (UNEVEN, packing, rule, (6, 2), "fast", {"sinks": True})
        for rule in (Mask(), Mask(window=7), Mask(causal=False))
        for packing in packings(UNEVEN)[:2]
    ]
    assert pool.run(6, several, str(plan), cases) == [len(cases)] * 6


@pytest.mark.parametrize(
    "text", ["ring=8 inner_ring=2", "ring=8 inner_ring=4", "ring=4 inner_ring=2 ulysses=2", "ring=4 inner_ring=2"]
)
def test_a_double_ring_in_other_worlds(pool: Pool, text: str) -> None:
    """Catches a double ring that is right without Ulysses, or in one shape only."""
    cases = [(tokens, packings(tokens)[1], Mask(), (6, 2), "fast", {}) for tokens in (EVEN, UNEVEN)]
    world = Plan.parse(text).world_size
    assert pool.run(world, several, text, cases) == [len(cases)] * world


@st.composite
def drawn(draw: st.DrawFn) -> tuple[str, tuple[Any, ...]]:
    """Any plan of up to 8 ranks and anything it should honour."""
    ring, ulysses = draw(
        st.sampled_from([(1, 2), (2, 1), (3, 1), (1, 3), (4, 1), (2, 2), (8, 1), (4, 2), (2, 4), (1, 8)])
    )
    exchange, layout = draw(st.sampled_from(EXCHANGES)), draw(st.sampled_from(LAYOUTS))
    inner = draw(st.sampled_from([d for d in range(1, ring + 1) if ring % d == 0])) if exchange == "ring" else None
    plan = Plan(ring=ring, ulysses=ulysses, exchange=exchange, layout=layout, inner_ring=inner)
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(-(-ulysses // kv_heads), 4 + ulysses // kv_heads))
    tokens = draw(st.integers(2 * ring * ulysses, 70))
    rule = Mask(
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, tokens)),
        prefix=draw(st.just(0) | st.integers(1, 9)),
        allowed=draw(st.sampled_from([None, None, every_third])),
    )
    cuts = [sorted({0, tokens, *draw(st.sets(st.integers(1, tokens - 1), max_size=5))}) for _ in range(2)]
    documents = [[b - a for a, b in pairwise(cut)] for cut in cuts]
    options = {
        "widths": draw(st.sampled_from([(8, 8), (8, 4), (4, 8)])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "slopes": draw(st.booleans()),
        "sinks": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.25])),
        "layer": 1,
        "window": draw(st.none() | st.integers(1, tokens)),
    }
    return str(plan), (tokens, {"documents": documents}, rule, (heads, kv_heads), "fast", options)


@settings(max_examples=50)
@given(drawn())
def test_anything_drawn(pool: Pool, case: tuple[str, tuple[Any, ...]]) -> None:
    """Catches the combination that nobody thought of."""
    text, given_case = case
    world = Plan.parse(text).world_size
    assert pool.run(world, several, text, [given_case]) == [1] * world
