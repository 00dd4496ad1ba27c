"""Bytes by formula, against published figures and against the terms written out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloom.geometry import Layout, Mask
from seqloom.plan import ModelShape, Plan, shortest
from seqloom.planner import all_reduce_bytes, attention_bytes

MIB = 2**20
TOKENS = 131_072
LLAMA_8B = ModelShape(
    family="llama",
    vocab=128_256,
    hidden=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    max_positions=TOKENS,
)


@pytest.mark.parametrize(
    ("ring", "forward", "backward"), [(2, 256, 768), (4, 384, 1152), (8, 448, 1344), (16, 480, 1440), (32, 496, 1488)]
)
def test_ring_bytes_of_llama_8b(ring: int, forward: int, backward: int) -> None:
    """Catches P sends where P - 1 do, query heads sent for key/value heads, and a gradient not counted in float32.

    MiB per layer and rank, 131,072 tokens in bfloat16. Backward: keys and values again, and dK, dV at twice the width.
    """
    sent = attention_bytes(Plan(ring=ring), LLAMA_8B, TOKENS, item_bytes=2)
    assert sent["ring"] == {"forward": forward * MIB, "backward": backward * MIB}
    assert sent["ulysses"] == {"forward": 0, "backward": 0}


@pytest.mark.parametrize(("ulysses", "each_way"), [(2, 640), (4, 480), (8, 280)])
def test_ulysses_bytes_of_llama_8b(ulysses: int, each_way: int) -> None:
    """Catches the part a rank keeps counted as sent, or one of q, k, v and the output forgotten."""
    sent = attention_bytes(Plan(ulysses=ulysses), LLAMA_8B, TOKENS, item_bytes=2)
    assert sent["ulysses"] == {"forward": each_way * MIB, "backward": each_way * MIB}
    assert sent["ring"] == {"forward": 0, "backward": 0}


WIDTH, VALUE_WIDTH = 5, 3


@st.composite
def cases(draw: st.DrawFn) -> tuple[Plan, ModelShape, int, tuple[Mask, ...]]:
    """A plan of any exchange, heads and a length that it does not divide, and rows of packed documents."""
    ring = draw(st.sampled_from([1, 2, 3, 4, 6]))
    exchange = draw(st.sampled_from(["ring", "gather", "needed", "rsa"]))
    inner = draw(st.sampled_from([None, *(d for d in range(1, ring + 1) if ring % d == 0)]))
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    plan = Plan(
        ring=ring,
        ulysses=draw(st.integers(1, min(4, kv_heads * group))),
        exchange=exchange,  # type: ignore[arg-type]
        inner_ring=inner if exchange == "ring" else None,
        layout=draw(st.sampled_from(["zigzag", "contiguous", "striped", "balanced"])),
    )
    num_tokens = draw(st.integers(shortest(plan), shortest(plan) + 40))
    cuts = st.lists(st.integers(1, num_tokens), max_size=3).map(lambda ends: sorted({*ends, num_tokens}))
    masks = [
        Mask(documents=tuple(stop - start for start, stop in pairwise([0, *ends])))
        for ends in draw(st.lists(cuts, min_size=1, max_size=3))
    ]
    shape = replace(LLAMA_8B, heads=kv_heads * group, kv_heads=kv_heads, head_dim=WIDTH)
    return plan, shape, num_tokens, tuple(masks)


def hops_around(sizes: list[int]) -> Counter[int]:
    """Tokens each rank sends while every block visits every rank, hop by hop."""
    ranks, sent = len(sizes), Counter[int]()
    for owner, size in enumerate(sizes):
        for hop in range(ranks - 1):
            sent[(owner + hop) % ranks] += size
    return sent


def hops_home(sizes: list[int]) -> Counter[int]:
    """Tokens each rank sends while gradients go from the first stop of each block to its owner."""
    ranks, sent = len(sizes), Counter[int]()
    for owner, size in enumerate(sizes):
        for stop in range(1, ranks):
            sent[(owner + stop) % ranks] += size
    return sent


def ring_tokens_sent(plan: Plan, spans: Any, masks: Sequence[Mask], rank: int) -> dict[str, tuple[int, int]]:
    """Tokens of blocks and of gradients that a rank sends by axis, message by message or pair by pair."""
    held = [sum(span.size for span in part) for part in spans]
    rows, others = len(masks), [part for part in range(plan.ring) if part != rank]
    if plan.exchange == "gather":
        return {"ring": (rows * sum(held[rank] for _ in others), rows * sum(held[other] for other in others))}
    if plan.exchange == "needed":
        places = [[position for span in part for position in range(*span)] for part in spans]

        def seen(queries: int, keys: int) -> int:
            return sum(any(mask.visible(q, k) for q in places[queries]) for mask in masks for k in places[keys])

        return {"ring": (sum(seen(x, rank) for x in others), sum(seen(rank, x) for x in others))}
    outer, inner = plan.rings
    if outer == 1:
        return {"ring": (rows * hops_around(held)[rank], rows * hops_home(held)[rank])}
    mine, place = divmod(rank, inner)
    column = [held[o * inner + place] for o in range(outer)]
    row_of = [held[o * inner : (o + 1) * inner] for o in range(outer)]  # each visits these neighbours in turn
    return {
        "outer_ring": (rows * hops_around(column)[mine], rows * hops_home(column)[mine]),
        "inner_ring": (
            rows * sum(hops_around(row)[place] for row in row_of),
            rows * sum(hops_home(row)[place] for row in row_of),
        ),
    }


def ulysses_elements_sent(shape: ModelShape, sizes: list[int], mine: int) -> tuple[int, int]:
    """Elements a member sends forward and backward, head by head and peer by peer."""
    parts, group = len(sizes), shape.heads // shape.kv_heads
    queries = [
        [h for h in range(shape.heads) if p * shape.heads // parts <= h < (p + 1) * shape.heads // parts]
        for p in range(parts)
    ]
    keys = [sorted({head // group for head in part}) for part in queries]
    to_heads = [
        [sizes[a] * (len(queries[b]) * WIDTH + len(keys[b]) * (WIDTH + VALUE_WIDTH)) for b in range(parts)]
        for a in range(parts)
    ]
    to_tokens = [[sizes[b] * len(queries[a]) * VALUE_WIDTH for b in range(parts)] for a in range(parts)]
    peers = [peer for peer in range(parts) if peer != mine]
    forward = sum(to_heads[mine][peer] + to_tokens[mine][peer] for peer in peers)
    backward = sum(to_heads[peer][mine] + to_tokens[peer][mine] for peer in peers)  # the same messages, turned round
    return forward, backward


@given(cases(), st.sampled_from([(2, 4), (4, 4), (8, 8)]), st.data())
def test_any_split_is_the_sum_of_its_messages(
    case: tuple[Plan, ModelShape, int, tuple[Mask, ...]], sizes: tuple[int, int], data: st.DataObject
) -> None:
    """Catches a hop too many, a block counted at the wrong rank, and heads, rows or widths at the wrong factor."""
    plan, shape, num_tokens, masks = case
    item, wide = sizes
    rank, member = data.draw(st.integers(0, plan.ring - 1)), data.draw(st.integers(0, plan.ulysses - 1))
    spans = Layout(plan.layout, num_tokens, plan.ring, plan.ulysses, masks).ring_spans
    found = attention_bytes(
        plan,
        shape,
        num_tokens,
        ring_rank=rank,
        ulysses_rank=member,
        masks=masks,
        item_bytes=item,
        accumulate_bytes=wide,
        value_dim=VALUE_WIDTH,
    )
    group, first = shape.heads // shape.kv_heads, member * shape.heads // plan.ulysses
    heads = {head // group for head in range(first, (member + 1) * shape.heads // plan.ulysses)}
    width = len(heads) * (WIDTH + VALUE_WIDTH)
    expected = {
        axis: {"forward": blocks * width * item, "backward": blocks * width * item + gradients * width * wide}
        for axis, (blocks, gradients) in ring_tokens_sent(plan, spans, masks, rank).items()
    }
    held = sum(span.size for span in spans[rank])
    members = [(m + 1) * held // plan.ulysses - m * held // plan.ulysses for m in range(plan.ulysses)]
    forward, backward = ulysses_elements_sent(shape, members, member)
    expected["ulysses"] = {"forward": len(masks) * forward * item, "backward": len(masks) * backward * item}
    assert found == expected


@given(cases())
def test_what_is_sent_is_what_is_received(case: tuple[Plan, ModelShape, int, tuple[Mask, ...]]) -> None:
    """Catches a formula for one rank that is not the others': gradients come home as often as blocks leave."""
    plan, shape, num_tokens, masks = case
    everyone = [attention_bytes(plan, shape, num_tokens, ring_rank=r, masks=masks) for r in range(plan.ring)]
    for axis in everyone[0].keys() - {"ulysses"}:
        blocks = sum(sent[axis]["forward"] for sent in everyone)
        assert sum(sent[axis]["backward"] for sent in everyone) == 2 * blocks


