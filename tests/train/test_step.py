"""One optimizer step: the same loss, gradients and norm under every plan, and what clipping does to them."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from pool import Pool
from seqloom.errors import ConfigError, NumericsError
from seqloom.fabric import Fabric
from seqloom.model import Float64Islands, build_model, count_copies, main_gradients, parallelize, whole_tensors
from seqloom.plan import Plan, Side, read_config
from seqloom.sequence import NO_LABEL, Batch
from seqloom.tensor import TensorGroup, split
from seqloom.train import StepReport, apply_gradients, compute_gradients, computing, step
from seqloom.train.step import gradient_norm

ROWS, TOKENS = 12, 24
LABELS = [1, 2, 3, 5, 8, 23, 0, 0, 4, 0, 0, 0]
"""Labels of each row, from its start: few at first, then many, and none at all for the last ranks of data."""

Result = tuple[float, float, int, dict[str, Tensor]]


def whole_batch() -> Batch:
    """Rows with few labels or none; two documents in the long one."""
    torch.manual_seed(5)
    tokens = torch.randint(0, 64, (ROWS, TOKENS))
    documents = [[TOKENS]] * 5 + [[10, 14]] + [[TOKENS]] * 6
    batch = Batch.from_tokens(tokens, documents)
    beyond = torch.arange(TOKENS) >= torch.tensor(LABELS)[:, None]
    return replace(batch, labels=batch.labels.masked_fill(beyond, NO_LABEL))


def cut(batch: Batch, parts: int) -> list[Batch]:
    """Micro-batches of equally many rows."""
    rows = len(batch.tokens) // parts
    pieces = [slice(first, first + rows) for first in range(0, len(batch.tokens), rows)]
    assert batch.documents is not None
    return [Batch(batch.tokens[piece], batch.labels[piece], batch.documents[piece]) for piece in pieces]


def model_of(dtype: torch.dtype) -> PreTrainedModel:
    return build_model(read_config("llama"), dtype=dtype, seed=3)


def one_device() -> Result:
    """transformers alone, document by document with its own causal attention: no seqloom attention, shard or loss."""
    batch, losses = whole_batch(), []
    with Float64Islands():
        model = model_of(torch.float64)
        model.set_attn_implementation("eager")
        for row, lengths in enumerate(batch.documents or ()):
            for tokens, labels in zip(batch.tokens[row].split(lengths), batch.labels[row].split(lengths), strict=True):
                logits = model(input_ids=tokens[None], use_cache=False).logits[0]
                losses.append(cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum"))
        count = sum(LABELS) - 1  # the end of the first document in the long row predicts nothing
        loss = torch.stack(losses).sum() / count
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    return loss.item(), norm.item(), count, gradients


def step_under(plan: Plan, accumulate: int, chunk: int) -> Result:
    """The same through seqloom, on one rank of many."""
    with Float64Islands():
        fabric = Fabric.build(plan)
        model = parallelize(model_of(torch.float64), fabric)
        for _ in range(2):  # gradients of the first call must not stay in those of the second
            report = compute_gradients(
                model, cut(whole_batch(), accumulate), fabric, precision="float32", chunk_tokens=chunk
            )
    return report.loss, report.gradient_norm, report.label_count, whole_tensors(model, fabric, "gradient")


@pytest.fixture(scope="module")
def expected() -> Result:
    return one_device()


@pytest.mark.parametrize(
    ("text", "accumulate", "chunk"),
    [
        ("data=1", 1, 1024),
        ("data=1", 4, 5),
        ("data=2", 1, 7),
        ("data=2", 3, 1024),
        ("ring=2", 2, 3),
        ("data=3", 2, 1024),
        ("ring=3", 3, 1024),
        ("data=4", 1, 1024),
        ("data=4", 3, 2),
        ("data=2 ring=2", 2, 1024),
        ("ring=2 ulysses=2", 4, 1024),
        ("data=2 ulysses=2", 1, 9),
        ("tensor=2", 2, 5),
        ("data=2 tensor=2 sequence_parallel=false", 3, 1024),
        ("tensor=4 tensor_kind=2d", 1, 7),
        ("ring=2 tensor=4 tensor_kind=3d grid=2x2x1", 3, 1024),
    ],
)
def test_one_objective(pool: Pool, expected: Result, text: str, accumulate: int, chunk: int) -> None:
    """Catches means of means: a gradient that weighs ranks or micro-batches alike whatever labels they have, one
    divided by the ranks, NaN from a rank without labels, and gradients left over from the step before."""
    plan = Plan.parse(text)
    loss, norm, count, gradients = expected
    assert count == 45 and norm > 1e-2
    for found in pool.run(plan.world_size, step_under, plan, accumulate, chunk):
        assert found[2] == count
        assert found[:2] == pytest.approx((loss, norm), rel=1e-10)
        assert found[3].keys() == gradients.keys()
        for name, gradient in gradients.items():
            difference = (found[3][name] - gradient).norm() / gradient.norm()
            assert difference < 1e-9, name


def test_ranks_without_labels_are_there() -> None:
    """Catches a change of the cases above after which every rank has labels again."""
    counts = [int((piece.labels != NO_LABEL).sum()) for piece in cut(whole_batch(), 4)]
    assert counts == [6, 35, 4, 0]
    halves = [int((whole_batch().labels[:, part] != NO_LABEL).sum()) for part in (slice(0, 12), slice(12, 24))]
    assert halves == [34, 11]


def flat(model: PreTrainedModel, fabric: Fabric, kind: Any) -> Tensor:
    return torch.cat([tensor.flatten().clone() for tensor in whole_tensors(model, fabric, kind).values()])


def clipped_step(plan: Plan, share: float | None, main: bool = False) -> tuple[float, float, float]:
    """How far a step of rate 1 moves the weights, its direction against the gradient, and the gradient's norm."""
    fabric = Fabric.build(plan)
    model = parallelize(model_of(torch.float64), fabric)
    if main:
        main_gradients(model)
    before = flat(model, fabric, "parameter")
    for _ in range(2):  # main gradients of the first call must not stay in those of the second
        report = compute_gradients(model, cut(whole_batch(), 2), fabric, precision="float32", chunk_tokens=64)
    gradient = flat(model, fabric, "gradient")
    clip = None if share is None else share * report.gradient_norm
    apply_gradients(model, torch.optim.SGD(model.parameters(), lr=1.0), report, clip=clip)
    moved = before - flat(model, fabric, "parameter")
    aligned = torch.dot(moved, gradient) / moved.norm() / gradient.norm()
    assert report.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-6)
    return moved.norm().item(), aligned.item(), report.gradient_norm


