"""Shards: every token, label and position goes to exactly one rank, and all ranks agree on the batch."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from pool import Pool
from seqloom.errors import DataError, PlanError, SeqloomError
from seqloom.fabric import Fabric
from seqloom.geometry import Mask
from seqloom.plan import Plan, shortest
from seqloom.sequence import NO_LABEL, Batch, shard_batch

Documents = list[list[int]] | None
SPLITS = [
    "data=1",
    "data=3",
    "ring=3",
    "ulysses=3",
    "ring=3 ulysses=2",
    "data=2 ring=2 ulysses=2",
    "data=2 ring=4",
    "ring=2 ulysses=4",
]
LAYOUTS = ("zigzag", "contiguous", "striped", "balanced")
TEXTS = [f"{text} layout={layout}" for text, layout in product(SPLITS, LAYOUTS)]


def batch_for(plan: Plan) -> Batch:
    """Two rows a data rank, of a length that nothing divides; every token tells its row and place, and every row has
    its own documents."""
    rows, length = 2 * plan.data, 3 * shortest(plan) + 1
    tokens = torch.arange(rows * length).view(rows, length) + 1000
    return Batch.from_tokens(
        tokens, [[row + 1, length - row - 1 - 1, 1] if length > row + 2 else [length] for row in range(rows)]
    )


def take(text: str) -> tuple[int, list[Tensor], int, list[int], int]:
    fabric = Fabric.build(Plan.parse(text))
    local, shard = shard_batch(batch_for(fabric.plan), fabric)
    inputs = local.inputs
    assert set(inputs) == {"input_ids", "position_ids", "use_cache"} and inputs["use_cache"] is False
    assert inputs["input_ids"] is local.input_ids and inputs["position_ids"] is local.position_ids
    held = [p for span in shard.spans for p in range(*span)]
    return (
        fabric.data.rank,
        [local.input_ids, local.position_ids, local.labels],
        local.label_count,
        held,
        len(shard.masks),
    )


@pytest.mark.parametrize("text", TEXTS)
def test_parts_make_the_batch(pool: Pool, text: str) -> None:
    """Catches a token lost, held twice, or parted from its label or position; and labels lost at shard borders."""
    plan = Plan.parse(text)
    batch = batch_for(plan)
    columns = [batch.tokens, batch.positions(), batch.labels]
    seen = torch.zeros_like(batch.tokens)
    for data_rank, parts, label_count, held, masks in pool.run(plan.world_size, take, text):
        first = data_rank * 2
        assert label_count == batch.label_count > 0 and masks == 2
        assert held
        for part, whole in zip(parts, columns, strict=True):
            assert torch.equal(part, whole[first : first + 2, held])
            assert part.is_contiguous() and part.dtype == torch.int64
        seen[first : first + 2, held] += 1
    assert torch.equal(seen, torch.ones_like(seen))


def differing(what: str) -> None:
    fabric = Fabric.build(Plan(ring=3))
    tokens, documents = torch.arange(12)[None], [[5, 7]]
    labels = Batch.from_tokens(tokens, documents).labels
    if fabric.rank == 1:
        if what == "tokens":
            tokens = tokens + (tokens == 4)
        if what == "labels":
            labels = labels.clone()
            labels[0, 3] = NO_LABEL
        if what == "documents":
            documents = [[4, 8]]
    fields = {
        "allowed": {"rule": Mask(allowed=lambda q, k: q - k < 5)},
        "rule": {"rule": Mask(window=3)},
        "seed": {"seed": 1},
        "first row": {"first_row": 1},
    }
    given = fields.get(what, {}) if fabric.rank == 1 else {}
    if what == "allowed" and fabric.rank != 1:
        given = {"rule": Mask(allowed=lambda q, k: q - k < 4)}
    windows = (4,) if what == "windows" and fabric.rank == 1 else (None,)
    shard_batch(Batch(tokens, labels, tuple(map(tuple, documents)), **given), fabric, windows=windows)


def differing_seen(what: str) -> str:
    try:
        differing(what)
    except SeqloomError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize("what", ["tokens", "labels", "documents", "rule", "allowed", "windows", "seed", "first row"])
def test_ranks_with_different_batches(pool: Pool, what: str) -> None:
    """Catches sequences mixed in attention because one rank's data order differs; every rank must hear of it."""
    said = pool.run(3, differing_seen, what)
    assert len(set(said)) == 1
    assert said[0].startswith("DataError: The ranks were given different batches")
    assert pool.run(3, differing_seen, "nothing") == ["accepted"] * 3


def differing_shapes(rows_of_rank: list[int], length_of_rank: list[int]) -> str:
    fabric = Fabric.build(Plan(ring=2, layout="contiguous"))
    rows, length = rows_of_rank[fabric.rank], length_of_rank[fabric.rank]
    try:
        shard_batch(Batch.from_tokens(torch.zeros(rows, length, dtype=torch.int64)), fabric)
    except SeqloomError as error:
        return type(error).__name__
    return "accepted"


@pytest.mark.parametrize(
    ("rows", "lengths", "expected"),
    [
        ([1, 1], [8, 16], ["DataError"] * 2),
        ([1, 2], [16, 8], ["DataError"] * 2),  # the same bytes in another shape
        ([2, 2], [8, 8], ["accepted"] * 2),
    ],
)
def test_ranks_with_different_shapes(pool: Pool, rows: list[int], lengths: list[int], expected: list[str]) -> None:
    """Catches batches of other shapes that hash alike: a hang in attention instead of a sentence."""
    assert pool.run(2, differing_shapes, rows, lengths) == expected


def shard_rows(text: str, rows: int, length: int) -> None:
    shard_batch(Batch.from_tokens(torch.zeros(rows, length, dtype=torch.int64)), Fabric.build(Plan.parse(text)))


def test_what_does_not_split(pool: Pool) -> None:
    """Catches a token or a row dropped to make a batch fit, and a second reason that shows only after the first."""
    with pytest.raises(PlanError) as caught:
        pool.run(4, shard_rows, "data=2 ring=2", 3, 3)
    tokens, rows = caught.value.reasons
    assert "3 tokens" in tokens and "ring=2" in tokens and "the shortest sequence has 4" in tokens
    assert "3 sequences" in rows and "data=2" in rows
    with pytest.raises(PlanError) as caught:
        pool.run(3, shard_rows, "ulysses=3", 1, 2)
    assert "the shortest sequence has 3" in str(caught.value) and len(caught.value.reasons) == 1


def test_an_empty_batch_is_refused(pool: Pool) -> None:
    """Catches a batch without rows that runs to a loss of nothing."""
    with pytest.raises(SeqloomError):
        pool.run(2, shard_rows, "ring=2", 0, 16)


@pytest.mark.parametrize("rule", [lambda q, k: None, lambda q, k: torch.ones(5), lambda q, k: q > 3 and k > 3])
def test_rules_that_say_nothing(rule: Callable[[Any, Any], Any]) -> None:
    """Catches a rule that fails far from here, in the first layer, in torch's words."""
    batch = Batch.from_tokens(torch.zeros(1, 12, dtype=torch.int64), rule=Mask(allowed=rule))
    with pytest.raises(DataError, match="elementwise operators"):
        shard_batch(batch, Fabric.build(Plan()))
