"""Elements that a tensor grid's linears send, against the closed forms and against each message counted."""

from collections.abc import Iterator, Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloom.geometry import Layout
from seqloom.plan import FAMILIES, Direction, ModelShape, Move, Plan, chunks, fit, read_config, shortest
from seqloom.planner import (
    Linear,
    Place,
    Tokens,
    layer_elements,
    layer_linears,
    linear_elements,
    local_heads,
    model_elements,
    places,
    tensor_bytes,
)

LLAMA_8B = ModelShape(
    family="llama",
    vocab=128_256,
    hidden=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    max_positions=131_072,
    intermediate=14_336,
)
TOKENS = 131_072


def total(sent: dict[str, dict[str, Fraction]]) -> Fraction:
    return sum((count for ways in sent.values() for count in ways.values()), Fraction())


def layout_of(plan: Plan, num_tokens: int) -> Layout:
    return Layout(plan.layout, num_tokens, plan.attention_ring, plan.attention_ulysses)


def one(plan: Plan, linear: Linear, num_tokens: int, place: Place, *, regather: bool) -> Fraction:
    """All that a rank sends in a linear on its own."""
    tokens = Tokens.of(plan, layout_of(plan, num_tokens), place)
    return total(linear_elements([linear], plan.tensor_grid, place.on_grid(plan), tokens, regather=regather))


M, K, N = 36 * 8, 72, 144
"""Sizes that squares and cubes of 2 and 3 divide."""


