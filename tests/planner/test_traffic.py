"""Bytes by formula, against published figures and against the terms written out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloom.plan import ModelShape, Plan
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


@given(
    st.integers(1, 8),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([(2, 4), (4, 4), (8, 8)]),
)
def test_the_hybrid_is_the_sum_of_its_messages(
    ring: int, ulysses: int, times: int, rows: int, sizes: tuple[int, int]
) -> None:
    """Catches a degree applied to the wrong factor where both are above 1: counted message by message."""
    item, wide = sizes
    num_tokens = 2 * ring * ulysses * times
    local = num_tokens // (ring * ulysses)
    # Ulysses: to each peer, its heads of my tokens (q, k, v), and back my heads of its tokens.
    heads_to_peer = LLAMA_8B.heads // ulysses + 2 * (LLAMA_8B.kv_heads // ulysses)
    to_peer = rows * local * heads_to_peer * 128
    back = rows * local * (LLAMA_8B.heads // ulysses) * 128
    ulysses_items = (ulysses - 1) * (to_peer + back)
    # Ring: each step sends one block of keys and one of values of the group's tokens and this rank's heads.
    block = 2 * rows * local * ulysses * (LLAMA_8B.kv_heads // ulysses) * 128
    ring_items = (ring - 1) * block
    plan = Plan(data=3, ring=ring, ulysses=ulysses)
    sent = attention_bytes(plan, LLAMA_8B, num_tokens, rows=rows, item_bytes=item, accumulate_bytes=wide)
    assert sent == {
        "ring": {"forward": ring_items * item, "backward": ring_items * (item + wide)},
        "ulysses": {"forward": ulysses_items * item, "backward": ulysses_items * item},
    }


def test_all_reduce_bytes() -> None:
    """Catches an all-reduce counted as one pass: a reduce-scatter and an all-gather, nothing for one rank."""
    assert [all_reduce_bytes(1200, degree) for degree in (1, 2, 3, 4)] == [0, 1200, 1600, 1800]
