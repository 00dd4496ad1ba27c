"""Every plan computes what one device computes: the long tables, and a part of them for every day.

The first table is every data x ring x ulysses in worlds 1, 2, 3, 4, 6 and 8, every layout and exchange, every inner
ring, for five families; each entry runs one and two sequences a data rank of an odd length, whole and packed with
documents cut at awkward places, under a causal mask and under a full one with a window and a prefix. The second is
every tensor grid of at most 8 ranks, alone and beside data, ring and ulysses, for seven families.
"""

from dataclasses import replace
from itertools import pairwise, product
from math import prod

import pytest

from pool import Pool
from seqloom.geometry import Mask
from seqloom.plan import Plan, fit, read_config
from seqloom.verify import Case, Verdict, verify_here

WORLDS = (1, 2, 3, 4, 6, 8)
FAMILIES = ("llama", "qwen2", "gemma2", "bloom", "gpt_oss")
TOLERANCE = 1e-9


def degrees(world: int) -> list[tuple[int, int, int]]:
    """Every (data, ring, ulysses) whose product is `world`."""
    return [t for t in product(range(1, world + 1), repeat=3) if t[0] * t[1] * t[2] == world]


LAYOUTS = ("zigzag", "contiguous", "striped", "balanced")


def exchanges(ring: int) -> list[tuple[str, int | None]]:
    """Every exchange, and the ring also as a double ring of every inner degree; of one rank, one."""
    if ring == 1:
        return [("ring", None)]
    inner = [degree for degree in range(2, ring) if ring % degree == 0]
    return [("gather", None), ("needed", None), ("rsa", None), ("ring", None), *(("ring", degree) for degree in inner)]


WHOLE = [
    Plan(data=data, ring=ring, ulysses=ulysses, layout=layout, exchange=exchange, inner_ring=inner)
    for world in WORLDS
    for data, ring, ulysses in degrees(world)
    for layout, (exchange, inner) in product(LAYOUTS if ring > 1 else LAYOUTS[:1], exchanges(ring))
]

PART = [
    "data=1",
    "ring=2",
    "ulysses=2 layout=striped",
    "data=3",
    "ring=3 exchange=gather",
    "ulysses=3 exchange=gather",
    "ring=2 ulysses=2 layout=contiguous exchange=gather",
    "data=2 ring=2 layout=striped exchange=gather",
    "ring=3 ulysses=2 layout=striped",
    "data=2 ulysses=3",
    "ring=2 ulysses=4",
    "data=2 ring=2 ulysses=2 layout=contiguous",
    "ring=3 exchange=needed layout=balanced",
    "ring=4 inner_ring=2",
    "ring=3 ulysses=2 exchange=rsa",
    "ring=2 ulysses=3 exchange=needed",
]
WIDE = Mask(causal=False, window=13, prefix=3)


def awkward(num_tokens: int, plan: Plan) -> tuple[int, ...]:
    """Document lengths with cuts beside the borders of shards rather than on them, and single tokens."""
    local = num_tokens // (plan.world_size // plan.data)
    cuts = {1, local - 1, local + 1, num_tokens // 2 + 1, num_tokens - 2, num_tokens - 1} & set(range(1, num_tokens))
    bounds = [0, *sorted(cuts), num_tokens]
    return tuple(stop - start for start, stop in pairwise(bounds))


def cases(plan: Plan, family: str) -> list[Case]:
    """The entry of one plan: batch 1 and 2, whole and packed, causal and not, at a prime length."""
    num_tokens = 47
    config = fit(read_config(family), plan, num_tokens)
    packed = awkward(num_tokens, plan)
    return [
        Case(config=config, plan=plan, num_tokens=num_tokens, batch=batch, documents=documents, rule=rule)
        for batch, documents, rule in (
            (1, None, Mask()),
            (1, packed, Mask()),
            (2, None, WIDE),
            (2, packed, WIDE),
        )
    ]


IN_LINE = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "bloom", "gpt2")
ON_A_GRID = IN_LINE[:5]
LINES = [
    Plan(tensor=tensor, sequence_parallel=sequence_parallel, tensor_overlap=overlap, regather=regather)
    for tensor in (2, 3, 4)
    for sequence_parallel in (True, False)
    for overlap, regather in (("backward", True), ("backward", False), ("ring", True), ("none", True))
]
SQUARE = {"2d": ("2x2",), "2.5d": ("2x2",), "3d": ("2x2x2",)}
RECTANGULAR = {"2d": ("3x2", "2x3", "4x2", "2x1", "1x3"), "2.5d": ("2x1", "1x2"), "3d": ("2x2x1", "3x2x1", "1x2x2")}
GRIDS = [
    Plan(
        tensor=prod(map(int, grid.split("x"))) * depth,
        tensor_kind=kind,
        depth=depth,
        grid=grid,
        tensor_tokens=tokens,
        regather=regather,
    )
    for shapes in (SQUARE, RECTANGULAR)
    for kind, grids in shapes.items()
    for grid in grids
    for depth in ((2,) if kind == "2.5d" else (1,))
    for tokens, regather in (("ring", True), ("ulysses", False))
]


def beside(plan: Plan) -> list[Plan]:
    """The plan alone, and with every data x ring x ulysses that makes at most 8 ranks."""
    room = 8 // plan.tensor
    return [
        replace(plan, data=data, ring=ring, ulysses=ulysses)
        for data, ring, ulysses in product(range(1, room + 1), repeat=3)
        if data * ring * ulysses <= room
    ]


