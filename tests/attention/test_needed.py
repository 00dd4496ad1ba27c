"""What `exchange=needed` sends, against a count from the dense mask."""

import pytest
import torch

from attention.oracle import visible_pairs
from pool import Pool
from seqloom.attention import attention
from seqloom.fabric import Fabric
from seqloom.geometry import Layout, Mask
from seqloom.plan import Plan
from seqloom.sequence import Batch, shard_batch

HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 8, 6
TOKENS = 96
ROW = [TOKENS]
QUARTERS = [TOKENS // 4] * 4

CASES = {
    "causal": (Mask(), None),
    "full": (Mask(causal=False), None),
    "window": (Mask(window=9), None),
    "prefix": (Mask(window=5, prefix=3), None),
    "quarters": (Mask(), [QUARTERS, QUARTERS]),
    "rows that differ": (Mask(window=20), [[5, 60, TOKENS - 65], ROW]),
}


def batch_of(name: str) -> Batch:
    rule, documents = CASES[name]
    return Batch.from_tokens(torch.zeros(2, TOKENS, dtype=torch.int64), documents, rule=rule)


def sent(plan: Plan, name: str) -> tuple[int, int]:
    """Bytes of forward and of backward along the ring, in float32."""
    fabric = Fabric.build(plan)
    local, shard = shard_batch(batch_of(name), fabric)
    tokens = local.input_ids.shape[1]
    q, k, v = (
        torch.randn(2, h, tokens, d, requires_grad=True)
        for h, d in ((HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, VALUE_WIDTH))
    )
    fabric.meter.reset()
    out = attention(q, k, v, shard)
    forward = fabric.meter.sent.get("ring", 0)
    out.sum().backward()
    return forward, fabric.meter.sent.get("ring", 0) - forward


def seen_keys(plan: Plan, name: str) -> list[list[int]]:
    """[asking][holding]: how many of the holder's keys, over all rows, some query of the asker sees."""
    batch = batch_of(name)
    visible = [visible_pairs(batch, row, None) for row in range(2)]
    masks = tuple(batch.mask(row) for row in range(2))
    held = [
        [p for span in spans for p in range(*span)]
        for spans in Layout(plan.layout, TOKENS, plan.ring, masks=masks).ring_spans
    ]
    return [[int(sum(mask[a][:, b].any(0).sum() for mask in visible)) for b in held] for a in held]


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped", "balanced"])
@pytest.mark.parametrize("name", CASES)
def test_no_redundant_bytes(pool: Pool, name: str, layout: str) -> None:
    """Catches a key sent to a rank whose queries do not see it, one sent twice, or a gradient returned for it."""
    plan = Plan(ring=4, exchange="needed", layout=layout)
    seen = seen_keys(plan, name)
    a_key = KV_HEADS * (WIDTH + VALUE_WIDTH) * 4
    for rank, (forward, backward) in enumerate(pool.run(4, sent, plan, name)):
        given = sum(seen[peer][rank] for peer in range(4) if peer != rank)
        taken = sum(seen[rank][peer] for peer in range(4) if peer != rank)
        assert (forward, backward) == (a_key * given, a_key * (given + taken))


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_quarters_at_eight_ranks(pool: Pool, layout: str) -> None:
    """Catches whole blocks fetched for a few keys: documents of a quarter of the length, 8 ranks, against the ring."""
    needed = pool.run(8, sent, Plan(ring=8, exchange="needed", layout=layout), "quarters")
    ring = pool.run(8, sent, Plan(ring=8, layout=layout), "quarters")
    assert 0 < sum(map(sum, needed)) < 0.5 * sum(map(sum, ring))
