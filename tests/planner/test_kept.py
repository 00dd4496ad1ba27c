"""What recomputed layers keep, by formula; tests/model/test_recompute.py holds it against what is held."""

import pytest

from seqloom.geometry import Layout
from seqloom.plan import ModelShape, Plan
from seqloom.planner import Kept, kept_bytes

MODEL = ModelShape(family="llama", vocab=96, hidden=64, layers=2, heads=8, kv_heads=4, head_dim=8, max_positions=None)
S = 48


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("recompute=selective", (2 * S * 64, 2 * S * 64 + 4 * S * 8)),
        ("ring=2 recompute=selective", (S * 64, S * 64 + 2 * S * 8)),
        ("ulysses=2 recompute=selective", (S * 64, S * (64 + 64 + 64) + S * 64 + 2 * S * 8)),
        ("tensor=2 recompute=full", (S * 64, S * 64 + 2 * S * 8)),
        ("tensor=2 sequence_parallel=false recompute=full", (2 * S * 64, S * 64 + 2 * S * 8)),
        ("tensor=2 sequence_parallel=false recompute=full activations=partitioned", (S * 64, S * 64 + 2 * S * 8)),
        ("tensor=4 tensor_kind=2d recompute=full", (S * 32, S * 32 + S * 8)),
        ("ring=2 exchange=rsa recompute=selective", (S * 64, S * 64 + 2 * S * 8 + 2 * S * 8 * S)),
    ],
)
def test_by_hand(text: str, wanted: tuple[int, int]) -> None:
    """Catches tokens, heads or channels of all ranks counted for one, and what Ulysses brought forgotten."""
    plan = Plan.parse(text)
    layout = Layout("zigzag", S, plan.attention_ring, plan.attention_ulysses)
    assert kept_bytes(plan, MODEL, layout, item_bytes=2) == Kept(*wanted)