def test_needed_sends_less_than_half_of_the_ring_for_short_documents() -> None:
    """Catches whole blocks fetched for a part of them: documents of a quarter of the length, over eight ranks."""
    masks = (Mask(documents=(16_384,) * 4),)
    sent = {
        exchange: sum(
            attention_bytes(Plan(ring=8, exchange=exchange), LLAMA_8B, 65_536, ring_rank=rank, masks=masks)["ring"][way]
            for rank in range(8)
            for way in ("forward", "backward")
        )
        for exchange in ("ring", "needed", "gather", "rsa")
    }  # type: ignore[arg-type]
    assert sent["needed"] < sent["ring"] / 2
    assert sent["ring"] == sent["gather"] == sent["rsa"]


def test_an_inner_ring_sends_as_much_but_less_of_it_across() -> None:
    """Catches a double ring that costs more: of 7 hops one crosses from node to node."""
    plain = attention_bytes(Plan(ring=8), LLAMA_8B, TOKENS)["ring"]
    double = attention_bytes(Plan(ring=8, inner_ring=4), LLAMA_8B, TOKENS)
    for way in ("forward", "backward"):
        assert double["outer_ring"][way] * 7 == plain[way]
        assert double["outer_ring"][way] + double["inner_ring"][way] == plain[way]


def test_a_key_head_goes_only_where_it_is_read() -> None:
    """Catches key/value heads repeated to all: 8 of them over 16 ranks go to 2 ranks each."""
    sent = attention_bytes(Plan(ulysses=16), LLAMA_8B, TOKENS, item_bytes=2)["ulysses"]
    mine = TOKENS // 16
    assert sent["forward"] == sent["backward"] == 15 * mine * 128 * (2 + 1 + 1 + 2) * 2


def test_all_reduce_bytes() -> None:
    """Catches an all-reduce counted as one pass: a reduce-scatter and an all-gather, nothing for one rank."""
    assert [all_reduce_bytes(1200, degree) for degree in (1, 2, 3, 4)] == [0, 1200, 1600, 1800]
