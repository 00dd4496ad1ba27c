"""Nothing of one call is left for the next: shapes, masks, plans and models come in turn, each exact.

Systems that keep document bounds, head counts or buffers in a class or a module go wrong here: a
batch of another shape with as many tokens meets the bounds of the one before, and a second model
meets the first one's plan.
"""

from dataclasses import replace

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from model.dense import batch_of, build, dense_loss, gradients
from model.test_parity import compare, split
from pool import Pool
from seqloom.fabric import Fabric, all_reduce_
from seqloom.geometry import Mask
from seqloom.model import Float64Islands, parallelize, sum_gradients, token_loss
from seqloom.plan import Plan
from seqloom.sequence import Batch, shard_batch

PLANS = ("ring=3", "ring=2 ulysses=2 exchange=gather", "ring=2 ulysses=2 exchange=needed layout=balanced")


def expected_of(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = dense_loss(model, batch)
    loss.backward()
    return loss.detach(), gradients(model)


def in_turn(family: str, text: str, batches: list[Batch]) -> int:
    """Each batch on one model, one after the other and the first once more; how many gradients were compared."""
    fabric = Fabric.build(Plan.parse(text))
    compared = 0
    with Float64Islands():
        dense, model = build(family), parallelize(build(family), fabric)
        expected = [expected_of(dense, batch) for batch in batches]
        for i in (*range(len(batches)), 0):
            model.zero_grad()
            compared += compare(split(model, batches[i], fabric), *expected[i], fabric.world.size)
    fabric.close()
    return compared


@pytest.mark.parametrize(("family", "text"), list(zip(("llama", "gemma2", "bloom"), PLANS, strict=True)))
def test_other_shapes_of_as_many_tokens(pool: Pool, text: str, family: str) -> None:
    """Catches bounds or positions kept by the number of tokens: 1 x 64, 2 x 32, 4 x 16, packed and whole."""
    packed = [[[9, 55]], [[32], [3, 29]], [[16], [1, 15], [7, 9], [16]]]
    shapes = [(1, 64), (2, 32), (4, 16)]
    batches = [
        batch_of(rows, documents, tokens)
        for (rows, tokens), bounds in zip(shapes, packed, strict=True)
        for documents in (bounds, None)
    ]
    assert all(pool.run(Plan.parse(text).world_size, in_turn, family, text, batches))


@pytest.mark.parametrize(("family", "text"), list(zip(("bloom", "llama", "gemma2"), PLANS, strict=True)))
def test_other_bounds_and_windows(pool: Pool, text: str, family: str) -> None:
    """Catches tiles, masks or exchange tables of the batch before, which has the same tokens in other documents."""
    rules = [
        (None, Mask()),
        ([[7, 41]], Mask()),
        ([[41, 7]], Mask()),
        ([[7, 41]], Mask(window=5)),
        ([[7, 41]], Mask(window=6)),
        ([[7, 41]], Mask(causal=False)),
        ([[7, 41]], Mask(prefix=3)),
    ]
    batches = [batch_of(1, documents, rule=rule) for documents, rule in rules]
    assert all(pool.run(Plan.parse(text).world_size, in_turn, family, text, batches))


def another_window() -> int:
    """One shard in layers of other windows, and two models of other windows on one batch."""
    fabric = Fabric.build(Plan(ring=2))
    batch = batch_of(2)
    compared = 0
    with Float64Islands():
        shared = shard_batch(batch, fabric)
        for window in (11, 48, 3, 11):
            dense, model = (build("mistral", sliding_window=window) for _ in range(2))
            loss = token_loss(parallelize(model, fabric), *shared)
            loss.backward()
            sum_gradients(model, fabric)
            found = all_reduce_(loss.detach(), fabric.world), gradients(model)
            compared += compare(found, *expected_of(dense, batch), 2)
    fabric.close()
    return compared


def test_one_shard_under_other_windows(pool: Pool) -> None:
    """Catches work kept in the shard for the first window that asked."""
    assert all(pool.run(2, another_window))


def interleaved(one: str, other: str) -> int:
    """Two models under two plans in one process: forward, forward, backward, backward, and again the other way."""
    fabrics = [Fabric.build(Plan.parse(text)) for text in (one, other)]
    batches = [batch_of(2, [[48], [5, 43]]), batch_of(2, None, 32, rule=Mask(window=9))]
    compared = 0
    with Float64Islands():
        dense = [build("llama"), build("bloom", n_head=6, hidden_size=48)]
        models = [build("llama"), build("bloom", n_head=6, hidden_size=48)]
        for model, fabric in zip(models, fabrics, strict=True):
            parallelize(model, fabric)
        for turn in ((0, 1), (1, 0)):
            shares = {}
            for i in turn:
                models[i].zero_grad()
                shares[i] = token_loss(models[i], *shard_batch(batches[i], fabrics[i]))
            for i in turn:
                shares[i].backward()
            for i in turn:
                sum_gradients(models[i], fabrics[i])
                found = all_reduce_(shares[i].detach(), fabrics[i].world), gradients(models[i])
                compared += compare(found, *expected_of(dense[i], batches[i]), fabrics[i].world.size)
            batches = [replace(batch, rule=Mask(causal=False)) for batch in batches]
    for fabric in fabrics:
        fabric.close()
    return compared


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ring=4", "ulysses=4"),
        ("ring=4 inner_ring=2", "data=2 ring=2 exchange=needed layout=balanced"),
        ("ring=2 ulysses=2", "ring=2 ulysses=2"),
    ],
)
def test_two_models_two_plans(pool: Pool, one: str, other: str) -> None:
    """Catches a plan, a head count or groups kept for the process: one model would take the other's."""
    assert all(pool.run(4, interleaved, one, other))


def plans_in_turn(texts: tuple[str, ...]) -> int:
    """One model after the other, each split under a plan of its own."""
    batch, compared = batch_of(2, [[48], [5, 43]]), 0
    with Float64Islands():
        dense = build("bloom")
        for text in texts:
            fabric = Fabric.build(Plan.parse(text))
            found = split(parallelize(build("bloom"), fabric), batch, fabric)
            compared += compare(found, *expected_of(dense, batch), fabric.world.size)
            fabric.close()
    return compared


def test_plans_in_turn(pool: Pool) -> None:
    """Catches what one plan leaves to the next: forwards of BLOOM's class, or groups that outlive their fabric."""
    texts = ("ring=2 ulysses=2", "data=2 ulysses=2", "ulysses=4", "ring=4 layout=striped exchange=rsa")
    assert all(pool.run(4, plans_in_turn, texts))