@pytest.mark.parametrize(("share", "moves"), [(None, 1.0), (0.25, 0.25), (4.0, 1.0)])
def test_clip(pool: Pool, share: float | None, moves: float) -> None:
    """Catches a clip to the norm of one rank or of its part, one that scales small gradients up, one that turns them,
    and main gradients that are clipped or stepped with in part."""
    for text, main in (("data=1", False), ("data=3", True), ("tensor=2", False), ("tensor=4 tensor_kind=2d", True)):
        plan = Plan.parse(text)
        for moved, aligned, norm in pool.run(plan.world_size, clipped_step, plan, share, main):
            assert moved == pytest.approx(moves * norm, rel=1e-4)
            assert aligned == pytest.approx(1.0, abs=1e-12)


def norm_of(text: str, shards: dict[str, int | None]) -> tuple[float, float]:
    """The norm of gradients split, replicated and plain, and of the same whole; pieces smaller than they are."""
    fabric = Fabric.build(Plan.parse(text))
    group, model, squares = TensorGroup.of(fabric), nn.ParameterDict(), 0.0
    torch.manual_seed(2)
    for number, (shape, held) in enumerate([((7, 5), shards), ((11,), {}), ((1, 1), shards), ((3,), None)]):
        whole = nn.Parameter(torch.randn(shape))
        model[str(number)] = whole if held is None else split(whole, group, held, Side((), None))
        model[str(number)].grad = model[str(number)].detach().clone()
        squares += float(whole.detach().double().square().sum())
    count_copies(model, fabric)
    with patch.object(step, "PIECE", 4):
        return gradient_norm(model, fabric), squares**0.5


