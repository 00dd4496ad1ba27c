"""The chunked loss with the vocabulary, and on 3d the hidden dim, split over ranks, against torch's own."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from close import assert_close
from memory.test_loss import HIDDEN, TOKENS, Largest
from pool import Pool
from seqloom.fabric import Fabric
from seqloom.memory import chunked_cross_entropy
from seqloom.plan import Plan, chunks

SPLITS = [(2, 50), (3, 97), (4, 50), (4, 5)]
"""Ranks and vocabulary: 97 rows over 3 ranks are 33, 33 and 31; 5 over 4 are 2, 2, 1 and none."""


def whole_inputs(vocab: int, width: int = HIDDEN) -> tuple[list[Tensor], Tensor]:
    """hidden, weight, bias and labels of two rows, some of them none; alike on all ranks."""
    draw = torch.Generator().manual_seed(vocab)
    shapes = [(2, TOKENS, width), (vocab, width), (vocab,)]
    leaves = [torch.randn(shape, dtype=torch.float64, generator=draw) for shape in shapes]
    labels = torch.randint(vocab, (2, TOKENS), generator=draw)
    labels[0, [0, 3, TOKENS - 1]] = -100
    labels[1, 20:30] = -100
    return leaves, labels


def dense(
    vocab: int, softcap: float | None, bias: bool, width: int = HIDDEN, embedded: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """torch's loss on one device, three times, and its gradients."""
    leaves, labels = whole_inputs(vocab, width)
    leaves = [one.requires_grad_() for one in leaves]
    logits = linear(leaves[0], leaves[1], leaves[2] if bias else None).flatten(0, 1)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    loss = 3 * cross_entropy(logits, labels.flatten(), reduction="sum")
    (loss + (leaves[1] ** 2).sum() if embedded else loss).backward()
    return loss.detach(), [one.grad for one in leaves if one.grad is not None]


def over_the_vocabulary(vocab: int, chunk: int, softcap: float | None, bias: bool) -> dict[str, Any]:
    """Loss share, gradients and largest tensor of one rank; the weight has a second use, as when it is tied."""
    fabric = Fabric.build(Plan(tensor=torch.distributed.get_world_size()))
    axis = fabric.tensor
    (hidden, weight, offset), labels = whole_inputs(vocab)
    sizes = chunks(vocab, axis.size)
    mine = [one.split(list(sizes))[axis.rank].clone().requires_grad_() for one in (weight, offset)]
    hidden = hidden.requires_grad_()
    with Largest() as made:
        loss = 3 * chunked_cross_entropy(
            hidden,
            mine[0],
            mine[1] if bias else None,
            labels,
            chunk_tokens=chunk,
            softcap=softcap,
            vocabulary=axis,
            first=sum(sizes[: axis.rank]),
        )
        sent = fabric.meter.sent
        (loss + mine[0].square().sum()).backward()
    assert fabric.meter.sent == sent  # nothing travels in backward
    return {
        "loss": loss.detach(),
        "hidden": hidden.grad,
        "weight": mine[0].grad,
        "bias": mine[1].grad,
        "largest": max(made.numel),
        "sent": sent,
    }


@pytest.mark.parametrize(("softcap", "bias"), [(None, False), (2.0, True)])
@pytest.mark.parametrize("chunk", [1, 10, 74, 75])
@pytest.mark.parametrize(("world", "vocab"), SPLITS)
def test_a_split_vocabulary(pool: Pool, world: int, vocab: int, chunk: int, softcap: float | None, bias: bool) -> None:
    """Catches a softmax over a part, a label looked for on every rank, gradients P times too large or too small."""
    found = pool.run(world, over_the_vocabulary, vocab, chunk, softcap, bias)
    loss, grads = dense(vocab, softcap, bias, embedded=True)
    assert_close(sum(rank["loss"] for rank in found), loss, tolerance=1e-12, ranks=world)
    assert all(torch.equal(rank["loss"], found[0]["loss"]) for rank in found)
    assert_close(sum(rank["hidden"] for rank in found), grads[0], tolerance=1e-12, ranks=world)
    assert_close(torch.cat([rank["weight"] for rank in found]), grads[1], tolerance=1e-12, ranks=world)
    if bias:
        assert_close(torch.cat([rank["bias"] for rank in found]), grads[2], tolerance=1e-12, ranks=world)
    # Two numbers a token to each of the others.
    assert [rank["sent"] for rank in found] == [{"tensor": (world - 1) * 2 * 2 * TOKENS * 8}] * world


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logits_of_one_chunk_and_one_part_only(pool: Pool, softcap: float | None) -> None:
    """Catches logits of more tokens than a chunk, or of the whole vocabulary, on any rank."""
    found = pool.run(2, over_the_vocabulary, 400, 20, softcap, True)
    # The head's part has 1,600 elements, the logits of all tokens 14,800, those of a chunk in full 8,000.
    assert [rank["largest"] for rank in found] == [20 * 200] * 2


