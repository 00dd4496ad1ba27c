"""Calls that follow each other in one process: other shapes, documents and plans; and ranks that see nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attention.oracle import dense_attention
from close import assert_close
from pool import Pool
from seqloom.attention import attention, specification
from seqloom.errors import DataError
from seqloom.fabric import Fabric
from seqloom.plan import Plan
from seqloom.sequence import Batch, shard_batch

FORMS = {"fast": attention, "specification": specification.attention}
Documents = list[list[int]] | None
HEADS, KV_HEADS, WIDTH = 8, 4, 8
TOLERANCE = 1e-12


def inputs(rows: int, tokens: int) -> list[Tensor]:
    """q, k, v and dout of the whole batch."""
    torch.manual_seed(rows * tokens)
    return [torch.randn(rows, h, tokens, WIDTH, dtype=torch.float64) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)]


def one_call(fabric: Fabric, rows: int, tokens: int, documents: Documents, form: str = "fast") -> list[Tensor]:
    """Compare out, dq, dk and dv of this rank with dense attention; raises where they part."""
    batch = Batch.from_tokens(torch.zeros(rows, tokens, dtype=torch.int64), documents)
    q, k, v, dout = inputs(rows, tokens)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = dense_attention(*whole, batch)
    expected.backward(dout)
    _, shard = shard_batch(batch, fabric)
    held = torch.tensor([p for span in shard.spans for p in range(*span)])
    mine = [x[:, :, held].clone().requires_grad_() for x in (q, k, v)]
    out = FORMS[form](*mine, shard)
    out.backward(dout[:, :, held])
    found = [out, *(x.grad for x in mine)]
    for actual, full in zip(found, [expected, *(x.grad for x in whole)], strict=True):
        assert_close(actual, full[:, :, held], tolerance=TOLERANCE, ranks=fabric.world.size)
    return [x.detach() for x in found]


def calls(text: str, shapes: list[tuple[int, int, Documents]], form: str = "fast") -> int:
    fabric = Fabric.build(Plan.parse(text))
    return sum(len(one_call(fabric, *shape, form)) for shape in shapes)


CHANGING: list[tuple[int, int, Documents]] = [
    (1, 64, [[20, 44]]),
    (2, 32, [[31, 1], [5, 27]]),  # as many tokens in all, in other rows
    (1, 64, [[44, 20]]),  # as at first, with other bounds
    (1, 64, None),
    (2, 32, None),
    (4, 16, [[16], [1, 15], [8, 8], [7, 2, 7]]),
    (1, 64, [[20, 44]]),
]


@pytest.mark.parametrize("text", ["ring=2", "ulysses=2", "ring=4 exchange=gather", "ring=2 ulysses=2 layout=striped"])
def test_shapes_change_from_call_to_call(pool: Pool, text: str) -> None:
    """Catches bounds or buffers kept from an earlier call and recognised by the number of tokens alone."""
    world = Plan.parse(text).world_size
    assert pool.run(world, calls, text, CHANGING) == [4 * len(CHANGING)] * world


STARVED: list[tuple[int, int, Documents]] = [
    # No query of a rank sees any key of some or of all other ranks.
    (1, 48, [[12, 12, 12, 12]]),
    (2, 48, [[6] * 8, [1] * 48]),
    (2, 48, [[48], [1] * 48]),  # one row of the two starves
    (1, 48, [[1, 46, 1]]),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "text",
    [
        "ring=4 layout=contiguous",
        "ring=4",
        "ring=3 layout=striped",
        "ring=4 layout=contiguous exchange=gather",
        "ring=2 ulysses=2 layout=contiguous",
    ],
)
def test_a_starved_rank(pool: Pool, text: str, form: str) -> None:
    """Catches a rank that skips its part of an exchange, or NaN, where its queries see nothing of a block."""
    world = Plan.parse(text).world_size
    assert pool.run(world, calls, text, STARVED, form) == [4 * len(STARVED)] * world


def interleaved() -> int:
    """Two fabrics used in turn, and backward of the first after forward of the second."""
    first, second = (
        Fabric.build(Plan(ring=2, ulysses=2)),
        Fabric.build(Plan(ring=4, layout="contiguous", exchange="gather")),
    )
    alone = [one_call(fabric, 2, 32, [[31, 1], [5, 27]]) for fabric in (first, second)]
    q, k, v, dout = inputs(2, 32)
    batch = Batch.from_tokens(torch.zeros(2, 32, dtype=torch.int64), [[31, 1], [5, 27]])
    runs = []
    for fabric in (first, second):
        _, shard = shard_batch(batch, fabric)
        held = torch.tensor([p for span in shard.spans for p in range(*span)])
        mine = [x[:, :, held].clone().requires_grad_() for x in (q, k, v)]
        runs.append((held, mine, attention(*mine, shard)))
    for (held, mine, out), expected in zip(runs, alone, strict=True):
        out.backward(dout[:, :, held])
        found = [out.detach(), *(x.grad for x in mine)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return len(runs)


def test_two_plans_in_one_process(pool: Pool) -> None:
    """Catches a group, a layout or a buffer that the second plan takes from the first."""
    assert pool.run(4, interleaved) == [2] * 4


def scaled(text: str) -> bool:
    """Another scale than the default, and an output gradient that is one number, expanded."""
    fabric = Fabric.build(Plan.parse(text))
    batch = Batch.from_tokens(torch.zeros(1, 24, dtype=torch.int64))
    q, k, v, _ = inputs(1, 24)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    dense_attention(*whole, batch, 0.7).sum().backward()
    _, shard = shard_batch(batch, fabric)
    held = torch.tensor([p for span in shard.spans for p in range(*span)])
    mine = [x[:, :, held].clone().requires_grad_() for x in (q, k, v)]
    attention(*mine, shard, scale=0.7).sum().backward()
    for part, full in zip(mine, whole, strict=True):
        assert_close(part.grad, full.grad[:, :, held], tolerance=TOLERANCE)
    return True


@pytest.mark.parametrize("text", ["data=1", "ring=3", "ring=2 ulysses=2 exchange=gather"])
def test_scale_and_expanded_gradients(pool: Pool, text: str) -> None:
    """Catches a scale forgotten in backward, and a gradient of stride 0 read as if it were laid out in memory."""
    assert all(pool.run(Plan.parse(text).world_size, scaled, text))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dropout": -0.1, "layer": 0}, "at least 0 and below 1"),
        ({"dropout": 1.0, "layer": 0}, "at least 0 and below 1"),
        ({"dropout": 0.5}, "give attention layer="),
        ({"softcap": 0.0}, "a number above 0"),
        ({"softcap": float("nan")}, "a number above 0"),
        ({"scale": 0.0}, "a number above 0"),
        ({"scale": torch.ones(())}, "not a learned one"),
        ({"slopes": torch.ones(1)}, r"slopes are \[1\], but the model has 8 query heads"),
        ({"sinks": torch.ones(9)}, r"sinks are \[9\], but the model has 8 query heads"),
        ({"slopes": torch.ones(HEADS, requires_grad=True)}, "get no gradient"),
        ({"window": 0}, "window of 0"),
    ],
)
def test_impossible_options(options: dict[str, Any], said: str) -> None:
    """Catches an option taken and ignored: a gradient lost, one number broadcast to all heads, coins drawn alike."""
    _, shard = shard_batch(Batch.from_tokens(torch.zeros(2, 8, dtype=torch.int64), first_row=0), Fabric.build(Plan()))
    with pytest.raises(DataError, match=said):
        attention(*inputs(2, 8)[:3], shard, **options)


def test_dropout_needs_the_row_numbers() -> None:
    """Catches a loop of one's own in which every step drops the same weights."""
    _, shard = shard_batch(Batch.from_tokens(torch.zeros(2, 8, dtype=torch.int64)), Fabric.build(Plan()))
    with pytest.raises(DataError, match="first_row="):
        attention(*inputs(2, 8)[:3], shard, dropout=0.5, layer=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q, k, v: (q, k[:, :, :-1], v), "k is "),
        (lambda q, k, v: (q[:1], k, v), "q is "),
        (lambda q, k, v: (q, k, v.float()), "v is "),
        (lambda q, k, v: (q, k[..., :4], v), "width 8 but k 4"),
        (lambda q, k, v: (q[:, :6], k, v), "do not fit ulysses=1"),
        (lambda q, k, v: (q, k, v[:, :2]), "do not fit ulysses=1"),
    ],
)
def test_tensors_that_the_shard_does_not_hold(change: Callable[..., tuple[Tensor, ...]], said: str) -> None:
    """Catches slices that clip: keys left out, or rows of zeros, where other tensors than the shard's come in."""
    _, shard = shard_batch(Batch.from_tokens(torch.zeros(2, 8, dtype=torch.int64)), Fabric.build(Plan()))
    q, k, v, _ = inputs(2, 8)
    assert attention(q, k, v, shard).shape == q.shape
    with pytest.raises(DataError, match=said):
        attention(*change(q, k, v), shard)