@pytest.mark.parametrize("depth", [None, 1, 2])
@pytest.mark.parametrize("q", [2, 3])
@pytest.mark.parametrize("regather", [True, False])
def test_2d_and_its_depth_in_closed_form(q: int, depth: int | None, regather: bool) -> None:
    """Catches a move counted once too often or over the wrong axis: MK, KN by gathering, MN where inputs stay."""
    kind, d = ("2d", 1) if depth is None else ("2.5d", depth)
    plan = Plan(tensor=d * q * q, tensor_kind=kind, depth=d)  # type: ignore[arg-type]
    times = 3 if regather else 2
    for place in places(plan):
        for direction in ("colwise", "rowwise"):
            moves = plan.tensor_grid.linear(direction, input_stays=False)  # type: ignore[arg-type]
            summa = one(plan, Linear(direction, K, N, moves), M, place, regather=regather)  # type: ignore[arg-type]
            assert summa == Fraction(times * (q - 1) * (M * K // d + K * N), q * q)
        stays = one(plan, Linear("rowwise", K, N, plan.tensor_grid.linear("rowwise")), M, place, regather=regather)
        assert stays == Fraction((q - 1) * (2 * M * N // d + times * K * N), q * q)


@pytest.mark.parametrize("q", [2, 3])
@pytest.mark.parametrize("direction", ["colwise", "rowwise"])
def test_3d_in_closed_form(q: int, direction: Direction) -> None:
    """Catches one of the three moves of a cube forgotten, or gathered again where it was kept."""
    plan = Plan(tensor=q**3, tensor_kind="3d")
    linear = Linear(direction, K, N, plan.tensor_grid.linear(direction))
    num_tokens = 72
    mk, kn, mn = num_tokens * K, K * N, num_tokens * N
    for place in places(plan):
        kept, again = (one(plan, linear, num_tokens, place, regather=regather) for regather in (False, True))
        assert kept == Fraction(2 * (q - 1) * (mk + kn + mn), q**3)
        assert again == Fraction((q - 1) * (3 * mk + 3 * kn + 2 * mn), q**3)


@pytest.mark.parametrize("t", [2, 4, 8])
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
@pytest.mark.parametrize("overlap", ["backward", "ring", "none"])
def test_1d_in_closed_form(t: int, family: str, overlap: str) -> None:
    """Catches q, k and v, or gate and up, that gather their input each for itself, and a schedule that sends more.

    With sequence parallelism 10 (t-1)/t N h a layer, 8 where the gathered input is kept; without it four all-reduces.
    """
    model = ModelShape(family=family, vocab=64, hidden=64, layers=2, heads=8, kv_heads=8, head_dim=8, max_positions=512)
    n = 64
    for text, times in (("", 10), ("regather=false", 8), ("sequence_parallel=false", 8)):
        plan = Plan.parse(f"tensor={t} tensor_overlap={overlap} {text}")
        for place in places(plan):
            found = layer_elements(plan, model, layout_of(plan, n), place)
            assert set(found) == {"tensor"} and total(found) == Fraction(times * (t - 1) * n * 64, t)


@pytest.mark.parametrize(
    ("text", "billions"),
    [
        ("tensor=8", 4.70),
        ("tensor=8 tensor_kind=2.5d depth=2", 0.83),
        ("tensor=8 tensor_kind=3d", 2.80),
    ],
)
def test_a_layer_of_llama_8b(text: str, billions: float) -> None:
    """Catches a linear of the layer forgotten: 8 ranks, 131,072 tokens, 10^9 elements forward and backward."""
    plan = Plan.parse(text)
    found = layer_elements(plan, LLAMA_8B, layout_of(plan, TOKENS), Place())
    assert round(float(total(found)) / 1e9, 2) == billions


def test_a_layer_of_llama_8b_as_summa() -> None:
    """Catches the advantage of leaving inputs where they are lost: 1.47 by SUMMA."""
    plan = Plan(tensor=8, tensor_kind="2.5d", depth=2)
    tokens = Tokens.of(plan, layout_of(plan, TOKENS), Place())
    summa = plan.tensor_grid.linear("rowwise", input_stays=False)
    found = Fraction()
    for linears in layer_linears(plan, LLAMA_8B):
        gathering = [
            linear
            if linear.direction == "colwise"
            else Linear("rowwise", linear.in_features, linear.out_features, summa)
            for linear in linears
        ]
        found += total(linear_elements(gathering, plan.tensor_grid, Place().on_grid(plan), tokens))
    assert round(float(found) / 1e9, 2) == 1.47


def test_a_wide_output_lets_the_input_move() -> None:
    """Catches a row-wise linear that moves the larger operand: an MLP narrower inside than two thirds of hidden."""
    narrow = ModelShape(
        family="llama", vocab=8, hidden=64, layers=1, heads=8, kv_heads=8, head_dim=8, max_positions=64, intermediate=16
    )
    plan = Plan(tensor=4, tensor_kind="2d")
    (down,) = layer_linears(plan, narrow)[-1]
    assert down.moves.x == Move("col", "hidden") and down.moves.y is None
    (back,) = layer_linears(plan, narrow)[1]
    assert back.moves.x is None and back.moves.y == Move("col", "hidden")


# --- every message counted --------------------------------------------------------------------------

PLANS = [
    "tensor=3",
    "tensor=4 sequence_parallel=false ring=2",
    "ring=2 tensor=6 tensor_kind=2d grid=3x2",
    "ulysses=2 tensor=6 tensor_kind=2d grid=2x3 tensor_tokens=ulysses",
    "tensor=12 tensor_kind=2.5d depth=2 grid=3x2",
    "tensor=8 tensor_kind=3d",
    "tensor=12 tensor_kind=3d grid=2x3x2",
    "tensor=6 tensor_kind=3d grid=3x2x1 layout=contiguous",
]


def messages(plan: Plan, linear: Linear, num_tokens: int, place: Place, *, again: bool) -> Iterator[tuple[str, int]]:
    """(axis, elements) of every message that a rank sends, from what each rank holds, peer by peer."""
    grid, layout = plan.tensor_grid, layout_of(plan, num_tokens)
    colwise = linear.direction == "colwise"
    source, target = (grid.outer, grid.inner) if colwise else (grid.inner, grid.outer)

    def tokens_on(side: object, where: Place) -> int:
        held = Tokens.of(plan, layout, where)
        return held.outer if side == grid.outer else held.inner

    def part(size: int, axes: Sequence[str], where: Place) -> int:
        for axis in axes:
            size = chunks(size, grid.axes[axis])[where.on_grid(plan)[axis]]
        return size

    def x(where: Place) -> int:
        return tokens_on(source, where) * part(linear.in_features, [source.hidden] if source.hidden else [], where)

    def w(where: Place) -> int:
        rows = part(linear.out_features, [a for a, d in linear.moves.shards.items() if d == 0], where)
        return rows * part(linear.in_features, [a for a, d in linear.moves.shards.items() if d == 1], where)

    def y(where: Place) -> int:
        return tokens_on(target, where) * part(linear.out_features, [target.hidden] if target.hidden else [], where)

    for move, held, gathers in ((linear.moves.x, x, True), (linear.moves.w, w, True), (linear.moves.y, y, False)):
        if move is None:
            continue
        peers = [place.moved(plan, move.axis, rank) for rank in range(grid.axes[move.axis])]
        others = [peer for peer in peers if peer != place]
        if move.dim == "whole":
            # Over the ranks of a line x [tokens, in] and y [tokens, out] are the same tensor, whole.
            whole = tokens_on(source, place) * (linear.in_features if gathers else linear.out_features)
            yield move.axis, Fraction(2 * len(others) * whole, len(peers))  # type: ignore[misc]
            continue
        mine = [(move.axis, held(place)) for _ in others]
        theirs = [(move.axis, held(peer)) for peer in others]
        yield from [*mine, *theirs, *(mine if gathers and again else [])]


@pytest.mark.parametrize("text", PLANS)
@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.data())
def test_any_sizes_are_the_sum_of_their_messages(
    text: str, more: int, width: int, out: int, regather: bool, data: st.DataObject
) -> None:
    """Catches sizes that are right only where everything divides: parts one longer, and parts of nothing."""
    plan = Plan.parse(text)
    num_tokens = shortest(plan) + more
    place = data.draw(st.sampled_from(list(places(plan))))
    direction: Direction = data.draw(st.sampled_from(["colwise", "rowwise"]))
    for stays in (True, False):
        linear = Linear(direction, width, out, plan.tensor_grid.linear(direction, input_stays=stays))
        expected = sum((count for _, count in messages(plan, linear, num_tokens, place, again=regather)), Fraction())
        assert one(plan, linear, num_tokens, place, regather=regather) == expected


@pytest.mark.parametrize("text", PLANS)
def test_what_is_sent_is_what_is_received(text: str) -> None:
    """Catches forward and backward exchanged: over all ranks, what gathers forward scatters as much backward."""
    plan = Plan.parse(f"{text} regather=false")
    model = ModelShape.from_config(fit(read_config("llama"), plan, 97))
    found = [layer_elements(plan, model, layout_of(plan, 97), place) for place in places(plan)]
    for axis in plan.tensor_grid.axes:
        ways = [sum(sent[axis][way] for sent in found) for way in ("forward", "backward")]
        assert ways[0] == ways[1]


def test_ring_steps_send_as_much_in_all() -> None:
    """Catches the ring schedule counted as if every rank sent its own block only: uneven, ranks differ, not sums."""
    plans = [Plan(tensor=3, tensor_overlap=overlap) for overlap in ("backward", "ring")]  # type: ignore[arg-type]
    model = ModelShape.from_config(fit(read_config("llama"), plans[0], 97))
    gathered, around = (
        [total(layer_elements(plan, model, layout_of(plan, 97), place)) for place in places(plan)] for plan in plans
    )
    assert gathered != around and sum(gathered) == sum(around)
    assert [sizes == sorted(sizes) for sizes in (gathered, around)] == [True, False]


def test_sequences_multiply_activations_and_no_weights() -> None:
    """Catches weights gathered once a row: they travel once, whatever the batch."""
    plan = Plan(tensor=8, tensor_kind="3d")
    model = ModelShape.from_config(fit(read_config("llama"), plan, 64))
    one, three = (
        layer_elements(plan, model, layout_of(plan, 64), Place(), sequences=sequences) for sequences in (1, 3)
    )
    assert three["weight"] == one["weight"] and one["weight"]["forward"] > 0
    assert {way: 3 * count for way, count in one["input"].items()} == three["input"]


def test_key_heads_that_do_not_divide() -> None:
    """Catches key/value weights counted in even parts where ranks hold them whole and work with the rows they read."""
    plan = Plan(tensor=9, tensor_kind="2d")
    model = ModelShape(family="llama", vocab=9, hidden=96, layers=1, heads=12, kv_heads=4, head_dim=8, max_positions=99)
    assert [local_heads(plan, model, rank) for rank in range(3)] == [(4, 4), (4, 2), (4, 4)]
    for rank, heads in enumerate((4, 2, 4)):
        place = Place(0, 0, rank)
        _, key, value = layer_linears(plan, model, rank)[0]
        assert key == value and key.rows == heads * 8 and key.moves.shards == {"row": 1, "col": None}
        tokens = Tokens.of(plan, layout_of(plan, 99), place)
        sent = linear_elements([key], plan.tensor_grid, place.on_grid(plan), tokens, regather=False)
        assert sent["row"] == {"forward": 2 * heads * 8 * 32, "backward": heads * 8 * 64}
    few = ModelShape(family="llama", vocab=9, hidden=96, layers=1, heads=12, kv_heads=2, head_dim=8, max_positions=99)
    assert [local_heads(plan, few, rank) for rank in range(3)] == [(4, 1), (4, 2), (4, 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_linears_of_its_layer(family: str) -> None:
    """Catches a linear left out or twice: the sizes of a layer's weights add up."""
    model = ModelShape.from_config(fit(read_config(family), Plan(tensor=2), 64))
    found = [linear for group in layer_linears(Plan(tensor=2), model) for linear in group]
    attention = model.hidden * 8 * (2 * model.heads + 2 * model.kv_heads)
    inside = 0 if model.experts else model.intermediate * (2 if family in ("bloom", "gpt2") else 3)
    if family.startswith("deepseek"):  # keys 6 + 4 wide, values 8; latents of 12 and 10
        attention = model.hidden * (12 + 10 + 4) + model.heads * (12 * (6 + 4) + 10 * (6 + 8) + 8 * model.hidden)
        inside = 3 * 24 * (2 if family == "deepseek_v2" else 1)
    assert sum(linear.in_features * linear.out_features for linear in found) == attention + model.hidden * inside


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model(tied: bool) -> None:
    """Catches the embedding or the head forgotten, or gathered again in a backward that has nothing left to gather."""
    shape = {"heads": 4, "kv_heads": 4, "head_dim": 8, "max_positions": 64, "intermediate": 48}
    model = ModelShape(family="llama", vocab=96, hidden=32, layers=3, tied=tied, **shape)  # type: ignore[arg-type]
    n, h, v = 48, 32, 96

    def ends(text: str) -> Fraction:
        plan = Plan.parse(text)
        layers = 3 * total(layer_elements(plan, model, layout_of(plan, n), Place()))
        return total(model_elements(plan, model, layout_of(plan, n), Place())) - layers

    # Rows scattered and their gradient gathered, hidden gathered and its gradient scattered: 4 (t-1)/t N h.
    assert ends("tensor=4") == ends("tensor=4 sequence_parallel=false") == Fraction(4 * 3 * n * h, 4)
    head = Fraction(2 * (n * h + h * v), 4)
    assert ends("tensor=4 tensor_kind=2d") == head + Fraction(2 * (n * h + tied * h * v), 4)
    # On a cube rows of the table are gathered, looked up for all tokens of `input` and scattered there.
    assert ends("tensor=8 tensor_kind=3d") == Fraction(2 * (n * h + h * v + n * v), 8) + Fraction(
        2 * (n * h + h * v), 8
    )


def test_bytes_are_elements_in_their_type() -> None:
    """Catches a place, a type or a batch that is not passed on, and thirds rounded up."""
    plan = Plan(tensor=3, sequence_parallel=False)
    model = ModelShape.from_config(fit(read_config("llama"), plan, 64))
    elements = layer_elements(plan, model, layout_of(plan, 64), Place(), sequences=2)["tensor"]
    sent = tensor_bytes(plan, model, 64, sequences=2, item_bytes=2)
    assert sent == {"tensor": {way: int(2 * count) for way, count in elements.items()}}
    plan = Plan(tensor=6, tensor_kind="2d", grid="3x2")
    model = ModelShape.from_config(fit(read_config("llama"), plan, 64))
    found = [tensor_bytes(plan, model, 65, place=place) for place in places(plan)]
    assert len({str(sent) for sent in found}) > 1


def test_one_rank_sends_nothing() -> None:
    """Catches axes of one rank that are said to carry something."""
    model = ModelShape.from_config(read_config("llama"))
    for text in ("ring=2", "tensor_kind=2d", "tensor=2 tensor_kind=2d grid=2x1", "tensor=2 tensor_kind=2d grid=1x2"):
        plan = Plan.parse(text)
        found = layer_elements(plan, model, layout_of(plan, 64), Place())
        busy = {axis for axis, ways in found.items() if any(ways.values())}
        assert busy == {axis for axis, size in plan.tensor_grid.axes.items() if size > 1}