def over_tokens_too(grid: str, held: tuple[int, ...], chunk: int, softcap: float | None, bias: bool) -> dict[str, Any]:
    """The loss on a grid of `row`, which splits tokens and the hidden dim, and `col`, which splits the vocabulary."""
    rows, cols = map(int, grid.split("x"))
    fabric = Fabric.build(Plan(tensor=rows * cols, tensor_kind="2d", grid=grid))
    row, col = fabric.grid["row"], fabric.grid["col"]
    (hidden, weight, offset), labels = whole_inputs(97, 7)
    rows_here = chunks(97, cols)
    first = sum(rows_here[: col.rank])
    hidden = hidden.split(list(chunks(7, rows)), -1)[row.rank].clone().requires_grad_()
    weight = weight[first : first + rows_here[col.rank]].split(list(chunks(7, rows)), -1)[row.rank]
    weight, offset = (x.clone().requires_grad_() for x in (weight, offset[first : first + rows_here[col.rank]]))
    with Largest() as made:
        loss = 3 * chunked_cross_entropy(
            hidden,
            weight,
            offset if bias else None,
            labels.split(list(held), 1)[row.rank],
            chunk_tokens=chunk,
            softcap=softcap,
            vocabulary=col,
            first=first,
            scatter=(row, held),
        )
        loss.backward()
    grads = {"hidden": hidden.grad, "weight": weight.grad, "bias": offset.grad}
    return {"loss": loss.detach(), "largest": max(made.numel), "sent": fabric.meter.sent, **grads}


@pytest.mark.parametrize(("softcap", "bias"), [(None, False), (2.0, True)])
@pytest.mark.parametrize("chunk", [1, 12, 1000])
@pytest.mark.parametrize(
    ("grid", "held"),
    [("2x2", (20, 17)), ("2x2", (37, 0)), ("3x2", (0, 36, 1)), ("2x3", (18, 19)), ("4x1", (1, 2, 4, 30))],
)
def test_logits_summed_over_an_axis(
    pool: Pool, grid: str, held: tuple[int, ...], chunk: int, softcap: float | None, bias: bool
) -> None:
    """Catches tokens of a batch's rows mixed up between ranks, a bias added by each, chunks that ranks number apart."""
    rows, cols = map(int, grid.split("x"))
    found = pool.run(rows * cols, over_tokens_too, grid, held, chunk, softcap, bias)
    at = [found[first : first + cols] for first in range(0, rows * cols, cols)]
    loss, grads = dense(97, softcap, bias, 7)
    world = rows * cols

    def joined(name: str) -> list[Any]:
        """By row, that of its columns joined: summed where it is of the hidden states."""
        if name == "hidden":
            return [sum(rank[name] for rank in one) for one in at]
        return [torch.cat([rank[name] for rank in one]) for one in at]

    assert_close(sum(rank["loss"] for rank in found), loss, tolerance=1e-12, ranks=world)
    assert_close(torch.cat(joined("hidden"), -1), grads[0], tolerance=1e-12, ranks=world)
    assert_close(torch.cat(joined("weight"), -1), grads[1], tolerance=1e-12, ranks=world)
    if bias:
        assert_close(sum(joined("bias")), grads[2], tolerance=1e-12, ranks=world)
    if chunk == 12:  # logits of the chunk's tokens, split in those of this rank and of others
        part = -(-97 // cols)
        assert max(rank["largest"] for rank in found) <= max(12 * part, 2 * TOKENS * 7, 97 * 7)


def in_bfloat16() -> tuple[Tensor, Tensor, torch.dtype]:
    axis = Fabric.build(Plan(tensor=2)).tensor
    (hidden, weight, _), labels = whole_inputs(50)
    hidden, mine = (x.bfloat16().requires_grad_() for x in (hidden, weight.chunk(2)[axis.rank]))
    loss = chunked_cross_entropy(hidden, mine, None, labels, chunk_tokens=9, vocabulary=axis, first=25 * axis.rank)
    loss.backward()
    return loss.detach(), mine.grad, hidden.grad.dtype


def test_a_split_vocabulary_in_lower_types(pool: Pool) -> None:
    """Catches a log-sum-exp that travels in bfloat16."""
    found = pool.run(2, in_bfloat16)
    (hidden, weight, _), labels = whole_inputs(50)
    leaves = [x.bfloat16().double().requires_grad_() for x in (hidden, weight)]
    loss = cross_entropy(linear(*leaves).flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    assert all(rank[0].dtype == torch.float32 and rank[2] == torch.bfloat16 for rank in found)
    assert_close(found[0][0] + found[1][0], loss, tolerance=1e-3)
    assert_close(torch.cat([found[0][1], found[1][1]]), leaves[1].grad, tolerance=1e-2)


def with_a_strange_label() -> Tensor:
    axis = Fabric.build(Plan(tensor=2)).tensor
    (hidden, weight, _), labels = whole_inputs(50)
    labels[0, 5] = 50
    return chunked_cross_entropy(
        hidden, weight.chunk(2)[axis.rank], None, labels, chunk_tokens=9, vocabulary=axis, first=25 * axis.rank
    )


def test_a_label_beyond_the_vocabulary_is_no_number(pool: Pool) -> None:
    """Catches a label that no rank holds taken for one of logit 0: one device refuses it, here the loss is infinite."""
    assert all(torch.isposinf(loss) for loss in pool.run(2, with_a_strange_label))
    (hidden, weight, _), labels = whole_inputs(50)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        chunked_cross_entropy(hidden, weight, None, labels + 50, chunk_tokens=9)


def test_a_sketch_has_the_shapes() -> None:
    """Catches a collective on the meta device."""
    fabric = Fabric.sketch(Plan(tensor=8, tensor_kind="3d"), rank=3)
    hidden, weight, bias = (torch.empty(s, device="meta", requires_grad=True) for s in ((2, 7, 4), (10, 4), (10,)))
    loss = chunked_cross_entropy(
        hidden,
        weight,
        bias,
        torch.empty(2, 4, device="meta", dtype=torch.int64),
        chunk_tokens=4,
        vocabulary=fabric.grid["input"],
        first=10,
        scatter=(fabric.grid["output"], (4, 3)),
    )
    loss.backward()
    assert loss.shape == () and all(x.grad.shape == x.shape for x in (hidden, weight, bias))