TENSOR_WHOLE = [
    (plan, family)
    for plans, families in ((LINES, IN_LINE), (GRIDS, ON_A_GRID))
    for alone in plans
    for plan in beside(alone)
    for family in families
]

TENSOR_PART = [
    ("llama", "tensor=2"),
    ("qwen3", "tensor=3 sequence_parallel=false"),
    ("bloom", "tensor=4 tensor_overlap=ring"),
    ("gpt2", "tensor=2 data=2 ring=2"),
    ("gemma2", "tensor=2 ulysses=3 regather=false"),
    ("llama", "tensor=4 tensor_kind=2d"),
    ("qwen2", "tensor=6 tensor_kind=2d grid=3x2"),
    ("qwen3", "tensor=4 tensor_kind=2d ring=2"),
    ("mistral", "tensor=8 tensor_kind=2.5d depth=2 tensor_tokens=ulysses"),
    ("llama", "tensor=8 tensor_kind=3d"),
]


def verify_each(each: list[Case]) -> list[Verdict]:
    """What a rank does."""
    return [verify_here(case) for case in each]


def assert_equal(pool: Pool, each: list[Case]) -> None:
    """Run the cases and hold every rank's verdict to the tolerance, not only to the verdict's own."""
    for verdicts in pool.run(each[0].plan.world_size, verify_each, each, timeout_seconds=240):
        assert len(verdicts) == len(each)
        for case, verdict in zip(each, verdicts, strict=True):
            errors = (
                verdict.loss_error,
                verdict.gradient_norm_error,
                verdict.worst_gradient_error,
                verdict.parameter_error,
            )
            assert verdict.equal and all(0 <= error <= TOLERANCE for error in errors), (case, verdict)


def test_the_table_is_whole() -> None:
    """Catches a table that lost entries, and cuts that fall on the borders of shards only."""
    assert len(WHOLE) == 16 + 4 * (16 * 4 + 7) and {plan.world_size for plan in WHOLE} == set(WORLDS)
    assert {Plan.parse(text).world_size for text in PART} == set(WORLDS)
    for plan in WHOLE:
        for case in cases(plan, "llama"):
            case.check()
            assert case.documents is None or (min(case.documents) == 1 and len(case.documents) >= 5), case


@pytest.mark.parametrize(
    ("text", "family"),
    [(text, family) for i, text in enumerate(PART) for family in ("llama", FAMILIES[1 + i % 4])],
)
def test_part(pool: Pool, text: str, family: str) -> None:
    """Any loss, norm or gradient that depends on the plan."""
    single, *_, packed = cases(Plan.parse(text), family)
    assert_equal(pool, [single, packed] if packed.plan.world_size < 8 else [packed])


def test_the_tensor_table_is_whole() -> None:
    """Catches a table that lost grids, and entries that are refused rather than run."""
    assert len(LINES) == 24 and len(GRIDS) == 26 and {plan.world_size for plan, _ in TENSOR_WHOLE} == {2, 3, 4, 6, 8}
    assert {Plan.parse(text).world_size for _, text in TENSOR_PART} == {2, 3, 4, 6, 8}
    assert {Plan.parse(text).tensor_kind for _, text in TENSOR_PART} == {"1d", "2d", "2.5d", "3d"}
    assert {family for family, _ in TENSOR_PART} == set(IN_LINE)
    for plan, family in TENSOR_WHOLE:
        for case in cases(plan, family)[:1]:
            case.check()


@pytest.mark.parametrize(("family", "text"), TENSOR_PART)
def test_tensor_part(pool: Pool, family: str, text: str) -> None:
    """Any loss, norm or gradient that depends on the tensor grid."""
    *_, packed = cases(Plan.parse(text), family)
    assert_equal(pool, [packed])


def several_steps(plan: Plan, family: str) -> list[Case]:
    """Two optimizer steps of two packed micro-batches each."""
    packed = cases(plan, family)[1]
    return [
        Case(
            config=packed.config,
            plan=plan,
            num_tokens=packed.num_tokens,
            documents=packed.documents,
            steps=2,
            accumulate=2,
        )
    ]


@pytest.mark.parametrize(
    "text", ["ring=2 ulysses=2", "data=3", "data=2 ring=2 exchange=gather", "tensor=2", "tensor=4 tensor_kind=2d"]
)
def test_part_of_several_steps(pool: Pool, text: str) -> None:
    """A micro-batch weighed by its own labels, gradients kept from the step before, or replicas that drift apart."""
    assert_equal(pool, several_steps(Plan.parse(text), "llama"))


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", WHOLE, ids=str)
def test_whole(pool: Pool, plan: Plan, family: str) -> None:
    """Any loss, norm or gradient that depends on the plan: the whole table, an entry of 4 cases each."""
    assert_equal(pool, cases(plan, family))


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "plan", [plan for plan in WHOLE if (plan.layout, plan.exchange) == ("zigzag", "ring")], ids=str
)
def test_whole_of_several_steps(pool: Pool, plan: Plan, family: str) -> None:
    """Parameters that part from one device's after two steps of two micro-batches, for every split of every world."""
    assert_equal(pool, several_steps(plan, family))


@pytest.mark.sweep
@pytest.mark.parametrize(("plan", "family"), TENSOR_WHOLE, ids=str)
def test_tensor_whole(pool: Pool, plan: Plan, family: str) -> None:
    """Any loss, norm or gradient that depends on the tensor grid: the whole table, an entry of 5 cases each."""
    assert_equal(pool, [*cases(plan, family), *several_steps(plan, family)])
