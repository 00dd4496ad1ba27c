"""Split attention against dense attention on one device, outputs and gradients."""

from itertools import product

import pytest
import torch
from torch import Tensor

from attention.oracle import dense_attention
from close import assert_close
from pool import Pool
from seqloom.attention import attention, specification
from seqloom.fabric import Fabric
from seqloom.plan import Plan
from seqloom.sequence import Batch, shard_batch


def global_inputs(rows: int, heads: int, kv_heads: int, tokens: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, the same on every rank."""
    torch.manual_seed(tokens)
    shapes = [heads, kv_heads, kv_heads, heads]
    return [torch.randn(rows, h, tokens, width, dtype=torch.float64).to(dtype) for h in shapes]


def split_run(
    plan: Plan, documents: list[list[int]] | None, rows: int, heads: int, kv_heads: int, tokens: int, form: str
) -> bool:
    """Hold out, dq, dk, dv of this rank's tokens against dense attention; raises where they part."""
    fabric = Fabric.build(plan)
    batch = Batch.from_tokens(torch.zeros(rows, tokens, dtype=torch.int64), documents)
    q, k, v, dout = global_inputs(rows, heads, kv_heads, tokens, 8, torch.float64)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = dense_attention(*whole, batch)
    expected.backward(dout)
    _, shard = shard_batch(batch, fabric)
    held = torch.tensor([p for span in shard.spans for p in range(*span)])
    mine = [x[:, :, held].clone().requires_grad_() for x in (q, k, v)]
    forms = {"fast": attention, "specification": specification.attention}
    out = forms[form](*mine, shard)
    out.backward(dout[:, :, held])
    pairs = [(out, expected), *((part.grad, full.grad) for part, full in zip(mine, whole, strict=True))]
    for part, full in pairs:
        assert_close(part, full[:, :, held], tolerance=1e-13, ranks=plan.world_size)
    return True


PLANS = [
    *(
        f"ring={ring} ulysses={ulysses} layout={layout} exchange={exchange}"
        for (ring, ulysses), layout, exchange in product(
            [(1, 1), (2, 1), (1, 2), (3, 1), (2, 2)], ["zigzag", "contiguous", "striped"], ["ring", "gather"]
        )
    ),
    "ring=4 ulysses=2",
    "ring=2 ulysses=4 exchange=gather",
    "ring=8 layout=striped",
    "ulysses=8",
]


@pytest.mark.parametrize("form", ["fast", "specification"])
@pytest.mark.parametrize("text", PLANS)
def test_equals_dense(pool: Pool, text: str, form: str) -> None:
    """Catches a block met twice or never, a diagonal off by one, a document seen from outside, a gradient sent to
    the wrong owner, or a group head paired with a wrong key head."""
    plan = Plan.parse(text)
    for documents in (None, [[48], [1, 16, 5, 26]], [[7, 1, 1, 39], [40, 8]]):
        heads = (8, 8) if plan.ulysses == 8 else (8, 4)
        assert all(pool.run(plan.world_size, split_run, plan, documents, 2, *heads, 48, form)), documents