@pytest.mark.parametrize(
    ("text", "shards"),
    [
        ("data=1", {}),
        ("data=2 tensor=3", {"tensor": 0}),
        ("tensor=6 tensor_kind=2d grid=3x2", {"row": 1, "col": 0}),
        ("tensor=8 tensor_kind=2.5d depth=2", {"row": 0, "col": 1}),
        ("tensor=8 tensor_kind=3d", {"output": 1, "input": 0, "weight": 0}),
    ],
)
def test_the_norm_counts_each_element_once(pool: Pool, text: str, shards: dict[str, int | None]) -> None:
    """Catches a replicated gradient counted once a rank, a split one counted on one rank alone, and the 48 for 28 that
    ranks which hold no element of a small parameter have made of it elsewhere."""
    for found, expected in pool.run(Plan.parse(text).world_size, norm_of, text, shards):
        assert found == pytest.approx(expected, rel=1e-7)


def precise_step(plan: Plan, precision: str) -> tuple[float, Tensor, set[torch.dtype]]:
    fabric = Fabric.build(plan)
    model = parallelize(model_of(torch.float32), fabric)
    report = compute_gradients(model, cut(whole_batch(), 2), fabric, precision=precision, chunk_tokens=16)
    dtypes = {x.dtype for p in model.parameters() for x in (p, p.grad) if x is not None}
    return report.loss, flat(model, fabric, "gradient"), dtypes


def test_bf16(pool: Pool) -> None:
    """Catches bf16 that is accepted and ignored, that turns the weights themselves to bf16, or that loses the sum
    over ranks: a split run must lie as near the float32 one as one device does."""
    [(exact, gradient, _)] = pool.run(1, precise_step, Plan(), "float32")
    for plan in (Plan(), Plan(data=2), Plan(ring=2, ulysses=2), Plan(tensor=2), Plan(tensor=4, tensor_kind="2d")):
        for loss, found, dtypes in pool.run(plan.world_size, precise_step, plan, "bf16"):
            assert dtypes == {torch.float32}
            assert loss != exact and loss == pytest.approx(exact, rel=5e-3)
            # bf16 keeps 8 bits: each product is off by up to 2^-9, and layers add up.
            assert 1e-4 < (found - gradient).norm() / gradient.norm() < 5e-2


@pytest.mark.parametrize("loss, norm", [(float("nan"), 1.0), (1.0, float("inf"))])
def test_nothing_moves_where_numbers_are_not_finite(loss: float, norm: float) -> None:
    """Catches a step on NaN, after which every weight and, soon, every kept checkpoint is NaN."""
    model = model_of(torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(NumericsError, match="no step was taken"):
        apply_gradients(model, optimizer, StepReport(loss, norm, 1), clip=1.0)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_an_unknown_precision_is_refused() -> None:
    """Catches 'bfloat16' read as float32 in silence."""
    with pytest.raises(ConfigError, match="float32, float64, bf16"):
        computing("bfloat16", torch.device("cpu"))


def dropping(plan: Plan, accumulate: int, p: float, first_row: int = 0) -> tuple[float, Tensor]:
    """Loss and all gradients with attention dropout p, the rows of the batch in micro-batches."""
    with Float64Islands():
        fabric = Fabric.build(plan)
        settings = {**read_config("llama"), "attention_dropout": p}
        model = parallelize(build_model(settings, dtype=torch.float64, seed=3), fabric)
        pieces = cut(whole_batch(), accumulate)
        rows = len(pieces[0].tokens)
        batches = [replace(piece, first_row=first_row + i * rows, seed=9) for i, piece in enumerate(pieces)]
        report = compute_gradients(model, batches, fabric, precision="float64", chunk_tokens=64)
    return report.loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_dropout_does_not_depend_on_the_plan(pool: Pool) -> None:
    """Catches coins drawn by rank, by micro-batch or by tile: another plan would train on other dropped weights."""
    loss, gradient = pool.run(1, dropping, Plan(), 1, 0.3)[0]
    for text, accumulate in [("ring=2", 1), ("data=2", 3), ("ring=2 ulysses=2", 2), ("ulysses=3", 1)]:
        plan = Plan.parse(text)
        for found, its_gradient in pool.run(plan.world_size, dropping, plan, accumulate, 0.3):
            assert found == pytest.approx(loss, rel=1e-10)
            assert (its_gradient - gradient).norm() / gradient.norm() < 1e-9, text
    without, other = pool.run(1, dropping, Plan(), 1, 0.0)[0], pool.run(1, dropping, Plan(), 1, 0.3, 12)[0]
    for elsewhere in (without, other):  # dropout does something, and another step drops other weights
        assert (elsewhere[1] - gradient).norm() / gradient.norm() > 1e-3
